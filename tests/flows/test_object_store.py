"""A thin thread through object storage: the same run with its artifacts behind an S3 server."""

import os

import objectstores
import pytest
import tinyrun

import sera_core
from flows.store_tools.verify import verify

pytestmark = pytest.mark.s3


@pytest.fixture
def bucket():
    """An empty bucket on a moto server of our own."""
    with objectstores.moto() as server, server.in_environment():
        yield server.bucket()


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
