"""The work pool of `sera deploy`: what a flow run starts in, with our defaults in its job template.

make_pool(client, "kubernetes", image="registry.example/sera-flow:cuda")
"""

import json
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import WorkPool
from prefect.exceptions import ObjectNotFound
from prefect.utilities.asyncutils import run_coro_as_sync
from prefect.workers.utilities import get_default_base_job_template_for_infrastructure_type

from sera_core.data.sources import bundled_file
from sera_core.errors import InputError

POOL = "sera"
STORE_VARIABLE = "sera_store"
CREDENTIALS_BLOCK = "sera-store"
"""A Secret block of earlier versions: the object store's environment variables as JSON."""
SHIPPED = ("process", "docker", "kubernetes")
"""Types with a template of ours (deployments/work_pools); of the others we complete Prefect's own."""
_REFERENCE = f"prefect.blocks.secret.{CREDENTIALS_BLOCK}."


def make_pool(client: SyncPrefectClient, pool_type: str | None = None, image: str | None = None) -> UUID:
    """Create or update the pool; its jobs read the store from the server's variable at start.

    Args:
        client: Of the server.
        pool_type: Type of a new pool. None: process.
        image: Container image of flow runs that name no other. None: as it is; for a new pool the template's.

    Raises:
        InputError: the type is unknown or not the existing pool's, or flow runs of this type have no image.
    """
    try:
        pool = client.read_work_pool(POOL)
    except ObjectNotFound:
        return _create(client, pool_type or "process", image)
    _check_type(pool, pool_type)
    template = _with_image(
        job_template(pool.base_job_template, has_credentials_block(client)), pool.type, image
    )
    if template != pool.base_job_template:
        client.update_work_pool(POOL, WorkPoolUpdate(base_job_template=template))
    return pool.id


def _create(client: SyncPrefectClient, pool_type: str, image: str | None) -> UUID:
    template = _with_image(job_template(_template_of(pool_type), keep_references=False), pool_type, image)
    return client.create_work_pool(WorkPoolCreate(name=POOL, type=pool_type, base_job_template=template)).id


def _template_of(pool_type: str) -> dict[str, Any]:
    """The template we ship for a type, else the one Prefect has for it."""
    if pool_type in SHIPPED:
        return json.loads(bundled_file("work_pools", f"{pool_type}.json").read_text())
    template = run_coro_as_sync(get_default_base_job_template_for_infrastructure_type(pool_type))
    if template is None:
        raise InputError(
            f"--pool-type {pool_type}: unknown to this Prefect installation; use {', '.join(SHIPPED)}, see "
            "`prefect work-pool create --help`, or create a pool named sera yourself"
        )
    return template


def _check_type(pool: WorkPool, pool_type: str | None) -> None:
    if pool_type not in (None, pool.type):
        raise InputError(
            f"--pool-type {pool_type}: the server's pool {POOL} is of type {pool.type}, which Prefect cannot "
            f"change; leave the flag out, or `prefect work-pool delete {POOL}` and deploy again (runs stay, "
            "schedules are off again)"
        )


def has_credentials_block(client: SyncPrefectClient) -> bool:
    """Whether the server still has the Secret block of an earlier version."""
    try:
        client.read_block_document_by_name(CREDENTIALS_BLOCK, "secret", include_secrets=False)
    except ObjectNotFound:
        return False
    return True


def job_template(template: dict[str, Any], keep_references: bool) -> dict[str, Any]:
    """The job template with our defaults, and without a command that a flow run could override.

    Args:
        template: The pool's base job template.
        keep_references: Keep variables that refer to the block of an earlier version.
    """
    properties = dict(template["variables"]["properties"])
    configuration = template["job_configuration"]
    if "command" in properties:
        configuration = _with_command(configuration, properties.pop("command").get("default"))
    env = {
        "SERA_STORE": f"{{{{ prefect.variables.{STORE_VARIABLE} }}}}",
        **(properties["env"].get("default") or {}),
    }
    if not keep_references:
        env = {name: value for name, value in env.items() if _REFERENCE not in str(value)}
    properties = {**properties, "env": {**properties["env"], "default": env}}
    if "working_dir" in properties and not properties["working_dir"].get("default"):
        # Without it each flow run gets a temporary folder, which is deleted while a resumed run uses it.
        properties["working_dir"] = {**properties["working_dir"], "default": "/"}
    variables = {**template["variables"], "properties": properties}
    return {**template, "job_configuration": configuration, "variables": variables}


def _with_command(template: Any, command: str | None) -> Any:
    """A part of a job template with the command variable replaced (None: by Prefect's default)."""
    if isinstance(template, list):
        return [_with_command(part, command) for part in template]
    if not isinstance(template, dict):
        return template
    given = {key: command if part == "{{ command }}" else part for key, part in template.items()}
    return {key: _with_command(part, command) for key, part in given.items() if part is not None}


def _with_image(template: dict[str, Any], pool_type: str, image: str | None) -> dict[str, Any]:
    """The template with another default image (None: as it is)."""
    if image is None:
        return template
    variables = template["variables"]
    if "image" not in variables["properties"]:
        raise InputError(
            f"--image {image}: a flow run of a {pool_type} pool has no image; leave the flag out"
        )
    named = {**variables["properties"]["image"], "default": image}
    properties = {**variables["properties"], "image": named}
    return {**template, "variables": {**variables, "properties": properties}}
