"""A Prefect server for one command; it ends when the command ends, even if that is killed.

Prefect's own embedded server outlives a killed flow and keeps its output pipe open. This one exits with its
parent (a signal from the kernel on Linux, a watcher thread elsewhere) and logs to a file.

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
from flows.orchestration.configured_server import use_server
from flows.orchestration.origins import restrict_origins
from sera_core.artifacts.folders import cache_folder, writable
from sera_core.errors import SeraError
from sera_core.guards.orphans import exit_with_parent

START_SECONDS = 180
HOME_MARKERS = ("up.lock", "embedded-server.log")
"""Files that mark a folder as the home of one of our servers."""
QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
    "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
    "PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED": "true",
    "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "true",
}
"""Settings of our servers and their clients: no telemetry, no second server, CSRF protection."""
NO_BLOCKS = {"PREFECT_SERVER_REGISTER_BLOCKS_ON_START": "false"}
"""A server for one command needs no block types; registering them takes seconds."""


def disable_telemetry() -> None:
    """Turn Prefect's telemetry off unless the environment sets it. Call before importing Prefect."""
    for name in ("DO_NOT_TRACK", "PREFECT_SERVER_ANALYTICS_ENABLED"):
        os.environ.setdefault(name, QUIET[name])


def bypass_loopback_proxy() -> None:
    """Use no proxy for servers on this machine, here and in child processes."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host.strip()]
        if "*" not in hosts:
            os.environ[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))


@contextmanager
def prefect_api(debug: bool = False) -> Iterator[str]:
    """Use the server at PREFECT_API_URL, else run our own while the block runs.

    Our own server requires a new random password, so it serves only this process.
    """
    os.environ.setdefault("PREFECT_LOGGING_LEVEL", "INFO" if debug else "CRITICAL")
    os.environ.setdefault("PREFECT_INTERNAL_LOGGING_LEVEL", "INFO" if debug else "CRITICAL")
    disable_telemetry()
    if configured := os.environ.get("PREFECT_API_URL"):
        with use_server(configured):
            _read_settings_again()
            yield configured
        return
    home = private_folder(Path(os.environ.get("PREFECT_HOME") or cache_folder() / "prefect"), "PREFECT_HOME")
    os.environ["PREFECT_HOME"] = str(home)
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    log = home / "embedded-server.log"
    previous, secret = os.environ.get(CLIENT_SECRET), new_secret()
    secrets = {SERVER_SECRET: secret, CLIENT_SECRET: secret}
    with open_private(log, "wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-P", "-m", "flows.orchestration.embedded_server", str(port), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Ctrl-C goes to this process only
            env={
                **os.environ,
                **QUIET,
                **NO_BLOCKS,
                **secrets,
                "PREFECT_UI_API_URL": url,
                "PREFECT_API_URL": url,
            },
        )
    try:
        wait_until_healthy(server, f"{url}/health", log)
        os.environ |= {"PREFECT_API_URL": url, CLIENT_SECRET: secret}
        _read_settings_again()
        yield url
    finally:
        os.environ.pop("PREFECT_API_URL", None)
        os.environ.pop(CLIENT_SECRET, None)
        if previous is not None:
            os.environ[CLIENT_SECRET] = previous
        _read_settings_again()
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _read_settings_again() -> None:
    """Prefect reads the environment when it is imported; if it was imported before, read it again."""
    if "prefect" in sys.modules:
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def private_folder(path: Path, name: str) -> Path:
    """A writable folder, made private if it is new, empty or already ours.

    Raises:
        InputError: it is not writable; `name` is the setting that gives it.
    """
    ours = (
        not path.is_dir() or not any(path.iterdir()) or any((path / name).exists() for name in HOME_MARKERS)
    )
    folder = writable(path, name)
    if ours:
        with suppress(OSError):  # owned by another user
            folder.chmod(0o700)
    return folder


def open_private(path: Path, mode: str) -> IO[bytes]:
    """Open a file with mode 0600; an existing file is changed to that."""
    stream = open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))  # noqa: SIM115
    with suppress(OSError):
        path.chmod(0o600)
    return stream


def free_port() -> int:
    """A free port on the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_healthy(server: subprocess.Popen, health: str, log: Path) -> None:
    """Wait until a server answers.

    Raises:
        SeraError: it exited, or took too long.
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
    how = f"did not start within {START_SECONDS} s" if code is None else f"exited (exit code {code})"
    raise SeraError(
        f"the Prefect server {how}; its output is in {log}. "
        "Check the installation with `sera doctor`, or use another server by setting PREFECT_API_URL"
    )


def main() -> None:
    """Serve Prefect's API on the loopback interface until the parent exits."""
    port, parent = int(sys.argv[1]), int(sys.argv[2])
    exit_with_parent(parent)
    os.umask(0o077)  # the database holds parameters, logs and blocks
    for file in Path(os.environ.get("PREFECT_HOME") or Path.home() / ".prefect").glob("prefect.db*"):
        with suppress(OSError):  # owned by another user
            file.chmod(0o600)  # earlier versions left it readable by all users
    import uvicorn
    from prefect.server.api.server import create_app

    uvicorn.run(restrict_origins(create_app()), host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main()
