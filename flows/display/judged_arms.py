"""What a judge says of a comparison's arms: as table rows, lines and JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from flows.display.judge_words import standing
from flows.display.round_card import with_interval
from flows.judged_arms import JudgedArms
from sera_core.artifacts.canonical import finite
from sera_core.method.win_rates import Rate

PAIR_COLUMNS = ("answers of", "against", "win rate", "at equal length", "ties", "order flips", "no verdict")
STRENGTH_COLUMNS = ("arm", "win rate against the first arm", "at equal style")


def pair_rows(found: JudgedArms) -> list[list[Any]]:
    """A row of PAIR_COLUMNS for each pair of arms."""
    return [
        [pair.first, pair.second, *map(_shown, (pair.win_rate, pair.equal_length)), _share(pair.ties),
         _share(pair.order_flips), pair.failed]
        for pair in found.pairs
    ]  # fmt: skip


def strength_rows(found: JudgedArms) -> list[list[Any]]:
    """A row of STRENGTH_COLUMNS for each arm but the first."""
    return [[arm, _shown(found.strengths[arm]), _shown(found.at_equal_style[arm])] for arm in found.arms[1:]]


def judge_lines(found: JudgedArms) -> Iterator[str]:
    """Who judged, and how to read the tables."""
    yield f"Judge {found.judge} ({standing(found.calibration)}); answers of each run's last round."
    yield (
        "Win rates against the first arm are expected ones, from all pairs of arms together "
        "(Bradley-Terry); at equal style: words, headings, list items and bold text held equal. 0.5 is a "
        "draw; 95 % intervals resample prompts."
    )


def judged_json(found: JudgedArms) -> dict[str, Any]:
    """As in `sera compare --judge --json`."""
    return finite(
        {
            "judge": found.judge,
            "calibration": dict(found.calibration),
            "pairs": [asdict(pair) for pair in found.pairs],
            "strengths": {arm: asdict(rate) for arm, rate in found.strengths.items()},
            "at_equal_style": {arm: asdict(rate) for arm, rate in found.at_equal_style.items()},
        }
    )


def _shown(rate: Rate) -> str:
    return with_interval(finite(asdict(rate)))


def _share(rate: Rate) -> str:
    return "–" if rate.value != rate.value else f"{rate.value:.3f}"
