"""What a judge said, in words: win rates between two rounds, and a judge's calibration."""

from collections.abc import Iterator, Mapping
from typing import Any

from flows.display.round_card import with_interval
from flows.evaluation import CALIBRATED, NOT_CALIBRATED, UNCALIBRATED
from sera_core.judges.comparison import FAILURES
from sera_core.reporting import words

MEASURE_WORDS = {
    "agreement": "agreement with people",
    "kappa": "Cohen's kappa",
    "order_flips": "order flips",
    "longer_preferred": "longer preferred",
}


def compared_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of `sera evaluate RUN`."""
    yield (
        f"round {found['round']} against {_other(found)} of {found['run']}, judge {found['judge']} "
        f"({standing(found['calibration'])}), {_answers(found)}"
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


def _other(found: Mapping[str, Any]) -> str:
    return "the start policy" if found["against"] == "start" else f"round {found['against']}"


def _answers(found: Mapping[str, Any]) -> str:
    prompts = words.plural(found["prompts"], "prompt")
    if found["answers"] == "held-out":
        return f"held-out answers to {prompts}"
    return f"answers to {prompts} of {found['answers']}"


def _counted(found: Mapping[str, Any]) -> Iterator[str]:
    failed = sum(found["failed"].values())
    yield (
        f"{found['comparisons']:,} comparisons, {found['asked']:,} asked in both orders: "
        f"{found['answered']:,} answered, {failed:,} failed and left out" + _tokens(found["tokens"])
    )
    yield from words.count_lines(
        {f"{name} ({FAILURES[name]})": count for name, count in found["failed"].items()}
    )


def _tokens(tokens: Mapping[str, int] | None) -> str:
    if tokens is None:
        return ""
    return "; tokens: " + ", ".join(f"{count:,} {name}" for name, count in sorted(tokens.items()))


def standing(calibration: Mapping[str, Any]) -> str:
    """How far the judge can be believed."""
    if calibration["status"] == NOT_CALIBRATED:
        return NOT_CALIBRATED
    agreement = calibration["measures"]["agreement"]["value"]
    return f"{calibration['status']}: agrees with people on {agreement:.1%} of labelled pairs"


def calibrated_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """The lines of `sera evaluate --calibrate`."""
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
        yield from words.count_lines(found["dropped"])
