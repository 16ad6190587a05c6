"""Who works on a run, and who computes a long step: one at a time, so that nobody's work is wasted.

    runs/<run>/lease/00000.json           create-only: who took the epoch, and when
    runs/<run>/lease/00000-beat.json      rewritten by its owner alone, every 15 s; the last says `released`
    steps/<step>/<key>/claim/…            likewise

An epoch is over when its last beat says so, when it is a minute old by the store's own clock, when whoever
waits has seen no further beat for a minute of their own clock (the store's may have jumped), or when its
holder was a process of this machine that is gone. Then the next one may be created. Correctness never rests
on any of it: records are create-only, and whoever holds an epoch that is over finds so before it commits a
round (`Lease.check`).
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from sera_core.artifacts.canonical import canonical_json
from sera_core.artifacts.holder import Holder, lives, this_process
from sera_core.artifacts.manifest import StepRecord, StepSpec, find_record
from sera_core.artifacts.records import FORMAT, Noun, read_record, typed
from sera_core.artifacts.store import Store, create_json
from sera_core.artifacts.upkeep import upkeep
from sera_core.errors import BusyError

BEAT_SECONDS = 15.0
EXPIRE_SECONDS = 60.0
"""Without a beat for so long, by the store's clock, an epoch is over."""
LOOK_SECONDS = 1.0
"""Between two looks at what somebody else holds."""
TELL_SECONDS = 60.0
"""Between two lines that say what is waited for."""

Tell = Callable[[str], None]


class Epoch(Noun):
    """The record of having taken a lease."""

    format: int
    epoch: int
    holder: Holder
    since: str


class Beat(Noun):
    """A sign of life."""

    format: int
    token: str
    beats: int
    released: bool


@dataclass(frozen=True)
class Held:
    """What is seen of the newest epoch."""

    epoch: Epoch
    beats: int
    released: bool
    age: float
    """Seconds since its last sign of life, by the store's clock."""

    @property
    def is_over(self) -> bool:
        """Whether the next epoch may be taken."""
        return self.released or self.age > EXPIRE_SECONDS or lives(self.epoch.holder) is False

    @property
    def surely_held(self) -> bool:
        """Whether the holder is known to be at work: a process of this machine that is there."""
        return not self.is_over and lives(self.epoch.holder) is True

    def __str__(self) -> str:
        return f"{self.epoch.holder}, since {self.epoch.since} (last sign of life {self.age:.0f} s ago)"


class Watch:
    """What one process sees of a lease over time."""

    def __init__(self) -> None:
        self._last: tuple[int, str, int] | None = None
        self._since = 0.0

    def is_over(self, seen: Held) -> bool:
        """Whether the epoch seen is over, or has given no further sign of life for a minute of this watch.

        By the store's clock a beat may lie in the future, for as long as a clock was wrong.
        """
        sign = (seen.epoch.epoch, seen.epoch.holder.token, seen.beats)
        if sign != self._last:
            self._last, self._since = sign, time.monotonic()
        return seen.is_over or time.monotonic() - self._since > EXPIRE_SECONDS


class Lease:
    """An epoch of our own, kept alive by a thread until it is released."""

    def __init__(self, store: Store, path: str, epoch: Epoch) -> None:
        self.store, self.path, self.epoch = store, path, epoch
        self._beats, self._end = 0, threading.Event()
        self._thread = threading.Thread(target=self._keep, name=f"lease {path}", daemon=True)
        self._thread.start()

    @property
    def number(self) -> int:
        """The epoch's number."""
        return self.epoch.epoch

    def check(self) -> None:
        """Find out whether the epoch is still the newest.

        Raises:
            BusyError: somebody took the next one: this process was paused, or cut off from the store, for
                longer than a lease lives.
        """
        after = _read_epoch(self.store, self.path, self.number + 1)
        if after is not None:
            raise BusyError(
                f"{self.store.url}/{self.path}: this process held it since {self.epoch.since} (epoch "
                f"{self.number}), gave no sign of life for {EXPIRE_SECONDS:.0f} s, and {after.holder} took "
                f"over at {after.since}; it stops here and commits nothing more. What it finished is kept"
            )

    def release(self) -> None:
        """Let the next one in at once. Where the store cannot be reached the epoch runs out by itself."""
        self._end.set()
        self._thread.join()
        with suppress(Exception):
            self._beat(released=True)

    def _keep(self) -> None:
        while not self._end.wait(BEAT_SECONDS):
            # A beat that fails is made up for by the next; if none arrives the epoch runs out.
            with suppress(Exception):
                if _read_epoch(self.store, self.path, self.number + 1) is not None:
                    return
                self._beat(released=False)

    def _beat(self, released: bool) -> None:
        self._beats += 1
        beat = Beat(format=FORMAT, token=self.epoch.holder.token, beats=self._beats, released=released)
        upkeep(self.store).replace(_beat_path(self.path, self.number), canonical_json(beat.model_dump()))


# ------------------------------------------------------------------------------------------------- looking


def look(store: Store, path: str) -> Held | None:
    """The newest epoch of a lease and when it last gave a sign of life; None when it was never taken."""
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
    """Numbers are dense, so that doubling and then halving the step finds the last in a few reads."""
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
    """Take the epoch after the one that was seen to be over; None when somebody else was faster."""
    number = 0 if after is None else after.epoch.epoch + 1
    since = datetime.now(UTC).isoformat(timespec="seconds")
    ours = Epoch(format=FORMAT, epoch=number, holder=this_process(), since=since)
    winner, _ = create_json(store, _epoch_path(path, number), ours.model_dump())
    won = typed(Epoch, winner, f"{store.url}/{_epoch_path(path, number)}")
    return Lease(store, path, ours) if won.holder.token == ours.holder.token else None


_HELD: dict[tuple[str, str], Lease] = {}
"""Leases of this process, by store and run."""


def held(store: Store, run: str) -> Lease | None:
    """The lease on a run that this process holds."""
    return _HELD.get((store.url, run))


@contextmanager
def hold(store: Store, run: str, tell: Tell) -> Iterator[Lease]:
    """Be the only one that works on a run while the block runs.

    Where somebody who may be gone holds it, the next sign of life, or its absence for a minute, decides.

    Args:
        store: where the run is.
        run: its name.
        tell: told what is waited for.

    Raises:
        BusyError: somebody else works on it: who, where and since when.
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
    """Wait until nobody holds the run; the last one who did, or None.

    Raises:
        BusyError: its holder is at work.
    """
    first: Held | None = None
    watch = Watch()
    while (seen := look(store, lease_path(run))) is not None and not watch.is_over(seen):
        beaten = first is not None and (first.epoch, first.beats) != (seen.epoch, seen.beats)
        if seen.surely_held or beaten:
            raise BusyError(
                f"run {run!r} is held by {seen}. It goes on by itself: `sera show {run}` tells how far it "
                "is. End that process to go on here"
            )
        if first is None:
            first = seen
            tell(f"run {run}: held by {seen}; waiting for its next sign of life, a minute at most")
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
    """Be the only one that does a step while the block runs, or get the record that another one made.

    Whoever asks has looked for the record: it is looked for again only where somebody else claimed the step.

    Whoever comes second waits: for the record, or for a claim that is given up or runs out.

    Args:
        store: where the step is.
        spec: the step; all its inputs are known.
        tell: told what is waited for.
    """
    assert spec.key is not None
    path, told, watch = claim_path(spec.step, spec.key), float("-inf"), Watch()
    while True:
        seen = look(store, path)
        # After looking: who was seen to be done has left its record before it let go.
        if seen is not None and (record := find_record(store, spec.step, spec.key)) is not None:
            yield record
            return
        if (seen is None or watch.is_over(seen)) and (lease := take(store, path, seen)) is not None:
            break
        if seen is not None and time.monotonic() > told + TELL_SECONDS:
            tell(f"step {spec.step} {spec.key[:12]}… is being done by {seen}; waiting for its record")
            told = time.monotonic()
        time.sleep(LOOK_SECONDS)
    try:
        yield None
    finally:
        lease.release()
