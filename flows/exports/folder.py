"""A round's policy as a folder: all weights, or a peft adapter, with its lineage and a model card."""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows.exports.gguf import GgufReport
from flows.exports.lineage import Lineage
from flows.exports.model_card import model_card
from sera_core.artifacts.reading import Round
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.errors import InputError
from sera_core.guards.shown import shown_json

ADAPTER_LEFT_OUT = ("base.json",)
"""Files of a stored adapter that only the store reads."""


def write_weights(records: RunStore, manifest: RoundManifest, folder: Path) -> None:
    """Write all weights: a copy of the recorded files, or the adapter merged into its base."""
    policy = Round(records, manifest)
    if policy.is_adapter:
        four_bits = records.configs()[0].settings.model.dtype == "nf4"
        _merge_adapter(policy.policy_path(), folder, four_bits)
    else:
        policy.copy_policy(folder)
    add_stops(folder, records.configs()[0].settings.model.template_kwargs)


def write_adapter(records: RunStore, manifest: RoundManifest, chain: Lineage, folder: Path) -> None:
    """Write the policy's adapter for peft: its base is named by hub id and commit, else by its local folder.

    Raises:
        InputError: the round's policy has all weights and no adapter.
    """
    policy = Round(records, manifest)
    refuse_no_adapter(policy)
    shutil.copytree(policy.policy_path(), folder, ignore=shutil.ignore_patterns(*ADAPTER_LEFT_OUT))
    if chain.start.is_on_hub:
        place = folder / "adapter_config.json"
        name = chain.start.name.split("@")[0]
        config = json.loads(place.read_text())
        config |= {"base_model_name_or_path": name, "revision": chain.start.digest}
        place.unlink()  # a copy of a stored file may be read-only
        place.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refuse_no_adapter(policy: Round) -> None:
    """Refuse a policy that is no adapter.

    Raises:
        InputError: it has all weights.
    """
    if not policy.is_adapter:
        raise InputError(
            f"--adapter: round {policy.manifest.round} of {policy.manifest.run!r} trained all weights: "
            "there is no adapter; leave --adapter out"
        )


def write_papers(
    records: RunStore, manifest: RoundManifest, chain: Lineage, folder: Path, gguf: GgufReport | None
) -> None:
    """Write lineage.json and README.md, the model card, beside a policy; make all files readable."""
    text = shown_json(chain.model_dump(mode="json"), indent=1, sort_keys=True)
    (folder / "lineage.json").write_text(text + "\n", encoding="utf-8")
    card = model_card(records, manifest, chain, (folder / "adapter_config.json").is_file(), gguf)
    (folder / "README.md").write_text(card, encoding="utf-8")
    for file in folder.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors makes files readable by the owner only


def base_of(adapter: Path) -> Path:
    """The local folder of an adapter's base."""
    return Path(json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"])


def _merge_adapter(source: Path, folder: Path, four_bits: bool) -> None:
    """Merge an adapter into its base; four_bits: into the rounded weights that it was trained on."""
    from sera_core.models.four_bits import write_rounded
    from sera_core.models.policies import load_policy, save_policy

    base = base_of(source)
    with tempfile.TemporaryDirectory(prefix="sera-") as scratch:
        trained_on = write_rounded(base, Path(scratch)) if four_bits else base
        save_policy(load_policy(source, base=trained_on), base, folder)


def add_stops(folder: Path, template_kwargs: Mapping[str, Any]) -> None:
    """Let generation end where the run's sampling does: a base model may not name its end-of-turn token.

    Args:
        folder: a policy folder, whose generation_config.json is changed if it names other tokens.
        template_kwargs: the run's arguments of the chat template.
    """
    from sera_core.data.rendering import Renderer
    from sera_core.models.policies import read_settings, write_settings

    place = folder / "generation_config.json"
    settings = read_settings(place)
    listed = settings.get("eos_token_id")
    stops = list(Renderer(folder, None, template_kwargs).stop_ids)
    if set(listed if isinstance(listed, list) else [listed]) != set(stops):
        place.unlink(missing_ok=True)
        write_settings(place, settings | {"eos_token_id": stops})
