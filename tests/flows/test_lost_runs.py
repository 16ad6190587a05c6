"""Flow runs whose process is gone go back to the server, and no others."""

import base64
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

from flows.orchestration.lost_runs import FlowRunTracker

SECRET = "sera:a password"
LONG_AGO = datetime.now(UTC) - timedelta(hours=1)


@contextmanager
def server(states: dict[str, tuple[str, datetime] | int]):
    """An API that knows these flow runs (or answers an error), and what was set."""
    done, tokens = {}, set()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            if not self.allowed():
                return
            if "csrf-token" in self.path:
                tokens.add(self.path.rsplit("=", 1)[-1])
                self.answer(200, {"token": "a token"})
                return
            found = states[self.path.rsplit("/", 1)[-1]]
            if isinstance(found, int):
                self.answer(found, {})
            else:
                self.answer(200, {"state": {"type": found[0], "timestamp": found[1].isoformat()}})

        def do_POST(self):
            if not self.allowed():
                return
            client, token = (self.headers.get(f"prefect-csrf-{name}") for name in ("client", "token"))
            if client not in tokens or token != "a token":
                self.answer(403, {"detail": "Missing CSRF token."})
                return
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            done[self.path.split("/")[-2]] = body["state"]["type"]
            self.answer(201, {})

        def allowed(self) -> bool:
            basic = "Basic " + base64.b64encode(SECRET.encode()).decode()
            if (shown := self.headers.get("authorization")) != basic:
                self.answer(401, {})
            return shown == basic

        def answer(self, code: int, body: dict):
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *_):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}", done
    httpd.shutdown()
    httpd.server_close()


def test_the_flow_run_of_every_process_in_the_group_is_seen_and_remembered(tmp_path):
    code = "import time; print(1, flush=True); time.sleep(60)"
    environment = {**os.environ, "PREFECT__FLOW_RUN_ID": "a-run"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, start_new_session=True, stdout=subprocess.PIPE
    )
    try:
        process.stdout.readline()
        seen = FlowRunTracker(tmp_path / "seen", SECRET)
        seen.scan(process.pid)
        assert seen.active == {"a-run"}
        assert FlowRunTracker(tmp_path / "seen", SECRET).lost == {"a-run"}  # after a kill
    finally:
        process.kill()
        process.communicate()
    seen.scan(process.pid)
    assert seen.active == set() == FlowRunTracker(tmp_path / "seen", SECRET).lost  # it ended by itself


def test_only_runs_that_were_under_way_when_last_seen_are_given_back(tmp_path):
    seen = FlowRunTracker(tmp_path / "seen", SECRET)
    seen.scan(0)  # a group with no flow in it
    later = datetime.now(UTC) + timedelta(minutes=1)
    states = {
        "running": ("RUNNING", LONG_AGO),
        "taken": ("PENDING", LONG_AGO),
        "being-cancelled": ("CANCELLING", LONG_AGO),
        "suspended": ("PAUSED", LONG_AGO),
        "finished": ("COMPLETED", LONG_AGO),
        "runs-elsewhere": ("RUNNING", later),
        "deleted": 404,
        "not-now": 503,
    }
    seen.active = set(states)
    seen.mark_lost()
    with server(states) as (url, done):
        seen.reschedule_lost(url)
    assert done == {"running": "SCHEDULED", "taken": "SCHEDULED", "being-cancelled": "CANCELLED"}
    assert seen.lost == {"not-now"}
    states = {"not-now": ("RUNNING", LONG_AGO)}
    again = FlowRunTracker(tmp_path / "seen", SECRET)
    with server(states) as (url, done):
        again.reschedule_lost(url)
    assert done == {"not-now": "SCHEDULED"} and again.lost == set()
