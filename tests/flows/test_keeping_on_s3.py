"""Leases, verify, diff, gc, plan and export where the store is a bucket."""

import json
import threading
import time
from pathlib import Path

import objectstores
import pytest
import tiny
import tinyrun
from fixtures import make_store

from flows.planning.plan import plan
from flows.store_tools.garbage import collect
from flows.store_tools.verify import verify
from sera_core.artifacts import lease
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.records import FORMAT
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import create_json, open_store
from sera_core.artifacts.upkeep import S3Upkeep, upkeep
from sera_core.errors import BusyError, StoreError

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module", params=["moto", "radosgw"])
def server(request):
    with getattr(objectstores, request.param)() as server, server.in_environment():
        yield server


@pytest.fixture
def url(server, kept_store):
    """A bucket that holds what the kept store does."""
    return upload(server, kept_store)


def upload(server, store: Path) -> str:
    """URL of a new bucket that holds what a local store does."""
    url = server.bucket()
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    client = server.client()
    for path in store.rglob("*"):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(store).as_posix()}"
            client.put_object(Bucket=bucket, Key=key, Body=path.read_bytes())
    return url


def keys(server, url: str) -> set[str]:
    return set(server.objects(url))


def remove_run(server, url: str, run: str) -> None:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    for key in keys(server, url):
        if key.startswith(f"runs/{run}/"):
            server.client().delete_object(Bucket=bucket, Key=f"{prefix}/{key}")


def test_verify_reads_the_bucket_and_not_the_copies_beside_it(server, url):
    records = RunStore(open_store(url), "first")
    assert verify(records).files > 60
    step = records.rounds()[1].steps["policy"]
    key = next(key for key in keys(server, url) if step.key in key and key.endswith(".safetensors"))
    open_store(url).fetch(key, *upkeep(records.store).hashed(key), "model.safetensors")  # now it is cached
    upkeep(records.store).replace(key, b"something else")
    with pytest.raises(StoreError, match="it was changed") as failed:
        verify(records)
    assert f"{url}/{key}" in str(failed.value)


def test_what_no_record_names_is_named_by_verify_and_never_fetched(url, tmp_path, sera):
    store = open_store(url)
    records = RunStore(store, "first")
    policy = Artifact(store, records.rounds()[1].steps["policy"])
    config = policy.uri("policy/config.json").removeprefix(f"{url}/")
    planted = config.replace("config.json", "added_tokens.json")
    upkeep(store).replace(planted, b"{}")
    assert not (policy.folder("policy") / "added_tokens.json").exists()
    target = tmp_path / "policy"
    sera("export", "first", "--round", "1", "--to", target, "--store", url)
    assert not (target / "added_tokens.json").exists()
    with pytest.raises(StoreError, match="no record names this file") as failed:
        verify(records)
    assert f"{url}/{planted}" in str(failed.value)


def test_diff_show_lineage_and_export_read_the_bucket(url, tmp_path, sera):
    def answer(*args: str) -> dict:
        return sera(*args, "--store", url, "--json").json

    assert [c["key"] for c in answer("diff", "first", "second")["config"]] == ["select.fraction"]
    shown = answer("show", "first")
    made = answer("export", "first", "--round", "1", "--to", str(tmp_path / "policy"))
    assert made["policy_sha256"] == shown["rounds"][1]["artifacts"]["policy"]["sha256"]
    chain = json.loads((tmp_path / "policy" / "lineage.json").read_text())
    assert chain == answer("lineage", "first", "--round", "1")


def test_plan_finds_what_the_bucket_holds(server, present_store, tmp_path):
    url = upload(server, present_store)
    tiny.tiny_policy(tmp_path / "policy", layers=1, hidden=32)
    found = plan(tinyrun.config(tmp_path, **{**make_store.SMALL, "limits": {"rounds": 3}}), "first", url)
    assert found["reuse"] >= 30 and found["run_now"] >= 1
    assert {row["status"] for row in found["steps"] if row["round"] in (0, 1)} == {"reuse"}


def test_gc_takes_in_two_passes_what_no_run_needs(server, url):
    store = open_store(url)
    assert collect(store, delete=False, older_than=7 * 86400.0)["items"] == []  # all of it is young
    needed = {ref.key for r in RunStore(store, "first").rounds() for ref in r.used}
    own = {ref.key for r in RunStore(store, "second").rounds() for ref in r.used} - needed
    before = keys(server, url)
    remove_run(server, url, "second")
    collect(store, delete=True, older_than=0.0)
    once = keys(server, url)
    assert not [key for key in once if key.split("/")[-1] == "done.json" and key.split("/")[2] in own]
    assert [key for key in once if key.endswith(".safetensors")] == [
        k for k in before if k.endswith(".safetensors")
    ]
    collect(store, delete=True, older_than=0.0)
    twice = keys(server, url)
    assert not [key for key in twice if key.startswith("steps/") and key.split("/")[2] in own]
    assert verify(RunStore(store, "first")).files > 60


def test_gc_ends_uploads_that_nobody_ended(server, url):
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    for key in (f"{prefix}/steps/train/left/model.safetensors", "elsewhere/model.safetensors"):
        begun = server.client().create_multipart_upload(Bucket=bucket, Key=key)
        server.client().upload_part(
            Bucket=bucket, Key=key, PartNumber=1, UploadId=begun["UploadId"], Body=b"half"
        )
    store = open_store(url)
    assert len(upkeep(store).uploads()) == 1  # the other one is not this store's
    if server.name != "moto":  # which says of every upload that it began in 2010
        assert collect(store, delete=True, older_than=3600.0)["items"] == []
    found = collect(store, delete=True, older_than=0.0)
    assert "an unfinished upload" in {item["why"] for item in found["items"]}
    assert server.unfinished_uploads(url) == ["elsewhere/model.safetensors"]


def test_a_lease_in_a_bucket_ages_by_the_servers_clock_and_is_taken_over(url, monkeypatch):
    store = open_store(url)
    there = {"token": "beef" * 4, "host": "far", "user": "ada", "pid": 7, "began": "1", "place": "far away"}
    create_json(
        store, "runs/r/lease/00000.json", {"format": FORMAT, "epoch": 0, "holder": there, "since": "t"}
    )
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: 0.0)
        assert lease.look(store, "runs/r/lease").age < 30
    monkeypatch.setattr(lease, "EXPIRE_SECONDS", 2.5)
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.5)
    with lease.hold(store, "r", print) as mine:
        assert mine.number == 1
        time.sleep(4)
        seen = lease.look(store, "runs/r/lease")
        assert seen.beats > 2 and not seen.is_over
        with pytest.raises(BusyError, match="is held by"), lease.hold(store, "r", print):
            pass
    assert lease.look(store, "runs/r/lease").is_over


def test_of_eight_that_take_an_epoch_one_has_it(url):
    store = open_store(url)
    taken = []
    begin = threading.Barrier(8)

    def try_it() -> None:
        begin.wait()
        taken.append(lease.take(store, "runs/r/lease", None))

    threads = [threading.Thread(target=try_it) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (mine,) = [one for one in taken if one is not None]
    assert lease.look(store, "runs/r/lease").epoch == mine.epoch
    mine.release()


def test_a_missing_object_has_no_age_and_no_hash(url):
    keeping = upkeep(open_store(url))
    assert keeping.age("runs/none.json") is None
    assert keeping.hashed("runs/none.json") is None
    keeping.delete(["runs/none.json"])
    listed = {stored.path: stored.bytes for stored in keeping.listing("runs")}
    assert listed["runs/first/run-000.json"] == len(open_store(url).read_bytes("runs/first/run-000.json"))
    assert Path("runs/first/run-000.json").as_posix() in listed


def test_who_may_only_read_a_bucket_sees_what_may_go(server, url, monkeypatch):
    remove_run(server, url, "second")
    true = S3Upkeep._call

    def call(self, method, **arguments):
        if not method.startswith(("list_objects", "head_", "get_")):
            raise PermissionError("Access Denied")
        return true(self, method, **arguments)

    def refuse(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr(S3Upkeep, "_call", call)
    for name in ("replace", "delete"):
        monkeypatch.setattr(S3Upkeep, name, refuse)
    before = server.objects(url)
    assert collect(open_store(url), delete=False, older_than=0)["items"]
    with pytest.raises(StoreError, match="needs permission to write"):
        collect(open_store(url), delete=True, older_than=0)
    assert server.objects(url) == before
