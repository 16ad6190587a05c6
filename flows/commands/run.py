"""`sera run`, `demo`, `advance`, `plan`: do a run or one round of it, or show its plan."""

import argparse
import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from flows.commands.output import print_note
from flows.commands.summary import closing_lines, rounds_table
from flows.commands.tables import leaves_room, print_folding_table, print_table, print_text
from flows.compare import Finish
from flows.display.run_view import (
    PLANNED_COLUMNS,
    gibibytes,
    planned_cells,
    planned_step,
    run_records,
    show,
)
from flows.experiments import load_experiment, with_changes
from flows.planning.plan import RESUMES, plan
from flows.running import open_run
from flows.running.rounds import has_work
from sera_core.artifacts.lease import wait_until_free
from sera_core.artifacts.run_records import check_name
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.config import SeraConfig
from sera_core.data.loading import format_counts
from sera_core.errors import InputError
from sera_core.reporting.words import plural

DEMO = "bundled:demo"
WHY_WIDTH = 30
"""Columns that what a step waits for needs at least, to be readable."""
STEP_WIDTH = 12
"""The same of a step, folded."""


def add_run(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera run EXPERIMENT.toml [--name RUN] [--set a.b=value …]`."""
    sub = commands.add_parser(
        "run", parents=[common], help="run all rounds of an experiment; rerunning resumes"
    )
    sub.add_argument("experiment", help="TOML file, or bundled:<name>")
    sub.add_argument("--name", help="run name (default: the file's stem)")
    add_set(sub)
    sub.set_defaults(command=run_command)


def add_demo(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera demo [--quick]`."""
    sub = commands.add_parser(
        "demo", parents=[common], help="run the whole loop on a small real model and real preferences"
    )
    sub.add_argument("--quick", action="store_true", help="smoke test: one self-reviewed round on 8 pairs")
    add_set(sub)
    sub.set_defaults(command=demo_command)


def add_advance(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera advance RUN`."""
    sub = commands.add_parser(
        "advance", parents=[common], help="run one more round; nothing if the run has stopped"
    )
    sub.add_argument("run")
    sub.set_defaults(command=advance_command)


def add_plan(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera plan EXPERIMENT.toml`, or of a run."""
    sub = commands.add_parser(
        "plan", parents=[common], help="show which steps a run would reuse and do, and their cost"
    )
    sub.add_argument("experiment", help="TOML file, bundled:<name>, or a run of the store")
    sub.add_argument("--name", help="run name (default: the file's stem)")
    sub.add_argument(
        "--price-per-hour",
        type=float,
        metavar="PRICE",
        help="price of an hour of this machine, in any currency: the plan says what the run costs",
    )
    add_set(sub)
    sub.set_defaults(command=plan_command)


def add_set(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="a.b=value",
        help="override a setting of the file; may be repeated",
    )


def run_command(args: argparse.Namespace) -> int:
    """Run all rounds; a finished run is only printed."""
    config = load_experiment(args.experiment, args.set)
    return _run_experiment(config, run_name(args), args)


def demo_command(args: argparse.Namespace) -> int:
    """Run the demo, or the quick demo."""
    experiment = f"{DEMO}-quick" if args.quick else DEMO
    name = "demo-quick" if args.quick else "demo"
    return _run_experiment(load_experiment(experiment, args.set), name, args)


def advance_command(args: argparse.Namespace) -> int:
    """Run one round if the run is open, then print the run."""
    records = run_records(open_store(args.store), args.run)
    if records.state() == "open":
        # before starting Prefect, which takes seconds
        wait_until_free(records.store, records.run, print_note)
        from flows.orchestration.embedded_server import prefect_api

        with prefect_api(args.debug), interrupt_on_termination():
            from flows.advance import sera_advance

            sera_advance(args.run, args.store)
    return _print_run(records, args)


def plan_command(args: argparse.Namespace) -> int:
    """Print the plan."""
    if args.price_per_hour is not None and not 0 < args.price_per_hour < math.inf:
        raise InputError(f"--price-per-hour: give a number above 0 (found {args.price_per_hour})")
    found = plan(*_planned(args), args.store)
    found |= _cost(found["seconds"], args.price_per_hour)
    _print_warnings(found)
    if args.json:
        print(json.dumps(found))
        return 0
    if found["note"]:
        print_text(found["note"])
    for side, formats in found["formats"].items():
        print_text(f"data.{side}: read {format_counts(formats)}")
    _print_steps(f"plan of {found['run']}", found["steps"])
    print_table("pairs of each round", PLANNED_COLUMNS, [planned_cells(row) for row in found["rounds"]])
    print_text(forecast(found))
    return 0


def _planned(args: argparse.Namespace) -> tuple[SeraConfig, str]:
    """Configuration and run name: of an experiment, or of a run of the store."""
    given = args.experiment
    if ":" not in given and not Path(given).exists() and given == Path(given).name:
        records = RunStore(open_store(args.store), check_name(given))
        if configs := records.configs():
            name = args.name or given
            if not args.set:
                return configs[-1].settings, check_name(name)
            return with_changes(dict(configs[-1].config), args.set, f"run {given!r}"), check_name(name)
    return load_experiment(given, args.set), run_name(args)


def _print_steps(title: str, steps: list[dict[str, Any]]) -> None:
    """The table of a plan's steps; where it is narrow, what each waits for is left out."""
    narrow = ["round", "step", "status", "tokens", "seconds", "bytes", "memory"]
    columns = [*narrow[:3], "why", *narrow[3:]]

    def rows(names: list[str]) -> list[list[Any]]:
        return [[_step_cell(row, name) for name in names] for row in steps]

    if leaves_room(narrow, rows(narrow), WHY_WIDTH):
        print_folding_table(title, columns, rows(columns), "why")
        return
    numbers = [name for name in narrow if name != "step"]
    if leaves_room(numbers, rows(numbers), STEP_WIDTH):
        print_folding_table(title, narrow, rows(narrow), "step")
    else:
        print_table(title, narrow, rows(narrow), keys=2)
    for row in steps:
        if row["why"].startswith(RESUMES):
            print_text(f"round {row['round']}, {planned_step(row)}: {row['why']}")
    if any(row["status"] == "depends" for row in steps):
        print_text("depends: on steps that are not done yet; a wider terminal, or --json, names them.")


def _step_cell(row: dict[str, Any], name: str) -> Any:
    if name == "step":
        return planned_step(row)
    if name == "seconds" and row[name] is not None:
        return f"{row[name]:,.1f}"
    return gibibytes(row[name]) if name == "memory" else row[name]


def run_name(args: argparse.Namespace) -> str:
    """The run name from --name, else the file's stem."""
    if args.name is not None:
        return check_name(args.name)
    return check_name(Path(args.experiment.removeprefix("bundled:")).stem)


def _run_experiment(config: SeraConfig, name: str, args: argparse.Namespace) -> int:
    started = time.monotonic()
    with finishing(args) as finish:
        worked = finish(config, name)
    if worked and not args.json:
        print_text(f"{time.monotonic() - started:.0f} s in total.")
    return _print_run(RunStore(open_store(args.store), name), args)


def _print_forecast(config: SeraConfig, name: str, args: argparse.Namespace) -> None:
    found = plan(config, name, args.store)
    print_note(forecast(found))
    _print_warnings(found)


def _print_warnings(found: dict[str, Any]) -> None:
    for warning in found["warnings"]:
        print_note(f"sera: warning: {warning}")


@contextmanager
def finishing(args: argparse.Namespace) -> Iterator[Finish]:
    """A function that does all rounds of a run and says whether there was work; the first starts Prefect."""
    with ExitStack() as stack:

        @cache
        def start_prefect() -> None:
            from flows.orchestration.embedded_server import prefect_api

            stack.enter_context(prefect_api(args.debug))
            stack.enter_context(interrupt_on_termination())

        def finish(config: SeraConfig, name: str) -> bool:
            wait_until_free(open_store(args.store), name, print_note)  # before changed settings are recorded
            if not has_work(open_run.open_run(config, name, args.store)):
                return False
            _print_forecast(config, name, args)
            start_prefect()
            from flows.sera import sera

            sera(config, run=name, store=args.store)
            return True

        yield finish


def forecast(found: dict[str, Any]) -> str:
    """A plan in one line: steps, tokens, bytes, time, memory, cost."""
    todo = found["run_now"] + found["depends"]
    if not todo:
        return f"run {found['run']}: all {found['reuse']} steps are in the store; nothing to do."
    seconds = found["seconds"]
    time_needed = "an unknown time (the model is not here yet)" if seconds is None else _minutes(seconds)
    return (
        f"run {found['run']}: {plural(found['reuse'], 'step')} to reuse, {todo} to do; "
        f"about {found['tokens']:,} tokens, {found['bytes'] / 1e6:,.0f} MB, "
        f"{time_needed} on this machine{_at_most(found['memory'])}{_priced(found)} (estimated)."
    )


def _cost(seconds: float | None, price_per_hour: float | None) -> dict[str, Any]:
    """The price of the run, if the hour's price is given; None where the time is unknown."""
    if price_per_hour is None:
        return {}
    cost = None if seconds is None else round(seconds / 3600 * price_per_hour, 4)
    return {"price_per_hour": price_per_hour, "cost": cost}


def _priced(found: dict[str, Any]) -> str:
    if found.get("cost") is None:
        return ""
    return f", a cost of {found['cost']:,.2f} at {found['price_per_hour']:g} an hour"


def _at_most(memory: int | None) -> str:
    return "" if memory is None else f", about {gibibytes(memory)} of memory"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


@contextmanager
def interrupt_on_termination() -> Iterator[None]:
    """Treat Prefect's TerminationSignal as an interrupt; finished steps are in the store."""
    from prefect.exceptions import TerminationSignal

    try:
        yield
    except TerminationSignal as signal:
        raise KeyboardInterrupt from signal


def _print_run(records: RunStore, args: argparse.Namespace) -> int:
    if args.json:
        print(json.dumps(show(records)))
        return 0
    rounds_table(records)
    for line in closing_lines(records):
        print_text(line)
    return 0
