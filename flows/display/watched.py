"""What is happening in a run now, from the store alone: `sera watch`."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from flows.display.round_card import with_interval
from flows.display.step_titles import TITLES
from sera_core.artifacts.doing import Doing, read_doing
from sera_core.artifacts.history import History
from sera_core.artifacts.lease import Held, Watch, lease_path, look
from sera_core.artifacts.run_records import ACCURACY, RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.reporting import words

LATE_SECONDS = 30.0
"""A heartbeat comes every 15 s: an older one is worth a word."""
ROUND_METRICS = ("score", "score_metric", "heldout/margin", "trained/margin", "tokens", "seconds")
"""Metrics of a finished round that are shown while the run goes on, besides its accuracy."""


@dataclass(frozen=True)
class Seen:
    """A run at one moment."""

    run: str
    state: str
    """`working`, `idle` (open, and no process works on it), `waiting` (for a review) or `stopped`."""
    rounds: list[RoundManifest]
    limit: int
    """`limits.rounds`."""
    stop_reason: str | None = None
    question: Mapping[str, Any] | None = None
    """The open review: round, until, default."""
    held: Held | None = None
    """The last holder, unless the run has stopped or waits."""
    doing: Doing | None = None
    seconds_left: float | None = None
    """Of the run at most, if its rounds take as long as the last reviewed one; None while unknown."""

    def json(self) -> dict[str, Any]:
        """The object of `sera watch --json`."""
        doing, question = self.doing, self.question
        return {
            "run": self.run,
            "state": self.state,
            "stop_reason": self.stop_reason,
            "waiting": question and {name: question[name] for name in ("round", "until", "default")},
            "round": doing.round if doing is not None else None,
            "step": doing.step if doing is not None else None,
            "progress": _progress(doing),
            "seconds_left": {"step": doing and doing.left, "run": self.seconds_left},
            "holder": None if self.held is None else str(self.held.epoch.holder),
            "heartbeat_seconds": None if self.held is None else round(self.held.age, 1),
            "limit_rounds": self.limit,
            "rounds": [_finished(manifest) for manifest in self.rounds],
        }


@dataclass
class Watcher:
    """Looks at a run again and again; finished rounds are read once."""

    records: RunStore
    _beats: Watch = field(default_factory=Watch)
    _history: History = field(default_factory=lambda: History([]))
    _limit: int = 0

    def look(self) -> Seen:
        """The run now."""
        self._read_rounds()
        rounds, number, run = self._history.rounds, self._history.next_round, self.records.run
        held = look(self.records.store, lease_path(run))
        over = held is None or self._beats.is_over(held)
        at = {"run": run, "rounds": rounds, "limit": self._limit}
        # Not `RunStore.state`, which records the default of a review whose deadline has passed.
        question = self.records.question(number)
        if question is not None and self.records.given_answer(number) is None:
            return Seen(state="waiting", question=question, **at)
        if over and (reason := self.records.stop_reason()) is not None:
            return Seen(state="stopped", stop_reason=reason, **at)
        at |= {"held": held, "doing": (doing := self._doing(held))}
        if over:
            return Seen(state="idle", **at)
        return Seen(state="working", seconds_left=seconds_left(rounds, self._limit, doing), **at)

    def _doing(self, held: Held | None) -> Doing | None:
        if held is None:
            return None
        path, epoch = lease_path(self.records.run), held.epoch
        return read_doing(self.records.store, path, epoch.epoch, epoch.holder.token)

    def _read_rounds(self) -> None:
        if not self._limit or self.records.sha256_of_round(self._history.next_round) is not None:
            self._history = self.records.history()
            self._limit = self.records.configs()[-1].settings.limits.rounds


def seconds_left(rounds: list[RoundManifest], limit: int, doing: Doing | None) -> float | None:
    """Seconds until the last round that the limits allow is done, if each takes as long as the last reviewed.

    Args:
        rounds: the finished rounds.
        limit: `limits.rounds`.
        doing: the step in progress.

    Returns:
        None until a reviewed round is finished: round 0 samples and reviews nothing.
    """
    if doing is None or doing.round is None or len(rounds) < 2:
        return None
    one = rounds[-1].metrics.get("seconds")
    if not isinstance(one, int | float):
        return None
    now = max(0.0, one - doing.spent - doing.seconds)
    return round(now + max(0, limit - len(rounds) - 1) * one, 1)


def _progress(doing: Doing | None) -> dict[str, Any] | None:
    if doing is None:
        return None
    names = ("done", "total", "unit", "seconds")
    return {"title": TITLES.get(doing.step, doing.step), **{name: getattr(doing, name) for name in names}}


def _finished(manifest: RoundManifest) -> dict[str, Any]:
    metrics = {
        name: manifest.metrics[name] for name in (ACCURACY, *ROUND_METRICS) if name in manifest.metrics
    }
    named = {name: getattr(manifest, name) for name in ("round", "decision", "reason", "pairs")}
    return {**named, "metrics": metrics}


# ----------------------------------------------------------------------------------------------------- words


def round_line(manifest: RoundManifest) -> str:
    """A finished round in one line."""
    accuracy = with_interval(manifest.metrics.get(ACCURACY))
    return (
        f"round {manifest.round}: {manifest.decision}, {manifest.pairs['human']} human and "
        f"{manifest.pairs['generated']} generated pairs, held-out accuracy {accuracy}"
    )


def step_line(seen: Seen) -> str:
    """Which step of which round is being done, and how far it is."""
    doing = seen.doing
    if doing is None:
        return f"round {len(seen.rounds)}: starting"
    where = "after the last round" if doing.round is None else f"round {doing.round} of at most {seen.limit}"
    title = TITLES.get(doing.step, doing.step)
    return f"{where}: {title}{_counted(doing)}"


def _counted(doing: Doing) -> str:
    if doing.done is None or doing.total is None:
        return ""
    if doing.unit == "bytes":
        return f", {doing.done / 1e6:,.0f} of {doing.total / 1e6:,.0f} MB"
    return f", {doing.done:,} of {doing.total:,} {doing.unit}"


def time_line(seen: Seen) -> str | None:
    """The time left, as estimated; None while nothing is known of it."""
    parts = []
    if seen.doing is not None and seen.doing.left is not None:
        parts.append(f"about {duration(seen.doing.left)} left in this step")
    if seen.seconds_left is not None:
        parts.append(f"at most about {duration(seen.seconds_left)} in the run")
    return f"{', '.join(parts)} (estimated from measured steps)" if parts else None


def holder_line(seen: Seen) -> str:
    """Who works on the run."""
    assert seen.held is not None
    since = f"{seen.held.epoch.holder}, since {seen.held.epoch.since}"
    return since if seen.held.age < LATE_SECONDS else f"{since}; last heartbeat {seen.held.age:.0f} s ago"


def idle_line(seen: Seen, store: str) -> str:
    """Nobody works on the run: how to continue."""
    command = f"sera advance {seen.run}{store_flag(store)}"
    again = f"sera run EXPERIMENT.toml --name {seen.run}{store_flag(store)}"
    if seen.held is None:
        who = "no process has begun to work on it yet"
    elif seen.held.released:
        who = f"{seen.held.epoch.holder} has ended"
    else:
        who = f"{seen.held.epoch.holder} is gone without an end"
    last = "" if seen.doing is None else f", last at {step_line(seen)}"
    return (
        f"Nobody works on run {seen.run}: {who}{last}. Finished steps are kept. "
        f"To continue: {again} (or one more round: {command})"
    )


def end_lines(seen: Seen, store: str) -> Iterator[str]:
    """Why the run has stopped, or whom it waits for."""
    if seen.state == "stopped":
        assert seen.stop_reason is not None
        yield f"The run stopped with `{seen.stop_reason}`: {words.STOPS[seen.stop_reason]}."
    elif seen.question is not None:
        question, until = seen.question, datetime.fromisoformat(seen.question["until"])
        answer = f"sera review {seen.run} --decision promote{store_flag(store)}"
        if until < datetime.now(UTC):
            yield (
                f"The review of round {question['round']} had no answer before {question['until']}: when the "
                f"run continues, its default counts ({question['default']})"
            )
        else:
            yield (
                f"The run is waiting for a review of round {question['round']} until {question['until']}: "
                f"{answer}"
            )


def store_flag(store: str) -> str:
    """` --store URI`, unless it is the default one."""
    return "" if store in ("./sera-store", "sera-store") else f" --store {store}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"
