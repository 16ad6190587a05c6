"""`sera compare`: several arms of one experiment under equal training budgets."""

import argparse
import json
from collections.abc import Iterator
from typing import Any

from flows.commands.run import add_set, finishing, run_name
from flows.commands.tables import print_table, print_text
from flows.compare import check_comparison, run_arms
from flows.display.compared import Compared, as_json, compared, means
from flows.experiments import load_experiment
from sera_core.arms import ARMS
from sera_core.errors import InputError
from sera_core.method.comparison import DIFFERENCES, VALUES, Difference, is_apart
from sera_core.reporting import words

ARM_NAMES, SEEDS = "sera,dpo,random", "0,1,2"
COLUMNS = ("arm", "rounds", "tokens trained", "tokens sampled", "last decision", *VALUES)
NAMES = {"balanced": "balanced accuracy", "reliance": "reliance"}


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
    add_set(sub)
    sub.set_defaults(command=compare_command)


def compare_command(args: argparse.Namespace) -> int:
    """Run what is not done yet, and print the comparison."""
    arms, seeds, name = _words(args.arms), _numbers(args.seeds), run_name(args)
    _refuse_seed(args.set)
    config = load_experiment(args.experiment, args.set)
    check_comparison(config, arms, seeds, name)
    with finishing(args) as finish:
        found = compared(run_arms(config, arms, seeds, name, args.store, finish))
    if args.json:
        print(json.dumps(as_json(found)))
        return 0
    print_table(f"arms of {name}, means over seeds {args.seeds}", COLUMNS, _rows(found))
    for line in _lines(found):
        print_text(line)
    return 0


def _words(given: str) -> list[str]:
    return [word.strip() for word in given.split(",")]


def _numbers(given: str) -> list[int]:
    try:
        seeds = [int(word) for word in _words(given)]
    except ValueError:
        raise InputError(f"--seeds {given!r}: give whole numbers, such as 0,1,2") from None
    if min(seeds) < 0:
        raise InputError(f"--seeds {given!r}: a seed is 0 or more")
    return seeds


def _refuse_seed(sets: list[str]) -> None:
    for change in sets:
        if change.partition("=")[0].strip() == "seed":
            raise InputError(f"--set {change}: the seeds of a comparison are given with --seeds")


def _rows(found: Compared) -> list[list[Any]]:
    rows = []
    for arm in found.arms:
        mean = means(found, arm)
        decisions = ", ".join(f"{decision} ({count})" for decision, count in mean["decisions"].items())
        spent = [f"{mean['rounds']:g}", round(mean["tokens"]), round(mean["sampled"])]
        rows.append([arm, *spent, decisions, *(mean[name] for name in VALUES)])
    return rows


def _lines(found: Compared) -> Iterator[str]:
    feature = words.feature(found.feature)
    yield (
        f"Measured on {len(found.pairs.ids)} held-out pairs under the policy of each run's last round. "
        f"aligned, counter, equal: accuracy where the chosen answer has more, less, as much of {feature}; "
        "balanced: the mean of aligned and counter; reliance: aligned − counter."
    )
    for arm, change in found.differences.items():
        yield f"{arm} against {found.first}: {_difference(change, found.first)}"
    yield from _short(found)
    runs = [run.run for by_seed in found.arms.values() for run in by_seed.values()]
    yield f"Runs: {', '.join(runs)}. `sera show {runs[0]}` shows one."


def _difference(change: Difference, first: str) -> str:
    numbers = "; ".join(
        f"{NAMES[name]} {getattr(change, name).in_words(signed=True)}" for name in DIFFERENCES
    )
    apart = [NAMES[name] for name in DIFFERENCES if is_apart(getattr(change, name))]
    if not apart:
        return f"{numbers}. Not distinguishable from {first}."
    return f"{numbers}. It differs in {' and '.join(apart)}."


def _short(found: Compared) -> Iterator[str]:
    """Runs that ended before all rounds: their arm trained on fewer tokens."""
    for arm, by_seed in list(found.arms.items())[1:]:
        for seed, run in by_seed.items():
            wanted = 1 if ARMS[arm].one_round else len(found.arms[found.first][seed].rounds)
            if len(run.rounds) < wanted:
                yield (
                    f"Unequal budgets: {run.run} stopped with `{run.stop_reason}` after {len(run.rounds)} of "
                    f"{wanted} rounds."
                )
