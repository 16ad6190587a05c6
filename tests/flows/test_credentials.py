"""A run takes credentials from its worker; they stand in no database, log, record or traceback."""

import os
import secrets
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import objectstores
import pytest
import servers
import tinyrun
from commandline import process

pytestmark = [pytest.mark.flow, pytest.mark.s3]
RUN = "with-a-key"


@pytest.fixture(scope="module")
def store_server():
    """A bucket server with credentials that stand nowhere else."""
    with objectstores.moto() as server:
        yield replace(server, access=f"ACCESS{secrets.token_hex(8)}", secret=f"SECRET{secrets.token_hex(16)}")


@pytest.fixture(scope="module")
def place(store_server, tmp_path_factory):
    """Server, deployments and worker; of all of them only the worker knows the credentials."""
    home = tmp_path_factory.mktemp("prefect")
    with servers.prefect_server(home) as server:
        for name in [name for name in server.environment if name.startswith("AWS_")]:
            del server.environment[name]
        url = store_server.bucket()
        knowing = {**server.environment, **store_server.environment}
        said = servers.sera(knowing, "deploy", "--json", "--store", url)
        with servers.worker(knowing):
            yield server, url, said


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """One run that ends well, one in a bucket that does not exist."""
    server, _, _ = place
    folder = tmp_path_factory.mktemp("runs")
    form = tinyrun.form(folder, limits={"rounds": 1}, execution={"child": "always"})
    good = {"config": form, "run": RUN}
    ended = {}
    for name, parameters in {"good": good, "bad": good | {"store": "s3://there-is-none/x"}}.items():
        flow_run = servers.trigger(server.environment, "sera/sera", parameters)
        ended[name] = servers.wait_for_state(server.environment, flow_run, ("COMPLETED", "FAILED"))["state"]
    return ended


def holding(folder: Path, text: str) -> list[str]:
    """Files below a folder in which a text stands."""
    return [str(path) for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_run_takes_its_credentials_from_the_worker(runs, place, store_server):
    _, url, _ = place
    assert runs["good"]["type"] == "COMPLETED", runs["good"]
    assert f"runs/{RUN}/round-000.json" in store_server.objects(url)


def test_a_run_that_may_not_write_says_so_by_the_store_s_name(runs):
    assert runs["bad"]["type"] == "FAILED" and "there-is-none" in runs["bad"]["message"]


def test_no_credential_stands_in_prefect_s_database_or_logs(runs, place, store_server):
    server, _, said = place
    home = Path(server.environment["PREFECT_HOME"])
    assert holding(home, RUN)  # what is stored as text is found
    for secret in (store_server.access, store_server.secret):
        assert holding(home, secret) == [] and secret not in said


def test_no_credential_stands_in_the_store(runs, place, store_server):
    _, url, _ = place
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = store_server.client()
    held = [
        client.get_object(Bucket=bucket, Key=f"{prefix}/{name}")["Body"].read()
        for name in store_server.objects(url)
    ]
    assert any(RUN.encode() in body for body in held)
    for secret in (store_server.access, store_server.secret):
        assert not any(secret.encode() in body for body in held)


def test_no_credential_stands_in_a_traceback(store_server):
    nobody = replace(store_server, endpoint=f"http://127.0.0.1:{servers.free_port()}")
    environment = {**os.environ, **nobody.environment}
    done = process("list", "--store", "s3://bucket/x", "--debug", env=environment)
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert store_server.access not in done.stderr and store_server.secret not in done.stderr


def test_a_block_of_an_earlier_version_is_warned_of_and_its_references_go_with_it(place):
    """Whoever may use the server can read what a block holds."""
    server, _, _ = place
    block = "from prefect.blocks.system import Secret; Secret(value={'AWS_X': 'y'}).save('sera-store')"
    subprocess.run([sys.executable, "-c", block], env=server.environment, check=True, capture_output=True)
    reference = "{{ prefect.blocks.secret.sera-store.AWS_X }}"
    pool = servers.api(server.environment, "/work_pools/sera")["base_job_template"]
    pool["variables"]["properties"]["env"]["default"]["AWS_X"] = reference
    servers.api(server.environment, "/work_pools/sera", {"base_job_template": pool}, method="PATCH")

    def deployed() -> tuple[str, dict[str, str]]:
        done = process("deploy", "--json", env=server.environment, check=True)
        template = servers.api(server.environment, "/work_pools/sera")["base_job_template"]
        return done.stderr, template["variables"]["properties"]["env"]["default"]

    said, environment = deployed()
    assert "prefect block delete secret/sera-store" in said and environment["AWS_X"] == reference
    assert "has no password" in said  # this server of the user's own
    servers.prefect(server.environment, "block", "delete", "secret/sera-store")
    said, environment = deployed()
    assert "sera-store" not in said and "AWS_X" not in environment
