"""`sera-gc`: `sera gc` as a Prefect flow."""

from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.store_tools.garbage import collect, collected_lines, parse_age
from sera_core.artifacts.store import default_store, open_store
from sera_core.guards.shown import shown


@flow(name="sera-gc", persist_result=False)
def sera_gc(store: str | None = None, delete: bool = False, older_than: str = "7d") -> State[dict[str, Any]]:
    """Find unreferenced files in a store, and with `delete` delete them.

    An unreferenced step is deleted in two passes: its record first, its files at least `older_than` later.
    Everything an unfinished run would reuse is kept.

    Args:
        store: Folder or s3://bucket/prefix. Empty: the worker's SERA_STORE.
        delete: Delete them. Without it nothing changes.
        older_than: Keep anything younger, by the store's clock: 90s, 30m, 12h, 7d, 2w.
    """
    found = collect(open_store(store or default_store()), delete, parse_age(older_than))
    for line in collected_lines(found):
        get_run_logger().info("%s", shown(line))
    items = f"{len(found['items'])} items, {found['bytes']:,} bytes"
    return Completed(message=f"{'deleted' if delete else 'unreferenced'}: {items}", data=found)
