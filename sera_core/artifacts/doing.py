"""What the holder of a run's lease is doing: the step, how far it is, the time left.

    runs/<run>/lease/00000-doing.json     rewritten by the holder alone, with its heartbeats

A record of its own, because earlier versions refuse a heartbeat with a field that they do not know.
"""

import time
from dataclasses import dataclass, field

from sera_core.artifacts.records import FORMAT, StrictModel, read_typed
from sera_core.artifacts.store import Store


class Doing(StrictModel):
    """What the holder of an epoch is doing."""

    format: int
    token: str
    """The holder's."""
    round: int | None
    """None: the evaluation on the test set, after the last round."""
    step: str
    seconds: float
    """How long the step has taken so far in this process."""
    done: int | None = None
    """Units done; None until the step reports."""
    total: int | None = None
    unit: str | None = None
    left: float | None = None
    """Seconds until the step is done, at its pace since its first report; None while unknown."""
    spent: float
    """Seconds of the round's finished steps."""


@dataclass
class Task:
    """The step that this process is doing; updated by the work, read by the thread of heartbeats."""

    step: str
    round: int | None
    spent: float
    """Seconds of the round's finished steps."""
    began: float = field(default_factory=time.monotonic)
    first: tuple[float, int] | None = None
    """Time and units done at the first report: a resumed step begins with those of earlier attempts."""
    last: tuple[float, int, int, str] | None = None
    """Time, units done, all units and the unit at the last report."""

    def report(self, done: int, total: int, unit: str) -> None:
        """Note the progress of the step; another unit is another part of it, with a pace of its own."""
        now = time.monotonic()
        if self.first is None or self.last is None or self.last[2:] != (total, unit) or done < self.first[1]:
            self.first = now, done
        self.last = now, done, total, unit

    def record(self, token: str) -> Doing:
        """The record of it."""
        done, total, unit = self.last[1:] if self.last is not None else (None, None, None)
        return Doing(
            format=FORMAT,
            token=token,
            round=self.round,
            step=self.step,
            seconds=round(time.monotonic() - self.began, 1),
            done=done,
            total=total,
            unit=unit,
            left=self._left(),
            spent=round(self.spent, 1),
        )

    def _left(self) -> float | None:
        if self.first is None or self.last is None:
            return None
        (began, before), (now, done, total, _) = self.first, self.last
        if done <= before or now <= began or total < done:
            return None
        return round((now - began) / (done - before) * (total - done), 1)


def doing_path(path: str, epoch: int) -> str:
    """Where the holder of an epoch writes what it is doing.

    Args:
        path: folder of the lease.
        epoch: its number.
    """
    return f"{path}/{epoch:05d}-doing.json"


def read_doing(store: Store, path: str, epoch: int, token: str) -> Doing | None:
    """What the holder of an epoch said last; None if it said nothing."""
    found = read_typed(store, doing_path(path, epoch), Doing)
    return found if found is not None and found.token == token else None
