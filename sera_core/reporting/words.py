"""Names of the records in words, and numbers as a reader wants them."""

import math
from collections.abc import Mapping
from typing import Any

from sera_core.data.parsing import KINDS

Rate = Mapping[str, Any]
"""A rate as it stands in records: value, low, high, n."""

MIN_PAIRS = 30
"""Fewer observations than this are said to be too few to tell (METHOD: a verdict needs power)."""

DECISIONS = {
    "promote": "the new policy becomes the head, from which the next round starts",
    "hold": "the head stays as it was; the next round starts from it again",
    "roll_back": "the head returns to the best round, and the run goes on from there",
    "stop": "there is no further round",
}

VERDICTS = {
    "converged": "nothing changes any more, and there are enough pairs to say so",
    "improving": "the policy ranks held-out pairs better than the last head",
    "degrading": "the policy ranks held-out pairs worse than the last head",
    "still_moving": "accuracy stands still, but the selection or the margins still move",
    "not_enough_evidence": "the evidence does not tell",
}

STOPS = {
    "converged": "the evidence shows, with enough pairs, that a further round changes nothing",
    "max_rounds": "the limit on rounds was reached; raise limits.rounds and run the same name again to go on",
    "degraded": "further rounds made the policy worse, so the best round stands",
    "no_pairs": "no pairs were left to train on",
    "budget": "a limit on tokens or hours was reached; raise it and run the same name again to go on",
    "reviewer": "a person stopped the run",
}

ALARMS = {
    "amplified": "Raised: the selection amplified length.",
    "not_enough_evidence": "Too few pairs to tell: every part needs at least 30 pairs.",
    "counter_side_holds": "Not raised: where the better answer is the shorter one, accuracy did not fall.",
    "both_sides_fall": "Not raised: accuracy fell on both sides: the policy got worse, whatever the length.",
    "selection_not_skewed": "Not raised: accuracy fell where the better answer is the shorter one, but "
    "the kept pairs do not favour longer answers.",
}

STAGES = {
    "data": "reading",
    "render": "token ids",
    "sample": "sampling",
    "pair": "pairing",
    "select": "selection",
    "mix": "mixing",
}

REASONS = {
    "duplicate": "the same row again",
    "equal": "chosen and rejected are the same",
    "overlap": "its prompt is on a side kept apart from training",
    "over_limit": "over the asked number of pairs",
    "tied_ratings": "no completion is rated lower than another",
    **KINDS,
    "empty": "an empty answer",
    "too_long": "an answer over the limit",
    "prompt_too_long": "a prompt over the limit",
    "kept": "kept",
    "relabelled": "kept, with chosen and rejected swapped",
    "non_finite": "its margin is not a number",
    "not_preferred": "the policy does not prefer the chosen answer clearly",
    "below_cut": "preferred, but beyond the cut",
    "above_cut": "control: not among the least preferred",
    "not_drawn": "not in the random draw",
    "over_share": "no room in the mix at the asked share",
    "no_valid_response": "every answer empty, cut by the limit, or without a finite reward",
    "one_distinct_response": "fewer than two different answers",
    "tie": "all answers have the same reward",
    "equal_text": "best and worst answer are the same text",
}


def stage(name: str) -> str:
    """A ledger's stage in words; the side behind it (`render_heldout`) is said too."""
    step, _, side = name.partition("_")
    sides = {"heldout": "held-out side", "test": "test side", "prompts": "prompt-only side"}
    return STAGES.get(step, step) + (f", {sides.get(side, side)}" if side else "")


def finite(value: Any) -> bool:
    """Whether it is a number that can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)


def number(value: Any, digits: int = 3, signed: bool = False) -> str:
    """A number with fixed digits; a dash where it was not measured; text as it is."""
    if isinstance(value, str):
        return value
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    return text.replace("-", "−")


def count(value: int | None) -> str:
    """A whole number with thousands set apart."""
    return "–" if value is None else f"{value:,}"


def interval(rate: Rate | None, digits: int = 3, signed: bool = False) -> str:
    """A value with its 95 % interval, or a dash where it was not measured."""
    if not rate or rate.get("value") is None:
        return "–"
    value = number(rate["value"], digits, signed)
    if rate.get("low") is None or rate.get("high") is None:
        return value
    return f"{value} [{number(rate['low'], digits, signed)}, {number(rate['high'], digits, signed)}]"


def percent(value: float | None) -> str:
    """A share as whole per cent."""
    return "–" if value is None else f"{100 * value:.0f} %"


def plural(amount: int, noun: str) -> str:
    """`1 pair`, `1,200 pairs`."""
    return f"{amount:,} {noun}" + ("" if amount == 1 else "s")


def too_few(rate: Rate | None) -> bool:
    """Whether a measured rate rests on too few observations."""
    return rate is not None and rate.get("value") is not None and rate["n"] < MIN_PAIRS


def above_zero(rate: Rate | None) -> bool:
    """Whether the whole interval lies above 0."""
    return rate is not None and rate.get("low") is not None and rate["low"] > 0
