"""A process working on a run: does steps and counts them against the budget. No Prefect."""

from collections.abc import Callable
from dataclasses import dataclass, field

from flows.round import Past, Ref, Sides, prepare
from sera_core.artifacts.history import History
from sera_core.artifacts.manifest import StepRecord, StepRef, StepSpec, find_record
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import Store, open_store
from sera_core.config import LimitsConfig
from sera_core.errors import BudgetReached, InputError

Runner = Callable[[StepSpec], StepRecord]
"""Does a step that has no record."""


@dataclass
class Meter:
    """Tokens and seconds of a run's steps, each step counted once."""

    limits: LimitsConfig
    tokens: int = 0
    seconds: float = 0.0
    seen: set[str] = field(default_factory=set)

    def add(self, record: StepRecord) -> None:
        """Count a step.

        Raises:
            BudgetReached: limits.tokens or limits.hours is reached.
        """
        if record.key in self.seen:
            return
        self.seen.add(record.key)
        self.tokens += tokens_of(record)
        self.seconds += record.seconds
        hours = self.seconds / 3600
        if self.limits.tokens is not None and self.tokens >= self.limits.tokens:
            raise BudgetReached(
                f"{self.tokens:,} tokens after step {record.step}: limits.tokens = {self.limits.tokens:,}"
            )
        if self.limits.hours is not None and hours >= self.limits.hours:
            raise BudgetReached(
                f"{hours:.3f} hours after step {record.step}: limits.hours = {self.limits.hours}"
            )


def tokens_of(record: StepRecord) -> int:
    """Tokens that a step trained on, scored or sampled."""
    return sum(int(value) for name, value in record.metrics.items() if name.startswith("tokens/"))


class Session:
    """A process working on a run."""

    def __init__(self, store_url: str, run: str, runner: Runner) -> None:
        self.store: Store = open_store(store_url, remember=True)
        self.records = RunStore(self.store, run)
        configs = self.records.configs()
        if not configs:
            raise InputError(f"run {run!r}: not in the store {store_url}; `sera list` names the runs there")
        self.run, self.runner = run, runner
        self.record = configs[-1]
        self.config = self.record.settings
        self.history: History = self.records.history()
        self.used: dict[str, StepRecord] = {}
        self.meter = Meter(self.config.limits)
        for manifest in self.history.rounds:
            self.meter.tokens += manifest.metrics.get("tokens", 0)
            self.meter.seconds += manifest.metrics.get("seconds", 0.0)
            self.meter.seen |= {ref.key for ref in manifest.used}

    def do(self, spec: StepSpec) -> StepRef:
        """Do a step unless it has a record; count it; return a reference to it."""
        record = find_record(self.store, spec.step, spec.key) or self.runner(spec)
        self.used[record.key] = record
        self.meter.add(record)
        return record.ref

    def prepare(self) -> Sides:
        """The pairs and the start policy."""
        return prepare(self.config, self.record.resolved["digests"], self.do)

    def past(self) -> Past:
        """The heads so far."""
        lineage = self.history.lineage
        promoted = {m.round: m.steps["evidence"] for m in self.history.promoted}
        return Past([m.steps for m in lineage], promoted, [m.round for m in lineage])

    def look(self, ref: Ref) -> StepRecord | None:
        """The record of a step of this or an earlier round."""
        return None if ref is None else self.used.get(ref.key) or find_record(self.store, ref.step, ref.key)

    def record_of(self, ref: Ref) -> StepRecord:
        """The record of a step done in this session."""
        assert ref is not None
        return self.used[ref.key]
