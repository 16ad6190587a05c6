"""Real servers for tests: Postgres, a Prefect server and a process worker, each to be ended and restarted.

with postgres() as database, prefect_server(home, database.url) as server:
    hands = worker(server.environment)
    hands.start()
    deployment = api(server.environment, "/deployments/name/sera/sera")
    hands.kill()
    hands.start()
"""

import base64
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import migrated
import pytest

ROOT = Path(__file__).parents[1]
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
START_SECONDS = 180


class Service:
    """A process in a group of its own that can be started, stopped and killed again and again."""

    def __init__(
        self,
        command: list[str],
        environment: dict[str, str],
        log: Path,
        ready: Callable[[], bool] = lambda: True,
        user: str | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.command, self.environment, self.log, self.ready = command, environment, log, ready
        self.user, self.stop_signal = user, stop_signal
        self.url = ""
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start, and wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                env=self.environment,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                user=self.user,
                group=None if self.user is None else pwd.getpwnam(self.user).pw_gid,
                extra_groups=None if self.user is None else [],
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"{self.command} did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.2)

    def stop(self) -> None:
        """Ask it to end, and end what is left of its group."""
        if self.process is not None:
            self.process.send_signal(self.stop_signal)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(20)
        self.kill()

    def kill(self, children: bool = True) -> None:
        """SIGKILL, to the whole group as when a machine is lost, or to the process alone."""
        if self.process is None:
            return
        if not children:
            self.process.kill()
        else:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    @property
    def pid(self) -> int:
        """Process id, which is also its group's."""
        assert self.process is not None
        return self.process.pid

    def __enter__(self) -> "Service":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextmanager
def postgres() -> Iterator[Service]:
    """A database of its own on a free port, with Prefect's tables; `url` is what Prefect connects to."""
    made = migrated.template(f"postgres-{_postgres_binaries().parent.name}", _migrated_data)
    folder = Path(tempfile.mkdtemp(prefix="sera-postgres-"))  # pytest's own folders are closed to other users
    try:
        subprocess.run(["cp", "--archive", str(made / "data"), str(folder / "data")], check=True)
        with _serving(folder) as database:
            yield database
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _migrated_data(made: Path) -> None:
    """A folder whose `data` is that of a Postgres server which is not running."""
    folder = Path(tempfile.mkdtemp(prefix="sera-postgres-"))
    user = _database_user()
    if user is not None:
        shutil.chown(folder, user)
    command = [str(_postgres_binaries() / "initdb"), "-D", str(folder / "data"), "-U", "prefect"]
    command += ["-A", "trust", "-E", "UTF8", "--no-sync"]
    make = Service(command, {**os.environ, "LC_ALL": "C"}, folder / "initdb.log", user=user)
    make.start()
    assert make.process is not None and make.process.wait(60) == 0, make.log.read_text()
    with _serving(folder) as database:
        migrated.migrate(folder, database.url)
    subprocess.run(["cp", "--archive", str(folder), str(made)], check=True)
    shutil.rmtree(folder)


@contextmanager
def _serving(folder: Path) -> Iterator[Service]:
    """Postgres on the folder's data; never as root."""
    binaries, user, port = _postgres_binaries(), _database_user(), free_port()
    if user is not None:
        shutil.chown(folder, user)
    serve = [str(binaries / "postgres"), "-D", str(folder / "data"), "-p", str(port), "-h", "127.0.0.1"]
    serve += ["-k", "", "-c", "fsync=off", "-c", "max_connections=200"]
    ask = [str(binaries / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    database = Service(
        serve,
        {**os.environ, "LC_ALL": "C"},
        folder / "postgres.log",
        ready=lambda: subprocess.run(ask, check=False).returncode == 0,
        user=user,
        stop_signal=signal.SIGINT,  # its fast shutdown
    )
    database.url = f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    with database:
        yield database


def prefect_server(home: Path, database_url: str | None = None, port: int | None = None) -> Service:
    """A Prefect server on the loopback interface, SQLite under its home unless a database is named.

    `url` is its API, `environment` reaches it.
    """
    home.mkdir(parents=True, exist_ok=True)
    if database_url is None:
        migrated.sqlite_home(home)
    port = port or free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_UI_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        "PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false",  # takes seconds, and no test asks for them
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "DO_NOT_TRACK": "1",
    }
    if database_url:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    server = Service(command, environment, home / "server.log", ready=lambda: answers(f"{url}/health"))
    server.url = url
    return server


def worker(environment: dict[str, str], name: str = "hands", pool: str = "sera") -> Service:
    """A process worker of the pool; the flows it starts are in its group. Returns before it polls."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name]
    return Service(command, environment, Path(environment["PREFECT_HOME"]) / f"worker-{name}.log")


def api(environment: dict[str, str], path: str, body: Any = None, method: str | None = None) -> Any:
    """Ask the server: POST with a body, else GET, unless a method is named. None where it answers nothing."""
    url, headers = environment["PREFECT_API_URL"], {"content-type": "application/json"}
    if (auth := environment.get("PREFECT_API_AUTH_STRING")) is not None:
        headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
        if body is not None or method is not None:  # servers with a password want a token too
            client = str(uuid.uuid4())
            token = _send(urllib.request.Request(f"{url}/csrf-token?client={client}", headers=headers))
            headers |= {"Prefect-Csrf-Token": token["token"], "Prefect-Csrf-Client": client}
    data = None if body is None else json.dumps(body).encode()
    return _send(urllib.request.Request(f"{url}{path}", data, headers, method=method))


def _send(request: urllib.request.Request) -> Any:
    """The answer. As Prefect's client does, ask again while the server says 503: its database is locked."""
    for wait in (1, 2, 4, 8, 16, None):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                text = answer.read()
            break
        except urllib.error.HTTPError as error:
            if error.code != 503 or wait is None:
                raise
            time.sleep(wait)
    return json.loads(text) if text else None


def prefect(environment: dict[str, str], *args: str, cwd: Path = ROOT) -> str:
    """Prefect's command line; what it printed."""
    return _command(["-m", "prefect", *args], environment, cwd)


def sera(environment: dict[str, str], *args: str, cwd: Path = ROOT) -> str:
    """Our command line; what it printed."""
    return _command(["-m", "flows.cli", *args], environment, cwd)


def trigger(environment: dict[str, str], deployment: str, parameters: dict[str, Any]) -> str:
    """Run a deployment (`sera/sera`), as the UI's button does; the flow run's id."""
    found = api(environment, f"/deployments/name/{deployment}")
    return api(environment, f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"]


def wait_for_state(
    environment: dict[str, str], flow_run: str, states: tuple[str, ...] = FINAL, seconds: float = 300
) -> dict[str, Any]:
    """The flow run, once the type or name of its state is one of these."""
    deadline = time.monotonic() + seconds
    found: dict[str, Any] = {}
    while time.monotonic() < deadline:
        with suppress(OSError):  # the server may be down on purpose
            found = api(environment, f"/flow_runs/{flow_run}")
            if {found["state"]["type"], found["state"]["name"]} & set(states):
                return found
        time.sleep(0.5)
    raise AssertionError(f"not one of {states} within {seconds} s: {found.get('state')}")


def dumped(environment: dict[str, str]) -> str:
    """Everything that the server's Postgres database holds, as SQL."""
    url = environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"].replace("+asyncpg", "")
    command = [str(_postgres_binaries() / "pg_dump"), url]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def processes_under(pid: int) -> dict[int, str]:
    """Descendants of a process and their command lines (Linux)."""
    parents, lines = {}, {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            if stat[0] != "Z":
                parents[int(folder.name)] = int(stat[1])
                lines[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    found: dict[int, str] = {}
    newest = {pid}
    while newest:
        newest = {child for child, parent in parents.items() if parent in newest}
        found |= {child: lines[child] for child in newest}
    return found


def answers(url: str) -> bool:
    """Whether a GET of it is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


def free_port() -> int:
    """A port of the loopback interface nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _command(arguments: list[str], environment: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _postgres_binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = str(found[-1]) if found else shutil.which("initdb")
    if initdb is None:
        pytest.skip("Postgres is not installed: apt-get install postgresql")
    return Path(initdb).resolve().parent


def _database_user() -> str | None:
    """Who runs Postgres, which root may not; None where this user can."""
    if os.getuid():
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"
