"""Concurrency limits: one flow run per run, one step per device.

Prefect's limits only avoid wasted work. Correctness is ensured by the store's create-only records.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

from prefect import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists

from flows.display.deployed import in_deployed_run
from sera_core.config import ExecutionConfig
from sera_core.errors import BusyError
from sera_core.models.devices import device_of
from tasks.step_functions import DEVICE_STEPS, NOTHING

DEVICE_LIMIT = "sera-device"
LEASE_SECONDS = 60
"""A killed process's slot is freed after this long (Prefect's default is five minutes)."""
WAIT_SECONDS = 120


@contextmanager
def run_slot(run: str, wait: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold the run's slot, so that no other deployed flow run works on it.

    Raises:
        BusyError: another flow run still holds it after `wait` seconds.
    """
    if not in_deployed_run():  # no shared server
        yield
        return
    limit = f"sera-run-{run}"
    make_limit(limit)
    with ExitStack() as stack:
        try:
            stack.enter_context(
                concurrency(
                    limit,
                    timeout_seconds=wait,
                    lease_duration=LEASE_SECONDS,
                    strict=True,
                    raise_on_lease_renewal_failure=False,
                )
            )
        except TimeoutError as error:
            raise BusyError(
                f"run {run!r}: another flow run works on it (Prefect limit {limit!r}, waited {wait:.0f} s); "
                "let it finish, or cancel it and trigger this one again"
            ) from error
        yield


def make_limit(name: str) -> None:
    """Create a limit of one slot; simultaneous calls are fine."""
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.upsert_global_concurrency_limit_by_name(name, 1)


def device_slot(step: str, execution: ExecutionConfig) -> AbstractContextManager[None]:
    """Hold a slot of the device while a step uses it: always on accelerators, on CPUs if set."""
    limit = None
    if step in DEVICE_STEPS and in_deployed_run():
        limit = execution.limit or (DEVICE_LIMIT if device_of(execution.device) != "cpu" else None)
    if limit is None:
        return NOTHING
    return concurrency(limit, lease_duration=LEASE_SECONDS, strict=True)
