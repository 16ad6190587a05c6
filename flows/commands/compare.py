"""`sera compare`: several arms of one experiment under equal training budgets."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.commands.run import add_set, finishing, run_name
from flows.commands.tables import print_table, print_text
from flows.compare import check_comparison, run_arms
from flows.display.compare_page import check_page, write_page
from flows.display.compare_words import COLUMNS, differences, measured_on, rows, run_names, unequal
from flows.display.compared import Compared, as_json, compared
from flows.display.compared_alarm import alarm_words
from flows.experiments import load_experiment
from sera_core.arms import ARMS
from sera_core.errors import InputError

ARM_NAMES, SEEDS = "sera,dpo,random", "0,1,2"


def add_compare(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera compare EXPERIMENT.toml [--arms a,b] [--seeds 0,1] [--name NAME]`."""
    sub = commands.add_parser(
        "compare",
        parents=[common],
        help="run arms of an experiment with equal training tokens, and compare them; rerunning resumes",
        epilog="; ".join(f"{name}: {arm.shows.rstrip('.')}" for name, arm in ARMS.items()) + ".",
    )
    sub.add_argument("experiment", help="TOML file, or bundled:<name>")
    sub.add_argument(
        "--arms",
        default=ARM_NAMES,
        help=f"arms, of {', '.join(ARMS)}; the first one sets the rounds and training tokens of the others "
        f"(default: {ARM_NAMES})",
    )
    sub.add_argument("--seeds", default=SEEDS, help=f"seeds, in place of the experiment's (default: {SEEDS})")
    sub.add_argument("--name", help="the runs are named NAME-ARM-SEED (default: the file's stem)")
    sub.add_argument("--out", metavar="FOLDER", help="also write the comparison to FOLDER/compare.html")
    add_set(sub)
    sub.set_defaults(command=compare_command)


def compare_command(args: argparse.Namespace) -> int:
    """Run what is not done yet, and print the comparison."""
    arms, seeds, name = as_words(args.arms), seeds_of(args.seeds), run_name(args)
    refuse_set(args.set, {"seed": "the seeds of a comparison are given with --seeds"})
    config = load_experiment(args.experiment, args.set)
    check_comparison(config, arms, seeds, name)
    if args.out is not None:
        check_page(Path(args.out))
    with finishing(args) as finish:
        found = compared(run_arms(config, arms, seeds, name, args.store, finish))
    page = None if args.out is None else write_page(found, name, Path(args.out))
    if args.json:
        print(json.dumps(as_json(found)))
    else:
        print_comparison(found, name, args.seeds, page)
    return 0


def print_comparison(found: Compared, name: str, seeds: str, page: Path | None) -> None:
    """Print the table, the differences and where the page is."""
    print_table(f"arms of {name}, means over seeds {seeds}", COLUMNS, rows(found))
    for line in (measured_on(found), *differences(found), *alarm_words(found.alarms), *unequal(found)):
        print_text(line)
    runs = run_names(found)
    print_text(f"Runs: {', '.join(runs)}. `sera show {runs[0]}` shows one.")
    if page is not None:
        print_text(f"wrote {page}")


def as_words(given: str) -> list[str]:
    """Words between commas."""
    return [word.strip() for word in given.split(",")]


def seeds_of(given: str) -> list[int]:
    """Seeds between commas."""
    try:
        seeds = [int(word) for word in as_words(given)]
    except ValueError:
        raise InputError(f"--seeds {given!r}: give whole numbers, such as 0,1,2") from None
    if min(seeds) < 0:
        raise InputError(f"--seeds {given!r}: a seed is 0 or more")
    return seeds


def refuse_set(sets: Sequence[str], elsewhere: Mapping[str, str]) -> None:
    """Refuse overrides of settings that the command itself sets.

    Args:
        sets: the values of --set.
        elsewhere: how to set it instead, by setting.
    """
    for change in sets:
        if (why := elsewhere.get(change.partition("=")[0].strip())) is not None:
            raise InputError(f"--set {change}: {why}")
