"""`sera run`, `demo`, `advance`, `plan`: do a run or a round of it, or say what it would do."""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.commands.output import say
from flows.commands.summary import closing_lines, rounds_table
from flows.commands.tables import print_table, print_text
from flows.display.run_view import run_records, show
from flows.experiments import load_experiment
from flows.planning.plan import plan
from flows.running import open_run
from flows.running.rounds import PAUSED, test_side_is_open
from sera_core.artifacts.lease import wait_until_free
from sera_core.artifacts.runs import RunStore, check_name
from sera_core.artifacts.store import open_store
from sera_core.config import SeraConfig
from sera_core.data.loading import format_counts

DEMO = "bundled:demo"


def add_run(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera run EXPERIMENT.toml [--name RUN] [--set a.b=value …]`."""
    sub = commands.add_parser(
        "run", parents=[common], help="all rounds of an experiment; the same name again goes on"
    )
    sub.add_argument("experiment", help="TOML file, or bundled:<name>")
    sub.add_argument("--name", help="run name (default: the file's stem)")
    _add_set(sub)
    sub.set_defaults(command=run_command)


def add_demo(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera demo [--quick]`."""
    sub = commands.add_parser(
        "demo", parents=[common], help="the whole loop on a small real model and real preferences"
    )
    sub.add_argument(
        "--quick", action="store_true", help="one self-reviewed round on 16 pairs: the smoke test"
    )
    _add_set(sub)
    sub.set_defaults(command=demo_command)


def add_advance(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera advance RUN`."""
    sub = commands.add_parser(
        "advance", parents=[common], help="one further round of a run, or nothing if it has stopped"
    )
    sub.add_argument("run")
    sub.set_defaults(command=advance_command)


def add_plan(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera plan EXPERIMENT.toml`."""
    sub = commands.add_parser(
        "plan", parents=[common], help="what a run would reuse and do, and what that costs"
    )
    sub.add_argument("experiment", help="TOML file, or bundled:<name>")
    sub.add_argument("--name", help="run name (default: the file's stem)")
    _add_set(sub)
    sub.set_defaults(command=plan_command)


def _add_set(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=value",
        help="change one setting of the file; may be repeated",
    )


def run_command(args: argparse.Namespace) -> int:
    """Do a run to its end, or answer from the store when it is finished."""
    config = load_experiment(args.experiment, args.set)
    return _run(config, check_name(name_of(args.experiment) if args.name is None else args.name), args)


def demo_command(args: argparse.Namespace) -> int:
    """The demo, or its quick form."""
    experiment = f"{DEMO}-quick" if args.quick else DEMO
    name = "demo-quick" if args.quick else "demo"
    return _run(load_experiment(experiment, args.set), name, args)


def advance_command(args: argparse.Namespace) -> int:
    """One round of a run that is open; then, as always, how the run stands."""
    records = run_records(open_store(args.store), args.run)
    if records.state() == "open":
        wait_until_free(records.store, records.run, say)  # before Prefect takes its seconds to start
        from flows.orchestration.embedded_server import prefect_api

        with prefect_api(args.debug), ended_by_signal():
            from flows.advance import sera_advance

            sera_advance(args.run, args.store)
    return _tell(records, args)


def plan_command(args: argparse.Namespace) -> int:
    """Print the plan."""
    config = load_experiment(args.experiment, args.set)
    found = plan(config, check_name(name_of(args.experiment) if args.name is None else args.name), args.store)
    if args.json:
        print(json.dumps(found))
        return 0
    if found["note"]:
        print_text(found["note"])
    for side, formats in found["formats"].items():
        print_text(f"data.{side}: read {format_counts(formats)}")
    columns = ["round", "step", "status", "why", "tokens", "seconds", "bytes"]
    print_table(
        f"plan of {found['run']}", columns, [[row[name] for name in columns] for row in found["steps"]]
    )
    print_text(_forecast(found))
    return 0


def name_of(experiment: str) -> str:
    """A run's default name: the file's stem."""
    return Path(experiment.removeprefix("bundled:")).stem


def _run(config: SeraConfig, name: str, args: argparse.Namespace) -> int:
    begun = time.monotonic()
    wait_until_free(open_store(args.store), name, say)  # before anything is recorded of a changed setting
    records = open_run.open_run(config, name, args.store)
    state = records.state()
    if state == "open" or (state not in PAUSED and test_side_is_open(records)):
        _announce(config, name, args)
        _work(config, name, args)
        if not args.json:
            print_text(f"{time.monotonic() - begun:.0f} s in all.")
    return _tell(records, args)


def _announce(config: SeraConfig, name: str, args: argparse.Namespace) -> None:
    say(_forecast(plan(config, name, args.store)))


def _forecast(found: dict[str, Any]) -> str:
    todo = found["run_now"] + found["depends"]
    if not todo:
        return f"run {found['run']}: all {found['reuse']} steps are in the store; nothing to do."
    seconds = found["seconds"]
    about = "an unknown time (the model is not on this machine yet)" if seconds is None else _minutes(seconds)
    return (
        f"run {found['run']}: {found['reuse']} steps to reuse, {todo} to do; "
        f"about {found['tokens']:,} tokens, {found['bytes'] / 1e6:,.0f} MB, "
        f"{about} on this machine (a guess)."
    )


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def _work(config: SeraConfig, name: str, args: argparse.Namespace) -> None:
    from flows.orchestration.embedded_server import prefect_api

    with prefect_api(args.debug), ended_by_signal():
        from flows.sera import sera

        sera(config, run=name, store=args.store)


@contextmanager
def ended_by_signal() -> Iterator[None]:
    """Prefect's word for being asked to end is ours for an interrupt: the store holds what is finished."""
    from prefect.exceptions import TerminationSignal

    try:
        yield
    except TerminationSignal as signal:
        raise KeyboardInterrupt from signal


def _tell(records: RunStore, args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps(show(records)))
        return 0
    rounds_table(records)
    for line in closing_lines(records):
        print_text(line)
    return 0
