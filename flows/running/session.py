"""A process working on a run: does steps and counts them against the budget. No Prefect."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flows.round import Past, Ref, Sides, prepare
from sera_core.artifacts import lease
from sera_core.artifacts.doing import Task
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


def refuse_uncalibrated(calibration: StepRecord, judge: str | None) -> None:
    """Refuse a judge that agrees with the labels no better than a word count or chance.

    Raises:
        InputError: with its agreement and the word count's.
    """
    metrics = calibration.metrics
    if metrics["calibrated"]:
        return
    agreement, control = metrics["agreement"], metrics["agreement/word-count"]
    raise InputError(
        f"the judge {judge} agrees with the labels of {agreement['n']} held-out pairs in "
        f"{_share(agreement)}, a word count in {_share(control)}: it is not better than that, so it decides "
        'about no round; choose another decide.judge, or set decide.uncalibrated = "allow"'
    )


def _share(rate: Mapping[str, Any]) -> str:
    low, high = (rate[end] for end in ("low", "high"))
    return f"{rate['value']:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


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
        self.round: int | None = None
        """The round in progress."""
        self.used: dict[str, StepRecord] = {}
        self.meter = Meter(self.config.limits)
        for manifest in self.history.rounds:
            self.meter.tokens += manifest.metrics.get("tokens", 0)
            self.meter.seconds += manifest.metrics.get("seconds", 0.0)
            self.meter.seen |= {ref.key for ref in manifest.used}
        self._before = self.meter.seconds

    def do(self, spec: StepSpec) -> StepRef:
        """Do a step unless it has a record; count it; return a reference to it."""
        record = find_record(self.store, spec.step, spec.key) or self._run(spec)
        self.used[record.key] = record
        self.meter.add(record)
        return record.ref

    def _run(self, spec: StepSpec) -> StepRecord:
        """Do a step; whoever watches the run reads from its lease how far it is."""
        if (held := lease.held(self.store, self.run)) is not None:
            held.begin(Task(spec.step, self.round, self.meter.seconds - self._before))
        return self.runner(spec.model_copy(update={"where": {**spec.where, "run": self.run}}))

    def prepare(self) -> Sides:
        """The pairs and the start policy.

        Raises:
            InputError: the judge that would decide is not calibrated.
        """
        sides = prepare(self.config, self.record.resolved["digests"], self.do)
        if sides.calibration is not None and self.config.decide.uncalibrated == "refuse":
            refuse_uncalibrated(self.record_of(sides.calibration), self.config.decide.judge)
        return sides

    def past(self) -> Past:
        """The heads so far."""
        lineage = self.history.lineage
        promoted = {m.round: m.steps for m in self.history.promoted}
        return Past([m.steps for m in lineage], promoted, [m.round for m in lineage])

    def look(self, ref: Ref) -> StepRecord | None:
        """The record of a step of this or an earlier round."""
        return None if ref is None else self.used.get(ref.key) or find_record(self.store, ref.step, ref.key)

    def record_of(self, ref: Ref) -> StepRecord:
        """The record of a step done in this session."""
        assert ref is not None
        return self.used[ref.key]
