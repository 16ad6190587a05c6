"""Who may start a run on `sera up`: a person with the password, and no page of anybody else."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import migrated
import pytest
import servers

pytestmark = [pytest.mark.browser, pytest.mark.flow]

PAGE = """<!doctype html><title>attack</title><script>
const body = BODY, target = "TARGET";
const ways = [
  {mode: "cors", headers: {"Content-Type": "application/json"}},
  {mode: "no-cors", headers: {"Content-Type": "text/plain"}},
  {mode: "no-cors", credentials: "include"},
  {mode: "cors", headers: {"Content-Type": "application/json", "Authorization": "Basic c2VyYTo="}},
];
window.attack = async () => {
  const told = [];
  for (const way of ways) {
    try { told.push((await fetch(target, {method: "POST", body, ...way})).status) }
    catch (error) { told.push("blocked") }
  }
  return told;
};
</script>
<form id=f method=post enctype=text/plain target=_blank action="TARGET">
<input name='BODY_NAME' value='"}'></form>
"""


@pytest.fixture(scope="module")
def up(tmp_path_factory) -> Iterator[dict[str, Any]]:
    """What `sera up` prints in a new home."""
    folder = tmp_path_factory.mktemp("attacked")
    environment = {n: v for n, v in os.environ.items() if not n.startswith(("PREFECT_", "SERA_STORE"))}
    home = migrated.sqlite_home(folder / "home")
    command = [sys.executable, "-m", "flows.cli", "up", "--json", "--home", str(home)]
    command += ["--port", str(servers.free_port())]
    process = subprocess.Popen(command, env=environment, cwd=folder, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def client(up) -> dict[str, str]:
    """What reaches the server."""
    return {
        "PREFECT_API_URL": f"{up['ui']}/api",
        "PREFECT_API_AUTH_STRING": Path(up["password_file"]).read_text(),
    }


@pytest.fixture
def page_of_another(up, tmp_path) -> Iterator[str]:
    """A page of another origin that starts the deployment `sera-gc` with a command of its own."""
    command = {"job_variables": {"command": f"touch {tmp_path / 'attacked'}"}}
    target = f"{up['ui']}/api/deployments/{up['deployments']['sera-gc']}/create_flow_run"
    text = PAGE.replace("BODY_NAME", json.dumps(command)[:-2].replace("'", "")).replace("TARGET", target)
    text = text.replace("BODY", json.dumps(json.dumps(command)))

    class Serve(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format, *args):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Serve)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/"
    httpd.shutdown()
    httpd.server_close()


def test_a_page_of_another_origin_starts_nothing_although_the_person_is_logged_in(
    chromium, up, client, page_of_another
):
    context = chromium.new_context()
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.goto(f"{up['ui']}/deployments")
    page.locator("input[type=password]").fill(client["PREFECT_API_AUTH_STRING"])  # asked once
    page.keyboard.press("Enter")
    page.get_by_role("link", name="sera-gc").first.wait_for()
    page.goto(f"{up['ui']}/deployments")
    page.get_by_role("link", name="sera-gc").first.wait_for()  # and not again

    other = context.new_page()
    other.goto(page_of_another)
    told = other.evaluate("attack()")
    assert len(told) == 4 and set(told) <= {"blocked", 0}  # 0: an answer that the page may not read
    with context.expect_page() as opened:
        other.evaluate("document.getElementById('f').submit()")
    opened.value.wait_for_load_state()
    assert "not those of" in opened.value.inner_text("body")
    context.close()
    assert servers.api(client, "/flow_runs/count", {}) == 0


def test_whoever_has_the_password_still_brings_no_command(up, client, tmp_path):
    path, mark = f"/deployments/{up['deployments']['sera-gc']}/create_flow_run", tmp_path / "attacked"
    body = {"job_variables": {"command": f"touch {mark}"}}
    ended = servers.wait_for_state(client, servers.api(client, path, body)["id"])
    assert ended["state"]["type"] == "COMPLETED", ended["state"]  # by the flow itself
    assert not mark.exists()

    template = servers.api(client, "/work_pools/sera")["base_job_template"]  # the control: Prefect's own
    template["variables"]["properties"]["command"] = {"type": "string"}
    template["job_configuration"]["command"] = "{{ command }}"
    servers.api(client, "/work_pools/sera", {"base_job_template": template}, method="PATCH")
    servers.api(client, path, body)
    deadline = time.monotonic() + 120
    while not mark.exists():
        assert time.monotonic() < deadline, "the attack itself does not work: this test cannot fail"
        time.sleep(0.5)
