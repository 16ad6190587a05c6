"""Run a step in a child process group: it frees all memory, can be cancelled, and never blocks heartbeats.

The child is forked from a server that has imported the libraries already (`fork_server`). Progress,
completion and errors come through a socket as JSON lines; what the child prints is passed to the log line by
line. The result is in the store.

Inside `keep_process`, a child whose step only reads a policy stays for the next such step: to open the device
and to load the policy anew takes seconds. It ends before any other step starts a child.

No process of the group survives: the parent kills the group when the step ends or is interrupted; if the
parent is killed, the server ends and the kernel kills the child; if the child is killed, its guard process
kills the rest.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from sera_core.artifacts.manifest import StepRecord, StepSpec, find_record
from sera_core.artifacts.step import Progress
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.errors import SeraError
from sera_core.guards.shown import shown
from sera_core.models.devices import device_of
from tasks.engines.child_process import Child, child_for, signal_group
from tasks.engines.fork_server import WAKE_SECONDS

Log = Callable[[str], None]
"""log(line): called with every line that the step and its libraries print."""

LEAVE_SECONDS = 30
"""Time for a finished child to exit (experiment trackers may still send data)."""


def to_stderr(line: str) -> None:
    """The default log."""
    sys.stderr.write(shown(line) + "\n")


def run_in_child(
    work: str,
    store_url: str,
    spec: StepSpec,
    execution: ExecutionConfig,
    progress: Progress,
    log: Log,
    may_stay: bool = False,
) -> StepRecord:
    """Run a step in a child process group; returns its record from the store.

    Args:
        work: step function as `module:function`.
        store_url: folder or URL of the store.
        spec: the step, which has no record yet.
        execution: execution settings.
        progress: called with the step's progress.
        log: called with every line of output; libraries log in more detail unless it is `to_stderr`.
        may_stay: whether the child may stay for the next step of this kind (`keep_process`).

    Raises:
        SeraError: the step function raised it (same class), or the process died; the message says how.
    """
    request = {
        "work": work,
        "store": store_url,
        "spec": spec.model_dump(),
        "execution": execution.model_dump(),
        "threads": torch_threads(execution),
        "talkative": log is not to_stderr,
    }
    heard = _Heard(progress)
    printed = Lines(lambda line: log(last_state(line)))
    with child_for(request, may_stay) as child:
        _listen(child, heard, printed)
        if printed.rest:
            printed.take(b"\n")
    if heard.error is not None:
        raise heard.error
    record = find_record(open_store(store_url), spec.step, spec.key)
    if record is None:
        raise SeraError(
            f"step {spec.step}: its process {describe_exit(child.process.wait())}; run the same command "
            "again to continue from the last finished part"
        )
    return record


def torch_threads(execution: ExecutionConfig) -> int | None:
    """torch's number of threads in this process, which can change the last bits of results on CPU."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch and device_of(execution.device) == "cpu" else None


@dataclass
class _Heard:
    """Messages received from the child."""

    progress: Progress
    error: SeraError | None = None
    ended: float | None = None
    """Time of the child's final message."""

    def __call__(self, line: str) -> None:
        message = json.loads(line)
        if "progress" in message:
            self.progress(*message["progress"])
            return
        self.ended = time.monotonic()
        if "error" in message:
            module, name, text = message["error"]
            self.error = getattr(import_module(module), name)(text)

    @property
    def done(self) -> bool:
        """Whether the step is finished."""
        return self.ended is not None and self.error is None

    @property
    def overdue(self) -> bool:
        """Whether the child should have exited by now."""
        return self.ended is not None and time.monotonic() > self.ended + LEAVE_SECONDS


def last_state(line: str) -> str:
    """A line as a terminal would show it: the last state of a progress bar."""
    return line.rstrip("\r").rpartition("\r")[2]


class Lines:
    """Splits bytes into lines; the last one may be incomplete."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell, self.rest = tell, b""

    def take(self, data: bytes) -> None:
        *whole, self.rest = (self.rest + data).split(b"\n")
        for line in whole:
            self.tell(line.decode(errors="replace"))


def _listen(child: Child, heard: _Heard, printed: Lines) -> None:
    """Pass on the child's messages and output until it exits, or waits for its next step.

    Wakes up often to handle signals.
    """
    with selectors.DefaultSelector() as selector:
        selector.register(child.channel, selectors.EVENT_READ, Lines(heard))
        selector.register(child.output, selectors.EVENT_READ, printed)
        while selector.get_map() and not heard.overdue:
            child.waits = child.stays and heard.done
            ready = selector.select(0 if child.waits else WAKE_SECONDS)
            for key, _ in ready:
                if data := read_some(key.fd):
                    key.data.take(data)
                else:
                    selector.unregister(key.fileobj)
            if child.process.poll() is not None:
                signal_group(child.process, signal.SIGKILL)  # remaining members keep the pipes open
                child.waits = False
            if not ready and (child.waits or child.process.poll() is not None):
                return
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.process.wait(0 if heard.overdue else LEAVE_SECONDS)


def read_some(file: int) -> bytes:
    """What there is to read; empty at the end."""
    try:
        return os.read(file, 1 << 16)
    except ConnectionResetError:  # it was killed before it read the request
        return b""


def describe_exit(code: int) -> str:
    """How a process ended, to follow its name."""
    if code >= 0:
        return f"ended with exit code {code}"
    what = "killed, perhaps out of memory" if code == -signal.SIGKILL else signal.strsignal(-code)
    return f"was ended by signal {-code} ({what})"
