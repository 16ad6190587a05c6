"""A store in a bucket: large files, records of hostile hands, interrupts, secrets."""

import os
import signal
import time
import traceback
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from faultproxy import FOR_EVER, FaultProxy

from sera_core.artifacts import s3_transfer
from sera_core.artifacts.manifest import StepSpec
from sera_core.artifacts.s3_requests import Patience, Requests
from sera_core.artifacts.s3_store import S3Store
from sera_core.artifacts.step import Attempt, run_step
from sera_core.artifacts.store import open_store, remove_workspace
from sera_core.config import ExecutionConfig
from sera_core.errors import InputError, StoreError
from tests.scale.simulator import COMMIT_WRITES

pytestmark = pytest.mark.s3

PART = s3_transfer.PART_BYTES
LARGE = 2 * PART + 12345
HURRIED = Patience(answer=3.0, total=6.0, tries=4, slowest=64 * 2**20)


def committed(store, name: str, data: bytes, told=None):
    """A file in the store, and what the store says it holds."""
    workspace = store.workspace("steps/train/key/0123456789abcdef")
    (workspace / name).write_bytes(data)
    try:
        return store.commit_file(workspace, "steps/train/key/0123456789abcdef", name, told)
    finally:
        remove_workspace(store, workspace)


def fetched(store, name: str, blob, told=None) -> Path:
    path = f"steps/train/key/0123456789abcdef/{name}"
    return store.fetch(path, blob.sha256, blob.bytes, name, told)


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_of_two_writers_of_a_record_the_first_wins_and_both_read_its_record(server):
    store = open_store(server.bucket())
    assert store.read_bytes("runs/x/round-000.json") is None
    assert store.create("runs/x/round-000.json", b"first") == b"first"
    assert store.create("runs/x/round-000.json", b"second") == b"first"
    assert store.read_bytes("runs/x/round-000.json") == b"first"
    assert store.names("runs") == ["x"]
    assert store.names("runs/x") == ["round-000.json"]
    assert store.read_range("runs/x/round-000.json", 1, 3) == b"ir"
    store.remove("runs/x/round-000.json")
    store.remove("runs/x/round-000.json")
    assert store.read_bytes("runs/x/round-000.json") is None


@pytest.mark.parametrize("size", [0, 1, PART, PART + 1, LARGE])
def test_a_file_comes_back_as_it_went_and_its_progress_is_told(server, size):
    store, url = open_store(url := server.bucket()), url
    data, told = os.urandom(size), []
    blob = committed(store, "model.safetensors", data, lambda *now: told.append(("up", *now)))
    assert (blob.sha256, blob.bytes) == (sha256(data).hexdigest(), size)
    assert server.unfinished_uploads(url) == []
    found = fetched(store, "model.safetensors", blob, lambda *now: told.append(("down", *now)))
    assert found.read_bytes() == data
    for way in ("up", "down"):
        done = [now for which, now, *_ in told if which == way]
        assert done == sorted(done) and done[-1] == size
        assert len(done) >= -(-size // PART)
    assert {tuple(rest) for _, _, *rest in told} == {(size, "bytes")}


def test_a_shard_costs_two_writes_and_is_read_back_in_order(server, monkeypatch):
    store, asked = open_store(server.bucket()), []
    call = Requests._call

    def counted(self, method, **arguments):
        asked.append(method)
        return call(self, method, **arguments)

    monkeypatch.setattr(Requests, "_call", counted)
    attempt = Attempt(store, StepSpec(step="logps", version=1, fields={}, inputs={}), ExecutionConfig())
    parts = []
    for number in range(40):  # more than are read at once
        name = f"part-{number:05d}.txt"
        attempt.write(name).write_bytes(bytes([number]))
        parts.append(attempt.commit_part(number, [name], {}))
    assert asked == ["put_object"] * COMMIT_WRITES * len(parts)
    reader = Attempt(store, attempt.spec, ExecutionConfig())
    assert [path.read_bytes()[0] for path in reader.part_paths(parts)] == list(range(40))
    remove_workspace(store, attempt.folder)
    remove_workspace(store, reader.folder)


def test_an_upload_that_fails_leaves_no_object_and_no_unfinished_upload(server):
    url = server.bucket()
    with FaultProxy(server.endpoint) as proxy, replace(server, endpoint=proxy.endpoint).in_environment():
        store = S3Store(url, HURRIED)
        proxy.plan("500", FOR_EVER, methods=("PUT",))  # it begins by POST; no part arrives
        with pytest.raises(StoreError, match="did not write it in 4 tries"):
            committed(store, "model.safetensors", os.urandom(LARGE))
    assert server.objects(url) == {}
    assert server.unfinished_uploads(url) == []


def test_an_upload_whose_beginning_was_not_answered_leaves_none_behind(server):
    url = server.bucket()
    with FaultProxy(server.endpoint) as proxy, replace(server, endpoint=proxy.endpoint).in_environment():
        store = S3Store(url, HURRIED)
        proxy.plan("answer lost", 1, methods=("POST",))
        blob = committed(store, "model.safetensors", data := os.urandom(LARGE))
        assert fetched(store, "model.safetensors", blob).read_bytes() == data
    assert server.unfinished_uploads(url) == []


def test_an_interrupted_upload_removes_its_remains_at_once(server):
    url = server.bucket()
    with FaultProxy(server.endpoint) as proxy, replace(server, endpoint=proxy.endpoint).in_environment():
        store = S3Store(url)
        proxy.plan("stalled", FOR_EVER, methods=("PUT",))

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 2.0)
        began = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                committed(store, "model.safetensors", os.urandom(LARGE))
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - began < 10
    assert server.unfinished_uploads(url) == []


def test_a_file_that_was_changed_is_refused_and_nothing_of_it_is_kept(moto, cache):
    url = moto.bucket()
    store = open_store(url)
    blob = committed(store, "model.safetensors", os.urandom(LARGE))
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    key = f"{prefix}/steps/train/key/0123456789abcdef/model.safetensors"
    moto.client().put_object(Bucket=bucket, Key=key, Body=os.urandom(LARGE))
    with pytest.raises(StoreError, match=r"sha256 .* but its record says"):
        fetched(store, "model.safetensors", blob)
    for size in (LARGE + 1, 10, 0):
        moto.client().put_object(Bucket=bucket, Key=key, Body=os.urandom(size))
        said = f"{size:,} bytes, but its record says {LARGE:,}" if size else "it ends before byte"
        with pytest.raises(StoreError, match=said):
            fetched(store, "model.safetensors", blob)
    store.remove("steps/train/key/0123456789abcdef/model.safetensors")
    with pytest.raises(StoreError, match="missing from the store"):
        fetched(store, "model.safetensors", blob)
    assert files_in(cache) == []


def test_a_record_of_a_size_that_no_disk_holds_is_refused_before_anything_is_asked_for(moto, cache):
    store = open_store(moto.bucket())
    blob = committed(store, "model.safetensors", b"small")
    with pytest.raises(StoreError, match="bytes free"):
        fetched(store, "model.safetensors", replace(blob, bytes=10**18))
    with pytest.raises(StoreError, match="5 bytes, but its record says 1,000,000"):
        fetched(store, "model.safetensors", replace(blob, bytes=10**6))
    with pytest.raises(StoreError, match="modified"):
        fetched(store, "model.safetensors", replace(blob, sha256="../../../etc/passwd"))
    assert files_in(cache) == []


def test_a_record_that_is_no_record_is_not_read_into_memory(moto, monkeypatch):
    monkeypatch.setattr("sera_core.artifacts.s3_requests.MAX_RECORD_BYTES", 1000)
    store = open_store(moto.bucket())
    store.create("runs/x/run-000.json", b"x" * 1001)
    with pytest.raises(StoreError, match="1,001 bytes are too many for a record"):
        store.read_bytes("runs/x/run-000.json")


@pytest.mark.parametrize(
    "path", ["../x", "/etc/passwd", "runs/../../x", "runs\\x", "runs/\uff0e\uff0e/x", ""]
)
def test_no_path_leaves_the_prefix(moto, path):
    store = open_store(moto.bucket())
    for act in (
        lambda: store.read_bytes(path),
        lambda: store.create(path, b"x"),
        lambda: store.workspace(path),
        lambda: store.fetch(path, "0" * 64, 1, "x"),
        lambda: store.fetch("runs/x", "0" * 64, 1, path),
        lambda: store.remove(path),
    ):
        with pytest.raises(StoreError, match="not a path inside the store"):
            act()


def test_a_cached_file_that_was_spoilt_is_fetched_again(moto):
    url = moto.bucket()
    data = os.urandom(1000)
    blob = committed(open_store(url), "model.safetensors", data)
    cached = fetched(open_store(url), "model.safetensors", blob)
    for spoilt in (b"short", os.urandom(1000)):
        cached.write_bytes(spoilt)
        assert fetched(open_store(url), "model.safetensors", blob).read_bytes() == data


def test_a_store_opened_before_a_fork_works_after_it(moto):
    store = open_store(moto.bucket())
    store.create("runs/x/run-000.json", b"first")
    if (child := os.fork()) == 0:
        os._exit(0 if store.create("runs/x/run-000.json", b"second") == b"first" else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.read_bytes("runs/x/run-000.json") == b"first"


def test_what_a_killed_process_left_on_the_local_disk_is_removed_by_the_next(moto, cache):
    store = open_store(moto.bucket())
    if (child := os.fork()) == 0:
        (store.workspace("steps/train/key/attempt") / "model.safetensors").write_bytes(b"x" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(files_in(cache)) == 1
    ours = store.workspace("steps/train/key/attempt")
    (ours / "model.safetensors").write_bytes(b"y")
    assert store.workspace("steps/train/key/attempt") != ours
    assert files_in(cache) == [ours / "model.safetensors"]


def test_a_bucket_that_is_not_there_is_named(server):
    store = open_store("s3://sera-nowhere/x")
    for act in (lambda: store.read_bytes("runs/x"), lambda: store.create("runs/x", b"")):
        with pytest.raises(StoreError, match="s3://sera-nowhere: this bucket does not exist"):
            act()


def test_a_server_that_is_not_there_is_a_clear_error_soon(moto):
    url = moto.bucket()
    with replace(moto, endpoint="http://127.0.0.1:9").in_environment():
        store = S3Store(url, HURRIED)
        with pytest.raises(StoreError, match=r"did not read it in \d tries") as refused:
            store.read_bytes("runs/x")
    assert "run again" in str(refused.value)


def test_wrong_credentials_are_said_and_no_secret_is_told(radosgw_server):
    url = radosgw_server.bucket()
    wrong = replace(radosgw_server, access="AKIAWRONGACCESS", secret="wrong-secret-4711")
    with wrong.in_environment():
        store = open_store(url)
        for act in (lambda: store.read_bytes("runs/x"), lambda: store.create("runs/x", b"")):
            with pytest.raises(StoreError, match="access denied") as refused:
                act()
            told = "".join(traceback.format_exception(refused.value))
            assert "wrong-secret-4711" not in told and "AKIAWRONGACCESS" not in told
            assert "AWS_ACCESS_KEY_ID" in str(refused.value)
    assert "wrong-secret-4711" not in repr(vars(store)), "a debugger's page of variables is shown around too"


def test_an_endpoint_with_a_password_is_refused_and_not_repeated(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://sera:hunter2@127.0.0.1:9000")
    with pytest.raises(InputError, match="AWS_SECRET_ACCESS_KEY") as refused:
        open_store("s3://bucket/prefix")
    assert "hunter2" not in str(refused.value)


def test_work_on_a_run_asks_once_for_a_record_that_is_created_once(moto):
    url = moto.bucket()
    working, checking = open_store(url, remember=True), open_store(url)
    assert working.read_bytes("runs/x/round-000.json") is None  # what is not there is asked for again
    checking.create("runs/x/round-000.json", b"first")
    assert working.read_bytes("runs/x/round-000.json") == b"first"
    working.create("steps/train/key/done.json", b"done")
    working.create("runs/x/lease/000001.json", b"a lease")
    for path in ("runs/x/round-000.json", "steps/train/key/done.json", "runs/x/lease/000001.json"):
        checking.remove(path)
        assert checking.read_bytes(path) is None
    again = open_store(url, remember=True)
    assert again.read_bytes("runs/x/round-000.json") == b"first"
    assert again.read_bytes("steps/train/key/done.json") == b"done"
    assert again.read_bytes("runs/x/lease/000001.json") is None


def test_a_file_this_machine_committed_is_read_here_and_checked_all_the_same(moto):
    store = open_store(moto.bucket())
    spec = StepSpec(step="train", version=1, fields={}, inputs={})

    def work(attempt):
        attempt.write("model.safetensors").write_bytes(b"weights")
        return ["model.safetensors"]

    record = run_step(store, spec, work, ExecutionConfig())
    file = record.files["model.safetensors"]
    path = f"{spec.path}/{file.attempt}/model.safetensors"
    store.remove(path)
    kept = store.fetch(path, file.sha256, file.bytes, "model.safetensors")
    assert kept.read_bytes() == b"weights"  # without asking the server
    kept.write_bytes(b"altered")
    with pytest.raises(StoreError, match="missing from the store"):
        store.fetch(path, file.sha256, file.bytes, "model.safetensors")
