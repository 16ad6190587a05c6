"""`sera evaluate`: win rates between rounds by an independent judge, and how far a judge can be believed."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flows.commands.capability_inputs import count_reasons, read_pairs, reading_from_flags
from flows.commands.output import check_positive, count_lines, print_note, print_result, quiet_stdout
from flows.display.round_card import with_interval
from flows.display.run_view import run_records
from flows.evaluation import CALIBRATED, NOT_CALIBRATED, UNCALIBRATED, calibrate_judge, evaluate_rounds
from sera_core.artifacts.store import open_store
from sera_core.errors import InputError
from sera_core.judges.comparison import FAILURES
from sera_core.judges.named import Asking, NamedJudge, find_judge

MEASURE_WORDS = {
    "agreement": "agreement with people",
    "kappa": "Cohen's kappa",
    "order_flips": "order flips",
    "longer_preferred": "longer preferred",
}


def evaluate(args: argparse.Namespace) -> int:
    """Compare two rounds, or calibrate a judge."""
    _check(args)
    template = None if args.template is None else Path(args.template)
    asking = Asking(args.judge_url, template, args.concurrency, args.retries, args.timeout)
    named = find_judge(args.judge, asking)
    return _calibrate(args, named) if args.calibrate is not None else _compare(args, named)


def _check(args: argparse.Namespace) -> None:
    if (args.run is None) == (args.calibrate is None):
        raise InputError("name a run to evaluate, or pairs with --calibrate; one of the two")
    if args.calibrate is not None and (args.round is not None or args.against is not None):
        raise InputError("--round and --against choose rounds of a run; leave them out with --calibrate")
    check_positive(args, "concurrency", *(["limit"] if args.limit is not None else []))
    if args.retries < 0:
        raise InputError(f"--retries {args.retries}: must be 0 or more")
    if not 0 < args.timeout < 86400:
        raise InputError(f"--timeout {args.timeout}: must be seconds above 0, and less than a day")


def _compare(args: argparse.Namespace, named: NamedJudge) -> int:
    records = run_records(open_store(args.store), args.run)
    with quiet_stdout():
        found = evaluate_rounds(records, args.round, args.against or 0, named, args.limit, print_note)
    print_result(args, found, _compared(found))
    return 0


def _calibrate(args: argparse.Namespace, named: NamedJudge) -> int:
    given, dropped = read_pairs(args.calibrate, reading_from_flags(args))
    with quiet_stdout():
        found = calibrate_judge(args.store, [g.pair for g in given], named, args.limit, print_note)
    found["dropped"] = count_reasons(dropped)
    print_result(args, found, _calibrated(found))
    return 0


def _compared(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"round {found['round']} against round {found['against']} of {found['run']}, judge {found['judge']} "
        f"({_standing(found['calibration'])}), held-out answers to {found['prompts']:,} prompts"
    )
    yield f"  win rate                    {with_interval(found['win_rate'])}; 0.5 is a draw"
    yield f"  win rate at equal length    {with_interval(found['length_controlled'])}"
    yield f"  ties                        {with_interval(found['ties'])}"
    yield f"  order flips                 {with_interval(found['order_flips'])}; each counts as a tie"
    yield from _counted(found)
    if found["equal"]:
        yield f"{found['equal']:,} comparisons are of equal answers: ties, without asking"
    if found["unpaired"]:
        yield f"{found['unpaired']:,} answers have no counterpart in the other round and are left out"


def _counted(found: Mapping[str, Any]) -> Iterator[str]:
    failed = sum(found["failed"].values())
    yield (
        f"{found['comparisons']:,} comparisons, {found['asked']:,} asked in both orders: "
        f"{found['answered']:,} answered, {failed:,} failed and left out" + _tokens(found["tokens"])
    )
    yield from count_lines({f"{name} ({FAILURES[name]})": count for name, count in found["failed"].items()})


def _tokens(tokens: Mapping[str, int] | None) -> str:
    if tokens is None:
        return ""
    return "; tokens: " + ", ".join(f"{count:,} {name}" for name, count in sorted(tokens.items()))


def _standing(calibration: Mapping[str, Any]) -> str:
    """How far the judge can be believed."""
    if calibration["status"] == NOT_CALIBRATED:
        return NOT_CALIBRATED
    agreement = calibration["measures"]["agreement"]["value"]
    return f"{calibration['status']}: agrees with people on {agreement:.1%} of labelled pairs"


def _calibrated(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"judge {found['judge']} on human-labelled pairs: {found['status']}"
    for judge, measures in {found["judge"]: found["measures"], **found["controls"]}.items():
        yield f"  {judge}"
        for name, title in MEASURE_WORDS.items():
            yield f"    {title:<22} {with_interval(measures[name])}"
    yield f"  agreement less word-count's: {with_interval(found['better_than_word_count'])}"
    yield {
        CALIBRATED: "It agrees with people more often than the word count and than chance.",
        UNCALIBRATED: "It is not shown to agree with people more often than the word count and than chance.",
    }[found["status"]]
    yield from _counted(found)
    if found["dropped"]:
        yield f"{sum(found['dropped'].values()):,} rows of the file are left out:"
        yield from count_lines(found["dropped"])
