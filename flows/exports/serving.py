"""The command that serves an exported policy: vLLM for a folder, llama.cpp's server for a GGUF file."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sera_core.artifacts.run_records import RoundManifest
from sera_core.config import SeraConfig
from sera_core.models.policies import read_settings
from tasks.engines.sampler import position_limit
from tasks.engines.vllm_sampler import lora_rank

LONGEST = 8192
"""Longest conversation served, in tokens: its keys and values take memory from the start."""


def served_name(manifest: RoundManifest) -> str:
    """The model's name at the server."""
    return f"{manifest.run}-{manifest.round}"


def vllm_command(config: SeraConfig, manifest: RoundManifest, folder: Path, place: str) -> str:
    """`vllm serve` for a policy folder, with the arithmetic and the sampling of its run.

    Args:
        folder: the policy folder, to be read.
        place: what to serve: a folder, or a repository on the hub.
    """
    return shlex.join(
        ["vllm", "serve", place, "--served-model-name", served_name(manifest), *_vllm(config, folder)]
    )


def vllm_adapter_command(
    config: SeraConfig, manifest: RoundManifest, folder: Path, base: Path, place: str
) -> str | None:
    """`vllm serve` for an adapter beside its base; None where vLLM cannot apply it so.

    Args:
        folder: the adapter's folder, to be read.
        base: the base's folder in the store, to be read.
        place: where the adapter is.
    """
    rank = lora_rank(folder)
    if rank is None or config.model.dtype == "nf4":  # such an adapter belongs to rounded weights
        return None
    settings = read_settings(folder / "adapter_config.json")
    words = ["vllm", "serve", settings["base_model_name_or_path"]]
    words += ["--revision", settings["revision"]] if settings.get("revision") else []
    words += ["--enable-lora", "--lora-modules", f"{served_name(manifest)}={place}"]
    words += ["--max-lora-rank", str(rank)]
    if (folder / "chat_template.jinja").is_file():  # the base on the hub may have another
        words += ["--chat-template", str(Path(place) / "chat_template.jinja")]
    return shlex.join([*words, *_vllm(config, base)])


def llama_command(config: SeraConfig, manifest: RoundManifest, folder: Path, file: str) -> str:
    """`llama-server` for a GGUF file, with the sampling of its run.

    Args:
        folder: the policy folder that the file was written from.
        file: the GGUF file.
    """
    sampling = config.sampling
    words = ["llama-server", "-m", file, "--alias", served_name(manifest), "--jinja"]
    words += ["--ctx-size", str(_longest(folder))]
    words += ["--temp", f"{sampling.temperature:g}", "--top-p", f"{sampling.top_p:g}", "--top-k", "0"]
    words += ["--min-p", "0"]
    return shlex.join([*words, *_template_arguments("--chat-template-kwargs", config)])


def _vllm(config: SeraConfig, folder: Path) -> list[str]:
    dtype = "float32" if config.model.dtype == "float32" else "bfloat16"
    words = ["--dtype", dtype, "--max-model-len", str(_longest(folder))]
    if changed := _own_sampling(config, folder):
        words += ["--override-generation-config", json.dumps(changed)]
    return [*words, *_template_arguments("--default-chat-template-kwargs", config)]


def _own_sampling(config: SeraConfig, folder: Path) -> dict[str, Any]:
    """The run's sampling instead of what the model's generation_config.json would set (top-k, penalties)."""
    run: Mapping[str, Any] = {
        "temperature": config.sampling.temperature,
        "top_p": config.sampling.top_p,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }
    settings = read_settings(folder / "generation_config.json")
    return {name: value for name, value in run.items() if settings.get(name) is not None}


def _template_arguments(flag: str, config: SeraConfig) -> list[str]:
    arguments = config.model.template_kwargs
    return [flag, json.dumps(dict(arguments))] if arguments else []


def _longest(folder: Path) -> int:
    return min(LONGEST, position_limit(folder) or LONGEST)
