"""A thin thread through object storage: the same run with its artifacts behind an S3 server."""

import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import tinyrun

import sera_core
from flows.verifying import verify
from sera_core.artifacts.store import open_store

pytestmark = pytest.mark.s3


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """An empty bucket on a moto server of our own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = (tmp_path / "moto.log").open("wb")
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stdout=log, stderr=log)
    keys = {"AWS_ACCESS_KEY_ID": "sera", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**keys, "AWS_ENDPOINT_URL": url}.items():
        monkeypatch.setenv(name, value)
    try:
        for _ in range(150):
            try:
                urllib.request.urlopen(url, timeout=2)
                break
            except OSError:
                time.sleep(0.2)
        request = urllib.request.Request(f"{url}/sera-test", method="PUT")
        urllib.request.urlopen(request, timeout=10)
        yield "s3://sera-test/prefix"
    finally:
        server.terminate()
        server.wait(10)


def test_a_run_lives_in_object_storage_and_resumes_from_it_alone(bucket, tmp_path):
    config = tinyrun.config(tmp_path, limits={"rounds": 2})
    records = tinyrun.work(config, bucket)
    assert next(r.decision for r in records.rounds()) == "promote"
    assert verify(records).files > 0
    local = tinyrun.work(config, tmp_path / "store")
    assert tinyrun.policy_shas(records) == tinyrun.policy_shas(local)
    os.environ["SERA_CACHE"] = str(tmp_path / "empty-cache")  # nothing local is needed
    run = sera_core.open_run(bucket, "tiny")
    assert len(run[1].pairs()) > 0 and (run[1].policy_path() / "model.safetensors").exists()
    before = records.rounds()
    assert tinyrun.work(config, bucket).rounds() == before


def test_of_two_writers_of_a_record_one_wins_and_both_read_the_winner(bucket):
    store = open_store(bucket)
    assert store.create("runs/x/round-000.json", b"first") == b"first"
    assert store.create("runs/x/round-000.json", b"second") == b"first"
    assert store.read_bytes("runs/x/round-000.json") == b"first"
    assert store.names("runs") == ["x"]
