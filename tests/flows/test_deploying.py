"""`sera deploy` and `sera up` on real servers: what is there afterwards, and what is left when it ends."""

import json
import os
import signal
import stat
import subprocess
import threading
import time
import urllib.error
import uuid
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import servers
from commandline import SERA, process

from flows.orchestration import work_pools

pytestmark = pytest.mark.flow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Prefect server on Postgres."""
    home = tmp_path_factory.mktemp("deploying")
    with servers.postgres() as database, servers.prefect_server(home, database.url) as server:
        yield server


@contextmanager
def listening():
    """A web server that keeps what is posted to it."""
    posted = []

    class Keep(BaseHTTPRequestHandler):
        def do_POST(self):
            posted.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Keep)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/hook", posted
    httpd.shutdown()
    httpd.server_close()


def deploy(server, folder: Path, *arguments: str) -> dict:
    return json.loads(servers.sera(server.environment, "deploy", "--json", *arguments, cwd=folder))


def test_deploying_twice_makes_the_same_things_once_and_keeps_what_was_set_by_hand(server, tmp_path):
    first = deploy(server, tmp_path)
    api, environment = servers.api, server.environment
    advance = api(environment, "/deployments/name/sera-advance/sera-advance")
    (schedule,) = advance["schedules"]
    assert schedule["active"] is False  # nothing runs by itself until somebody wants it
    path = f"/deployments/{advance['id']}/schedules/{schedule['id']}"
    api(environment, path, {"active": True}, method="PATCH")
    give_up = first["automations"]["sera: give up"]
    api(environment, f"/automations/{give_up}", {"enabled": False}, method="PATCH")
    limit = f"/v2/concurrency_limits/{first['limits']['sera-device']}"
    api(environment, limit, {"limit": 2}, method="PATCH")

    other = tmp_path / "other"
    other.mkdir()
    assert deploy(server, other) == first  # the same ids, and the store that was set first

    advance = api(environment, "/deployments/name/sera-advance/sera-advance")
    assert [(s["id"], s["active"]) for s in advance["schedules"]] == [(schedule["id"], True)]
    assert api(environment, f"/automations/{give_up}")["enabled"] is False
    assert api(environment, limit)["limit"] == 2
    assert first["variables"] == {"sera_store": str(tmp_path / "sera-store")}
    assert "sera: tell a person" not in first["automations"]  # nobody was named to be told


@pytest.fixture(scope="module")
def told(server, tmp_path_factory):
    """What was deployed with a store and a webhook, the webhook and what is posted to it."""
    with listening() as (url, posted):
        folder = tmp_path_factory.mktemp("told")
        yield deploy(server, folder, "--store", "s3://bucket/runs", "--notify", url), url, posted


def test_what_is_deployed_names_the_store_and_no_path_of_the_checkout(server, told):
    made, _, _ = told
    assert made["variables"] == {"sera_store": "s3://bucket/runs"}
    assert set(made["deployments"]) >= {"sera", "sera-advance"}
    for deployment in made["deployments"].values():
        found = servers.api(server.environment, f"/deployments/{deployment}")
        assert str(servers.ROOT) not in json.dumps(found)
        assert found["work_pool_name"] == "sera"
        assert found["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
        assert found["job_variables"].get("gpus") == (0 if found["name"] == "sera-gc" else None)
    pool = servers.api(server.environment, "/work_pools/sera")
    env = pool["base_job_template"]["variables"]["properties"]["env"]["default"]
    assert env == {"SERA_STORE": "{{ prefect.variables.sera_store }}"}  # filled in when a flow run starts
    assert "{{ command }}" not in json.dumps(pool["base_job_template"])  # no run brings its own


def test_a_pool_keeps_its_own_command_and_takes_none_from_a_run():
    properties = {"env": {}, "command": {"default": "nice prefect flow-run execute"}}
    template = {
        "variables": {"properties": properties},
        "job_configuration": {"command": "{{ command }}", "manifest": [{"args": "{{ command }}", "env": 1}]},
    }
    closed = work_pools.job_template(template, keep_references=False)
    assert closed["job_configuration"] == {
        "command": "nice prefect flow-run execute",
        "manifest": [{"args": "nice prefect flow-run execute", "env": 1}],
    }
    assert "command" not in closed["variables"]["properties"]
    del properties["command"]["default"]
    closed = work_pools.job_template(template, keep_references=False)
    assert closed["job_configuration"] == {"manifest": [{"env": 1}]}


def test_the_webhook_that_was_named_is_told_of_an_alarm_and_of_the_end(server, told):
    _, url, posted = told
    blocks = servers.api(server.environment, "/block_documents/filter", {})
    assert "sera-notify" in {block["name"] for block in blocks} and url not in json.dumps(blocks)
    for name in ("sera.alarm.amplification", "sera.round.completed", "sera.run.stopped"):
        event = {
            "event": name,
            "id": str(uuid.uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "resource": {"prefect.resource.id": "sera.run.demo", "prefect.resource.name": "demo"},
            "payload": {"reason": f"because of {name}", "best_round": 2},
        }
        servers.api(server.environment, "/events", [event])
    wait_until(lambda: len(posted) >= 2)
    assert sorted(message["text"].splitlines() for message in posted) == [
        [f"demo: {name}", f"reason: because of {name}", "best_round: 2"]
        for name in ("sera.alarm.amplification", "sera.run.stopped")
    ]


def test_without_a_server_deploying_says_how_to_get_one(tmp_path):
    for named in ({}, {"PREFECT_API_URL": f"http://127.0.0.1:{servers.free_port()}/api"}):
        environment = {**alone(), "PREFECT_HOME": str(tmp_path), **named}
        done = process("deploy", env=environment, cwd=tmp_path)
        assert done.returncode == 2
        assert "PREFECT_API_URL" in done.stderr and "sera up" in done.stderr


@contextmanager
def standing(folder: Path, port: int):
    """`sera up --json` as a process; killed at the end if it is still there."""
    up = subprocess.Popen(
        [*SERA, *up_at(folder / "home", port)],
        env=alone(),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield up
    finally:
        up.kill()
        up.communicate()


def up_at(home: Path, port: int) -> list[str]:
    return ["up", "--json", "--home", str(home), "--port", str(port)]


def alone() -> dict[str, str]:
    """The environment of somebody who has no Prefect yet."""
    return {n: v for n, v in os.environ.items() if not n.startswith(("PREFECT_", "SERA_STORE"))}


def refused(home: Path, port: int) -> tuple[int, str]:
    done = process(*up_at(home, port), env=alone(), timeout=60)
    return done.returncode, done.stderr


def leader(pid: int, words: str) -> int | None:
    """The process `sera up` started with these words in its command."""
    return next((p for p, line in servers.processes_under(pid).items() if words in line), None)


def wait_until(true, seconds: float = 120):
    deadline = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)
    return found


def heartbeat(environment) -> str | None:
    """When the worker was last heard of."""
    workers = servers.api(environment, "/work_pools/sera/workers/filter", {})
    return max((w["last_heartbeat_time"] for w in workers), default=None)


def still_there(processes: dict[int, str]) -> list[str]:
    return [line for pid, line in processes.items() if Path(f"/proc/{pid}").exists()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where `sera up` is given; its home stays for the next one."""
    return tmp_path_factory.mktemp("up")


def test_sera_up_starts_again_what_dies_and_ends_it_all(folder):
    port = servers.free_port()
    with standing(folder, port) as up:
        told = json.loads(up.stdout.readline())
        assert told["ui"] == f"http://127.0.0.1:{port}"
        assert told["variables"] == {"sera_store": str(folder / "sera-store")}
        password = Path(told["password_file"])
        assert stat.S_IMODE(password.stat().st_mode) == 0o600
        assert stat.S_IMODE((folder / "home").stat().st_mode) == 0o700
        stranger = {"PREFECT_API_URL": f"{told['ui']}/api"}
        with pytest.raises(urllib.error.HTTPError, match="401"):
            servers.api(stranger, "/deployments/name/sera/sera")
        environment = {**stranger, "PREFECT_API_AUTH_STRING": password.read_text()}
        assert servers.api(environment, "/deployments/name/sera/sera")["id"] == told["deployments"]["sera"]
        assert servers.answers(told["ui"])  # the UI itself, which is told where the API is
        settings = servers.api({"PREFECT_API_URL": told["ui"]}, "/ui-settings")
        assert settings["api_url"] == f"{told['ui']}/api" and settings["auth"] == "BASIC"

        code, message = refused(folder / "elsewhere", port)
        assert code == 2 and str(port) in message and "--port" in message
        code, message = refused(folder / "home", servers.free_port())
        assert code == 3 and str(folder / "home") in message

        before = wait_until(lambda: heartbeat(environment))
        os.kill(leader(up.pid, "worker start"), signal.SIGKILL)
        assert "the worker died" in up.stderr.readline()
        wait_until(lambda: heartbeat(environment) > before)
        os.kill(leader(up.pid, "embedded_server"), signal.SIGKILL)
        assert "the server died" in up.stderr.readline()
        wait_until(lambda: servers.answers(f"{told['ui']}/api/health"))
        assert servers.api(environment, "/deployments/name/sera/sera")["id"] == told["deployments"]["sera"]

        everything = servers.processes_under(up.pid)
        up.send_signal(signal.SIGTERM)
        assert up.wait(60) == 0
        assert not still_there(everything)


def test_nothing_outlives_a_killed_sera_up(folder):
    with standing(folder, servers.free_port()) as up:
        up.stdout.readline()
        wait_until(lambda: leader(up.pid, "worker start"))
        everything = servers.processes_under(up.pid)
        assert len(everything) > 2
        up.kill()
        up.wait(10)
        wait_until(lambda: not still_there(everything), seconds=30)
