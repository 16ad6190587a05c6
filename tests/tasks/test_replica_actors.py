"""Sampling and scoring on a Ray cluster: the bytes of one process, also if a node dies; what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from raycluster import cluster
from sharded import CPU, Sharded

from sera_core.artifacts.manifest import find_record
from sera_core.artifacts.step import environment
from sera_core.config import ExecutionConfig
from sera_core.errors import InputError
from tasks.engines import replica_actors
from tasks.engines.replica_actors import Room, connect, differences, room_for

RAY = CPU.model_copy(update={"distribute": "ray", "replicas": 2})


@pytest.mark.slow
def test_a_node_is_killed_while_two_sample_and_the_bytes_are_those_of_one_process(tmp_path: Path) -> None:
    """Also, by the same owner's cluster afterwards: scoring, by the one node that is left."""
    world = Sharded(tmp_path / "world")
    shutil.copytree(tmp_path / "world", tmp_path / "alone")
    alone = Sharded(tmp_path / "alone")
    with cluster(2) as nodes:
        execution = RAY.model_copy(update={"address": nodes.address})
        owner = world.owner(world.sample, execution)
        assert owner.stdout is not None and int(owner.stdout.readline()) == 256  # one shard of five is done
        nodes.kill(1)
        assert owner.wait(240) == 0
        scorer = world.owner(world.logps, execution)
        expected = {spec.step: alone.run(spec) for spec in (alone.sample, alone.logps)}
        assert scorer.wait(240) == 0
    for spec in (world.sample, world.logps):
        record = find_record(world.store, spec.step, spec.key)
        assert record is not None and record.digest == expected[spec.step].digest
        assert record.counts == expected[spec.step].counts and record.metrics == expected[spec.step].metrics
        assert record.environment["distribute"] == "ray"
    assert len(world.shards_written(world.sample)) <= 6, "more than the shard under way was done again"


# ------------------------------------------------------------------------------------------------ the workers


def room(nodes: list[dict[str, float]], shards: int = 99, **settings: Any) -> Room:
    return room_for(ExecutionConfig.model_validate({"distribute": "ray", **settings}), nodes, shards)


def test_workers_on_cpus_share_the_cores_of_the_machines() -> None:
    nodes = [{"CPU": 2.0}, {"CPU": 6.0}, {}]
    assert room(nodes) == Room(1, 6, 0.0)
    assert room(nodes, replicas=2) == Room(2, 3, 0.0), "3 + 3 on the larger machine"
    assert room(nodes, replicas=4) == Room(4, 2, 0.0)
    assert room(nodes, replicas=50, shards=9) == Room(9, 1, 0.0), "nine, of which eight find room at once"
    assert room(nodes, replicas="auto") == Room(2, 3, 0.0)


def test_workers_on_gpus_take_one_each_or_what_is_set() -> None:
    nodes = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 64.0}, {"CPU": 2.0, "GPU": 4.0}]
    assert room(nodes, replicas="auto") == Room(6, 1, 1.0), "two CPUs bring two workers to the last"
    assert room(nodes, replicas="auto", gpus_per_replica=0.5) == Room(10, 1, 0.5)
    assert room(nodes, replicas=3, device="cpu").gpus == 0
    with pytest.raises(InputError, match=r"replica = 8, but no machine of the Ray cluster has more than 4"):
        room(nodes, gpus_per_replica=8)
    with pytest.raises(InputError, match=r"gpus_per_replica = 1, but no machine .* more than 0 GPUs"):
        room([{"CPU": 8.0}], device="cuda")
    with pytest.raises(InputError, match="no machine of the Ray cluster has a CPU to give"):
        room([{}])


# ------------------------------------------------------------------------------------------------- refusing


def test_other_packages_and_other_code_are_named() -> None:
    here = environment()
    assert differences(here, here) == []
    there = {**here, "packages": {**here["packages"], "torch": "1.0"}, "code": "0123456789"}
    del there["packages"]["numpy"]
    assert differences(there, here) == [
        f"torch 1.0 (here {here['packages']['torch']})",
        f"numpy missing (here {here['packages']['numpy']})",
        f"sera-flow {here['sera-flow']} (code 01234567) (here {here['sera-flow']} (code {here['code'][:8]}))",
    ]


def test_ray_that_is_missing_and_a_cluster_that_does_not_answer_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said = r"no Ray cluster at 127\.0\.0\.1:9 \(.*refused.*\)\. Start one with `ray start --head"
    with pytest.raises(InputError, match=said):
        connect("127.0.0.1:9")
    monkeypatch.setattr(replica_actors, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"Ray is not installed; run pip install 'sera-flow\[ray\]'"):
        connect("")


@pytest.mark.parametrize("address", ["ray://head:10001", "head", "user:secret@head:6379", "10.0.0.1:port"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ValueError, match="give host:port of a Ray cluster's head"):
        ExecutionConfig(distribute="ray", address=address)
