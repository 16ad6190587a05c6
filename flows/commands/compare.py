"""`sera compare`: several arms of one experiment under equal training budgets."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flows.commands.output import check_positive, print_note
from flows.commands.run import add_set, finishing, run_name
from flows.commands.tables import print_table, print_text
from flows.compare import FinishAll, check_comparison, in_order, run_arms
from flows.display.compare_page import check_page, write_page
from flows.display.compare_words import COLUMNS, differences, measured_on, rows, run_names, unequal
from flows.display.compared import Compared, as_json, compared
from flows.display.compared_alarm import alarm_words
from flows.display.judged_arms import (
    PAIR_COLUMNS,
    STRENGTH_COLUMNS,
    judge_lines,
    judged_json,
    pair_rows,
    strength_rows,
)
from flows.experiments import load_experiment
from flows.judged_arms import JudgedArms, check_judged, judge_arms
from sera_core.arms import ARMS
from sera_core.config import SeraConfig
from sera_core.errors import InputError
from sera_core.judges.named import Asking, NamedJudge, find_judge

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
    sub.add_argument(
        "--judge",
        help="also compare the arms' held-out answers by a judge, as in `sera evaluate`: word-count, "
        "constant, openai:<model> (at $OPENAI_BASE_URL), local:<folder>, reward:<folder>, or module:function",
    )
    sub.add_argument(
        "--mode",
        choices=["pairwise", "single"],
        default="pairwise",
        help="of the judge, as in `sera evaluate`",
    )
    sub.add_argument(
        "--limit", type=int, metavar="K", help="judge the answers to K prompts only, by their ids"
    )
    add_jobs(sub)
    add_set(sub)
    sub.set_defaults(command=compare_command)


def add_jobs(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="do up to N runs at the same time, each in a process with its share of the cores, or a GPU of "
        "its own (default: 1)",
    )


@contextmanager
def finishing_all(args: argparse.Namespace) -> Iterator[FinishAll]:
    """A function that does runs: one after another, or --jobs at a time.

    Raises:
        InputError: --jobs is not positive.
    """
    check_positive(args, "jobs")
    if args.jobs > 1:
        from flows.side_by_side import side_by_side

        with side_by_side(args, args.jobs) as finish_all:
            yield finish_all
    else:
        with finishing(args) as finish:
            yield in_order(finish)


def compare_command(args: argparse.Namespace) -> int:
    """Run what is not done yet, and print the comparison."""
    arms, seeds, name = as_words(args.arms), seeds_of(args.seeds), run_name(args)
    refuse_set(args.set, {"seed": "the seeds of a comparison are given with --seeds"})
    config = load_experiment(args.experiment, args.set)
    check_comparison(config, arms, seeds, name)
    named = _judge(args, config)
    if args.out is not None:
        check_page(Path(args.out))
    with finishing_all(args) as finish_all:
        runs = run_arms(config, arms, seeds, name, args.store, finish_all)
    found = compared(runs)
    judged = None if named is None else judge_arms(runs, named, args.limit, print_note)
    page = None if args.out is None else write_page(found, name, Path(args.out), judged)
    if args.json:
        print(json.dumps(as_json(found) | ({} if judged is None else {"judged": judged_json(judged)})))
    else:
        print_comparison(found, name, args.seeds, page, judged)
    return 0


def _judge(args: argparse.Namespace, config: SeraConfig) -> NamedJudge | None:
    """The judge, if one is named; refused before any run."""
    if args.judge is None:
        if args.limit is not None or args.mode != "pairwise":
            raise InputError("--limit and --mode are about a judge; name one with --judge")
        return None
    if args.limit is not None:
        check_positive(args, "limit")
    check_judged(config)
    return find_judge(args.judge, Asking(single=args.mode == "single"))


def print_comparison(
    found: Compared, name: str, seeds: str, page: Path | None, judged: JudgedArms | None = None
) -> None:
    """Print the table, the differences, what a judge says, and where the page is."""
    print_table(f"arms of {name}, means over seeds {seeds}", COLUMNS, rows(found))
    for line in (measured_on(found), *differences(found), *alarm_words(found.alarms), *unequal(found)):
        print_text(line)
    if judged is not None:
        print_table("answers by the judge", PAIR_COLUMNS, pair_rows(judged))
        print_table(f"against {found.first}, all pairs together", STRENGTH_COLUMNS, strength_rows(judged))
        for line in judge_lines(judged):
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
