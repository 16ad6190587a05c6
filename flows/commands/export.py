"""`sera export`, `sera lineage`: a policy as a Hugging Face folder, and its lineage."""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.commands.output import print_note, print_result, quiet_stdout
from flows.display.run_view import run_records
from flows.exports.export import SUFFIX, Export, export_policy
from flows.exports.folder import base_of, refuse_no_adapter
from flows.exports.gguf import check_gguf
from flows.exports.hub import check_target, push
from flows.exports.lineage import Lineage, lineage, start_of
from flows.outputs import check_new
from sera_core.artifacts.reading import Round
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.errors import InputError
from sera_core.models.gguf_writing import FILE_TYPES

SERVERS = {"vllm": "vLLM", "llama.cpp": "llama.cpp"}


def add_export(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera export RUN [--round N] [--to DIR] [--gguf TYPE] [--adapter] [--push-to ORG/NAME]`."""
    sub = commands.add_parser(
        "export",
        parents=[common],
        help="write a round's policy as a Hugging Face folder with lineage and model card, or for llama.cpp",
    )
    sub.add_argument("run")
    sub.add_argument("--round", type=int, help="round number (default: the best round)")
    sub.add_argument(
        "--to", help="folder to create; it must not exist (or a file NAME.gguf, with --gguf: only that)"
    )
    sub.add_argument(
        "--gguf",
        choices=FILE_TYPES,
        help="also write a GGUF file for llama.cpp, policy-TYPE.gguf in the folder, and compare it with the "
        "policy",
    )
    sub.add_argument(
        "--adapter",
        action="store_true",
        help="of a LoRA run: write the adapter for peft, without its base (default: merged into it)",
    )
    sub.add_argument(
        "--push-to", metavar="ORG/NAME", help="push to the Hugging Face hub, private (token: HF_TOKEN)"
    )
    sub.add_argument("--public", action="store_true", help="with --push-to: make the repository public")
    sub.set_defaults(command=export_command)


def add_lineage(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera lineage RUN [--round N]`."""
    sub = commands.add_parser(
        "lineage", parents=[common], help="show where a round's policy comes from, down to the data"
    )
    sub.add_argument("run")
    sub.add_argument("--round", type=int, help="round number (default: the best round)")
    sub.set_defaults(command=lineage_command)


def export_command(args: argparse.Namespace) -> int:
    """Write the policy as a folder, an adapter or a GGUF file, and push the folder with --push-to."""
    _check_flags(args)
    records = run_records(open_store(args.store), args.run)
    manifest = round_of(records, args.round)
    _check_policy(args, records, Round(records, manifest))
    if args.to is not None:
        check_new("--to", Path(args.to))
    if args.push_to is not None:
        check_target(args.push_to)
    with tempfile.TemporaryDirectory(prefix="sera-export-") as scratch:
        target = Path(args.to) if args.to is not None else Path(scratch) / "policy"
        with quiet_stdout():
            place = args.push_to if args.to is None else args.to
            export = export_policy(records, manifest, target, str(place), args.gguf, args.adapter)
        url = None if args.push_to is None else push(target, args.push_to, args.public, print_note)
        found = {
            "run": args.run,
            "round": manifest.round,
            "to": args.to,
            "pushed_to": url,
            "policy_sha256": manifest.artifacts["policy"]["sha256"],
            "gguf": None if export.gguf is None else export.gguf.record(),
            "serve": export.serve,
        }
    print_result(args, found, _exported(found, export))
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    one_file = args.to is not None and args.to.endswith(SUFFIX)
    if args.to is None and args.push_to is None:
        raise InputError("sera export: give a folder with --to, a repository with --push-to, or both")
    if args.public and args.push_to is None:
        raise InputError("--public: only with --push-to; give that too")
    if args.adapter and args.gguf is not None:
        raise InputError("--gguf: a GGUF file holds all weights; leave --adapter out")
    if one_file and args.gguf is None:
        raise InputError(
            f"--to {args.to}: for a GGUF file give its type too ({', '.join(FILE_TYPES)}): --gguf f16"
        )
    if one_file and args.push_to is not None:
        raise InputError(
            f"--to {args.to}: --push-to pushes a folder; name a folder, which will hold the GGUF file"
        )


def _check_policy(args: argparse.Namespace, records: RunStore, policy: Round) -> None:
    """Refuse what this policy cannot be written as, before anything is written."""
    if args.adapter:
        refuse_no_adapter(policy)
        if args.push_to is not None and not start_of(records).is_on_hub:
            raise InputError(
                "--adapter with --push-to: the adapter's base is not on the hub, so nobody could load it; "
                "push without --adapter"
            )
    if args.gguf is not None:
        folder = policy.policy_path()
        check_gguf(base_of(folder) if policy.is_adapter else folder)


def _exported(found: dict[str, Any], export: Export) -> Iterator[str]:
    for place in (found["to"], found["pushed_to"]):
        if place is not None:
            sha = found["policy_sha256"][:12]
            yield f"wrote round {found['round']} of {found['run']} to {place} (policy sha256 {sha}…)"
    if export.gguf is not None:
        yield f"{export.gguf.file}: {export.gguf.words()}"
    for server, command in found["serve"].items():
        yield f"to serve it with {SERVERS[server]}:"
        yield f"  {command}"


def lineage_command(args: argparse.Namespace) -> int:
    """Print the lineage of a policy."""
    records = run_records(open_store(args.store), args.run)
    chain = lineage(records, round_of(records, args.round))
    print_result(args, chain.model_dump(mode="json"), _lineage_lines(chain))
    return 0


def _lineage_lines(chain: Lineage) -> Iterator[str]:
    policy = chain.policy
    yield f"policy of {policy.run}, round {policy.round}: {policy.sha256} (weights {policy.weights[:12]}…)"
    yield f"configuration {chain.config_sha256}, seed {chain.seed}"
    yield f"start policy {chain.start.name}: {chain.start.digest}"
    for source in chain.data:
        yield f"{source.side} data {source.name}: {source.digest}"
    for code in chain.code:
        yield f"code sera-flow {code.version}: {code.digest or 'not recorded'}"
    for step in chain.steps:
        inputs = ", ".join(f"{name} {ref.digest[:12]}…" for name, ref in step.inputs.items()) or "its source"
        yield f"  {step.digest[:12]}… {step.step} from {inputs}"


def round_of(records: RunStore, number: int | None) -> RoundManifest:
    """A round by its number, or the best one.

    Raises:
        InputError: there is no such round, or none was promoted.
    """
    rounds = records.rounds()
    if number is None:
        best = records.history().best
        if best is None:
            raise InputError(
                f"run {records.run!r}: no round is promoted yet, so there is no best round; choose one with "
                "--round"
            )
        return best
    if not 0 <= number < len(rounds):
        have = f"rounds 0 to {len(rounds) - 1}" if rounds else "no finished round"
        raise InputError(f"--round {number}: run {records.run!r} has {have}")
    return rounds[number]
