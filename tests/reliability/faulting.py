"""The fault table: what each operation of the store does when the server fails it twice, and for ever.

It survives, or says clearly within two minutes that it does not, nothing wrong is committed, and once the
fault is over the same operation succeeds.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from faultproxy import FAULTS, FOR_EVER, FaultProxy
from objectstores import ObjectStore

from sera_core.artifacts.checks import Blob
from sera_core.artifacts.folders import cache_folder
from sera_core.artifacts.s3_requests import Patience
from sera_core.artifacts.s3_store import S3Store
from sera_core.artifacts.s3_transfer import PART_BYTES
from sera_core.artifacts.store import remove_workspace
from sera_core.errors import StoreError

LIMIT_SECONDS = 120.0
TIMES = {"twice": 2, "for ever": FOR_EVER}
AT_ONCE = 10
ATTEMPT = "steps/train/key/0123456789abcdef"
_ENVIRONMENT = threading.Lock()


@dataclass(frozen=True)
class Row:
    """One case of the table."""

    store: str
    fault: str
    operation: str
    survived: bool
    outcome: str
    """`done`, `clear error`, or what was wrong."""
    seconds: float


class Case:
    """One operation on a store of its own, reached through a proxy, and directly for a second opinion."""

    def __init__(self, through: S3Store, direct: S3Store, server: ObjectStore) -> None:
        self.through, self.direct, self.server = through, direct, server
        self.data = os.urandom(PART_BYTES + 12345)
        self.record = self.data[:2000]
        self.blob = Blob(sha256(self.data).hexdigest(), len(self.data))

    def create_record(self, store: S3Store) -> None:
        assert store.create("runs/x/round-000.json", self.record) == self.record

    def read_record(self, store: S3Store) -> None:
        assert store.read_bytes("runs/x/round-000.json") == self.record

    def put_blob(self, store: S3Store) -> None:
        workspace = store.workspace(ATTEMPT)
        try:
            (workspace / "model.safetensors").write_bytes(self.data)
            assert store.commit_file(workspace, ATTEMPT, "model.safetensors") == self.blob
        finally:
            remove_workspace(store, workspace)

    def get_blob(self, store: S3Store) -> None:
        path = f"{ATTEMPT}/model.safetensors"
        local = store.fetch(path, self.blob.sha256, self.blob.bytes, "model.safetensors")
        try:
            assert local.read_bytes() == self.data
        finally:
            local.unlink()

    def wrong(self) -> str:
        """What is in the store, or in the cache, that should not be; nothing, if all is well."""
        if self.direct.read_bytes("runs/x/round-000.json") not in (None, self.record):
            return "another record was committed"
        try:
            self.get_blob(self.direct)
        except StoreError as error:
            if "missing from the store" not in str(error):
                return f"another file was committed: {error}"
        folder = cache_folder() / self.blob.sha256
        return f"left in the cache: {list(folder.iterdir())}" if any(_files(folder)) else ""

    def clean(self) -> None:
        self.direct.remove("runs/x/round-000.json")
        self.direct.remove(f"{ATTEMPT}/model.safetensors")


@dataclass(frozen=True)
class Operation:
    """An operation, what must be in the store before it, and which of its requests fail."""

    name: str
    act: Callable[[Case, S3Store], None]
    before: Callable[[Case, S3Store], None] | None = None
    methods: tuple[str, ...] = ()
    after: int = 0


OPERATIONS = (
    Operation("create record", Case.create_record),
    Operation("read record", Case.read_record, before=Case.create_record),
    Operation("put blob", Case.put_blob, methods=("PUT",)),
    Operation("put blob, its end", Case.put_blob, methods=("POST",), after=1),
    Operation("get blob", Case.get_blob, before=Case.put_blob),
)


def fault_table(server: ObjectStore, patience: Patience) -> list[Row]:
    """Every operation with every fault, a few at a time."""
    url = server.bucket()
    cases = [
        (
            server,
            f"{url}/{number}-{fault.replace(' ', '-')}-{how.replace(' ', '-')}",
            op,
            fault,
            how,
            patience,
        )
        for number, op in enumerate(OPERATIONS)
        for fault in FAULTS
        for how in TIMES
    ]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(lambda case: _row(*case), cases))


def _row(
    server: ObjectStore, url: str, operation: Operation, fault: str, how: str, patience: Patience
) -> Row:
    with FaultProxy(server.endpoint) as proxy:
        through = _opened(replace(server, endpoint=proxy.endpoint), url, patience)
        case = Case(through, _opened(server, url, Patience()), server)
        if operation.before is not None:
            operation.before(case, case.direct)
        proxy.plan(fault, TIMES[how], operation.methods, operation.after)
        outcome, seconds = _tried(operation, case)
        proxy.heal()
        if outcome in ("done", "clear error"):
            outcome = _afterwards(operation, case, url) or outcome
        case.clean()
    survived = outcome in ("done", "clear error") and seconds < LIMIT_SECONDS
    return Row(server.name, f"{fault} {how}", operation.name, survived, outcome, round(seconds, 2))


def _tried(operation: Operation, case: Case) -> tuple[str, float]:
    began = time.monotonic()
    try:
        operation.act(case, case.through)
        outcome = "done"
    except StoreError as error:
        outcome = "clear error" if "run again" in str(error) else f"unclear: {error}"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    return outcome, time.monotonic() - began


def _afterwards(operation: Operation, case: Case, url: str) -> str:
    """What is wrong once the fault is over; nothing, if all is well."""
    if wrong := case.wrong():
        return wrong
    try:
        operation.act(case, case.through)
    except Exception as error:
        return f"fails when the fault is over: {type(error).__name__}: {error}"
    prefix = url.removeprefix("s3://").partition("/")[2]
    left = [key for key in case.server.unfinished_uploads(url) if key.startswith(f"{prefix}/")]
    return f"unfinished uploads: {left}" if left else case.wrong()


def _opened(server: ObjectStore, url: str, patience: Patience) -> S3Store:
    """The environment is the whole process's, and is read once, when a store is opened."""
    with _ENVIRONMENT, server.in_environment():
        return S3Store(url, patience)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows as tests/reliability/latest.json has them: the operation is said with the fault."""
    return [
        {
            **{k: v for k, v in asdict(row).items() if k != "operation"},
            "fault": f"{row.operation}: {row.fault}",
        }
        for row in rows
    ]
