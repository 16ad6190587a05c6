"""Set up a Prefect server to drive runs: pool, limit, variable, automations, deployments. Idempotent.

deploy(print, store="s3://bucket/runs")
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import (
    GlobalConcurrencyLimitCreate,
    VariableCreate,
    VariableUpdate,
)
from prefect.client.schemas.filters import WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from flows.orchestration.authentication import NO_PASSWORD, has_no_password
from flows.orchestration.configured_server import check_server
from flows.orchestration.limits import DEVICE_LIMIT
from flows.orchestration.work_pools import (
    CREDENTIALS_BLOCK,
    POOL,
    STORE_VARIABLE,
    has_credentials_block,
    make_pool,
)
from sera_core.data.sources import bundled_file
from sera_core.errors import InputError, SeraError

NOTIFY_BLOCK = "sera-notify"


def deploy(
    warn: Callable[[str], None],
    pool_type: str | None = None,
    store: str | None = None,
    notify: str | None = None,
    image: str | None = None,
) -> dict[str, dict[str, str]]:
    """Create or update everything. Returns ids (for variables: values) by kind and name.

    Args:
        warn: Called with each security problem of the server.
        pool_type: Type of the work pool. None: an existing pool's, else process.
        store: Folder or URL that flow runs use by default. None: the server's current one, else ./sera-store.
        notify: URL that gets a POST with a JSON `text` when a run stops or raises its alarm.
        image: Container image of flow runs that name no other.

    Raises:
        InputError: no server answers, or pool type or image do not fit.
    """
    with _client() as client:
        made = {
            "work_pools": {POOL: str(make_pool(client, pool_type, image))},
            "limits": {DEVICE_LIMIT: str(_device_limit(client))},
            "variables": {STORE_VARIABLE: _store_variable(client, store)},
            "automations": _automations(client, notify),
        }
        made["deployments"] = _deployments(client)
        for warning in _warnings(client):
            warn(warning)
    return made


@contextmanager
def _client() -> Iterator[SyncPrefectClient]:
    url = get_current_settings().api.url
    if url is None:
        raise InputError("no Prefect server: set PREFECT_API_URL, or start one with `sera up`")
    check_server(url)
    with get_client(sync_client=True) as client:
        if (problem := client.api_healthcheck()) is not None:
            raise InputError(
                f"PREFECT_API_URL={url}: no Prefect server answers ({problem}); start one with `sera up`"
            )
        yield client


def _warnings(client: SyncPrefectClient) -> Iterator[str]:
    """Security problems of the server, one line each, with the remedy."""
    if has_no_password(str(client.api_url)):
        yield NO_PASSWORD
    if has_credentials_block(client):
        yield (
            f"the block {CREDENTIALS_BLOCK} of an earlier version shows the store's credentials to "
            "every user of this server: set them in the worker's environment, then run "
            f"`prefect block delete secret/{CREDENTIALS_BLOCK}` and `sera deploy`"
        )


def _device_limit(client: SyncPrefectClient) -> UUID:
    """Create the limit of one step at a time on the device; an existing limit is kept."""
    try:
        return client.read_global_concurrency_limit_by_name(DEVICE_LIMIT).id
    except ObjectNotFound:
        return client.create_global_concurrency_limit(
            GlobalConcurrencyLimitCreate(name=DEVICE_LIMIT, limit=1)
        )


def _store_variable(client: SyncPrefectClient, store: str | None) -> str:
    """Set the variable if a store is given or none is set. Returns its value."""
    variable = client.read_variable_by_name(STORE_VARIABLE)
    if variable is not None and store is None:
        return str(variable.value)
    url = absolute_store(store or "./sera-store")
    if variable is None:
        client.create_variable(VariableCreate(name=STORE_VARIABLE, value=url))
    elif variable.value != url:
        client.update_variable(VariableUpdate(name=STORE_VARIABLE, value=url))
    return url


def absolute_store(store: str) -> str:
    """The store as a URL or absolute path."""
    return store if "://" in store else str(Path(store).expanduser().absolute())


def _automations(client: SyncPrefectClient, notify: str | None) -> dict[str, str]:
    """Create or update the automations of automations.yaml; they stay on or off as they were."""
    block = None if notify is None else _notification_block(notify)
    made = {}
    for entry in yaml.safe_load(bundled_file("", "automations.yaml").read_text())["automations"]:
        for action in entry["actions"]:
            if action.get("block_document_id") == "{{ notify }}":
                action["block_document_id"] = block
        existing = client.read_automations_by_name(entry["name"])
        if None not in (action.get("block_document_id", "") for action in entry["actions"]):
            made[entry["name"]] = str(_automation(client, AutomationCore.model_validate(entry), existing))
        elif existing:  # from an earlier --notify
            made[entry["name"]] = str(existing[0].id)
    return made


def _automation(client: SyncPrefectClient, wanted: AutomationCore, existing: list[Any]) -> UUID:
    if not existing:
        return client.create_automation(wanted)
    found = existing[0]
    wanted.enabled = found.enabled
    if AutomationCore.model_validate(found.model_dump()) != wanted:
        client.update_automation(found.id, wanted)
    return found.id


def _notification_block(url: str) -> UUID:
    """A block that posts a JSON `text`, as chat programs expect; the URL is stored as a secret."""
    block = CustomWebhookNotificationBlock(
        name="sera",
        url="{{url}}",
        json_data={"text": "{{subject}}\n{{body}}"},
        headers=None,
        cookies=None,
        secrets={"url": url},  # pyright: ignore[reportArgumentType]
    )
    saved = block.save(NOTIFY_BLOCK, overwrite=True)
    assert isinstance(saved, UUID)
    return saved


def _deployments(client: SyncPrefectClient) -> dict[str, str]:
    """Create or update the deployments of prefect.yaml; schedules stay on or off as they were."""
    file = bundled_file("", "prefect.yaml")
    entrypoints = {entry["entrypoint"] for entry in yaml.safe_load(file.read_text())["deployments"]}
    before = {
        (deployment.id, schedule.slug): schedule.active
        for deployment in _read_deployments(client, entrypoints)
        for schedule in deployment.schedules
    }
    _prefect_deploy(file)
    made = {}
    for deployment in _read_deployments(client, entrypoints):
        made[deployment.name] = str(deployment.id)
        for schedule in deployment.schedules:
            was_active = before.get((deployment.id, schedule.slug), schedule.active)
            if was_active != schedule.active:
                client.update_deployment_schedule(deployment.id, schedule.id, active=was_active)
    return made


def _read_deployments(client: SyncPrefectClient, entrypoints: set[str]) -> list[DeploymentResponse]:
    pool = WorkPoolFilter(name=WorkPoolFilterName(any_=[POOL]))
    found = client.read_deployments(work_pool_filter=pool)
    return [deployment for deployment in found if deployment.entrypoint in entrypoints]


def _prefect_deploy(file: Path) -> None:
    """Run `prefect deploy`; -P keeps a folder `flows` in the working directory off the path."""
    command = [sys.executable, "-P", "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(
        [*command, "--prefect-file", str(file)], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SeraError(f"`prefect deploy` of {file} failed:\n{(done.stdout + done.stderr)[-3000:]}")
