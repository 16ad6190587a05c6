"""One export of a round's policy: built in a temporary folder, checked, then renamed to its place."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from flows.exports import serving
from flows.exports.folder import base_of, write_adapter, write_papers, write_weights
from flows.exports.gguf import GgufReport, write_checked
from flows.exports.lineage import Lineage, lineage
from sera_core.artifacts.reading import Round
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.models.gguf_writing import FileType

SUFFIX = ".gguf"


@dataclass(frozen=True)
class Export:
    """What was written."""

    gguf: GgufReport | None
    serve: dict[str, str]
    """The command that serves it, by server: `vllm`, `llama.cpp`."""


def export_policy(
    records: RunStore,
    manifest: RoundManifest,
    target: Path,
    place: str,
    file_type: FileType | None = None,
    adapter: bool = False,
) -> Export:
    """Write a round's policy. Only files named in its record are copied.

    Args:
        records: of the run.
        manifest: of the round.
        target: the folder to create, or with `file_type` a file `*.gguf`, which is then all that is written.
        place: how the commands name what was written: `target`, or a repository on the hub.
        file_type: also write a GGUF file of this type, `policy-TYPE.gguf` in the folder.
        adapter: write only the adapter of a LoRA run.
    """
    chain = lineage(records, manifest)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        folder = Path(scratch) / "policy"
        if adapter:
            return _adapter(records, manifest, chain, folder, target, place)
        write_weights(records, manifest, folder)
        return _weights(records, manifest, chain, folder, target, place, file_type)


def _weights(
    records: RunStore,
    manifest: RoundManifest,
    chain: Lineage,
    folder: Path,
    target: Path,
    place: str,
    file_type: FileType | None,
) -> Export:
    config, report, serve = records.configs()[0].settings, None, {}
    alone = target.suffix == SUFFIX and file_type is not None
    if file_type is not None:
        file = target.name if alone else f"policy-{file_type}{SUFFIX}"
        report = write_checked(records, manifest, folder, folder / file, file_type)
    if not alone:
        serve["vllm"] = serving.vllm_command(config, manifest, folder, place)
    if report is not None:
        where = place if alone else str(Path(place) / report.file)
        serve["llama.cpp"] = serving.llama_command(config, manifest, folder, where)
    write_papers(records, manifest, chain, folder, report)
    (folder / target.name if alone else folder).rename(target)
    return Export(report, serve)


def _adapter(
    records: RunStore, manifest: RoundManifest, chain: Lineage, folder: Path, target: Path, place: str
) -> Export:
    config, base = records.configs()[0].settings, base_of(Round(records, manifest).policy_path())
    write_adapter(records, manifest, chain, folder)
    write_papers(records, manifest, chain, folder, None)
    command = serving.vllm_adapter_command(config, manifest, folder, base, place)
    folder.rename(target)
    return Export(None, {} if command is None else {"vllm": command})
