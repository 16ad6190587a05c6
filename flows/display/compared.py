"""Read the arms of a comparison: each run's rounds on the held-out pairs, and the arms' differences."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from flows.compare import Runs, tokens_of, trained_rounds
from flows.display.compared_alarm import Alarms, alarms_of
from sera_core.artifacts.canonical import finite
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.compared_runs import SEED, HeldoutPairs, heldout_pairs, ranked
from sera_core.errors import StoreError
from sera_core.method.comparison import VALUES, Difference, difference_from_first, values_of


@dataclass(frozen=True)
class Measured:
    """One run of an arm."""

    run: str
    rounds: list[RoundManifest]
    """Those that trained a policy."""
    correct: list[Float[np.ndarray, " pair"]]
    """How each round's policy ranks the held-out pairs: 1 correct, ½ a tie, 0 wrong or not scored."""
    stop_reason: str | None


@dataclass(frozen=True)
class Compared:
    """Arms on the same held-out pairs: the first, and the others against it."""

    feature: str
    pairs: HeldoutPairs
    arms: dict[str, dict[int, Measured]]
    """Arm -> seed -> run; the first arm first."""
    differences: dict[str, Difference]
    alarms: Alarms
    """Of the arms that drop human pairs, against the arm `random`; empty without it."""

    @property
    def first(self) -> str:
        """The arm that the others are compared with."""
        return next(iter(self.arms))

    def last(self, arm: str) -> Float[np.ndarray, "seed pair"]:
        """How the policies of an arm's last rounds rank the pairs."""
        return np.stack([run.correct[-1] for run in self.arms[arm].values()])

    def by_round(self, arm: str) -> list[dict[str, float | None]]:
        """Values of an arm's rounds, means over seeds; as far as every seed has the round."""
        runs = [run.correct for run in self.arms[arm].values()]
        return [values_of(np.stack(same), self.pairs.difference) for same in zip(*runs, strict=False)]


def compared(runs: Runs) -> Compared:
    """Read the held-out evidence of every run.

    Raises:
        StoreError: a run has other held-out pairs than the first one.
    """
    first = next(iter(next(iter(runs.values())).values()))
    settings = first.configs()[-1].settings
    pairs = heldout_pairs(first.store, trained_rounds(first)[-1], settings.decide.feature)
    arms = {
        arm: {seed: _measured(records, pairs.ids) for seed, records in by_seed.items()}
        for arm, by_seed in runs.items()
    }
    found = Compared(settings.decide.feature, pairs, arms, {}, alarms_of(runs, SEED))
    for arm in list(arms)[1:]:
        found.differences[arm] = difference_from_first(
            found.last(arm),
            found.last(found.first),
            pairs.difference,
            pairs.groups,
            seed=SEED,
            resamples=settings.evaluate.resamples,
        )
    return found


def _measured(records: RunStore, ids: Sequence[str]) -> Measured:
    rounds = trained_rounds(records)
    correct = [_correct(records, manifest, ids) for manifest in rounds]
    return Measured(records.run, rounds, correct, records.stop_reason())


def _correct(records: RunStore, manifest: RoundManifest, ids: Sequence[str]) -> Float[np.ndarray, " pair"]:
    found, correct = ranked(records.store, manifest)
    if found != list(ids):
        raise StoreError(
            f"run {records.run!r}, round {manifest.round}: its held-out pairs are not those of the first "
            "run, so they cannot be compared; start the comparison under another --name"
        )
    return correct


def as_json(found: Compared) -> dict[str, Any]:
    """The comparison, as in `sera compare --json`."""
    return {
        "first": found.first,
        "feature": found.feature,
        "pairs": len(found.pairs.ids),
        "prompts": len(np.unique(found.pairs.groups)),
        "arms": {
            arm: {
                str(seed): {**_one(run, found.pairs), "alarm": _alarm_json(found, arm, seed)}
                for seed, run in by_seed.items()
            }
            for arm, by_seed in found.arms.items()
        },
        "means": {arm: means(found, arm) for arm in found.arms},
        "differences": {
            arm: {**asdict(change), "distinguishable": change.distinguishable}
            for arm, change in found.differences.items()
        },
    }


def _one(run: Measured, pairs: HeldoutPairs) -> dict[str, Any]:
    last = run.rounds[-1]
    return {
        "run": run.run,
        "round": last.round,
        "rounds": len(run.rounds),
        "decision": last.decision,
        "stop_reason": run.stop_reason,
        **_spent(run),
        **values_of(run.correct[-1][None], pairs.difference),
    }


def _alarm_json(found: Compared, arm: str, seed: int) -> dict[str, Any] | None:
    """None for an arm that drops no pairs, for `random` itself and in a comparison without it."""
    one = found.alarms.get(arm, {}).get(seed)
    if one is None:
        return None
    told = {"round": one.round, "kept": one.kept, "kept_random": one.kept_random}
    if one.alarm is None:
        return {**told, "state": "not_comparable"}
    features = {name: finite(asdict(alarm)) for name, alarm in one.alarm.alarms.items()}
    return {**told, "state": one.alarm.state, "raised": list(one.alarm.raised), "features": features}


def _spent(run: Measured) -> dict[str, int]:
    return {"tokens": sum(tokens_of(run.rounds)), "sampled": sum(tokens_of(run.rounds, "sampled"))}


def means(found: Compared, arm: str) -> dict[str, Any]:
    """Means over seeds of an arm's rounds, tokens and values, and how often each decision came last."""
    runs = list(found.arms[arm].values())
    decisions = Counter(run.rounds[-1].decision for run in runs)
    values = values_of(found.last(arm), found.pairs.difference)
    return {
        "rounds": float(np.mean([len(run.rounds) for run in runs])),
        **{name: float(np.mean([_spent(run)[name] for run in runs])) for name in ("tokens", "sampled")},
        "decisions": dict(decisions),
        **{name: values[name] for name in VALUES},
    }
