"""The amplification alarm of a comparison: an arm's selection against that of the arm `random`.

Both arms trained on equally many human pairs in the same round for the same tokens, so that only the choice
of the pairs differs. In a single run there is no such arm, and the alarm compares with the last head.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from flows.compare import Runs, trained_rounds
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.compared_rounds import train_pairs
from sera_core.data.differences import read_differences
from sera_core.method.alarm import PanelAlarm, panel_alarm
from sera_core.method.diagnostics import correctness_of_all
from sera_core.reporting import words
from sera_core.reviewers import prompt_groups

RANDOM_ARM = "random"
SAME_SIZE = 0.1
"""Largest difference between the human pairs that two arms kept, as a share of the random arm's, at which
the selections count as equally large."""


@dataclass(frozen=True)
class ArmAlarm:
    """The alarm of an arm's last reviewed round under one seed."""

    round: int
    kept: int
    """Human pairs that the arm's selection kept."""
    kept_random: int
    alarm: PanelAlarm | None
    """None: the selections are not equally large."""


Alarms = dict[str, dict[int, ArmAlarm]]
"""Arm -> seed -> alarm."""


@dataclass(frozen=True)
class _Round:
    records: RunStore
    manifest: RoundManifest

    def input(self, role: str) -> Artifact:
        """A step of the round, or an input of its evidence: `features`, `rendered`."""
        steps = self.manifest.steps
        if role not in steps:
            steps = Artifact(self.records.store, steps["evidence"]).record.inputs
        return Artifact(self.records.store, steps[role])

    def correct(self) -> tuple[list[str], Float[np.ndarray, " heldout"]]:
        """Held-out pairs, and how this round's policy ranks them."""
        table = schema.read_table(self.input("evidence").path("heldout.parquet"), schema.SCORED)
        return table["pair_id"].to_pylist(), correctness_of_all(table["margin"].to_numpy())


def alarms_of(runs: Runs, seed: int) -> Alarms:
    """The alarm of every arm that drops human pairs, where there is an arm `random`; else nothing.

    Args:
        runs: finished runs of the comparison.
        seed: of the resamples.
    """
    found: Alarms = {}
    for arm, by_seed in runs.items() if RANDOM_ARM in runs else ():
        for number, records in by_seed.items() if arm != RANDOM_ARM else ():
            rounds = _same_round(records, runs[RANDOM_ARM][number])
            if rounds is not None and (alarm := _alarm(*rounds, seed)) is not None:
                found.setdefault(arm, {})[number] = alarm
    return found


def _same_round(arm: RunStore, random: RunStore) -> tuple[_Round, _Round] | None:
    """The last round that both arms trained after a review."""
    by_number = {manifest.round: manifest for manifest in trained_rounds(random)}
    for manifest in reversed(trained_rounds(arm)):
        if manifest.round > 0 and manifest.round in by_number:
            return _Round(arm, manifest), _Round(random, by_number[manifest.round])
    return None


def _alarm(arm: _Round, random: _Round, seed: int) -> ArmAlarm | None:
    train = train_pairs(arm.input)
    if train.kept.all():
        return None
    kept, kept_random = (int(one.kept.sum()) for one in (train, train_pairs(random.input)))
    sizes = (arm.manifest.round, kept, kept_random)
    if abs(kept - kept_random) > SAME_SIZE * kept_random:
        return ArmAlarm(*sizes, None)
    ids, now = arm.correct()
    correct_random = random.correct()[1]
    alarm = panel_alarm(
        heldout=read_differences(arm.input("features").path("heldout.parquet"), ids),
        train=train.differences,
        correct_now=now,
        correct_head=correct_random,
        correct_random=correct_random,
        kept=train.kept,
        heldout_groups=prompt_groups(arm.input("rendered").path("heldout.parquet"), ids),
        train_groups=train.groups,
        seed=seed,
    )
    return ArmAlarm(*sizes, alarm)


def alarm_words(alarms: Alarms) -> Iterator[str]:
    """A line for each arm: the features that its selection amplified, and under how many seeds."""
    for arm, by_seed in alarms.items():
        asked = [found.alarm for found in by_seed.values() if found.alarm is not None]
        if not asked:
            one = next(iter(by_seed.values()))
            yield (
                f"{arm}, alarm: not computed, its selection kept {one.kept:,} human pairs and that of "
                f"{RANDOM_ARM} {one.kept_random:,}."
            )
            continue
        raised = Counter(name for alarm in asked for name in alarm.raised)
        few = sorted(set.intersection(*(set(alarm.open) for alarm in asked)))
        seeds = words.plural(len(asked), "seed")
        told = ", ".join(f"{name} (in {count} of {seeds})" for name, count in raised.items())
        measured = len(asked[0].alarms) - len(few)
        said = f"amplified {told}" if told else f"none of {measured} features amplified in {seeds}"
        end = f"; too few pairs to tell: {', '.join(few)}" if few else ""
        yield f"{arm}, alarm against {RANDOM_ARM}: {said}{end}."
