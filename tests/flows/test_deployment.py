"""A deployment on a real Prefect server and worker.

Deployed from prefect.yaml, triggered by API, read from the store.
"""

import json
import time
import urllib.error

import pytest
import servers
import tinyrun
from servers import ROOT, api, prefect

import sera_core

pytestmark = pytest.mark.flow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A Prefect server on Postgres and a process worker; yields the environment that reaches them."""
    home = tmp_path_factory.mktemp("prefect")
    with servers.postgres() as database, servers.prefect_server(home, database.url) as server:
        prefect(server.environment, "work-pool", "create", "sera", "--type", "process")
        with servers.worker(server.environment):
            yield server.environment


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
