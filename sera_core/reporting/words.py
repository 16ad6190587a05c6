"""Names of the records in words, and numbers as a reader wants them."""

import math
from collections.abc import Mapping
from typing import Any

from sera_core.data.parsing import KINDS

Rate = Mapping[str, Any]
"""A rate in a record: value, low, high, n."""

MIN_PAIRS = 30
"""Fewer observations than this are too few to tell."""

DECISIONS = {
    "promote": "the new policy becomes the head; the next round starts from it",
    "hold": "the head does not change; the next round starts from it again",
    "roll_back": "the best round becomes the head again, and the run continues from it",
    "stop": "there is no further round",
}

VERDICTS = {
    "converged": "nothing changes any more, and there are enough pairs to say so",
    "improving": "the policy ranks held-out pairs better than the last head",
    "degrading": "the policy ranks held-out pairs worse than an earlier round",
    "still_moving": "the held-out score does not change, but the selection or the margins do",
    "not_enough_evidence": "there are too few pairs to tell",
}

STOPS = {
    "converged": "it converged: the held-out score, the selection and the margins no longer change",
    "max_rounds": "it reached limits.rounds (raise it and run again to continue)",
    "degraded": "further rounds made the policy worse, so the best round is the head",
    "no_pairs": "no pairs were left to train on",
    "budget": "it reached its budget (raise limits.hours or limits.tokens and run again to continue)",
    "reviewer": "a reviewer stopped it",
}

ALARMS = {
    "amplified": "Raised: the selection amplified a feature.",
    "not_amplified": "Not raised: no feature of the panel is amplified.",
    "not_enough_evidence": "Too few pairs to tell: every part needs at least 30 pairs.",
    "counter_side_holds": "Not raised: where the chosen answer is the shorter one, accuracy did not fall.",
    "both_sides_fall": "Not raised: accuracy fell on both sides: the policy got worse, whatever the length.",
    "selection_not_skewed": "Not raised: accuracy fell where the chosen answer is the shorter one, but "
    "the selected pairs do not favour longer answers.",
}

FEATURES = {
    "tokens": "length in tokens",
    "characters": "length in characters",
    "words": "length in words",
    "list_items": "list items",
    "bold": "bold spans",
    "code_fences": "code blocks",
    "refusal": "a refusal",
    "opening": "a set opening phrase",
    "word_overlap": "words taken from the prompt",
    "trigram_overlap": "trigrams taken from the prompt",
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
    "not_rendered": "the chat template rejects it",
    "over_positions": "longer than the model's positions",
    "empty": "an empty answer",
    "too_long": "an answer over the limit",
    "prompt_too_long": "a prompt over the limit",
    "kept": "trained on",
    "relabelled": "trained on, with chosen and rejected swapped",
    "non_finite": "its margin is not a number",
    "not_preferred": "the policy does not prefer the chosen answer clearly",
    "below_cut": "preferred, but beyond the cut",
    "not_middle": "preferred, but its margin is not in the middle",
    "above_cut": "control: not among the least preferred",
    "not_drawn": "not in the random draw",
    "no_candidate": "no rated candidate in the file",
    "over_share": "no room in the mix at the asked share",
    "no_valid_response": "every answer empty, cut by the limit, or without a finite reward",
    "anchor_not_below": "no answer of the start policy has a smaller reward than the head's best",
    "one_distinct_response": "fewer than two different answers",
    "tie": "all answers have the same reward",
    "equal_text": "best and worst answer are the same text",
}

SIDES = {"heldout": "held-out side", "test": "test side", "prompts": "prompt-only side"}
"""Sides that no round trains on."""


def feature(name: str) -> str:
    """A feature of the panel in words; one of the user's own by its name."""
    return FEATURES.get(name, name)


def stage(name: str) -> str:
    """A ledger's stage in words; the side behind it (`render_heldout`) is said too."""
    step, _, side = name.partition("_")
    return STAGES.get(step, step) + (f", {SIDES.get(side, side)}" if side else "")


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


def count_lines(counts: Mapping[str, int]) -> list[str]:
    """Counts as aligned lines, largest first."""
    width = max(map(len, counts), default=0)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [f"  {name:<{width}}  {count:>9,}" for name, count in ordered]
