"""A deployment on a real Prefect server and worker.

Deployed from prefect.yaml, triggered by API, read from the store.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import tinyrun

import sera_core

pytestmark = pytest.mark.flow
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Prefect server and a process worker; yields the environment that reaches them."""
    home = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_UI_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    log = (home / "log").open("wb")
    start = [sys.executable, "-m", "prefect", "server", "start", "--port", str(port)]
    processes = [subprocess.Popen(start, env=environment, stdout=log, stderr=log)]
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2)
                break
            except OSError:
                time.sleep(0.5)
        prefect(environment, "work-pool", "create", "sera", "--type", "process")
        worker = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "sera"]
        processes.append(subprocess.Popen(worker, env=environment, cwd=home, stdout=log, stderr=log))
        yield environment
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(30)


def prefect(environment, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", *args],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def api(environment, path: str, body: dict | None = None) -> dict:
    request = urllib.request.Request(
        f"{environment['PREFECT_API_URL']}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_a_deployed_run_is_triggered_by_api_and_ends_in_the_store(server, tmp_path):
    prefect(server, "--no-prompt", "deploy", "--prefect-file", "deployments/prefect.yaml", "--all")
    deployment = api(server, "/deployments/name/sera/sera")
    assert deployment["entrypoint"] == "flows.sera.sera"
    assert str(ROOT) not in json.dumps(deployment)  # no path of the checkout is recorded
    store = str(tmp_path / "store")
    settings = tinyrun.settings(tmp_path, limits={"rounds": 2})
    body = {"parameters": {"config": settings, "run": "deployed", "store": store}}
    flow_run = api(server, f"/deployments/{deployment['id']}/create_flow_run", body)
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        state = api(server, f"/flow_runs/{flow_run['id']}")["state"]
        if state["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            break
        time.sleep(2)
    assert state["type"] == "COMPLETED", state
    run = sera_core.open_run(store, "deployed")
    assert len(run) == 2 and run.stop_reason == "max_rounds"
    artifacts = api(server, "/artifacts/latest/filter", {"limit": 50})
    assert {a["key"] for a in artifacts} == {"deployed-index", "deployed-round-0", "deployed-round-1"}
    names = [r["name"] for r in api(server, "/flow_runs/filter", {"limit": 20})]
    assert {"deployed", "deployed-round-0", "deployed-round-1"} <= set(names)


def test_an_unknown_setting_is_refused_by_name_before_anything_runs(server, tmp_path):
    deployment = api(server, "/deployments/name/sera/sera")
    settings = tinyrun.settings(tmp_path)
    settings["train"]["betta"] = 0.2
    body = {"parameters": {"config": settings, "run": "bad", "store": str(tmp_path / "store")}}
    with pytest.raises(urllib.error.HTTPError) as refused:
        api(server, f"/deployments/{deployment['id']}/create_flow_run", body)
    assert "betta" in refused.value.read().decode()
