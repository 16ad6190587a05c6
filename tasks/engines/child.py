"""Run a step in a child process group: it frees all memory, can be cancelled, and never blocks heartbeats.

    python -P -m tasks.engines.child FD PARENT_PID

The request is JSON on stdin. Progress, completion and errors go to the pipe FD as JSON lines; stdout and
stderr are passed to the parent's log line by line. The result is in the store.

No process of the group survives: the parent kills the group when the step ends or is interrupted; if the
parent is killed, the kernel kills the child; if the child is killed, its guard process kills the rest.
"""

import contextlib
import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import IO, Any, cast

from sera_core.artifacts.manifest import StepRecord, StepSpec, find_record
from sera_core.artifacts.step import Progress, run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.errors import SeraError
from sera_core.guards.orphans import exit_with_parent, guarded_group
from sera_core.guards.shown import shown
from sera_core.models.devices import device_of
from tasks.engines.library_logs import VERBOSE_LIBRARIES, forward_library_logs

Log = Callable[[str], None]
"""log(line): called with every line that the step and its libraries print."""

TERM_SECONDS = 5
"""Time between SIGTERM and SIGKILL."""
LEAVE_SECONDS = 30
"""Time for a finished child to exit (experiment trackers may still send data)."""
WAKE_SECONDS = 0.5

_Group = tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]
"""The child, its message pipe, its output."""


def to_stderr(line: str) -> None:
    """The default log."""
    sys.stderr.write(shown(line) + "\n")


# ------------------------------------------------------------------------------------------------ the parent


def run_in_child(
    work: str, store_url: str, spec: StepSpec, execution: ExecutionConfig, progress: Progress, log: Log
) -> StepRecord:
    """Run a step in a child process group; returns its record from the store.

    Args:
        work: step function as `module:function`.
        store_url: folder or URL of the store.
        spec: the step, which has no record yet.
        execution: execution settings.
        progress: called with the step's progress.
        log: called with every line of output; libraries log in more detail unless it is `to_stderr`.

    Raises:
        SeraError: the step function raised it (same class), or the process died; the message says how.
    """
    request = {
        "work": work,
        "store": store_url,
        "spec": spec.model_dump(),
        "execution": execution.model_dump(),
        "threads": _threads(execution),
        "talkative": log is not to_stderr,
    }
    heard = _Heard(progress)
    with _group(request) as (process, channel, output):
        printed = _Lines(lambda line: log(_last_state(line)))
        _listen(process, {channel: _Lines(heard), output: printed}, heard)
        if printed.rest:
            printed.take(b"\n")
    if heard.error is not None:
        raise heard.error
    record = find_record(open_store(store_url), spec.step, spec.key)
    if record is None:
        raise SeraError(
            f"step {spec.step}: its process {_describe_exit(process.returncode)}; run the same command again "
            "to continue from the last finished part"
        )
    return record


def _threads(execution: ExecutionConfig) -> int | None:
    """torch's number of threads in this process, which can change the last bits of results on CPU."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch and device_of(execution.device) == "cpu" else None


@contextlib.contextmanager
def _group(request: dict[str, Any]) -> Iterator[_Group]:
    """Start a child in its own process group; kill the group at the end of the block."""
    read, write = os.pipe()
    with os.fdopen(read, "rb", buffering=0) as channel, tempfile.TemporaryFile("w+") as stdin:
        json.dump(request, stdin)
        stdin.seek(0)
        # -P: do not import a folder `tasks` in the working directory
        command = [sys.executable, "-P", "-u", "-X", "faulthandler", "-m", "tasks.engines.child"]
        try:
            process = subprocess.Popen(
                [*command, str(write), str(os.getpid())],
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(write,),
                start_new_session=True,
            )
        finally:
            os.close(write)
        output = cast(IO[bytes], process.stdout)
        try:
            yield process, channel, output
        except BaseException:
            _signal(process, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TERM_SECONDS)
            raise
        finally:
            _signal(process, signal.SIGKILL)
            process.wait()
            output.close()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal the whole group, which exists as long as it has members."""
    with contextlib.suppress(ProcessLookupError, PermissionError):  # no member left, or (macOS) only zombies
        os.killpg(process.pid, number)


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
    def overdue(self) -> bool:
        """Whether the child should have exited by now."""
        return self.ended is not None and time.monotonic() > self.ended + LEAVE_SECONDS


def _last_state(line: str) -> str:
    """A line as a terminal would show it: the last state of a progress bar."""
    return line.rstrip("\r").rpartition("\r")[2]


class _Lines:
    """Splits bytes into lines; the last one may be incomplete."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self.tell, self.rest = tell, b""

    def take(self, data: bytes) -> None:
        *whole, self.rest = (self.rest + data).split(b"\n")
        for line in whole:
            self.tell(line.decode(errors="replace"))


def _listen(process: subprocess.Popen[bytes], pipes: dict[IO[bytes], _Lines], heard: _Heard) -> None:
    """Pass on the child's messages and output until it exits. Wakes up often to handle signals."""
    with selectors.DefaultSelector() as selector:
        for pipe, lines in pipes.items():
            selector.register(pipe, selectors.EVENT_READ, lines)
        while selector.get_map() and not heard.overdue:
            ready = selector.select(WAKE_SECONDS)
            for key, _ in ready:
                if data := os.read(key.fd, 1 << 16):
                    key.data.take(data)
                else:
                    selector.unregister(key.fileobj)
            if process.poll() is not None:
                _signal(process, signal.SIGKILL)  # remaining members keep the pipes open
                if not ready:
                    return
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0 if heard.overdue else LEAVE_SECONDS)


def _describe_exit(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    what = "killed, perhaps out of memory" if code == -signal.SIGKILL else signal.strsignal(-code)
    return f"was ended by signal {-code} ({what})"


# ------------------------------------------------------------------------------------------------- the child


def main() -> None:
    """Run the step of the request on stdin."""
    channel, parent = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(channel, False)
    request = json.load(sys.stdin)
    with guarded_group():
        exit_with_parent(parent)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # clean up, then exit
        _serve(request, channel)


def _serve(request: dict[str, Any], channel: int) -> None:
    """Run the step, and report completion or the error to the parent."""

    def tell(**message: Any) -> None:
        os.write(channel, json.dumps(message).encode() + b"\n")

    spec = StepSpec.model_validate(request["spec"])
    try:
        _use_threads(request["threads"])
        module, name = request["work"].split(":")
        output = logging.StreamHandler()
        output.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        with (
            forward_library_logs(output, VERBOSE_LIBRARIES)
            if request["talkative"]
            else contextlib.nullcontext()
        ):
            run_step(
                open_store(request["store"], remember=True),
                spec,
                getattr(import_module(module), name),
                ExecutionConfig.model_validate(request["execution"]),
                lambda *report: tell(progress=report),
            )
        tell(done=True)
    except SeraError as error:
        tell(error=[type(error).__module__, type(error).__qualname__, str(error)])
    except Exception as error:
        traceback.print_exc()
        message = f"step {spec.step}: {type(error).__name__}: {error} (see its log for the traceback)"
        tell(error=[SeraError.__module__, SeraError.__qualname__, message])


def _use_threads(count: int | None) -> None:
    if count is None:
        return
    import torch

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


if __name__ == "__main__":
    main()
