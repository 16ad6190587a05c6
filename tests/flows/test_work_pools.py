"""The work pools of `sera deploy` on the tests' server: complete templates, job variables, refusals."""

import asyncio
import json
from typing import Any

import composefile
import kubernetes_validate
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import VariableCreate
from prefect.exceptions import PrefectHTTPStatusError
from prefect.workers.base import BaseJobConfiguration
from pydantic import Field

from flows.orchestration import work_pools
from sera_core.errors import InputError

pytestmark = pytest.mark.flow
TEMPLATES = composefile.ROOT / "deployments" / "work_pools"
IMAGE = "registry.example/mine:2"


class AnyJob(BaseJobConfiguration):
    """What a worker makes of a template; the subclasses of its packages name more fields."""

    image: str | None = None
    mem_limit: str | None = None
    container_create_kwargs: dict[str, Any] = Field(default_factory=dict)
    job_manifest: dict[str, Any] = Field(default_factory=dict)


@pytest.fixture(scope="module")
def client(prefect_server):
    """A client of the server, which knows a store while the module's tests run."""
    with get_client(sync_client=True) as client:
        known = client.read_variable_by_name("sera_store")
        if known is None:
            client.create_variable(VariableCreate(name="sera_store", value="s3://bucket/runs"))
        yield client
        if known is None:
            client.delete_variable_by_name("sera_store")


@pytest.fixture
def named(monkeypatch):
    """Gives the pool of `sera deploy` another name on the shared server."""
    return lambda name: monkeypatch.setattr(work_pools, "POOL", name)


def shipped(pool_type: str) -> dict[str, Any]:
    return json.loads((TEMPLATES / f"{pool_type}.json").read_text())


def made_of(client, given: dict[str, Any]) -> AnyJob:
    """The job of a flow run with these job variables, filled in as a worker does."""
    template = client.read_work_pool(work_pools.POOL).base_job_template

    async def fill() -> AnyJob:
        async with get_client() as asking:
            return await AnyJob.from_template_and_values(template, given, client=asking)

    return asyncio.run(fill())


@pytest.mark.parametrize("pool_type", ["process", "docker", "kubernetes"])
def test_a_pool_of_each_type_is_complete_and_deploying_again_changes_nothing(client, named, pool_type):
    named(f"complete-{pool_type}")
    made = work_pools.make_pool(client, pool_type)
    pool = client.read_work_pool(work_pools.POOL)
    assert (pool.id, pool.type) == (made, pool_type)
    wanted = shipped(pool_type)
    if pool_type == "process":  # a folder of its own would be deleted while a resumed run uses it
        wanted["variables"]["properties"]["working_dir"]["default"] = "/"
    assert pool.base_job_template == wanted
    assert work_pools.make_pool(client) == made
    assert client.read_work_pool(work_pools.POOL).base_job_template == wanted
    job = made_of(client, {"env": {"ADDED": "by a deployment"}})
    assert job.env["ADDED"] == "by a deployment"
    assert job.env["SERA_STORE"] == client.read_variable_by_name("sera_store").value


@pytest.mark.parametrize("pool_type", ["docker", "kubernetes"])
def test_the_image_is_set_on_a_new_pool_and_on_an_old_one_and_nothing_else(client, named, pool_type):
    named(f"image-{pool_type}")
    work_pools.make_pool(client, pool_type, IMAGE)
    wanted = shipped(pool_type)
    wanted["variables"]["properties"]["image"]["default"] = IMAGE
    assert client.read_work_pool(work_pools.POOL).base_job_template == wanted
    work_pools.make_pool(client, None, "other:1")
    wanted["variables"]["properties"]["image"]["default"] = "other:1"
    assert client.read_work_pool(work_pools.POOL).base_job_template == wanted
    work_pools.make_pool(client)
    assert client.read_work_pool(work_pools.POOL).base_job_template == wanted


def test_a_type_of_prefects_own_gets_our_store(client, named):
    named("cloud")
    work_pools.make_pool(client, "ecs", IMAGE)
    variables = client.read_work_pool("cloud").base_job_template["variables"]["properties"]
    assert variables["env"]["default"]["SERA_STORE"] == "{{ prefect.variables.sera_store }}"
    assert variables["image"]["default"] == IMAGE and "command" not in variables


def test_what_does_not_fit_is_refused_before_anything_is_made(client, named, sera):
    named("refused")
    with pytest.raises(InputError, match=r"--pool-type kubernets: unknown .*process, docker, kubernetes"):
        work_pools.make_pool(client, "kubernets")
    with pytest.raises(InputError, match=r"--image registry.example/mine:2: .* process pool has no image"):
        work_pools.make_pool(client, "process", IMAGE)
    assert "refused" not in {pool.name for pool in client.read_work_pools()}
    work_pools.make_pool(client)
    said = sera("deploy", "--pool-type", "docker", code=2)
    assert "is of type process" in said.err and "prefect work-pool delete refused" in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert client.read_work_pool("refused").type == "process"


@pytest.fixture
def deployment(client, named):
    """A deployment in a Kubernetes pool."""
    named("cluster")
    work_pools.make_pool(client, "kubernetes")
    flow = client.create_flow_from_name("sera-variables")
    return client.create_deployment(
        flow_id=flow, name="sera", work_pool_name="cluster", job_variables={"memory": "64Gi"}
    )


def started(client, deployment, variables: dict[str, Any]) -> dict[str, Any]:
    """The job variables that the worker of a flow run with these gets."""
    flow_run = client.create_flow_run_from_deployment(deployment, job_variables=variables)
    return {**client.read_deployment(deployment).job_variables, **flow_run.job_variables}


@pytest.mark.parametrize(
    ("variables", "gpus", "cores", "memory"),
    [({}, 1, 4, "64Gi"), ({"gpus": 0, "cpus": 0.5, "memory": "8Gi"}, 0, 0.5, "8Gi")],
)
def test_a_flow_run_sets_its_devices_cores_and_memory(client, deployment, variables, gpus, cores, memory):
    given = started(client, deployment, variables)
    manifest = made_of(client, given).job_manifest
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {
        "requests": {"cpu": cores, "memory": memory},
        "limits": {"memory": memory, "nvidia.com/gpu": gpus},
    }
    kubernetes_validate.validate(as_sent(manifest), "1.32", strict=True)


def as_sent(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest as the worker's package sends it, less two fields that it wants in the wrong place."""
    sent = json.loads(json.dumps(manifest))
    pod = sent["spec"]["template"]["spec"]
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    (container,) = pod["containers"]
    container["env"] = [{"name": name, "value": value} for name, value in container["env"].items()]
    return sent


@pytest.mark.parametrize("wrong", [{"gpus": -1}, {"gpus": "many"}, {"cpus": 0}, {"memory": 8}])
def test_a_flow_run_with_impossible_job_variables_is_refused(client, deployment, wrong):
    with pytest.raises(PrefectHTTPStatusError, match=r"4(09|22)"):
        started(client, deployment, wrong)


def test_a_container_of_docker_gets_the_memory_cores_and_devices_of_its_flow_run(client, named):
    named("containers")
    work_pools.make_pool(client, "docker", "sera-flow:cpu")
    job = made_of(client, {"memory": "24g", "cpus": "0-3", "device_requests": []})
    assert (job.image, job.mem_limit) == ("sera-flow:cpu", "24g")
    assert job.container_create_kwargs["cpuset_cpus"] == "0-3"
    assert job.container_create_kwargs["device_requests"] == []
    free = made_of(client, {})
    assert free.mem_limit is None and "cpuset_cpus" not in free.container_create_kwargs
    assert free.container_create_kwargs["device_requests"][0]["device_ids"] == ["0"]
