"""Leases: one process at a time works on a run or computes a long step, so that no work is done twice.

    runs/<run>/lease/00000.json           create-only: who took the epoch, and when
    runs/<run>/lease/00000-beat.json      rewritten by its owner alone, every 15 s; the last says `released`
    runs/<run>/lease/00000-doing.json     likewise: the step that it is doing, and how far it is (doing.py)
    steps/<step>/<key>/claim/…            likewise

An epoch has ended when its last heartbeat says `released`, when that heartbeat is a minute old by the store's
clock, when a waiting process has seen no new heartbeat for a minute of its own clock (the store's clock may
have jumped), or when its holder was a process of this machine that no longer exists. Then the next epoch may
be created. Leases only save work; correctness does not depend on them: records are create-only, and a holder
checks that its epoch is still the newest before it commits a round (`Lease.check`).
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from sera_core.artifacts.canonical import canonical_json
from sera_core.artifacts.doing import Task, doing_path
from sera_core.artifacts.holder import Holder, is_alive, this_process
from sera_core.artifacts.manifest import StepRecord, StepSpec, find_record
from sera_core.artifacts.records import FORMAT, StrictModel, read_record, typed
from sera_core.artifacts.store import Store, create_json
from sera_core.artifacts.upkeep import upkeep
from sera_core.errors import BusyError

BEAT_SECONDS = 15.0
EXPIRE_SECONDS = 60.0
"""An epoch without a heartbeat for this long, by the store's clock, has ended."""
STEP_SECONDS = 1.5
"""A new step is told within this time, without a heartbeat; its progress comes with the heartbeats."""
LOOK_SECONDS = 1.0
"""Time between two reads of a lease that another process holds."""
TELL_SECONDS = 60.0
"""Time between two log lines while waiting."""

Tell = Callable[[str], None]


class Epoch(StrictModel):
    """The record that a process took a lease."""

    format: int
    epoch: int
    holder: Holder
    since: str


class Beat(StrictModel):
    """A heartbeat."""

    format: int
    token: str
    beats: int
    released: bool


@dataclass(frozen=True)
class Held:
    """The newest epoch of a lease and its last heartbeat."""

    epoch: Epoch
    beats: int
    released: bool
    age: float
    """Seconds since its last heartbeat, by the store's clock."""

    @property
    def is_over(self) -> bool:
        """Whether the next epoch may be taken."""
        return self.released or self.age > EXPIRE_SECONDS or is_alive(self.epoch.holder) is False

    @property
    def holder_is_alive(self) -> bool:
        """Whether the holder is known to be alive: a running process of this machine."""
        return not self.is_over and is_alive(self.epoch.holder) is True

    def __str__(self) -> str:
        return f"{self.epoch.holder}, since {self.epoch.since} (last heartbeat {self.age:.0f} s ago)"


class Watch:
    """Tracks the heartbeats of a lease while this process waits for it."""

    def __init__(self) -> None:
        self._last: tuple[int, str, int] | None = None
        self._since = 0.0

    def is_over(self, seen: Held) -> bool:
        """Whether the epoch has ended, or had no new heartbeat for a minute since it was first seen.

        The store's clock alone is not enough: after a clock change a heartbeat can lie in the future.
        """
        sign = (seen.epoch.epoch, seen.epoch.holder.token, seen.beats)
        if sign != self._last:
            self._last, self._since = sign, time.monotonic()
        return seen.is_over or time.monotonic() - self._since > EXPIRE_SECONDS


class Lease:
    """An epoch held by this process; a thread sends heartbeats until it is released."""

    def __init__(self, store: Store, path: str, epoch: Epoch) -> None:
        self.store, self.path, self.epoch = store, path, epoch
        self._beats, self._end = 0, threading.Event()
        self._task: Task | None = None
        self._told: Task | None = None
        self._thread = threading.Thread(target=self._keep, name=f"lease {path}", daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        """The epoch's number."""
        return self.epoch.epoch

    def begin(self, task: Task) -> None:
        """Tell readers of the store which step this process does now."""
        self._task = task

    def report(self, done: int, total: int, unit: str) -> None:
        """Note the progress of that step, for the next heartbeat; costs no request."""
        if self._task is not None:
            self._task.report(done, total, unit)

    def check(self) -> None:
        """Check that the epoch is still the newest.

        Raises:
            BusyError: another process took the next one, because this one was paused or could not reach the
                store for longer than a lease lasts.
        """
        after = _read_epoch(self.store, self.path, self.number + 1)
        if after is not None:
            raise BusyError(
                f"{self.store.url}/{self.path}: this process held the lease since {self.epoch.since} (epoch "
                f"{self.number}) but sent no heartbeat for {EXPIRE_SECONDS:.0f} s, and {after.holder} took "
                f"over at {after.since}. It stops here and commits nothing more; finished steps are kept"
            )

    def release(self) -> None:
        """Release the lease at once. If the store cannot be reached, the epoch expires by itself."""
        self._end.set()
        self._thread.join()
        with suppress(Exception):
            if self._task is not None:  # how far it came: it may have failed
                self._tell(self._task)
            self._beat(released=True)

    def _keep(self) -> None:
        last = time.monotonic()
        while not self._end.wait(min(STEP_SECONDS, BEAT_SECONDS)):
            is_due = time.monotonic() - last >= BEAT_SECONDS
            # A failed heartbeat is retried by the next one; if all fail, the epoch expires.
            with suppress(Exception):
                if is_due:
                    last = time.monotonic()
                    if _read_epoch(self.store, self.path, self.number + 1) is not None:
                        return
                    self._beat(released=False)
                if self._task is not None and (is_due or self._task is not self._told):
                    self._tell(self._task)

    def _tell(self, task: Task) -> None:
        record = task.record(self.epoch.holder.token)
        where = doing_path(self.path, self.number)
        upkeep(self.store).replace(where, canonical_json(record.model_dump()))
        self._told = task

    def _beat(self, released: bool) -> None:
        self._beats += 1
        beat = Beat(format=FORMAT, token=self.epoch.holder.token, beats=self._beats, released=released)
        upkeep(self.store).replace(_beat_path(self.path, self.number), canonical_json(beat.model_dump()))


# ------------------------------------------------------------------------------------------------- reading


def look(store: Store, path: str) -> Held | None:
    """The newest epoch of a lease and its last heartbeat; None if the lease was never taken."""
    epoch = _newest(store, path)
    if epoch is None:
        return None
    where = _beat_path(path, epoch.epoch)
    data = read_record(store, where)
    beat = None if data is None else typed(Beat, data, f"{store.url}/{where}")
    if beat is None or beat.token != epoch.holder.token:
        return Held(epoch, 0, False, upkeep(store).age(_epoch_path(path, epoch.epoch)) or 0.0)
    age = 0.0 if beat.released else upkeep(store).age(where) or 0.0
    return Held(epoch, beat.beats, beat.released, age)


def _newest(store: Store, path: str) -> Epoch | None:
    """The newest epoch. Numbers are dense, so a doubling, then halving search needs only a few reads."""
    newest, last, step = None, -1, 1
    while (found := _read_epoch(store, path, last + step)) is not None:
        newest, last, step = found, last + step, 1 if last < 0 else 2 * step
    absent = last + step
    while absent - last > 1:
        middle = (last + absent) // 2
        if (found := _read_epoch(store, path, middle)) is None:
            absent = middle
        else:
            newest, last = found, middle
    return newest


def _read_epoch(store: Store, path: str, number: int) -> Epoch | None:
    where = _epoch_path(path, number)
    data = read_record(store, where)
    return None if data is None else typed(Epoch, data, f"{store.url}/{where}")


def _epoch_path(path: str, number: int) -> str:
    return f"{path}/{number:05d}.json"


def _beat_path(path: str, number: int) -> str:
    return f"{path}/{number:05d}-beat.json"


# -------------------------------------------------------------------------------------------------- taking


def take(store: Store, path: str, after: Held | None) -> Lease | None:
    """Create the epoch after one that has ended; None if another process was faster."""
    number = 0 if after is None else after.epoch.epoch + 1
    since = datetime.now(UTC).isoformat(timespec="seconds")
    ours = Epoch(format=FORMAT, epoch=number, holder=this_process(), since=since)
    winner, _ = create_json(store, _epoch_path(path, number), ours.model_dump())
    won = typed(Epoch, winner, f"{store.url}/{_epoch_path(path, number)}")
    return Lease(store, path, ours) if won.holder.token == ours.holder.token else None


_HELD: dict[tuple[str, str], Lease] = {}
"""Leases of this process, by store and run."""


def held(store: Store, run: str) -> Lease | None:
    """The lease on a run that this process holds, or None."""
    return _HELD.get((store.url, run))


@contextmanager
def hold(store: Store, run: str, tell: Tell) -> Iterator[Lease]:
    """Hold the lease on a run while the block runs.

    If the current holder may be dead, wait up to a minute for its next heartbeat.

    Args:
        store: where the run is.
        run: its name.
        tell: called with a line that says what this process waits for.

    Raises:
        BusyError: another process works on the run; the message says who, where and since when.
    """
    lease = _take_run(store, run, tell)
    _HELD[store.url, run] = lease
    try:
        yield lease
    finally:
        del _HELD[store.url, run]
        lease.release()


def _take_run(store: Store, run: str, tell: Tell) -> Lease:
    path = lease_path(run)
    while True:
        lease = take(store, path, wait_until_free(store, run, tell))
        if lease is not None:
            return lease


def wait_until_free(store: Store, run: str, tell: Tell) -> Held | None:
    """Wait until the run's lease is free; returns its last holder, or None.

    Raises:
        BusyError: its holder is alive.
    """
    first: Held | None = None
    watch = Watch()
    while (seen := look(store, lease_path(run))) is not None and not watch.is_over(seen):
        beaten = first is not None and (first.epoch, first.beats) != (seen.epoch, seen.beats)
        if seen.holder_is_alive or beaten:
            raise BusyError(
                f"run {run!r} is held by {seen}. `sera watch {run}` shows its progress. To continue the run "
                "here, stop that process first"
            )
        if first is None:
            first = seen
            tell(f"run {run}: held by {seen}; waiting up to a minute for its next heartbeat")
        time.sleep(LOOK_SECONDS)
    return seen


def lease_path(run: str) -> str:
    """Folder of a run's lease."""
    return f"runs/{run}/lease"


def claim_path(step: str, key: str) -> str:
    """Folder of a step's claims."""
    return f"steps/{step}/{key}/claim"


@contextmanager
def claim(store: Store, spec: StepSpec, tell: Tell) -> Iterator[StepRecord | None]:
    """Claim a step while the block runs, or yield the record that another process made.

    If another process holds the claim, wait for its record, or until the claim is released or expires.

    Args:
        store: where the step is.
        spec: the step; all its inputs are known. The caller has already looked for its record, so it is
            looked for again only if another process claimed the step.
        tell: called with a line that says what this process waits for.
    """
    assert spec.key is not None
    path, reported, watch = claim_path(spec.step, spec.key), float("-inf"), Watch()
    while True:
        seen = look(store, path)
        # In this order: a process writes its record before it releases its claim.
        if seen is not None and (record := find_record(store, spec.step, spec.key)) is not None:
            yield record
            return
        if (seen is None or watch.is_over(seen)) and (lease := take(store, path, seen)) is not None:
            break
        if seen is not None and time.monotonic() > reported + TELL_SECONDS:
            tell(f"step {spec.step} {spec.key[:12]}… is being computed by {seen}; waiting for its record")
            reported = time.monotonic()
        time.sleep(LOOK_SECONDS)
    try:
        yield None
    finally:
        lease.release()
