"""A Prefect server of our own for one command: it ends with us, however we end.

Prefect's own embedded server outlives a killed flow and keeps its output pipe open. This one is told by the
kernel (Linux) or by a watching thread when its parent is gone, and writes to a file.

    python -m flows.orchestration.embedded_server PORT PARENT_PID
"""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from flows.orchestration.authentication import CLIENT_SECRET, SERVER_SECRET, new_secret
from flows.orchestration.configured_server import named_server
from flows.orchestration.origins import guarded
from sera_core.artifacts.folders import cache_folder, writable
from sera_core.errors import SeraError
from sera_core.guards.orphans import exit_with_parent

START_SECONDS = 180
OURS = ("up.lock", "embedded-server.log")
"""Files by which a folder is known as a home of a server of ours."""
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
    "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "true",
}
"""Settings of every server we start and of its clients: nothing leaves the machine, nothing starts a second
server, no page of another site can change anything."""


def track_nothing() -> None:
    """Prefect sends no telemetry unless somebody asked for it. To be called before it is imported."""
    for name in ("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED"):
        os.environ.setdefault(name, QUIET[name])


def never_proxy_loopback() -> None:
    """Keep proxies of the environment away from this machine's own servers, here and in child processes."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host.strip()]
        if "*" not in hosts:
            os.environ[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))


@contextmanager
def prefect_api(debug: bool = False) -> Iterator[str]:
    """Use the configured Prefect server (PREFECT_API_URL), else one of our own while the block runs.

    Ours answers this process alone: it asks for a secret that is made for it.

    Must be entered before `prefect` is imported: its settings are read then.
    """
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if debug else "CRITICAL")
    os.environ.setdefault("PREFECT_INTERNAL_LOGGING_LEVEL", "INFO" if debug else "CRITICAL")
    track_nothing()
    if configured := os.environ.get("PREFECT_API_URL"):
        with named_server(configured):
            yield configured
        return
    home = private_folder(Path(os.environ.get("PREFECT_HOME") or cache_folder() / "prefect"), "PREFECT_HOME")
    os.environ["PREFECT_HOME"] = str(home)
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    log = home / "embedded-server.log"
    given, secret = os.environ.get(CLIENT_SECRET), new_secret()
    theirs = {SERVER_SECRET: secret, CLIENT_SECRET: secret}
    with open_private(log, "wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.orchestration.embedded_server", str(port), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # an interrupt is ours to handle first
            env={**os.environ, **QUIET, **theirs, "PREFECT_UI_API_URL": url, "PREFECT_API_URL": url},
        )
    try:
        wait_until_healthy(server, f"{url}/health", log)
        os.environ |= {"PREFECT_API_URL": url, CLIENT_SECRET: secret}
        yield url
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        os.environ.pop(CLIENT_SECRET, None)
        if given is not None:
            os.environ[CLIENT_SECRET] = given
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def private_folder(path: Path, name: str) -> Path:
    """A folder one may write to, closed to other users where it holds nothing yet or is ours already.

    Raises:
        InputError: it cannot be written to; `name` is the setting that names it.
    """
    ours = not path.is_dir() or not any(path.iterdir()) or any((path / name).exists() for name in OURS)
    folder = writable(path, name)
    if ours:
        with suppress(OSError):  # somebody else's
            folder.chmod(0o700)
    return folder


def open_private(path: Path, mode: str) -> IO[bytes]:
    """A file that only this user reads; an older one is closed to others."""
    stream = open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
    with suppress(OSError):
        path.chmod(0o600)
    return stream


def free_port() -> int:
    """A port of the loopback interface nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(server: subprocess.Popen, health: str, log: Path) -> None:
    """Wait until a server that was just started answers.

    Raises:
        SeraError: it ended, or took too long.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(health, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    code = server.poll()
    how = f"did not start within {START_SECONDS} s" if code is None else f"ended at once (exit code {code})"
    raise SeraError(
        f"the Prefect server {how}; its output is in {log}. "
        "`sera doctor` checks the installation; a server of your own is used when PREFECT_API_URL names it"
    )


def main() -> None:
    """Serve Prefect's API on the loopback interface until the parent is gone."""
    port, parent = int(sys.argv[1]), int(sys.argv[2])
    exit_with_parent(parent)
    os.umask(0o077)  # the database holds parameters, logs and blocks: for this user alone
    for file in Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect").glob("prefect.db*"):
        with suppress(OSError):  # another user's, who may close it
            file.chmod(0o600)  # an earlier version left it open to all users of the machine
    import uvicorn
    from prefect.server.api.server import create_app

    uvicorn.run(guarded(create_app()), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
