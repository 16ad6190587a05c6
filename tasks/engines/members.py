"""Processes of this machine that do one step together, as the step's owner sees them.

They are forked from the server that forks every step's process (`fork_server`), and none outlives its owner.
The owner does no work of the step, so that no process of it can be stuck.
"""

import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar

from sera_core.artifacts.step import Attempt
from sera_core.errors import SeraError
from sera_core.guards.shown import shown
from tasks.engines.child import LEAVE_SECONDS, Lines, describe_exit, last_state, read_some, torch_threads
from tasks.engines.child_process import Child, signal_group
from tasks.engines.child_step import Channel
from tasks.engines.fork_server import WAKE_SECONDS

LOG = logging.getLogger("sera.processes")
LAST_LINES = 40
"""Lines of a failed process's output that are shown: the traceback of an unexpected error."""
CHATTER = "[Gloo] "
"""What gloo prints about every connection."""


def asked_of_each(attempt: Attempt, count: int, work: str, device: str) -> list[dict[str, Any]]:
    """What each of `count` processes is asked, without its `rank`: the step, its threads and its GPU.

    Args:
        attempt: the step's.
        count: number of processes.
        work: what each does, as `module:function` (request, channel) -> result.
        device: the torch device.
    """
    set_here = os.environ.get("OMP_NUM_THREADS", "")  # what torch would read, where it is not imported
    threads = torch_threads(attempt.execution) or int(set_here if set_here.isdecimal() else 0)
    same = {
        "work": work,
        "store": attempt.store.url,
        "spec": attempt.spec.model_dump(),
        "execution": attempt.execution.model_dump(),
        "threads": max(1, (threads or os.cpu_count() or 1) // count) if device == "cpu" else None,
        "talkative": False,
    }
    return [
        same | {"environment": {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": _visible(place)}}
        for place in range(count)
    ]


def _visible(place: int) -> str:
    """The GPU of a process, as CUDA_VISIBLE_DEVICES names it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[place].strip() if given else str(place)


@dataclass(eq=False)
class Member:
    """One of the processes, as its owner sees it."""

    attempt: Attempt
    rank: int
    count: int
    child: Child
    done: dict[str, Any] = field(default_factory=dict)
    """Its result, at the end."""
    error: SeraError | None = None
    failed_at: float | None = None
    """Time of the first sign of its failure."""
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LAST_LINES))
    """What it printed last."""

    @property
    def name(self) -> str:
        return f"process {self.rank + 1} of {self.count}"

    @property
    def failed(self) -> bool:
        """Whether it told an error, or ended without a result."""
        failed = self.error is not None or (not self.done and self.child.process.poll() is not None)
        if failed and self.failed_at is None:
            self.failed_at = time.monotonic()
        return failed

    @property
    def was_killed(self) -> bool:
        """Whether a signal ended it, and so perhaps made others fail."""
        return self.failed and self.error is None and (self.child.process.poll() or 0) < 0

    def hear(self, line: str) -> None:
        """Take one message."""
        (name, value), *_ = json.loads(line).items()
        getattr(self, f"_hear_{name}")(value)

    def _hear_log(self, record: list[Any]) -> None:
        name, level, text = record
        logging.getLogger(name).log(level, "%s", text)

    def _hear_error(self, error: list[str]) -> None:
        self.error = told_error(error)

    def _hear_done(self, result: dict[str, Any]) -> None:
        self.done = result

    def say(self, message: Any) -> None:
        """Send it a message, or the answer that it waits for."""
        with contextlib.suppress(OSError):  # it died meanwhile: seen in the next turn
            self.child.channel.sendall(json.dumps(message).encode() + b"\n")

    def printed(self, line: str) -> None:
        """Take one line of its output."""
        line = shown(last_state(line))
        if line.strip() and not line.startswith(CHATTER):
            self.lines.append(line)
            LOG.info("%s: %s", self.name, line)

    def show_last_lines(self) -> None:
        """Log what it printed last, before it failed."""
        if self.lines:
            LOG.warning("%s printed last:\n%s", self.name, "\n".join(self.lines))

    def how_it_ended(self) -> str:
        """To follow its name."""
        return describe_exit(self.child.process.wait())


def told_error(error: list[str]) -> SeraError:
    """The error that another process told as [module, class, message]."""
    module, name, text = error
    return getattr(import_module(module), name)(text)


AnyMember = TypeVar("AnyMember", bound=Member)


@contextlib.contextmanager
def together(kind: type[AnyMember]) -> Iterator[list[AnyMember]]:
    """A list for the processes; none outlives the block. Those that are done may leave in their own time."""
    members: list[AnyMember] = []
    try:
        yield members
        _let_leave(members)
    finally:
        for member in members:
            signal_group(member.child.process, signal.SIGKILL)
        for member in members:
            member.child.end()


def _let_leave(members: list[AnyMember]) -> None:
    deadline = time.monotonic() + LEAVE_SECONDS
    for member in members:
        member.child.channel.close()  # there is no further request
        if member.done:
            with contextlib.suppress(subprocess.TimeoutExpired):
                member.child.process.wait(max(0, deadline - time.monotonic()))


class Listening:
    """The messages and the output of processes."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def __enter__(self) -> "Listening":
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()

    def to(self, member: Member) -> None:
        """Listen to a further process."""
        self._selector.register(member.child.channel, selectors.EVENT_READ, Lines(member.hear))
        self._selector.register(member.child.output, selectors.EVENT_READ, Lines(member.printed))

    def turn(self, seconds: float = WAKE_SECONDS) -> bool:
        """Take what they say within so many seconds; returns whether they said anything."""
        ready = self._selector.select(seconds)
        for key, _ in ready:
            if data := read_some(key.fd):
                key.data.take(data)
            else:
                self._selector.unregister(key.fileobj)
        return bool(ready)


# -------------------------------------------------------------------------------------------- each of them


@contextlib.contextmanager
def speaking(channel: Channel) -> Iterator[None]:
    """Send our log lines to the owner."""
    logger, handler = logging.getLogger("sera"), _Forward(channel)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _Forward(logging.Handler):
    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self.channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self.channel.tell(log=[record.name, record.levelno, record.getMessage()])
