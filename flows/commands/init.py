"""`sera init`: look at a model, preference data and this machine, and write a first experiment."""

import argparse
import os
import secrets
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flows.commands.capability_inputs import InputPair, find_policy, policy_folder, tokenize_pairs
from flows.commands.output import check_output, print_note, print_result, quiet_stdout
from flows.commands.run import forecast
from flows.experiments import load_experiment
from flows.planning.first_experiment import Seen, Setting, as_toml, proposed
from flows.planning.plan import plan
from sera_core.artifacts.run_records import check_name
from sera_core.config import SeraConfig
from sera_core.data import loading
from sera_core.data.formats import Reading
from sera_core.data.parsing import KINDS
from sera_core.data.preferences import drop_degenerate
from sera_core.data.sources import read_rows
from sera_core.errors import InputError
from sera_core.guards.memory import accelerator_here, device_memory
from sera_core.models.memory_estimate import folder_shape

QUESTIONS = {
    "model": "Model (hub id, local folder, URL, or package:<distribution>/<file>.gguf): ",
    "data": "Preference pairs (jsonl, json, csv, parquet, hub:<id>, or a URL): ",
}


def add_init(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """`sera init`."""
    sub = subparsers.add_parser(
        "init",
        parents=[common],
        help="write a first experiment for your model and data",
        description="Look at a model, preference data and this machine, write a short commented experiment "
        "with the settings that should differ from the defaults, and print what the run would cost. Asks for "
        "what is not given.",
    )
    sub.add_argument(
        "out", type=Path, nargs="?", default=Path("mine.toml"), help="file to write (default: mine.toml)"
    )
    sub.add_argument("--model", help="hub id, local folder, URL, or package:<distribution>/<file>.gguf")
    sub.add_argument(
        "--data", help="preference pairs: jsonl, json, csv, parquet, hub:<id>, bundled:, or a URL"
    )
    sub.add_argument("--force", action="store_true", help="replace the file if it exists")
    sub.set_defaults(command=init)


def init(args: argparse.Namespace) -> int:
    """Write the experiment and print its plan."""
    check_output(args.out, args.force)
    name = check_name(args.out.stem)
    seen = _look(_given(args, "model"), _given(args, "data"), args.out)
    settings = proposed(seen)
    found = plan(_written(args.out, as_toml(settings)), name, args.store)
    for warning in found["warnings"]:
        print_note(f"sera: warning: {warning}")
    value = {
        "out": str(args.out),
        "settings": {f"{one.section}.{one.name}": one.value for one in settings},
        "plan": found,
    }
    print_result(args, value, _lines(args.out, settings, found))
    return 0


def _written(out: Path, text: str) -> SeraConfig:
    """Write the file, unless a run would refuse it."""
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        config = load_experiment(str(temporary))
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return config


def _lines(out: Path, settings: list[Setting], found: dict[str, Any]) -> list[str]:
    return [
        f"{out}: written, {len(settings)} settings",
        *(f"  {one.section}.{one.name} = {one.value}: {one.why}" for one in settings),
        forecast(found),
        f"Next: sera plan {out}, then sera run {out}",
    ]


def _given(args: argparse.Namespace, what: str) -> str:
    """The flag's value, or the answer to its question.

    Raises:
        InputError: neither is given.
    """
    value = getattr(args, what)
    if not value and sys.stdin is not None and sys.stdin.isatty() and not args.json:
        value = input(QUESTIONS[what]).strip()
    if not value:
        raise InputError(f"--{what} is missing; give it, or answer the question in a terminal")
    return value


def _look(model: str, data: str, out: Path) -> Seen:
    """Find out what the choices rest on."""
    from sera_core.data.rendering import Renderer
    from tasks.engines.sampler import position_limit

    source = find_policy("--model", model)
    read = loading.read_pairs(data, read_rows(data), Reading(on_bad_row="drop"))
    pairs, _ = drop_degenerate("train", read.items)
    if not pairs:
        raise InputError(f"--data {data}: no usable pair; `sera data {data}` says why")
    with quiet_stdout(), tempfile.TemporaryDirectory(prefix="sera-") as scratch:
        folder = policy_folder("--model", source, Path(scratch) / "model")
        has_template = bool(Renderer(folder).tokenizer.chat_template)
        renderer = Renderer(folder, None if has_template else "chatml")
        ids = tokenize_pairs(renderer, [InputPair(pair, None) for pair in pairs])
        shape, positions = folder_shape(folder), position_limit(folder)
    device = "cuda" if accelerator_here("auto") else "cpu"
    return Seen(
        model=_from(out, model) if source.kind == "folder" else model,
        shape=shape,
        positions=positions,
        has_template=has_template,
        data=_from(out, data) if Path(data).is_file() else data,
        formats=loading.format_counts(read.formats),
        pairs=len(pairs),
        prompts=len({pair.prompt_id for pair in pairs}),
        unusable=_unusable(read),
        prompt_tokens=[len(prompt) for prompt, _, _ in ids],
        answer_tokens=[len(answer) for _, *answers in ids for answer in answers],
        device=device,
        memory=device_memory("auto")[0],
        four_bits=find_spec("bitsandbytes") is not None,
    )


def _unusable(read: loading.Read) -> dict[str, int]:
    reasons = [drop.reason for drop in read.dropped if drop.reason in KINDS]
    return {kind: reasons.count(kind) for kind in set(reasons)}


def _from(out: Path, path: str) -> str:
    """A local path as the experiment names it: from its folder if it lies in it, else from the root."""
    whole, home = Path(path).expanduser().resolve(), out.resolve().parent
    return os.path.relpath(whole, home) if whole.is_relative_to(home) else str(whole)
