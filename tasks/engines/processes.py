"""Train a round in several processes of this machine: start them, answer them, end them all.

The processes are forked from the server that forks every step's process (`fork_server`), not launched by
`torch.distributed.run`: its agent would be one more process between them and their owner, would import torch
and TRL again for each, and restarts what should fail at once. Here they start in a fraction of a second, need
no port (they meet through a file), and end with their owner, also if it is killed.

The owner does no work of the step, so that no process of it can be stuck: it alone has the store's attempt,
and commits what the first process has written. If one process dies, the others are killed, the step fails
with one message, and a rerun continues from the last checkpoint, with any number of processes.
"""

import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from sera_core.artifacts.manifest import StepSpec
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.errors import SeraError
from sera_core.guards.shown import shown
from sera_core.models.devices import device_of
from sera_core.models.shared_policies import release_policies
from tasks.engines.child import LEAVE_SECONDS, Lines, describe_exit, last_state, read_some, torch_threads
from tasks.engines.child_process import Child, release_process, signal_group, start
from tasks.engines.child_step import Channel
from tasks.engines.fork_server import WAKE_SECONDS
from tasks.engines.start_check import StartDiffersError

LOG = logging.getLogger("sera.train")
EXPLAIN_SECONDS = 5
"""Time after the first sign of trouble in which its cause may show: others fail when one dies."""
LAST_LINES = 40
"""Lines of a failed process's output that are shown: the traceback of an unexpected error."""
CHATTER = "[Gloo] "
"""What gloo prints about every connection."""


# -------------------------------------------------------------------------------------------------- the owner


def train_in_processes(attempt: Attempt, count: int, work: str) -> list[str]:
    """Train in `count` processes; returns the files that the first one wrote.

    Args:
        attempt: the step's; its counts and metrics are set.
        count: number of processes, at least 2.
        work: what each process does, as `module:function` (request, channel) -> result.

    Raises:
        SeraError: a process raised it (same class), or died; the message says how.
    """
    release_process()
    release_policies()
    for policy in ("start", "model"):
        attempt.input(policy).folder("policy")  # fetched once, not by each process
    attempt.parts()  # known before one is dropped
    attempt.environment["processes"] = count
    try:
        result = _train(attempt, count, work, None)
    except StartDiffersError as error:
        LOG.warning("%s; retrying once", error)
        result = _train(attempt, count, work, error.margin)
    attempt.counts.update(result["counts"])
    attempt.metrics |= result["metrics"]
    return result["files"]


def _train(attempt: Attempt, count: int, work: str, first_margin: float | None) -> dict[str, Any]:
    """One try; returns the first process's result."""
    with tempfile.TemporaryDirectory(prefix="sera-processes-") as folder:
        with _started(attempt, requests_of(attempt, count, work, folder, first_margin)) as members:
            _listen(members)
        grown = [member.done["grown"] for member in members]  # each watched its own
        attempt.memory.grown = sum(grown) if device_of(attempt.execution.device) == "cpu" else max(grown)
        return members[0].done


def requests_of(
    attempt: Attempt, count: int, work: str, folder: str, first_margin: float | None
) -> list[dict[str, Any]]:
    """What each of `count` processes is asked to do.

    Args:
        attempt, count, work: as in `train_in_processes`.
        folder: where they meet and put temporary files.
        first_margin: margin at step 0, in nats, with which the first try was refused; else None.
    """
    device, threads = device_of(attempt.execution.device), torch_threads(attempt.execution)
    same = {
        "work": work,
        "store": attempt.store.url,
        "spec": attempt.spec.model_dump(),
        "execution": attempt.execution.model_dump(),
        "threads": max(1, (threads or os.cpu_count() or 1) // count) if device == "cpu" else None,
        "talkative": False,
    }
    shared = {"count": count, "folder": folder, "first_margin": first_margin}
    shared["attempt"] = [attempt.id, str(attempt.folder)]
    return [
        same
        | {"rank": {"rank": rank, **shared}}
        | {"environment": {} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": _visible(rank)}}
        for rank in range(count)
    ]


def _visible(rank: int) -> str:
    """The GPU of a process, as CUDA_VISIBLE_DEVICES names it."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[rank].strip() if given else str(rank)


@dataclass
class _Member:
    """One of the processes, as its owner sees it."""

    attempt: Attempt
    rank: int
    count: int
    child: Child
    done: dict[str, Any] = field(default_factory=dict)
    """Its result, at the end."""
    error: SeraError | None = None
    margin: float = 0.0
    """Of a `StartDiffersError`, in nats."""
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
        """Take one message; see `SharedAttempt`."""
        (name, value), *_ = json.loads(line).items()
        getattr(self, f"_hear_{name}")(value)

    def _hear_progress(self, report: list[Any]) -> None:
        self.attempt.progress(*report)

    def _hear_log(self, record: list[Any]) -> None:
        name, level, text = record
        logging.getLogger(name).log(level, "%s", text)

    def _hear_commit(self, part: list[Any]) -> None:
        self._answer(self.attempt.commit_part(*part))

    def _hear_drop(self, number: int) -> None:
        self.attempt.drop_part(number)

    def _hear_margin(self, margin: float) -> None:
        self.margin = margin

    def _hear_error(self, error: list[str]) -> None:
        module, name, text = error
        self.error = getattr(import_module(module), name)(text)
        if isinstance(self.error, StartDiffersError):
            self.error.margin = self.margin

    def _hear_done(self, result: dict[str, Any]) -> None:
        self.done = result

    def _answer(self, answer: Any) -> None:
        with contextlib.suppress(OSError):  # it died meanwhile: seen in the next turn
            self.child.channel.sendall(json.dumps(answer).encode() + b"\n")

    def printed(self, line: str) -> None:
        """Take one line of its output."""
        line = shown(last_state(line))
        if line.strip() and not line.startswith(CHATTER):
            self.lines.append(line)
            LOG.info("%s: %s", self.name, line)


@contextlib.contextmanager
def _started(attempt: Attempt, requests: list[dict[str, Any]]) -> Iterator[list[_Member]]:
    """The processes; none outlives the block. Those that have finished may leave in their own time."""
    members: list[_Member] = []
    try:
        for rank, request in enumerate(requests):
            members.append(_Member(attempt, rank, len(requests), start(request, stays=True)))
        yield members
        _let_leave(members)
    except BaseException:
        if attempt.execution.tracking != "none" and members:
            members[0].child.end(politely=True)  # so that the tracker's run is closed
            members.pop(0)
        raise
    finally:
        for member in members:
            signal_group(member.child.process, signal.SIGKILL)
        for member in members:
            member.child.end()


def _let_leave(members: list[_Member]) -> None:
    deadline = time.monotonic() + LEAVE_SECONDS
    for member in members:
        member.child.channel.close()  # there is no further request
        with contextlib.suppress(subprocess.TimeoutExpired):
            member.child.process.wait(max(0, deadline - time.monotonic()))


def _listen(members: list[_Member]) -> None:
    """Take messages and output until every process is done.

    Raises:
        SeraError: one of them failed.
    """
    trouble: float | None = None
    with selectors.DefaultSelector() as selector:
        for member in members:
            selector.register(member.child.channel, selectors.EVENT_READ, Lines(member.hear))
            selector.register(member.child.output, selectors.EVENT_READ, Lines(member.printed))
        while not all(member.done for member in members):
            ready = selector.select(WAKE_SECONDS)
            for key, _ in ready:
                if data := read_some(key.fd):
                    key.data.take(data)
                else:
                    selector.unregister(key.fileobj)
            failed = [member for member in members if member.failed]
            if failed:
                trouble = trouble or time.monotonic()
                clear = any(member.was_killed for member in failed) or len(failed) == len(members)
                if (clear and not ready) or time.monotonic() > trouble + EXPLAIN_SECONDS:
                    raise _explanation(failed)


def _explanation(failed: list[_Member]) -> SeraError:
    """What to say about processes that failed: one that was killed made others fail, else the first did."""
    cause = min(failed, key=lambda member: (not member.was_killed, member.failed_at))
    if cause.lines:
        LOG.warning("%s printed last:\n%s", cause.name, "\n".join(cause.lines))
    if cause.error is not None:
        return cause.error
    return SeraError(
        f"step {cause.attempt.spec.step}: {cause.name} {describe_exit(cause.child.process.wait())}, so the "
        "others were ended; run the same command again to continue from the last checkpoint"
    )


# -------------------------------------------------------------------------------------------- each of them


class SharedAttempt(Attempt):
    """The attempt in one of its processes: it writes files, and the owner commits them."""

    def __init__(self, request: dict[str, Any], channel: Channel) -> None:
        rank = request["rank"]
        self.channel, self.first = channel, rank["rank"] == 0
        super().__init__(
            open_store(request["store"], remember=True),
            StepSpec.model_validate(request["spec"]),
            ExecutionConfig.model_validate(request["execution"]),
            self._tell_progress,
            (rank["attempt"][0], Path(rank["attempt"][1])),
        )

    def _tell_progress(self, *report: Any) -> None:
        if self.first:
            self.channel.tell(progress=report)

    def commit_part(self, number: int, files: list[str], info: dict[str, Any]) -> dict[str, Any]:
        assert self.first, "only the first process commits"
        return self.channel.ask(commit=[number, files, info])

    def drop_part(self, number: int) -> None:
        self.channel.tell(drop=number)


@contextlib.contextmanager
def speaking(channel: Channel, first: bool) -> Iterator[None]:
    """Send our log lines to the owner, if this is the first process; the others' only repeat them."""
    logger, handler = logging.getLogger("sera"), _Forward(channel)
    if not first:
        yield
        return
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
