"""`sera list`, `show`, `verify`, `report`, `export`: look at runs, check them, take the policy out."""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from flows.commands.printing import print_table, print_text
from flows.commands.summary import closing_lines, rounds_table
from flows.looking import run_records, show, verify
from sera_core.artifacts.runs import RoundManifest, RunStore, list_runs
from sera_core.artifacts.store import open_store
from sera_core.errors import InputError


def add_list(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera list`."""
    commands.add_parser("list", parents=[common], help="the runs in a store").set_defaults(
        command=list_command
    )


def add_show(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera show RUN [--round N]`."""
    sub = commands.add_parser(
        "show", parents=[common], help="a run's rounds: decisions, metrics, pairs, artifacts"
    )
    sub.add_argument("run")
    sub.add_argument("--round", type=int, help="one round in full")
    sub.set_defaults(command=show_command)


def add_verify(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera verify RUN`."""
    sub = commands.add_parser("verify", parents=[common], help="hash every file again and follow every link")
    sub.add_argument("run")
    sub.set_defaults(command=verify_command)


def add_report(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera report RUN --out DIR`."""
    sub = commands.add_parser("report", parents=[common], help="the run as HTML pages")
    sub.add_argument("run")
    sub.add_argument("--out", required=True, help="folder to write to")
    sub.set_defaults(command=report_command)


def add_export(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera export RUN [--round N] --to DIR`."""
    sub = commands.add_parser("export", parents=[common], help="a round's policy as a Hugging Face folder")
    sub.add_argument("run")
    sub.add_argument("--round", type=int, help="default: the best round")
    sub.add_argument("--to", required=True, help="folder to write; it must not exist")
    sub.set_defaults(command=export_command)


def list_command(args: argparse.Namespace) -> int:
    """The runs of a store."""
    store = open_store(args.store)
    found = [show(records) for name in list_runs(store) if (records := RunStore(store, name)).configs()]
    rows = [
        {
            **{name: run[name] for name in ("run", "stop_reason", "waiting", "head", "best_round")},
            "rounds": len(run["rounds"]),
        }
        for run in found
    ]
    if args.json:
        print(json.dumps({"store": store.url, "runs": rows}))
    elif not rows:
        print_text(f"No runs in {store.url}; `sera demo` makes one.")
    else:
        columns = ["run", "rounds", "stop_reason", "head", "best_round"]
        print_table(f"runs in {store.url}", columns, [[row[name] for name in columns] for row in rows])
    return 0


def show_command(args: argparse.Namespace) -> int:
    """A run, or one of its rounds."""
    records = run_records(open_store(args.store), args.run)
    found = show(records)
    if args.round is not None:
        manifest = _round(records, args.round)
        found["rounds"] = [found["rounds"][args.round]]
        if not args.json:
            _print_round(manifest, found["rounds"][0])
            return 0
    if args.json:
        print(json.dumps(found))
        return 0
    rounds_table(records)
    for line in closing_lines(records):
        print_text(line)
    return 0


def verify_command(args: argparse.Namespace) -> int:
    """Check a run; a failure names the first file or link that does not hold."""
    records = run_records(open_store(args.store), args.run)
    files = verify(records)
    if args.json:
        print(json.dumps({"run": args.run, "files": files, "rounds": len(records.rounds()), "ok": True}))
    else:
        print_text(f"run {args.run}: {files} files and the chain of {len(records.rounds())} rounds hold.")
    return 0


def report_command(args: argparse.Namespace) -> int:
    """Write the pages."""
    from flows.run_report import write_run_report

    files = write_run_report(args.store, args.run, Path(args.out))
    if args.json:
        print(json.dumps({"run": args.run, "files": [str(file) for file in files]}))
    else:
        print_text(f"{len(files)} pages; open {files[0]}")
    return 0


def export_command(args: argparse.Namespace) -> int:
    """Write the policy: copied as it is, an adapter merged into its base."""
    records = run_records(open_store(args.store), args.run)
    number: int | None = args.round
    if number is None:
        best = records.history().best
        if best is None:
            raise InputError(
                f"run {args.run!r}: no round was promoted yet, so there is no best one; name one with --round"
            )
        number = best.round
    manifest = _round(records, number)
    target = Path(args.to)
    if target.exists():
        raise InputError(f"--to {target}: exists already; name a folder that does not")
    export_policy(records, manifest, target)
    sha = manifest.artifacts["policy"]["sha256"]
    if args.json:
        print(json.dumps({"run": args.run, "round": manifest.round, "to": str(target), "policy_sha256": sha}))
    else:
        print_text(f"round {manifest.round} of {args.run} is in {target} (policy sha256 {sha[:12]}…)")
    return 0


def export_policy(records: RunStore, manifest: RoundManifest, target: Path) -> None:
    """A complete Hugging Face folder, made beside its place and moved there in one step."""
    from sera_core.artifacts.reading import Round

    if "policy" not in manifest.steps:
        raise InputError(
            f"round {manifest.round} trained no policy ({manifest.stop_reason}); choose another with --round"
        )
    source = Round(records, manifest).policy_path()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as scratch:
        folder = Path(scratch) / "policy"
        if (source / "adapter_config.json").exists():
            _merge_adapter(source, folder)
        else:
            shutil.copytree(source, folder, copy_function=shutil.copyfile)
        for file in folder.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors writes for the owner alone
        folder.rename(target)


def _merge_adapter(source: Path, folder: Path) -> None:
    from sera_core.models import load_policy, save_policy

    base = json.loads((source / "adapter_config.json").read_text())["base_model_name_or_path"]
    save_policy(load_policy(source, base=base), base, folder)


def _round(records: RunStore, number: int) -> RoundManifest:
    rounds = records.rounds()
    if not 0 <= number < len(rounds):
        have = f"rounds 0 to {len(rounds) - 1}" if rounds else "no finished round"
        raise InputError(f"--round {number}: run {records.run!r} has {have}")
    return rounds[number]


def _print_round(manifest: RoundManifest, found: dict[str, Any]) -> None:
    print_text(f"run {manifest.run}, round {manifest.round}: {manifest.decision}. {manifest.reason}.")
    ledger = {
        name: value
        for name, value in manifest.metrics.items()
        if name.startswith(("human/", "generated/", "prompts/", "responses"))
    }
    print_table("pairs and prompts by reason", ["what", "count"], sorted(ledger.items()))
    metrics = {name: value for name, value in manifest.metrics.items() if name not in ledger}
    print_table(
        "metrics", ["metric", "value"], [[name, _shown(value)] for name, value in sorted(metrics.items())]
    )
    rows = [
        [role, a["rows"], a["bytes"], a["sha256"][:16], a["uri"]]
        for role, a in sorted(found["artifacts"].items())
    ]
    print_table("artifacts", ["role", "rows", "bytes", "sha256", "where"], rows)


def _shown(value: Any) -> Any:
    from flows.cards import interval

    if isinstance(value, dict) and "value" in value:
        return interval(value)
    return json.dumps(value) if isinstance(value, dict | list) else value
