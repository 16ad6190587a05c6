"""What the steps of a finished round took, as rates for the simulator: a round of more workers and pairs."""

from dataclasses import dataclass
from typing import Any

from sera_core.artifacts.manifest import StepRecord, find_record
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.errors import InputError
from tasks.sampling import SHARD_PROMPTS
from tasks.scoring import SHARD_ROWS
from tests.scale.simulator import Rates, simulate

SHARDED = {"sample": SHARD_PROMPTS, "logps": SHARD_ROWS}
"""Rows of a shard of each step that workers share: prompts or responses."""


@dataclass(frozen=True)
class StepTimes:
    """A step of the round: its kind, rows, and seconds as if one worker had done it."""

    step: str
    rows: int
    seconds: float

    def rates(self) -> Rates:
        """Mean seconds of a whole shard; the start of the process and the policy's loading are part of it."""
        return Rates(shard_s=self.seconds / self.rows * SHARDED[self.step])


@dataclass(frozen=True)
class RoundTimes:
    """The last round of a run: steps that workers share, seconds of all others, and its human pairs."""

    shared: list[StepTimes]
    others_s: float
    pairs: int


def round_times(store: str, run: str) -> RoundTimes:
    """Read the records of a run's last round.

    Raises:
        InputError: the run has no round whose pairs were counted.
    """
    records = RunStore(open_store(store), run)
    rounds = records.rounds()
    if not rounds:
        raise InputError(
            f"{run} in {store}: no finished round; give the store and the name of a finished run"
        )
    last = rounds[-1]
    found = [find_record(records.store, ref.step, ref.key) for ref in last.used]
    used = [record for record in found if record is not None]
    shared = [_times(record) for record in used if record.step in SHARDED and _rows(record)]
    others = sum(record.seconds for record in used if record.step not in SHARDED)
    rendered = records.store, last.steps["pairs"].step, last.steps["pairs"].key
    held = find_record(*rendered)
    pairs = held.files["train.parquet"].rows if held else None
    if not pairs:
        raise InputError(f"{run} in {store}: the pairs of its last round are not in the store")
    return RoundTimes(shared, others, pairs)


def replay(times: RoundTimes, pairs: int, workers: int, seed: int = 0) -> dict[str, Any]:
    """The round with so many human pairs on so many workers: all rows and other seconds grow in proportion.

    The steps come one after the other, as in a run. What no worker shares (training above all) takes its
    measured seconds, so it bounds what workers gain.
    """
    grown = pairs / times.pairs
    told = [
        simulate(max(1, round(part.rows * grown / SHARDED[part.step])), workers, part.rates(), seed + number)
        for number, part in enumerate(times.shared)
    ]
    shared = sum(one["makespan_s"] + one["merge_s"] for one in told)
    others = times.others_s * grown
    alone = sum(part.seconds for part in times.shared) * grown
    return {
        "workers": workers,
        "pairs": pairs,
        "makespan_s": round(shared + others, 1),
        "shared_s": round(shared, 1),
        "others_s": round(others, 1),
        "faster": round((alone + others) / (shared + others), 2),
        "store_requests_per_s": max((one["store_requests_per_s"] for one in told), default=0.0),
    }


def _rows(record: StepRecord) -> int:
    """Prompts of a sampling step, responses of a scoring step."""
    return record.counts.get("prompts" if record.step == "sample" else "responses", 0)


def _times(record: StepRecord) -> StepTimes:
    workers = int(record.environment.get("replicas", 1))
    return StepTimes(record.step, _rows(record), record.seconds * workers)
