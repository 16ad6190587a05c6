"""Fork each step's process from a server that has imported the libraries: they take 5 to 12 seconds a step.

    python -P -m tasks.engines.fork_server CONTROL_FD PARENT_PID

A process that runs steps starts one server. For each request on the control socket the server imports what
the step needs and forks. It never uses a device or starts a model, because a process cannot pass these on.
The server ends with the process that started it (PARENT_PID, which only tells a reader of the process list
whose server it is), and every forked process ends with the server.
"""

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from sera_core.errors import SeraError
from sera_core.guards.memory import count_again, count_without
from tasks.engines.child_step import run_request

PYTHON = (sys.executable, "-P", "-u", "-X", "faulthandler", "-m")
"""-P: do not import a folder `tasks` in the working directory."""
WAKE_SECONDS = 0.5
LIBRARIES = (
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "peft",
    "sera_core.models.logprobs",
)
"""Imported for every step."""
LIBRARIES_OF = {
    "tasks.sampling": ("tasks.engines.hf_sampler",),
    "tasks.training": ("tasks.engines.dpo_trainer",),
}
"""Imported for one step in addition, by the module of its step function."""
READ_LATE = ("SERA_", "PREFECT_", "PYTEST_")
"""Beginnings of environment variables that no library reads when it is imported."""


# -------------------------------------------------------------------------------- the process that runs steps


class ForkedProcess:
    """A process that the server forked, with the part of `subprocess.Popen` that we use.

    Closing it ends its process group, also while the server still imports.
    """

    def __init__(self, status: socket.socket) -> None:
        self.returncode: int | None = None
        self._status, self._rest = status, b""
        self._status.settimeout(WAKE_SECONDS)
        self.pid = 0
        while (pid := self._line(waits=True)) is None:
            pass
        if pid == "":
            raise SeraError("the server that starts the steps' processes ended; run the same command again")
        self.pid = int(pid)

    def poll(self) -> int | None:
        """The exit code (negative: the signal), or None while the process runs."""
        if self.returncode is None and (code := self._line(waits=False)) is not None:
            self.returncode = int(code) if code else -signal.SIGKILL  # it ends with the server
        return self.returncode

    def wait(self, seconds: float | None = None) -> int:
        """The exit code, once the process has ended.

        Raises:
            subprocess.TimeoutExpired: it runs on after `seconds`.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while (code := self.poll()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired("step", seconds or 0)
            self._readable(0.05)
        return code

    def close(self) -> None:
        """Kill the group, if it has members."""
        self._status.close()

    def _readable(self, seconds: float) -> bool:
        """Whether the server says something within so many seconds."""
        poll = select.poll()  # unlike select, it takes any number of open files
        poll.register(self._status, select.POLLIN)
        return bool(poll.poll(1000 * seconds))

    def _line(self, waits: bool) -> str | None:
        """The server's next line; None: not yet; empty: the server is gone."""
        while b"\n" not in self._rest:
            if not waits and not self._readable(0):
                return None
            try:
                data = self._status.recv(64)
            except TimeoutError:
                return None
            except ConnectionResetError:
                data = b""
            if not data:
                return ""
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode()


class _Server:
    """The server of this process, and the environment that it was started in."""

    def __init__(self) -> None:
        self.environment = _read_early(os.environ)
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = subprocess.Popen(
                [*PYTHON, "tasks.engines.fork_server", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                cwd=working_directory(),
            )
        count_without(self._process.pid)

    def serves(self) -> bool:
        """Whether it runs, in the environment of now."""
        return self._process.poll() is None and self.environment == _read_early(os.environ)

    def fork(self, request: dict[str, Any], channel: int, output: int) -> ForkedProcess:
        """Start a process for the request; see `fork`."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                socket.send_fds(self._control, [b"."], [theirs.fileno(), channel, output])
            ours.sendall(json.dumps(request).encode() + b"\n")
            return ForkedProcess(ours)
        except BaseException:
            ours.close()
            raise

    def end(self) -> None:
        """Kill the server, and with it every process that it forked."""
        self._control.close()
        self._process.kill()
        self._process.wait()
        count_again(self._process.pid)


_server: _Server | None = None
_starting = threading.Lock()


def fork(request: dict[str, Any], channel: int, output: int) -> ForkedProcess:
    """Fork a process that runs the step of a request, with this process's environment and working directory.

    Args:
        request: see `tasks.engines.child_step`; variables in its `environment` are set besides.
        channel: file descriptor of a socket for messages and further requests.
        output: file descriptor for everything that it prints.

    Raises:
        SeraError: the server died.
    """
    environment = {**os.environ, **request.get("environment", {})}
    here = {"environment": environment, "directory": working_directory()}
    return _running().fork({**request, **here}, channel, output)


def _running() -> _Server:
    """The server; a new one if there is none, or if the environment has changed since it was started."""
    global _server
    with _starting:
        if _server is None or not _server.serves():
            end_server()
            _server = _Server()
        return _server


@atexit.register
def end_server() -> None:
    """End the server of this process, if there is one; the next step starts a new one."""
    global _server
    if _server is not None:
        _server.end()
        _server = None


def working_directory() -> str:
    """The working directory; if it was deleted, nothing relative to it can be read anyway."""
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return "/"


def _read_early(environment: Any) -> dict[str, str]:
    """The variables that a library may read when it is imported."""
    return {name: value for name, value in environment.items() if not name.startswith(READ_LATE)}


# ------------------------------------------------------------------------------------------------- the server


def main() -> None:
    """Serve; or, in a forked process, run the step."""
    codes: list[int] = []
    atexit.register(_leave, codes)  # registered first, called last
    gc.disable()
    forked = _serve(socket.socket(fileno=int(sys.argv[1])))
    if forked is None:
        return
    gc.enable()
    try:
        run_request(*forked, os.getppid())
        codes.append(0)
    except SystemExit as ended:
        codes.append(ended.code if isinstance(ended.code, int) else 1)


def _leave(codes: list[int]) -> None:
    """Leave a forked process, all else cleaned up: to free the server's objects would take seconds."""
    for code in codes:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(control: socket.socket) -> tuple[dict[str, Any], int] | None:
    """Fork until the process that started the server ends; returns (request, channel) in a forked process."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler of its own, so that wakeup_fd is written
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    statuses: dict[int, socket.socket] = {}
    while True:
        ready = select.select([control, woken, *statuses.values()], [], [])[0]
        if woken in ready:
            os.read(woken, 1 << 16)
        for pid, status in list(statuses.items()):
            if status in ready:  # the other end was closed
                _kill_group(pid)
        _reap(statuses)
        if control not in ready:
            continue
        data, files, _, _ = socket.recv_fds(control, 1, 3)
        if not data:
            return None
        status, (channel, output) = socket.socket(fileno=files[0]), files[1:]
        with status.makefile("rb") as lines:
            line = lines.readline()
        if line.endswith(b"\n"):  # else the asking thread was interrupted
            request = json.loads(line)
            with _printing_to(output):
                _import_for(request["work"])
            gc.freeze()  # the forked process shares the pages of what its garbage collector leaves alone
            if (pid := os.fork()) == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for other in (woken, wake, control, status, *statuses.values()):
                    os.close(other if isinstance(other, int) else other.detach())
                return _become(request, channel, output)
            statuses[pid] = status
            with contextlib.suppress(BrokenPipeError):  # the next turn sees that it is closed
                status.send(f"{pid}\n".encode())
        os.close(channel)
        os.close(output)


def _reap(statuses: dict[int, socket.socket]) -> None:
    """Tell the exit codes of the processes that have ended."""
    for pid in list(statuses):
        ended, code = os.waitpid(pid, os.WNOHANG)
        if ended:
            with statuses.pop(pid) as status, contextlib.suppress(BrokenPipeError):
                status.send(f"{os.waitstatus_to_exitcode(code)}\n".encode())


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


@contextlib.contextmanager
def _printing_to(output: int) -> Iterator[None]:
    """Print to the step's log inside the block: what importing says belongs there."""
    for stream in (1, 2):
        os.dup2(output, stream)
    try:
        yield
    finally:
        null = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(null, stream)
        os.close(null)


def _import_for(work: str) -> None:
    """Import what a step needs. What fails here fails again in the step's process, which reports it."""
    module = work.split(":")[0]
    # without it, asking whether there is a GPU opens it, and a forked process cannot use an open one
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    for name in (module, *LIBRARIES, *LIBRARIES_OF.get(module, ())):
        with contextlib.suppress(Exception):
            import_module(name)


def _become(request: dict[str, Any], channel: int, output: int) -> tuple[dict[str, Any], int]:
    """Give a forked process its session, output, environment and working directory."""
    os.setsid()
    for stream in (1, 2):
        os.dup2(output, stream)
    os.close(output)
    os.environ.clear()
    os.environ.update(request.pop("environment"))
    os.chdir(request.pop("directory"))
    if not _can_be_forked():
        _start_anew(request, channel)
    return request, channel


def _start_anew(request: dict[str, Any], channel: int) -> None:
    """Replace this process by a new interpreter that runs the step."""
    with tempfile.TemporaryFile("w+") as file:
        json.dump(request, file)
        file.seek(0)
        os.dup2(file.fileno(), 0)
    os.set_inheritable(channel, True)
    os.execv(sys.executable, [*PYTHON, "tasks.engines.child_step", str(channel), str(os.getppid())])


def _can_be_forked() -> bool:
    """Whether the step can run in this process. Where an import opened a GPU, and on macOS, it cannot."""
    torch = sys.modules.get("torch")
    return sys.platform == "linux" and not (torch and torch.cuda._is_in_bad_fork())


if __name__ == "__main__":
    main()
