"""`sera list`, `show`, `verify`, `report`: show and check runs."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.commands.export import round_of
from flows.commands.output import print_result
from flows.commands.summary import closing_lines, rounds_table
from flows.commands.tables import metric_cell, print_table, print_text
from flows.display.progress import reporter
from flows.display.run_view import run_records, show
from flows.store_tools.verify import Verified, verify
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore, list_runs
from sera_core.artifacts.store import open_store
from sera_core.reporting import evidence


def add_list(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera list`."""
    commands.add_parser("list", parents=[common], help="list the runs in a store").set_defaults(
        command=list_command
    )


def add_show(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera show RUN [--round N]`."""
    sub = commands.add_parser(
        "show", parents=[common], help="show a run's rounds: decisions, metrics, pairs, artifacts"
    )
    sub.add_argument("run")
    sub.add_argument("--round", type=int, help="show this round in full")
    sub.set_defaults(command=show_command)


def add_verify(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera verify RUN`."""
    sub = commands.add_parser(
        "verify", parents=[common], help="check a run: hash every file and follow every link"
    )
    sub.add_argument("run")
    sub.set_defaults(command=verify_command)


def add_report(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera report RUN --out DIR`."""
    sub = commands.add_parser("report", parents=[common], help="write the run as HTML pages")
    sub.add_argument("run")
    sub.add_argument("--out", required=True, help="folder to write to")
    sub.set_defaults(command=report_command)


def list_command(args: argparse.Namespace) -> int:
    """List the runs of a store."""
    store = open_store(args.store)
    found = [
        show(records, False) for name in list_runs(store) if (records := RunStore(store, name)).configs()
    ]
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
        print_text(f"No runs in {store.url}; start one with `sera demo`.")
    else:
        columns = ["run", "rounds", "stop_reason", "head", "best_round"]
        print_table(f"runs in {store.url}", columns, [[row[name] for name in columns] for row in rows])
    return 0


def show_command(args: argparse.Namespace) -> int:
    """Show a run, or one of its rounds."""
    records = run_records(open_store(args.store), args.run)
    found = show(records)
    if args.round is not None:
        manifest = round_of(records, args.round)
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
    """Check a run; an error names the first bad file or link."""
    records = run_records(open_store(args.store), args.run)
    with reporter("verify") as progress:
        found = verify(records, progress)
    line = _verified(args.run, found)
    print_result(args, {"run": args.run, "ok": True, **asdict(found)}, [line])
    return 0


def _verified(run: str, found: Verified) -> str:
    if not found.rounds:
        return f"run {run}: the configuration is intact; no round is finished yet."
    return (
        f"run {run}: {found.files} files ({found.bytes / 1e6:,.1f} MB) of {found.steps} steps and "
        f"{found.links} links of {found.rounds} rounds are intact, down to the data and the start policy."
    )


def report_command(args: argparse.Namespace) -> int:
    """Write the HTML pages."""
    from flows.display.run_report import write_run_report

    files = write_run_report(args.store, args.run, Path(args.out))
    if args.json:
        print(json.dumps({"run": args.run, "files": [str(file) for file in files]}))
    else:
        print_text(f"wrote {len(files)} pages; open {files[0]}")
    return 0


def _print_round(manifest: RoundManifest, found: dict[str, Any]) -> None:
    print_text(f"run {manifest.run}, round {manifest.round}: {manifest.decision}. {manifest.reason}.")
    ledger = {
        name: value
        for name, value in manifest.metrics.items()
        if name.startswith(("human/", "generated/", "prompts/", "responses"))
    }
    print_table("pairs and prompts by reason (kept: trained on)", ["what", "count"], sorted(ledger.items()))
    if reliance_rows := evidence.reliance_rows(manifest.metrics):
        rows = [
            [row.feature, *(cell.value for cell in row.cells[:3]), row.cells[0].n] for row in reliance_rows
        ]
        heads = [head for head, *_ in evidence.RELIANCE[:3]]
        print_table("reliance on features: held-out pairs", ["feature", *heads, "pairs"], rows)
    metrics = {
        name: value
        for name, value in found["metrics"].items()
        if name not in ledger and not name.startswith("heldout/reliance/")
    }
    print_table(
        "metrics",
        ["metric", "value"],
        [[name, metric_cell(value)] for name, value in sorted(metrics.items())],
    )
    rows = [
        [role, a["rows"], a["bytes"], a["sha256"][:16], a["uri"]]
        for role, a in sorted(found["artifacts"].items())
    ]
    print_table("artifacts", ["role", "rows", "bytes", "sha256", "where"], rows)
