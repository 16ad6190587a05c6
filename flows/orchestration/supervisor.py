"""`sera up`: run a Prefect server, a worker and the deployments until interrupted.

Server and worker each run in a process group. A group ends with this process, even if that is killed, and is
restarted if it dies.

    python -m flows.orchestration.supervisor PARENT_PID MODULE ARGS…      run MODULE as leader of such a group
"""

import fcntl
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from flows.orchestration.authentication import CLIENT_SECRET, SERVER_SECRET, load_secret
from flows.orchestration.embedded_server import QUIET, open_private, private_folder, wait_until_healthy
from flows.orchestration.lost_runs import FlowRunTracker
from sera_core.errors import BusyError, InputError, SeraError
from sera_core.guards.orphans import exit_with_parent, guarded_group

STARTS, STARTS_SECONDS = 5, 120
"""A process is not restarted after this many starts within this many seconds."""
END_SECONDS = 15
"""Seconds between SIGTERM and SIGKILL."""
_PROFILE = ("PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "PREFECT_API_KEY", "PREFECT_UI_API_URL")


Report = Callable[[str], None]
"""report(line): called with messages about restarts."""
Ready = Callable[[dict[str, Any], str, Path | None], None]
"""ready(deployed, password, file): called once everything is up; the file holds the password, or is None."""


def up(home: Path, port: int, deploy_arguments: list[str], ready: Ready, report: Report) -> None:
    """Run server and worker until interrupted or terminated.

    Args:
        home: Folder for Prefect's database, settings, logs and the server's password.
        port: Port of the server and its UI.
        deploy_arguments: Flags for `sera deploy`.
        ready: Called once everything is up.
        report: Called when a process died and is restarted.

    Raises:
        InputError: the port is taken.
        BusyError: another `sera up` uses this home.
        SeraError: a process keeps dying.
    """
    start_server = ["flows.orchestration.embedded_server", str(port), str(os.getpid())]
    start_worker = ["prefect", "worker", "start", "--pool", "sera", "--name", "sera-up"]
    with _stop_on_signal(), _lock_home(home), ExitStack() as ending:
        _check_port(port)
        secret, file = load_secret(home)
        environment = environment_of(home, port, secret)
        api = environment["PREFECT_API_URL"]
        server = SupervisedProcess("server", start_server, environment, home)
        worker = SupervisedProcess("worker", start_worker, environment, home)
        flow_runs = FlowRunTracker(home / "flow-runs", secret)
        ending.callback(server.end)
        server.start()
        wait_until_healthy(server.process, f"{api}/health", server.log)
        made = _deploy(environment, deploy_arguments)
        ending.callback(flow_runs.reschedule_lost, api)
        ending.callback(flow_runs.mark_lost)
        ending.callback(worker.end)  # callbacks run last to first
        worker.start()
        ready(made, secret, file)
        while True:
            time.sleep(0.5)
            if server.has_died():
                server.restart(report)
                wait_until_healthy(server.process, f"{api}/health", server.log)
            if worker.has_died():
                flow_runs.mark_lost()
                worker.restart(report)
            flow_runs.reschedule_lost(api)
            flow_runs.scan(worker.process.pid)


def environment_of(home: Path, port: int, secret: str) -> dict[str, str]:
    """Environment of server, worker and `sera deploy`: the user's settings without the user's profile."""
    url = f"http://127.0.0.1:{port}/api"
    theirs = {name: value for name, value in os.environ.items() if name not in _PROFILE}
    defaults = {
        # keep leases across a server restart
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # and detect heartbeats missed while it was down, up to a month
        "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P30D",
        "PREFECT_WORKER_QUERY_SECONDS": "5",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    ours = {
        **QUIET,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_UI_API_URL": url,
        SERVER_SECRET: secret,
        CLIENT_SECRET: secret,
    }
    return {**defaults, **theirs, **ours}


class SupervisedProcess:
    """A module run as leader of a process group, with its output in a log file."""

    def __init__(self, name: str, module: list[str], environment: dict[str, str], home: Path) -> None:
        self.name, self.environment, self.home = name, environment, home
        self.log = home / f"{name}.log"
        # -P keeps a folder `flows` in the working directory off the path
        self.command = [
            sys.executable,
            "-P",
            "-m",
            "flows.orchestration.supervisor",
            str(os.getpid()),
            *module,
        ]
        self.starts: list[float] = []

    def start(self) -> None:
        """Start the process."""
        self.starts.append(time.monotonic())
        with open_private(self.log, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def has_died(self) -> bool:
        """Whether the process has died."""
        return self.process.poll() is not None

    def restart(self, report: Report) -> None:
        """Restart the process after it died.

        Raises:
            SeraError: it died too often.
        """
        self._signal(signal.SIGKILL)  # remaining processes of the group
        recent = [start for start in self.starts if time.monotonic() - start < STARTS_SECONDS]
        if len(recent) >= STARTS:
            raise SeraError(f"the {self.name} died {STARTS} times within {STARTS_SECONDS} s; see {self.log}")
        code = self.process.returncode
        report(f"the {self.name} died (exit code {code}); restarting it; see {self.log}")
        self.start()

    def end(self) -> None:
        """Terminate the group, and kill it if that fails."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline and (self.process.poll() is None or self._signal(0)):
            time.sleep(0.1)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> bool:
        """Signal the whole group. Returns whether it exists."""
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):  # gone (macOS: PermissionError for a zombie)
            return False
        return True


def _deploy(environment: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "flows.cli", "deploy", "--json", *arguments]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise SeraError(f"`sera deploy` failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


@contextmanager
def _stop_on_signal() -> Iterator[None]:
    """Leave the block quietly on Ctrl-C, SIGTERM or SIGHUP."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup
            signal.signal(number, interrupt)
    with suppress(KeyboardInterrupt):
        yield


@contextmanager
def _lock_home(home: Path) -> Iterator[None]:
    """Allow one `sera up` per home: two servers must not share a SQLite file."""
    private_folder(home, "--home")
    with (home / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(
                f"{home}: another `sera up` uses this home; use that one, or another --home"
            ) from error
        yield


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} of 127.0.0.1: {error}; choose another with --port") from error


def main() -> None:
    """Run a module as leader of a process group that ends with it, and with the parent."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    # ignored in a shell's background job, but the worker stops by interrupting itself
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with guarded_group():
        exit_with_parent(parent)
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
