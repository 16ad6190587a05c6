"""`sera evaluate`: win rates between rounds by an independent judge, and how far a judge can be believed."""

import argparse
from pathlib import Path

from flows.commands.capability_inputs import count_reasons, read_pairs, reading_from_flags
from flows.commands.output import check_positive, print_note, print_result, quiet_stdout
from flows.display.judge_words import calibrated_lines, compared_lines
from flows.display.run_view import run_records
from flows.evaluation import calibrate_judge, evaluate_rounds
from sera_core.artifacts.store import open_store
from sera_core.errors import InputError
from sera_core.judges.named import Asking, NamedJudge, find_judge


def evaluate(args: argparse.Namespace) -> int:
    """Compare two rounds, or calibrate a judge."""
    _check(args)
    template = None if args.template is None else Path(args.template)
    single = args.mode == "single"
    asking = Asking(args.judge_url, template, args.concurrency, args.retries, args.timeout, single)
    named = find_judge(args.judge, asking)
    return _calibrate(args, named) if args.calibrate is not None else _compare(args, named)


def _check(args: argparse.Namespace) -> None:
    if (args.run is None) == (args.calibrate is None):
        raise InputError("name a run to evaluate, or pairs with --calibrate; one of the two")
    chosen = (args.round, args.against, args.prompts)
    if args.calibrate is not None and any(value is not None for value in chosen):
        raise InputError(
            "--round, --against and --prompts are about a run's answers; leave them out with --calibrate"
        )
    check_positive(args, "concurrency", *(["limit"] if args.limit is not None else []))
    if args.retries < 0:
        raise InputError(f"--retries {args.retries}: must be 0 or more")
    if not 0 < args.timeout < 86400:
        raise InputError(f"--timeout {args.timeout}: must be seconds above 0, and less than a day")


def _compare(args: argparse.Namespace, named: NamedJudge) -> int:
    records = run_records(open_store(args.store), args.run)
    with quiet_stdout():
        found = evaluate_rounds(
            records, args.round, _against(args.against), named, args.limit, print_note, args.prompts
        )
    print_result(args, found, compared_lines(found))
    return 0


def _against(given: str | None) -> int | None:
    """Number of the other round; None for the start policy."""
    if given == "start":
        return None
    try:
        return int(given or 0)
    except ValueError:
        raise InputError(f"--against {given!r}: give the number of a round, or start") from None


def _calibrate(args: argparse.Namespace, named: NamedJudge) -> int:
    given, dropped = read_pairs(args.calibrate, reading_from_flags(args))
    with quiet_stdout():
        found = calibrate_judge(args.store, [g.pair for g in given], named, args.limit, print_note)
    found["dropped"] = count_reasons(dropped)
    print_result(args, found, calibrated_lines(found))
    return 0
