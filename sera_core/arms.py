"""The arms of `sera compare`: an experiment with a few other settings, in the same loop.

An arm changes what a round trains on, never how it is trained or measured. Round 0 has nothing to review by,
so it is the same in all of them.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sera_core.errors import InputError

SERA = "sera"
"""The experiment as it is."""


@dataclass(frozen=True)
class Arm:
    """The settings in which an arm differs from the experiment."""

    settings: Mapping[str, Mapping[str, Any]]
    """By section; those that have no effect in the experiment are left out."""
    shows: str
    source: str
    first_round: int = 1
    """The first round in which it differs."""
    one_round: bool = False
    """Whether the tokens of all rounds are spent in one round."""


def _selection(rule: str) -> dict[str, dict[str, Any]]:
    return {"select": {"rule": rule}, "select_generated": {"rule": rule}}


_ALL_HUMAN = {"select": {"rule": "none"}, "mix": {"shares": [0.0]}}
_REVIEWS = "a control requested in the reviews of the SeRA paper"

ARMS: dict[str, Arm] = {
    SERA: Arm({}, "The experiment as it is.", "SeRA, arXiv 2410.09362"),
    "dpo": Arm(
        _ALL_HUMAN,
        "All human pairs in every round and no generated ones: what more training alone does.",
        "DPO, arXiv 2305.18290",
    ),
    "dpo-single": Arm(
        _ALL_HUMAN,
        "All human pairs in one round that trains as long as all rounds together: what rounds do.",
        "DPO, arXiv 2305.18290",
        one_round=True,
    ),
    "random": Arm(
        _selection("random"),
        "As many pairs as the selection keeps, drawn at random: whether the margins choose well.",
        _REVIEWS,
    ),
    "bottom": Arm(
        _selection("bottom"),
        "As many pairs as the selection keeps, those with the smallest margins: its opposite.",
        "a control of ours",
    ),
    "middle": Arm(
        _selection("middle"),
        "As many pairs, those with margins around the median: whether large ones are the right ones.",
        "arXiv 2510.13212, by the margin alone",
    ),
    "relabel": Arm(
        _selection("relabel"),
        "No pair is dropped; one with a negative margin is swapped: whether dropping pairs matters.",
        _REVIEWS,
    ),
    "human-only": Arm(
        {"mix": {"shares": [0.0]}}, "Selected human pairs alone: what generated pairs add.", _REVIEWS
    ),
    "generated-only": Arm(
        {"mix": {"shares": [1.0]}}, "Generated pairs alone after round 0: what human pairs add.", _REVIEWS
    ),
    "gamma-0": Arm(
        {"review": {"gamma": 0.0}},
        "Margins of the head alone: what past rounds add to them.",
        _REVIEWS,
        first_round=2,
    ),
    "sera-crossfit": Arm(
        {"review": {"crossfit": 2}},
        "Human pairs reviewed by policies that were not trained on them: whether margins are memories. The "
        "rounds train for equal tokens; its fold policies train for as many again.",
        "cross-fitting, an option of ours",
    ),
}


def refuse_unknown_arms(names: Sequence[str]) -> None:
    """Refuse unknown or repeated arms, and fewer than two.

    Raises:
        InputError: names the first, and the nearest arm.
    """
    for name in names:
        if name not in ARMS:
            close = difflib.get_close_matches(name, ARMS, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(ARMS)}"
            raise InputError(f"--arms {name!r}: no such arm; {hint}")
    if len(set(names)) < max(2, len(names)):
        raise InputError(f"--arms {','.join(names)}: name at least two different arms, each once")
    if ARMS[names[0]].one_round:
        raise InputError(
            f"--arms {','.join(names)}: {names[0]} trains for the tokens of the first arm's rounds, so it "
            "cannot be the first; name it after another"
        )
