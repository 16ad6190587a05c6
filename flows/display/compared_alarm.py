"""The amplification alarm of a comparison: an arm's selection against that of the arm `random`.

Both arms trained on equally many human pairs in the same round for the same tokens, so that only the choice
of the pairs differs. In a single run there is no such arm, and the alarm compares with the last head.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Int

from flows.compare import Runs, trained_rounds
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.data.differences import Differences, read_differences
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

    def artifact(self, role: str) -> Artifact:
        return Artifact(self.records.store, self.manifest.steps[role])

    def beside(self, name: str, file: str) -> Path:
        """A file of an input of the round's evidence: `features` or `rendered`."""
        evidence = self.artifact("evidence").record
        return Artifact(self.records.store, evidence.inputs[name]).path(file)

    def correct(self) -> tuple[list[str], Float[np.ndarray, " heldout"]]:
        """Held-out pairs, and how this round's policy ranks them."""
        table = schema.read_table(self.artifact("evidence").path("heldout.parquet"), schema.SCORED)
        return table["pair_id"].to_pylist(), correctness_of_all(table["margin"].to_numpy())

    def selected(self) -> tuple[list[str], Bool[np.ndarray, " pair"]]:
        """Human pairs that the round selected from, and which it kept."""
        scored = schema.read_table(self.artifact("scored").path("scored.parquet"), schema.SCORED)
        ids: list[str] = scored["pair_id"].to_pylist()
        rows = schema.iter_rows(self.artifact("human").path("ledger.parquet"), ["pair_id", "kept"])
        kept = {row["pair_id"] for row in rows if row["kept"]}
        return ids, np.array([id in kept for id in ids], dtype=bool)

    def measured(self, file: str, ids: list[str]) -> tuple[Differences, Int[np.ndarray, " pair"]]:
        """Differences of the panel's features, and the number of each pair's prompt."""
        return (
            read_differences(self.beside("features", file), ids),
            prompt_groups(self.beside("rendered", file), ids),
        )


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
    train_ids, kept = arm.selected()
    if kept.all():
        return None
    kept_random = int(random.selected()[1].sum())
    sizes = (arm.manifest.round, int(kept.sum()), kept_random)
    if abs(int(kept.sum()) - kept_random) > SAME_SIZE * kept_random:
        return ArmAlarm(*sizes, None)
    ids, now = arm.correct()
    heldout, heldout_groups = arm.measured("heldout.parquet", ids)
    train, train_groups = arm.measured("train.parquet", train_ids)
    correct_random = random.correct()[1]
    alarm = panel_alarm(
        heldout=heldout,
        train=train,
        correct_now=now,
        correct_head=correct_random,
        correct_random=correct_random,
        kept=kept,
        heldout_groups=heldout_groups,
        train_groups=train_groups,
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
