"""A shared store is tried before its first use, and refused if two racing writers can both win."""

import json
import os
import signal
import time

import pytest
import tinyrun
from reliability.crashing import count_commits

from flows.running import open_run
from sera_core.artifacts.probing import PASSED, RACES, check_shared, probe
from sera_core.artifacts.s3_store import S3Store
from sera_core.artifacts.store import open_store
from sera_core.errors import StoreError

pytestmark = pytest.mark.s3


def racy(store: S3Store, path: str, data: bytes) -> bytes:
    """What Swift's gateway does: it looks, and then it writes."""
    if (there := store.read_bytes(path)) is not None:
        return there
    time.sleep(0.2)
    store._do(store._requests().put(store._key(path), data))
    return data


def test_a_real_server_passes_every_trial_and_nothing_is_left_in_it(server):
    url = server.bucket()
    found = probe(open_store(url))
    assert [(finding.name, finding.ok) for finding in found] == [
        ("write", True), ("read", True), ("range", True), ("file", True), ("race", True),
    ]  # fmt: skip
    assert server.objects(url) == {}


def test_a_store_that_passed_is_not_tried_again(moto, monkeypatch):
    store = open_store(url := moto.bucket())
    assert check_shared(store, accept_racy=False) is None
    assert list(moto.objects(url)) == [PASSED]
    assert json.loads(store.read_bytes(PASSED))["races"] == RACES
    monkeypatch.setattr(S3Store, "create", racy)
    assert check_shared(open_store(url), accept_racy=False) is None


def test_a_racy_store_is_refused_unless_that_is_accepted_and_then_it_warns_every_time(moto, monkeypatch):
    monkeypatch.setattr(S3Store, "create", racy)
    store = open_store(url := moto.bucket())
    with pytest.raises(StoreError, match=r"8 writers raced .* won instead of one.*accept_racy_store=true"):
        check_shared(store, accept_racy=False)
    for _ in range(2):
        warning = check_shared(store, accept_racy=True)
        assert warning is not None and warning.startswith("WARNING: ") and url in warning
    assert moto.objects(url) == {}


def test_a_run_does_not_begin_in_a_racy_store(moto, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(S3Store, "create", racy)
    url = moto.bucket()
    with pytest.raises(StoreError, match="accept_racy_store"):
        open_run.open_run(tinyrun.config(tmp_path), "tiny", url)
    assert moto.objects(url) == {}
    open_run.open_run(tinyrun.config(tmp_path, execution={"accept_racy_store": True}), "tiny", url)
    assert "WARNING: " in capsys.readouterr().err


def test_a_store_that_gives_other_bytes_back_is_refused_even_if_races_are_accepted(moto, monkeypatch):
    real = S3Store.read_range
    monkeypatch.setattr(S3Store, "read_range", lambda *args: real(*args)[::-1])
    with pytest.raises(StoreError, match="'range' failed: a ranged read returned the wrong bytes"):
        check_shared(open_store(moto.bucket()), accept_racy=True)


def test_a_trial_that_was_killed_is_made_again(moto):
    url = moto.bucket()
    if (child := os.fork()) == 0:
        count_commits(kill_at=20)
        check_shared(open_store(url), accept_racy=False)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert PASSED not in moto.objects(url)
    assert check_shared(open_store(url), accept_racy=False) is None
    assert PASSED in moto.objects(url)


def test_a_folder_needs_no_trial(tmp_path):
    assert check_shared(open_store(str(tmp_path / "store")), accept_racy=False) is None
    assert not (tmp_path / "store").exists()
