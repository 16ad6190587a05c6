"""The process group of a step: started, kept for the next step, ended."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from tasks.engines.fork_server import ForkedProcess, fork, working_directory

TERM_SECONDS = 5
"""Time between SIGTERM and SIGKILL."""


@dataclass
class Child:
    """A process group for steps."""

    process: ForkedProcess
    channel: socket.socket
    """Its messages, and requests after the first."""
    output: IO[bytes]
    surroundings: tuple[dict[str, str], str]
    """The environment and the working directory that it was started in."""
    stays: bool
    """Whether it waits for another request after a finished step."""
    waits: bool = False
    """Whether it has finished its step and waits."""

    def ask(self, request: dict[str, Any]) -> bool:
        """Send it a further request; False: it has ended."""
        if self.process.poll() is not None:
            return False
        self.waits = False
        try:
            self.channel.sendall(json.dumps(request).encode() + b"\n")
        except OSError:
            return False
        return True

    def end(self, politely: bool = False) -> None:
        """Kill the group; politely: after SIGTERM and some seconds."""
        if politely:
            signal_group(self.process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(TERM_SECONDS)
        signal_group(self.process, signal.SIGKILL)
        self.process.wait()
        self.process.close()
        self.channel.close()
        self.output.close()


_lock = threading.Lock()
_keepers = 0
_kept: Child | None = None
"""The idle child that stays for the next step that only reads a policy."""


@contextlib.contextmanager
def keep_process() -> Iterator[None]:
    """Keep one child between steps inside the block; it ends with the block."""
    global _keepers
    with _lock:
        _keepers += 1
    try:
        yield
    finally:
        with _lock:
            _keepers -= 1
            last = _keepers == 0
        if last:
            release_process()


def release_process() -> None:
    """End the child that is kept, if there is one, and so give its memory back."""
    if (child := _take()) is not None:
        child.end()


@contextlib.contextmanager
def child_for(request: dict[str, Any], may_stay: bool) -> Iterator[Child]:
    """A child that does the request: the kept one or a new one. After the block it is kept or ended.

    Args:
        request: see `tasks.engines.child_step`.
        may_stay: whether it may do further requests.
    """
    stays = may_stay and _keepers > 0
    child = _take()
    if child is not None and not (stays and child.surroundings == _surroundings() and child.ask(request)):
        child.end()
        child = None
    if child is None:
        child = start(request, stays)
    try:
        yield child
    except BaseException:
        child.end(politely=True)
        raise
    if not (child.waits and _keep(child)):
        child.end()


def start(request: dict[str, Any], stays: bool) -> Child:
    """Start a process group for a request.

    Args:
        request: see `tasks.engines.child_step`.
        stays: whether more will be said to it.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    output, to_output = os.pipe()
    printed = os.fdopen(output, "rb", buffering=0)
    try:
        process = fork(request, theirs.fileno(), to_output)
    except BaseException:
        ours.close()
        printed.close()
        raise
    finally:
        theirs.close()
        os.close(to_output)
    if not stays:
        ours.shutdown(socket.SHUT_WR)  # there is no further request
    return Child(process, ours, printed, _surroundings(), stays)


def _surroundings() -> tuple[dict[str, str], str]:
    return dict(os.environ), working_directory()


def _take() -> Child | None:
    """The kept child, which is then the caller's."""
    global _kept
    with _lock:
        child, _kept = _kept, None
    return child


def _keep(child: Child) -> bool:
    """Keep a child that waits for a request; False: another one is kept already, or none may be."""
    global _kept
    with _lock:
        if _kept is not None or _keepers == 0:
            return False
        _kept = child
        return True


def signal_group(process: ForkedProcess, number: int) -> None:
    """Signal the whole group, which exists as long as it has members."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # no member left, or (macOS) only zombies
        os.killpg(process.pid, number)
