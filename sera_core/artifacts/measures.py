"""Types of the metrics in records, checked when a record is read.

A metric is a number, a rate (`value`, `low`, `high`, `n`), text, or a list or table of these. A metric that
was not measured is null; an infinite number is a string (`"inf"`), as `canonical.finite` writes it.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator

_RATES = frozenset(
    {
        "heldout/accuracy_change",
        "heldout/chosen_longer",
        "heldout/margin",
        "heldout/margin_change",
        "heldout/preferred_longer",
        "heldout/rewards/accuracies",
        "samples/cut_by_limit",
        "samples/kl_previous",
        "samples/kl_reference",
        "samples/tokens",
        "score",
        "since_round_0",
        "test/chosen_longer",
        "test/margin",
        "test/preferred_longer",
        "test/rewards/accuracies",
        "trained/margin",
        "trained/rewards/accuracies",
    }
)
_RATED = ("heldout/reliance/", "test/reliance/")
"""Beginnings of names of rates: feature and quantity follow."""
_TABLES = frozenset({"heldout/accuracy_by_length", "test/accuracy_by_length"})
"""Metrics that are a dictionary of rates."""
_TEXTS = frozenset(
    {
        "alarm",
        "alarm_reason",
        "best_reason",
        "decision",
        "reason",
        "score_metric",
        "stop_reason",
        "verdict",
        "verdict_reason",
        "weights/result",
        "weights/start",
    }
)
_TRUTHS = frozenset({"ask"})
_COUNTED = ("human/", "generated/", "prompts/", "tokens/")
"""Prefixes of metrics that count pairs, prompts and tokens."""
_COUNTS = frozenset(
    {"pairs/human", "pairs/generated", "review/pairs", "tokens", "flipped", "flipped/dropped"}
)
_ROUNDS = frozenset({"best_round", "head_after"})
"""Numbers of rounds; null where there is none."""
_NUMBERS = frozenset(
    {
        "consistency",
        "flipped/dropped_by_chance",
        "generated_share",
        "ks",
        "margin_noise_nats",
        "overlap",
        "review/crossfit_mean",
        "review/head_mean",
        "seconds",
        "sign_changes",
        "target_share",
        "train_loss",
    }
)
_INFINITE = ("inf", "-inf")


def checked_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics if each has the type of its name.

    Raises:
        ValueError: one has not; the message names it.
    """
    for name, value in metrics.items():
        if not _fits(name, value):
            raise ValueError(f"metric {name!r}: expected {_wanted(name)}, found {value!r:.60}")
    return metrics


Metrics = Annotated[dict[str, Any], AfterValidator(checked_metrics)]
"""Metrics by name; a metric that this file does not list may have any JSON type."""


def _fits(name: str, value: Any) -> bool:
    if _is_rated(name):
        return value is None or is_rate(value)
    if name in _TABLES:
        return value is None or (isinstance(value, dict) and all(map(is_rate, value.values())))
    if name in _TEXTS:
        return value is None or isinstance(value, str)
    if name in _TRUTHS:
        return isinstance(value, bool)
    if name in _ROUNDS:
        return value is None or (_is_whole(value) and value >= 0)
    if _is_count(name):
        return _is_whole(value) and value >= 0
    return name not in _NUMBERS or value is None or _is_number(value)


def _wanted(name: str) -> str:
    if _is_rated(name):
        return "a rate (value, low, high, n)"
    kinds = (
        (_TABLES, "rates by name"),
        (_TEXTS, "text"),
        (_TRUTHS, "true or false"),
        (_ROUNDS, "the number of a round"),
    )
    expected = next((what for names, what in kinds if name in names), "a number")
    return "a count" if _is_count(name) else expected


def is_rate(value: Any) -> bool:
    """Whether the value is a rate: a dictionary with `value`, `low`, `high` and `n` (observations)."""
    if not isinstance(value, Mapping) or not {"value", "low", "high", "n"} <= value.keys():
        return False
    numbers = (held for name, held in value.items() if name != "n")
    return _is_whole(value["n"]) and all(held is None or _is_finite(held) for held in numbers)


def _is_rated(name: str) -> bool:
    return name in _RATES or name.startswith(_RATED)


def _is_count(name: str) -> bool:
    return name in _COUNTS or name.startswith(_COUNTED)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and math.isfinite(value)


def _is_number(value: Any) -> bool:
    return _is_finite(value) or (isinstance(value, str) and value in _INFINITE)
