"""A Prefect server, a worker and what `sera deploy` makes, kept up here until interrupted: `sera up`.

Each process has a group of its own, which ends with us, however we end, and is started again when it ends
before us.

    python -m flows.orchestration.supervisor PARENT_PID MODULE ARGS…      MODULE as the leader of such a group
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

from flows.orchestration.authentication import CLIENT_SECRET, SERVER_SECRET, secret_of
from flows.orchestration.embedded_server import QUIET, open_private, private_folder, wait_until_healthy
from flows.orchestration.lost_runs import Seen
from sera_core.errors import BusyError, InputError, SeraError
from sera_core.guards.orphans import exit_with_parent, guarded_group

STARTS, STARTS_SECONDS = 5, 120
"""A process that was started so often within so many seconds is not started again."""
END_SECONDS = 15
"""Between asking a group to end and killing it."""
_PROFILE = ("PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "PREFECT_API_KEY", "PREFECT_UI_API_URL")


Say = Callable[[str], None]
"""say(line): told what happens meanwhile."""
Ready = Callable[[dict[str, Any], str, Path | None], None]
"""ready(deployed, password, file): called once everything is up; the file holds the password, if one does."""


def up(home: Path, port: int, deploy_arguments: list[str], ready: Ready, say: Say) -> None:
    """Serve until interrupted or terminated.

    Args:
        home: Folder for Prefect's database, settings, logs and the server's password.
        port: Port of the server and its UI.
        deploy_arguments: What to hand on to `sera deploy`.
        ready: Called once everything is up.
        say: Told when something ended and is started again.

    Raises:
        InputError: the port is taken.
        BusyError: another `sera up` has this home.
        SeraError: a process ends again and again.
    """
    start_server = ["flows.orchestration.embedded_server", str(port), str(os.getpid())]
    start_worker = ["prefect", "worker", "start", "--pool", "sera", "--name", "sera-up"]
    with _interrupted(), _held(home), ExitStack() as ending:
        _check_port(port)
        secret, file = secret_of(home)
        environment = environment_of(home, port, secret)
        api = environment["PREFECT_API_URL"]
        server = Kept("server", start_server, environment, home)
        worker = Kept("worker", start_worker, environment, home)
        flow_runs = Seen(home / "flow-runs", secret)
        ending.callback(server.end)
        server.start()
        wait_until_healthy(server.process, f"{api}/health", server.log)
        made = _deploy(environment, deploy_arguments)
        ending.callback(flow_runs.give_back, api)
        ending.callback(flow_runs.lose)
        ending.callback(worker.end)  # the last one is called first
        worker.start()
        ready(made, secret, file)
        while True:
            time.sleep(0.5)
            if server.ended():
                server.start_again(say)
                wait_until_healthy(server.process, f"{api}/health", server.log)
            if worker.ended():
                flow_runs.lose()
                worker.start_again(say)
            flow_runs.give_back(api)
            flow_runs.look(worker.process.pid)


def environment_of(home: Path, port: int, secret: str) -> dict[str, str]:
    """What server, worker and deploying are given: the user's settings without the user's profile."""
    url = f"http://127.0.0.1:{port}/api"
    theirs = {name: value for name, value in os.environ.items() if name not in _PROFILE}
    defaults = {
        # a restarted server goes on with the leases it gave
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        # and still misses the heartbeats it missed while it was down, up to a month
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


class Kept:
    """A module run as the leader of a process group, with its output in a file."""

    def __init__(self, name: str, module: list[str], environment: dict[str, str], home: Path) -> None:
        self.name, self.environment, self.home = name, environment, home
        self.log = home / f"{name}.log"
        # -P: a folder `flows` where the command was given is not ours
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
        """Start it."""
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

    def ended(self) -> bool:
        """Whether it has ended without being asked."""
        return self.process.poll() is not None

    def start_again(self, say: Say) -> None:
        """Start it after it has ended.

        Raises:
            SeraError: it ends as soon as it is started.
        """
        self._signal(signal.SIGKILL)  # what it left
        recent = [start for start in self.starts if time.monotonic() - start < STARTS_SECONDS]
        if len(recent) >= STARTS:
            raise SeraError(f"the {self.name} ended {STARTS} times within {STARTS_SECONDS} s; see {self.log}")
        code = self.process.returncode
        say(f"the {self.name} ended (exit code {code}) and is started again; its log is {self.log}")
        self.start()

    def end(self) -> None:
        """Ask the group to end, and kill what does not."""
        self._signal(signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline and (self.process.poll() is None or self._signal(0)):
            time.sleep(0.1)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> bool:
        """To the whole group; whether there is one."""
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):  # gone, or (macOS) as good as gone
            return False
        return True


def _deploy(environment: dict[str, str], arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "flows.cli", "deploy", "--json", *arguments]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode != 0:
        raise SeraError(f"`sera deploy` failed: {done.stderr.strip()}")
    return json.loads(done.stdout)


@contextmanager
def _interrupted() -> Iterator[None]:
    """Being interrupted or terminated is how this is meant to end."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # under nohup a hangup is nothing
            signal.signal(number, interrupt)
    with suppress(KeyboardInterrupt):
        yield


@contextmanager
def _held(home: Path) -> Iterator[None]:
    """One `sera up` a home: two servers on one SQLite file disturb each other."""
    private_folder(home, "--home")
    with (home / "up.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BusyError(f"{home}: another `sera up` has this home; use that one, or --home") from error
        yield


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise InputError(f"port {port} of 127.0.0.1: {error}; give another one with --port") from error


def main() -> None:
    """Run a module as leader of a group that ends with it, and it with its parent."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    # a shell's background job ignores it, and so would the worker, which ends by interrupting itself
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with guarded_group():
        exit_with_parent(parent)
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
