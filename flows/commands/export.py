"""`sera export`, `sera lineage`: a policy as a Hugging Face folder, and its lineage."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flows.commands.output import print_note, print_result
from flows.display.run_view import run_records
from flows.exports.hub import check_target, push
from flows.exports.lineage import Lineage, lineage
from flows.exports.model_card import model_card
from flows.outputs import check_new
from sera_core.artifacts.reading import Round
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.errors import InputError
from sera_core.guards.shown import shown_json


def add_export(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera export RUN [--round N] [--to DIR] [--push-to ORG/NAME]`."""
    sub = commands.add_parser(
        "export",
        parents=[common],
        help="write a round's policy as a Hugging Face folder, with its lineage and a model card",
    )
    sub.add_argument("run")
    sub.add_argument("--round", type=int, help="round number (default: the best round)")
    sub.add_argument("--to", help="folder to create; it must not exist")
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
    """Write the policy (an adapter merged into its base), and push it with --push-to."""
    if args.to is None and args.push_to is None:
        raise InputError("sera export: give a folder with --to, a repository with --push-to, or both")
    if args.public and args.push_to is None:
        raise InputError("--public: only with --push-to; give that too")
    records = run_records(open_store(args.store), args.run)
    manifest = round_of(records, args.round)
    if args.to is not None:
        check_new("--to", Path(args.to))
    if args.push_to is not None:
        check_target(args.push_to)
    with tempfile.TemporaryDirectory(prefix="sera-export-") as scratch:
        folder = Path(args.to) if args.to is not None else Path(scratch) / "policy"
        export_policy(records, manifest, folder)
        url = None if args.push_to is None else push(folder, args.push_to, args.public, print_note)
    found = {
        "run": args.run,
        "round": manifest.round,
        "to": args.to,
        "pushed_to": url,
        "policy_sha256": manifest.artifacts["policy"]["sha256"],
    }
    print_result(args, found, _exported(found))
    return 0


def _exported(found: dict[str, Any]) -> Iterator[str]:
    for place in (found["to"], found["pushed_to"]):
        if place is not None:
            sha = found["policy_sha256"][:12]
            yield f"wrote round {found['round']} of {found['run']} to {place} (policy sha256 {sha}…)"


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


def export_policy(records: RunStore, manifest: RoundManifest, target: Path) -> None:
    """Write a complete Hugging Face folder: built in a temporary folder, then renamed to `target`.

    Only files named in the policy's record are copied.
    """
    chain, policy = lineage(records, manifest), Round(records, manifest)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        folder = Path(scratch) / "policy"
        if policy.is_adapter:
            four_bits = records.configs()[0].settings.model.dtype == "nf4"
            _merge_adapter(policy.policy_path(), folder, four_bits)
        else:
            policy.copy_policy(folder)
        text = shown_json(chain.model_dump(mode="json"), indent=1, sort_keys=True)
        (folder / "lineage.json").write_text(text + "\n", encoding="utf-8")
        (folder / "README.md").write_text(model_card(records, manifest, chain), encoding="utf-8")
        for file in folder.rglob("*"):
            file.chmod(
                0o755 if file.is_dir() else 0o644
            )  # safetensors makes files readable by the owner only
        folder.rename(target)


def _merge_adapter(source: Path, folder: Path, four_bits: bool) -> None:
    """Merge an adapter into its base; four_bits: into the rounded weights that it was trained on."""
    from sera_core.models.four_bits import write_rounded
    from sera_core.models.policies import load_policy, save_policy

    base = Path(json.loads((source / "adapter_config.json").read_text())["base_model_name_or_path"])
    with tempfile.TemporaryDirectory(prefix="sera-") as scratch:
        trained_on = write_rounded(base, Path(scratch)) if four_bits else base
        save_policy(load_policy(source, base=trained_on), base, folder)
