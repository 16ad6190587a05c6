"""The arms of `sera compare`: an experiment with a few other settings, in the same loop.

An arm changes what a round trains on, how its rewards are computed, or the loss, never how a round is
measured. Round 0 has nothing to review by, so it is the same in all of them, but for `dpo-single` and those
with another loss.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sera_core.errors import InputError
from sera_core.judges.names import IMPLICIT

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
    """The first round in which it does what it is for."""
    one_round: bool = False
    """Whether the tokens of all rounds are spent in one round."""
    needs_rater: bool = False
    """Whether the experiment must name a rater (`pairing.by`)."""


def _selection(rule: str) -> dict[str, dict[str, Any]]:
    return {"select": {"rule": rule}, "select_generated": {"rule": rule}}


def _generated_only(share: float) -> dict[str, dict[str, Any]]:
    """No selection, and a fixed share of pairs of the policy's own responses."""
    return {"select": {"rule": "none"}, "select_generated": {"rule": "none"}, "mix": {"shares": [share]}}


def _loss(*losses: str, **settings: Any) -> dict[str, dict[str, Any]]:
    return {"train": {"losses": losses, "loss_weights": (), **settings}}


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
    "iterative-dpo": Arm(
        _generated_only(1.0),
        "All pairs that the rater orders and no human ones after round 0: the usual iteration.",
        "iterative DPO with a reward model, as in arXiv 2312.11456",
        needs_rater=True,
    ),
    "implicit": Arm(
        {"pairing": {"by": IMPLICIT}},
        "Responses ordered by the implicit reward: what the rater adds.",
        _REVIEWS,
        needs_rater=True,
    ),
    "dice": Arm(
        {
            **_generated_only(0.5),
            "pairing": {"by": IMPLICIT},
            "review": {"gamma": 0.0, "length_penalty": "dice"},
        },
        "The closest peer: implicit rewards with a length penalty, half of each round human pairs, no "
        "selection.",
        "DICE, arXiv 2406.09760",
    ),
    "spa": Arm(
        {
            **_generated_only(1.0),
            "pairing": {"by": IMPLICIT},
            "sampling": {"responses": 2},
            "review": {"gamma": 0.0, "reference": "initial"},
            "train": {"reference": "previous"},
        },
        "Two responses a prompt, ordered by the implicit reward, trained against the previous policy. SPA's "
        "smoothing of the least confident pairs is left out.",
        "SPA, arXiv 2406.04412, read second-hand",
    ),
    "anchored": Arm(
        {"pairing": {"rule": "best-anchored"}},
        "The rejected response of a generated pair is the start policy's worst: whether pairs stay apart as "
        "the policy improves.",
        "anchored rejection, arXiv 2508.06026, read second-hand",
    ),
    "cream": Arm(
        {
            **_generated_only(1.0),
            "pairing": {"by": IMPLICIT},
            "review": {"gamma": 0.3, "ensemble": "last-two"},
            **_loss("sigmoid", label_smoothing="consistency"),
        },
        "Generated pairs alone, their labels smoothed as far as the last two heads rank the responses "
        "differently: whether to doubt labels or to drop pairs. Both heads' rewards order the pairs, in "
        "CREAM those of the newest.",
        "CREAM, arXiv 2410.12735, read second-hand",
        first_round=2,
    ),
    "ld-dpo": Arm(
        _loss("sigmoid", ld_alpha=0.5),
        "Tokens of a longer answer beyond the length of the shorter one count half: what the selection adds "
        "to a loss that depends less on length.",
        "LD-DPO, arXiv 2409.06411",
        first_round=0,
    ),
    "wpo": Arm(
        _loss("sigmoid", pair_weights="wpo"),
        "Pairs weighted by how probable the policy finds them: whether to weigh pairs or to drop them.",
        "WPO, arXiv 2406.11827",
        first_round=0,
    ),
    "rpo": Arm(
        _loss("sigmoid", "sft"),
        "The likelihood of chosen answers added to the loss: whether it keeps them likely.",
        "RPO, arXiv 2404.19733",
        first_round=0,
    ),
    "sppo": Arm(
        _loss("sppo_hard"),
        "Rewards drawn to fixed values instead of apart: whether that keeps chosen answers likely.",
        "SPPO with hard labels, arXiv 2405.00675",
        first_round=0,
    ),
    "curry": Arm(
        {**_ALL_HUMAN, "mix": {"shares": [0.0], "order": "easy-first"}},
        "As dpo, but the pairs with the largest margins first: whether their order matters.",
        "Curry-DPO, arXiv 2403.07230, which orders by ratings",
    ),
    "bees": Arm(
        {"review": {"gamma": 0.5, "ensemble": "last-two"}},
        "Margins of the last two heads fused with equal weights.",
        "BeeS, arXiv 2502.14560, with p = σ(margin): its fusion Πp/(Πp + Π(1−p)) orders pairs by the sum of "
        "margins",
        first_round=2,
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
    "variance": Arm(
        {"select_generated": {"rule": "prompt-variance"}},
        "As many generated pairs, of the prompts whose responses differ most: whether the prompt or the pair "
        "should be chosen.",
        "preference variance, arXiv 2510.13022, read second-hand",
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
