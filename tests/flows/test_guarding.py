"""A server of ours answers this machine's programs and its own pages, and no page of anybody else."""

import base64
import json
import os
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request

import migrated
import pytest

from flows.orchestration.authentication import (
    CLIENT_SECRET,
    SERVER_SECRET,
    has_no_password,
    load_secret,
    request,
)
from flows.orchestration.embedded_server import (
    QUIET,
    free_port,
    open_private,
    prefect_api,
    private_folder,
    wait_until_healthy,
)
from flows.orchestration.origins import refusal
from sera_core.errors import InputError


@pytest.mark.parametrize(
    ("host", "origin", "answered"),
    [
        ("127.0.0.1:4200", None, True),
        ("localhost:4200", None, True),
        ("[::1]:4200", None, True),
        ("localhost:8080", "http://localhost:8080", True),  # a forwarded port
        ("127.0.0.1:4200", "http://127.0.0.1:4200", True),
        ("127.0.0.1:4200", "http://localhost:4200", False),
        ("127.0.0.1:4200", "http://127.0.0.1:9999", False),
        ("127.0.0.1:4200", "https://evil.example", False),
        ("127.0.0.1:4200", "null", False),
        ("evil.example:4200", None, False),
        ("evil.example:4200", "http://evil.example:4200", False),
        ("127.0.0.1.evil.example", None, False),
        ("localhost.evil.example:4200", None, False),
        ("127.0.0.1@evil.example", None, False),
        ("[::1", None, False),
        ("", None, False),
    ],
)
def test_only_loopback_names_and_the_servers_own_pages_are_answered(host, origin, answered):
    assert (refusal(host, origin) is None) is answered


def test_a_log_is_for_this_user_alone(tmp_path):
    for name, before in (("new.log", False), ("old.log", True)):
        log = tmp_path / name
        if before:
            log.touch(mode=0o644)
        with open_private(log, "ab") as output:
            output.write(b"line")
        assert stat.S_IMODE(log.stat().st_mode) == 0o600 and log.read_bytes() == b"line"


def test_the_password_of_a_home_is_made_once(tmp_path, monkeypatch):
    monkeypatch.delenv(SERVER_SECRET, raising=False)
    secret, file = load_secret(tmp_path)
    assert len(secret) > 30 and load_secret(tmp_path) == (secret, file)
    file.chmod(0o644)
    assert stat.S_IMODE(load_secret(tmp_path)[1].stat().st_mode) == 0o600
    file.write_text("\n")
    with pytest.raises(InputError, match="auth: the server's password is empty"):
        load_secret(tmp_path)
    monkeypatch.setenv(SERVER_SECRET, "the user's own")
    assert load_secret(tmp_path) == ("the user's own", None)


def test_a_folder_somebody_else_uses_keeps_its_mode(tmp_path):
    shared, empty = tmp_path / "shared", tmp_path / "empty"
    for folder in (shared, empty):
        folder.mkdir(mode=0o755)
    (shared / "theirs").touch()
    for folder, mode in ((shared, 0o755), (empty, 0o700), (tmp_path / "new", 0o700)):
        assert stat.S_IMODE(private_folder(folder, "--home").stat().st_mode) == mode
    (shared / "up.lock").touch()
    assert stat.S_IMODE(private_folder(shared, "--home").stat().st_mode) == 0o700


@pytest.mark.flow
def test_a_page_of_another_origin_starts_nothing(tmp_path):
    port, log = free_port(), tmp_path / "server.log"
    home = migrated.sqlite_home(tmp_path / "home")
    (home / "prefect.db").chmod(0o644)  # as an earlier version left it
    url = f"http://127.0.0.1:{port}/api"
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(home), "PREFECT_API_URL": url}
    environment["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] = "false"  # the guard alone refuses
    command = [sys.executable, "-P", "-m", "flows.orchestration.embedded_server", str(port), str(os.getpid())]
    with log.open("wb") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    try:
        wait_until_healthy(server, f"{url}/health", log)

        def status(headers: dict[str, str], method: str = "POST") -> int:
            body = json.dumps({"name": "planted"}).encode() if method == "POST" else None
            asked = urllib.request.Request(f"{url}/flows/", body, method=method)
            for name, value in {"Content-Type": "application/json", **headers}.items():
                asked.add_header(name, value)
            try:
                with urllib.request.urlopen(asked, timeout=30) as answer:
                    return answer.status
            except urllib.error.HTTPError as error:
                return error.code

        attacks = [
            {"Origin": "https://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1", "Content-Type": "text/plain"},  # a form needs no preflight
            {"Host": "evil.example"},  # a name that points at 127.0.0.1
            {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
        ]
        assert [status(headers) for headers in attacks] == [403] * len(attacks)
        assert status({"Origin": "https://evil.example"}, "OPTIONS") == 403
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}/flows/count", b"{}", {"Content-Type": "application/json"})
        ) as answer:
            assert json.loads(answer.read()) == 0  # none of them made a flow
        assert status({"Origin": f"http://127.0.0.1:{port}"}) == 201  # the server's own page
        assert has_no_password(url)
        assert _upgrade(port, "https://evil.example") == 403
        for file in home.rglob("*"):
            if file.is_file():
                assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.flow
def test_the_server_of_one_command_answers_that_command_alone(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv(CLIENT_SECRET, "the user's own")

    def status(url: str, secret: str | None) -> int:
        try:
            request(url, "/flows/count", {}, secret)
            request(url, "/admin/version", secret=secret)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    with prefect_api() as url:
        secret = os.environ[CLIENT_SECRET]
        assert len(secret) > 30
        assert [status(url, shown) for shown in (None, "sera:", "the user's own", secret)] == [
            401,
            401,
            401,
            200,
        ]
        assert secret not in (tmp_path / "home" / "embedded-server.log").read_text()
        assert stat.S_IMODE((tmp_path / "home").stat().st_mode) == 0o700
        basic = "Basic " + base64.b64encode(secret.encode()).decode()
        blind = urllib.request.Request(f"{url}/flows/count", b"{}", {"Authorization": basic})
        with pytest.raises(urllib.error.HTTPError, match="403"):  # no token
            urllib.request.urlopen(blind, timeout=30)
        assert not has_no_password(url)
    assert os.environ[CLIENT_SECRET] == "the user's own"


def _upgrade(port: int, origin: str) -> int:
    """Status that a request for a websocket gets."""
    lines = (
        "GET /api/events/in HTTP/1.1", f"Host: 127.0.0.1:{port}", f"Origin: {origin}", "Upgrade: websocket",
        "Connection: Upgrade", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "", "",
    )  # fmt: skip
    with socket.create_connection(("127.0.0.1", port), timeout=30) as peer:
        peer.sendall("\r\n".join(lines).encode())
        return int(peer.recv(64).split()[1])
