"""The alarm: has training on the pairs that were kept made the policy lean on a feature of the panel?

For each feature, by `diagnostics.amplification_alarm`, each condition by a 95 % bootstrap interval: on
held-out pairs whose chosen answer has *less* of the feature accuracy fell; where it has more, accuracy did
not fall; and among the kept pairs the chosen answer has more of it more often than among all pairs. The
policy is compared with one trained on a random selection of the same size where there is one: then all that
differs is which pairs were kept. Else it is compared with the last head, from which it differs by a whole
round.

The thresholds are fixed: nothing here is a setting. Features are not corrected for each other, since one that
is amplified must not be hidden by others that are watched; three conditions at once keep false alarms rare.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from sera_core.method.diagnostics import Alarm, amplification_alarm
from sera_core.method.win_rates import Rate

LEVEL = 0.95
"""Of each interval."""
RANDOM, HEAD = "a random selection of the same size", "the last head"


@dataclass(frozen=True)
class PanelAlarm:
    """The alarm of every feature of the panel."""

    alarms: dict[str, Alarm]
    """By feature, each with its numbers and its reason."""
    comparison: str
    """What the policy was compared with: RANDOM or HEAD."""
    raised: tuple[str, ...]
    """Features it was raised for."""
    open: tuple[str, ...]
    """Features with too few pairs on a side (or kept) to tell."""
    sentence: str
    """All of it in words."""

    @property
    def state(self) -> str:
        """`amplified`; `not_enough_evidence` if no feature has enough pairs; else `not_amplified`."""
        if self.raised:
            return "amplified"
        return "not_enough_evidence" if len(self.open) == len(self.alarms) else "not_amplified"


def panel_alarm(
    *,
    heldout: Mapping[str, Float[np.ndarray, " heldout"]],
    train: Mapping[str, Float[np.ndarray, " pair"]],
    correct_now: Float[np.ndarray, " heldout"],
    correct_head: Float[np.ndarray, " heldout"],
    correct_random: Float[np.ndarray, " heldout"] | None,
    kept: Bool[np.ndarray, " pair"],
    heldout_groups: Int[np.ndarray, " heldout"] | None,
    train_groups: Int[np.ndarray, " pair"] | None,
    seed: int,
) -> PanelAlarm:
    """The alarm of a round for each feature of the panel.

    Args:
        heldout: by feature, its value for the chosen answer less that for the rejected one, of the held-out
            pairs; only the sign counts.
        train: likewise of the pairs that the round selected from; the same features.
        correct_now: `diagnostics.correctness` of the held-out margins under this round's policy.
        correct_head: likewise under the last head.
        correct_random: likewise under a policy trained as this one, on a random selection of the same size;
            None: there is none.
        kept: which of the train pairs were kept.
        heldout_groups, train_groups: number of each pair's prompt; None: each pair stands for itself.
        seed: of the resamples.

    Raises:
        ValueError: the two sides have different features.
    """
    if set(heldout) != set(train):
        raise ValueError(
            f"The features of held-out pairs ({', '.join(sorted(heldout))}) are not those of the train pairs "
            f"({', '.join(sorted(train))}); compute the same panel on both."
        )
    comparison = HEAD if correct_random is None else RANDOM
    alarms = {
        name: amplification_alarm(
            heldout_feature=difference,
            correct_now=correct_now,
            correct_before=correct_head if correct_random is None else correct_random,
            train_feature=train[name],
            kept=kept,
            comparison=comparison,
            seed=seed,
            level=LEVEL,
            heldout_groups=heldout_groups,
            train_groups=train_groups,
        )
        for name, difference in heldout.items()
    }
    raised = tuple(name for name, alarm in alarms.items() if alarm.raised)
    left = tuple(name for name, alarm in alarms.items() if alarm.reason == "not_enough_evidence")
    return PanelAlarm(alarms, comparison, raised, left, _sentence(alarms, raised, left, comparison))


def _sentence(
    alarms: Mapping[str, Alarm], raised: Sequence[str], left: Sequence[str], comparison: str
) -> str:
    told = len(alarms) - len(left)
    if not told:
        return f"too few pairs to tell of any of {len(alarms)} features, against {comparison}"
    few = f"; {', '.join(left)}: too few pairs to tell" if left else ""
    if not raised:
        return f"none of {told} features is amplified against {comparison}{few}"
    said = ", ".join(f"{name} ({_numbers(alarms[name])})" for name in raised)
    return f"{len(raised)} of {told} features amplified against {comparison}: {said}{few}"


def _numbers(alarm: Alarm) -> str:
    fell, excess = _said(alarm.counter_change), _said(alarm.kept_share_excess)
    return f"accuracy where the chosen answer has less of it {fell}, its share among the kept pairs {excess}"


def _said(rate: Rate) -> str:
    return f"{rate.value:+.3f} [{rate.low:+.3f}, {rate.high:+.3f}]"
