"""Load, write and hash policy folders.

A policy folder has config.json, generation_config.json, safetensors, tokenizer files and chat_template.jinja,
without local paths. Weights are read only from safetensors, never from a pickle; remote code is never run.

torch and transformers are imported only in the functions that need them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from sera_core.artifacts.canonical import files_digest, sha256_file
from sera_core.config import Dtype, Precision
from sera_core.data.file_checks import placeholder_problem, refuse_special
from sera_core.errors import InputError, SeraError
from sera_core.guards.shown import one_line
from sera_core.models.four_bits import four_bits, refuse_missing_bitsandbytes
from sera_core.models.weights import (
    refuse_mismatched_tensors,
    refuse_mismatched_weights,
    refuse_not_finite,
    refuse_oversized,
    wrapper_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
CONFIG_FILES = ("config.json", "generation_config.json")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_WEIGHTS_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*\.safetensors")
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")


def load_policy(
    folder: Path | str,
    dtype: Precision = "float32",
    device: str = "cpu",
    base: Path | str | None = None,
) -> PreTrainedModel:
    """Load a policy folder as a model in eval mode.

    Args:
        folder: a policy folder, or an adapter folder (adapter_config.json), which needs `base`.
        dtype: dtype of the weights in memory. `nf4` rounds all linear layers but the output to four bits (in
            blocks of 64, arXiv 2305.14314), which are multiplied in bfloat16.
        device: device of the model.
        base: the adapter's base policy folder. In float32 the adapter is merged into it. Else it stays beside
            it in float32, as it was trained: rounding would swallow most of a merged adapter.

    Raises:
        InputError: no policy folder, an adapter without its base, weights that do not fit config.json or are
            not finite, or settings that nothing can be computed with.
    """
    import torch
    from transformers import AutoModelForCausalLM

    refuse_missing_bitsandbytes(dtype)
    folder = Path(folder)
    adapter = (folder / "adapter_config.json").is_file()
    weights = Path(base) if adapter and base is not None else folder
    if adapter and base is None:
        raise InputError(
            f"policy folder {folder} contains an adapter: give the policy folder of its base as `base`."
        )
    if not (weights / "config.json").is_file():
        raise InputError(
            f"policy folder {weights} has no config.json: it is incomplete or not a policy folder."
        )
    _refuse_code(weights)
    _refuse_code(folder)
    refuse_other_weights(weights)
    if prefix := wrapper_of(weights):
        raise InputError(
            f"policy folder {weights}: all tensor names begin with {prefix!r}, added by a wrapper: "
            "save the unwrapped model, or use the folder as a run's model.source, which removes the prefix"
        )
    refuse_oversized(weights, read_settings(weights / "config.json"))
    with quiet_transformers(), _refusing(weights):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            weights,
            dtype=torch.bfloat16 if dtype == "nf4" else getattr(torch, dtype),
            quantization_config=four_bits() if dtype == "nf4" else None,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, with the shapes in the message
            output_loading_info=True,
            device_map={"": device} if dtype == "nf4" or device == "meta" else None,
        )
        model: Any
        model, loading = loaded
        refuse_mismatched_weights(weights, loading)
        if adapter:
            from peft import PeftModel, get_peft_model_state_dict

            model = PeftModel.from_pretrained(model, str(folder))
            refuse_mismatched_tensors(folder / "adapter_model.safetensors", get_peft_model_state_dict(model))
            model = model.merge_and_unload() if dtype == "float32" else model.get_base_model()
    model = model.eval() if dtype == "nf4" else model.to(device=device).eval()
    if device != "meta":
        refuse_not_finite(weights, model)
        with quiet_transformers(), _refusing(weights), torch.no_grad():
            model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device))
    return model


@contextmanager
def _refusing(folder: Path) -> Iterator[None]:
    """A folder that the libraries cannot open, or compute with: each of them raises classes of its own."""
    import torch

    try:
        yield
    except (SeraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"policy folder {folder} cannot be opened as a model: its config.json, generation_config.json or "
            f"weights are damaged, or of an architecture that this version of transformers does not have "
            f"({one_line(error)}): save the model again"
        ) from error


def load_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a policy folder.

    Raises:
        InputError: transformers cannot load a tokenizer from its files.
    """
    from transformers import AutoTokenizer

    _refuse_code(Path(folder))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            Path(folder), local_files_only=True, trust_remote_code=False
        )
        ids = tokenizer("a b", add_special_tokens=False)["input_ids"]  # some settings fail only in use
        tokenizer.decode([*ids, *tokenizer.all_special_ids])
    except Exception as error:  # the tokenizers library raises bare Exceptions for a file it cannot read
        raise InputError(
            f"cannot load the tokenizer in {folder}: {one_line(error)}. Save the model's tokenizer into that "
            "folder again."
        ) from error
    return tokenizer


def save_policy(
    model: Any,
    tokenizer_source_folder: Path | str,
    folder: Path | str,
    dtype: Dtype = "float32",
    weights: dict[str, Any] | None = None,
) -> Path:
    """Write a trained policy as a policy folder; the same weights give the same bytes.

    Weights come from the model, everything else from the start policy's folder: configs (with its original
    `use_cache`), tokenizer files, chat template. A PEFT model is written as an adapter, without the base's
    weights.

    Args:
        model: a transformers model or a PEFT model.
        tokenizer_source_folder: the policy folder that training started from.
        folder: output folder.
        dtype: dtype of the weights on disk.
        weights: the weights by their names, of a model that does not hold them whole; None: the model's own.
    """
    import torch

    start, folder = Path(tokenizer_source_folder), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        _save_adapter(model, folder, weights)
    else:
        state = _cast(model.state_dict() if weights is None else weights, getattr(torch, dtype))
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=state)
        write_settings(folder / "config.json", read_settings(start / "config.json") | {"dtype": dtype})
        (folder / "generation_config.json").unlink(missing_ok=True)
        _copy_present(start, folder, ("generation_config.json",))
    _copy_present(start, folder, TOKENIZER_FILES)
    return folder


def _cast(state: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The state dict in another dtype; tied weights stay one tensor and are written once."""
    cast: dict[Any, Any] = {}
    for tensor in state.values():
        key, target = (tensor.data_ptr(), tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype
        if key not in cast:
            cast[key] = tensor.detach().to(target)
    return {name: cast[tensor.data_ptr(), tensor.shape] for name, tensor in state.items()}


def _save_adapter(model: Any, folder: Path, weights: dict[str, Any] | None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, without the base's path and a model card."""
    model.save_pretrained(folder, save_embedding_layers=False, state_dict=weights)
    (folder / "README.md").unlink(missing_ok=True)
    config = read_settings(folder / "adapter_config.json")
    config["base_model_name_or_path"] = None
    for key, value in config.items():
        if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
            config[key] = sorted(value)  # PEFT keeps target_modules as a set, whose order varies by process
    write_settings(folder / "adapter_config.json", config)


def _copy_present(origin: Path, folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (origin / name).is_file():
            shutil.copyfile(origin / name, folder / name)


def quiet_transformers() -> Any:
    """Hide transformers' progress bars and load reports inside the block."""
    from transformers.utils import logging

    @contextmanager
    def quiet() -> Iterator[None]:
        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()

    return quiet()


def weights_digest(folder: Path | str) -> str:
    """Digest of a policy folder's weights (safetensors and their index), computed like a step digest.

    Raises:
        InputError: the folder has no safetensors.
    """
    folder = Path(folder)
    names = [name for name in policy_files(folder) if ".safetensors" in name]
    if not names:
        raise InputError(
            f"policy folder {folder} has no *.safetensors file: it is incomplete or not a policy folder."
        )
    return files_digest({name: sha256_file(folder / name) for name in names})


def policy_files(folder: Path | str) -> list[str]:
    """Sorted names of the policy files in a folder; other files are ignored.

    Raises:
        InputError: one is a pipe or a device.
    """
    folder = Path(folder)
    known = [entry for entry in folder.iterdir() if matters(entry.name)]
    return sorted(entry.name for entry in known if refuse_special(entry).is_file())


def matters(name: str) -> bool:
    """Whether a file of this name belongs to a policy."""
    known = name in CONFIG_FILES or name in TOKENIZER_FILES or name in ADAPTER_FILES
    return known or any(PurePosixPath(name).match(pattern) for pattern in WEIGHT_PATTERNS)


def _refuse_code(folder: Path) -> None:
    """Refuse a folder that would run code when it is loaded."""
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        if "auto_map" in read_settings(folder / name):
            raise InputError(
                f"policy folder {folder} needs code from its own repository (auto_map in {name}), which is "
                "never run here: choose a model whose architecture transformers itself has."
            )
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and not (folder / "adapter_model.safetensors").is_file():
        raise InputError(
            f"policy folder {folder} contains an adapter without adapter_model.safetensors: weights are read "
            "only from safetensors, because a pickle can run code when it is opened; save the adapter again."
        )


def refuse_other_weights(folder: Path) -> None:
    """Refuse a folder whose index or configuration refers to weights other than its own safetensors.

    transformers opens any file they refer to, even in another folder or a pickle.

    Raises:
        InputError: a name is not a plain `….safetensors`, or the file is missing; the message names it.
    """
    named = read_settings(folder / "config.json").get("transformers_weights")
    if named is not None:
        _check_weights_name(folder / "config.json", str(named).removesuffix(".index.json"))
    whole = (folder / "model.safetensors").is_file()  # then nothing reads an index beside it
    for index in sorted(folder.glob("*.safetensors.index.json")):
        shards = read_settings(index).get("weight_map")
        if not isinstance(shards, dict):
            raise InputError(f"{index}: has no weight_map: save the model again.")
        for shard in sorted({str(shard) for shard in shards.values()}):
            _check_weights_name(index, shard)
            if not whole and not (folder / shard).is_file():
                raise InputError(f"{index}: names {shard}, which is not in its folder: copy it there.")


def _check_weights_name(named_by: Path, name: str) -> None:
    if not _WEIGHTS_NAME.fullmatch(name):
        raise InputError(
            f"{named_by}: names {name!r} as weights, which is not a *.safetensors file in the same folder: "
            "weights are read only from safetensors, because a pickle can run code when it is opened. Save "
            "the model again with save_pretrained."
        )


def check_settings(folder: Path) -> None:
    """Check every JSON file of a policy.

    Raises:
        InputError: one is not a valid JSON object.
    """
    for name in policy_files(folder):
        if name.endswith(".json"):
            read_settings(folder / name)


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if the file does not exist.

    Raises:
        InputError: it is not a valid JSON object.
    """
    if not refuse_special(path).is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        if what := placeholder_problem(text.encode()):
            raise InputError(f"{path}: {what}")
        value = json.loads(text)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}): save the model again.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: not a JSON object: save the model again.")
    return value


def write_settings(path: Path, value: dict[str, Any]) -> None:
    """Write JSON with sorted keys: equal settings give equal bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
