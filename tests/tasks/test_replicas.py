"""Sampling and scoring by several processes: the bytes of one, whoever dies and whatever is done already."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from sharded import CPU, Sharded

from sera_core.artifacts.manifest import StepRecord
from sera_core.artifacts.step import part_numbers
from sera_core.config import ExecutionConfig
from sera_core.errors import SeraError
from sera_core.models import devices
from sera_core.models.devices import replica_processes
from tasks.engines import replica_processes as replicas

slow = pytest.mark.slow
TWO = CPU.model_copy(update={"distribute": "processes", "replicas": 2})
THREE = TWO.model_copy(update={"replicas": 3})
SHARDS = [f"part-{number:05d}.json" for number in range(5)]


class Killed(Exception):
    """Stands for a cancelled run."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replicas") / "inputs"
    Sharded(folder)
    return folder


@pytest.fixture
def world(inputs: Path, tmp_path: Path) -> Sharded:
    shutil.copytree(inputs, tmp_path / "world")
    return Sharded(tmp_path / "world")


@pytest.fixture(scope="module")
def alone(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, StepRecord]:
    """Both steps done by one process, in a store of their own."""
    folder = tmp_path_factory.mktemp("alone") / "world"
    shutil.copytree(inputs, folder)
    world = Sharded(folder)
    return {step.step: world.run(step) for step in (world.sample, world.logps)}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[psutil.Process]:
    """The processes, as they start."""
    found, start = [], replicas.start

    def noted(*args: Any, **kwargs: Any) -> Any:
        child = start(*args, **kwargs)
        found.append(psutil.Process(child.process.pid))
        return child

    monkeypatch.setattr(replicas, "start", noted)
    return found


def gone_within(seconds: float, left: list[psutil.Process]) -> None:
    assert left and not psutil.wait_procs(left, timeout=seconds)[1]


def same(record: StepRecord, alone: StepRecord) -> None:
    """The same files, counts and metrics, from all shards."""
    assert record.digest == alone.digest
    assert {name: file.sha256 for name, file in record.files.items()} == {
        name: file.sha256 for name, file in alone.files.items()
    }
    assert (record.counts, record.metrics, record.parts) == (alone.counts, alone.metrics, SHARDS)


# ------------------------------------------------------------------------------------------------ the result


@slow
def test_two_processes_write_the_bytes_of_one_and_share_the_work(
    world: Sharded, alone: dict[str, StepRecord], started: list[psutil.Process]
) -> None:
    for spec in (world.sample, world.logps):
        seen: list[tuple[int, int]] = []
        record = world.run(spec, TWO, lambda done, total, _, seen=seen: seen.append((done, total)))
        same(record, alone[spec.step])
        assert record.environment["replicas"] == 2 and "replicas" not in alone[spec.step].environment
        assert seen[-1][0] == seen[-1][1] == record.counts["responses"]
        folder = Path(world.url) / spec.path
        by = {
            next(iter(json.loads((folder / name).read_text())["files"].values()))["attempt"]
            for name in SHARDS
        }
        assert len(by) == 2, "one process did it all"
        assert world.shards_written(spec) == [f"part-{number:05d}.parquet" for number in range(5)]
    gone_within(1, started)
    assert len(started) == 4


# ------------------------------------------------------------------------------------------------- resuming


@slow
@pytest.mark.parametrize("step", ["sample", "logps"])
def test_a_killed_process_loses_the_shard_under_way_and_others_do_it(
    world: Sharded,
    alone: dict[str, StepRecord],
    started: list[psutil.Process],
    caplog: pytest.LogCaptureFixture,
    step: str,
) -> None:
    spec = getattr(world, step)
    killed: list[int] = []

    def progress(done: int, *_: Any) -> None:
        if not killed and done > 0:
            killed.append(done)
            started[0].kill()

    same(world.run(spec, TWO, progress), alone[step])
    assert killed and len(world.shards_written(spec)) <= 6
    assert f"step {step}: process 1 of 2 was ended by signal 9" in caplog.text
    gone_within(1, started)


@slow
def test_a_step_fails_when_no_process_is_left_and_then_continues(
    world: Sharded, alone: dict[str, StepRecord], started: list[psutil.Process]
) -> None:
    def progress(*_: Any) -> None:
        for process in started:
            process.kill()

    said = r"step sample: process \d of 2 was ended by signal 9 .*, and no other is left; run the same"
    with pytest.raises(SeraError, match=said):
        world.run(world.sample, TWO, progress)
    same(world.run(world.sample), alone["sample"])


@slow
def test_a_cancelled_step_leaves_no_process(world: Sharded, started: list[psutil.Process]) -> None:
    def progress(*_: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        world.run(world.logps, TWO, progress)
    assert len(started) == 2
    gone_within(5, started)


@slow
def test_an_owner_is_killed_and_another_number_of_processes_continues(
    world: Sharded, alone: dict[str, StepRecord]
) -> None:
    owner = world.owner(world.sample, TWO)
    assert owner.stdout is not None
    while int(owner.stdout.readline()) < 300:  # more than a shard of 256 responses
        pass
    family = psutil.Process(owner.pid).children(recursive=True)
    assert len(family) >= 3  # the server, and the two that it forked
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    gone_within(10, family)
    kept = world.parts(world.sample)
    seen: list[int] = []
    same(world.run(world.sample, THREE, lambda done, *_: seen.append(done)), alone["sample"])
    assert not kept or min(seen) > 4 * 61 * len(kept) - 256


@slow
@pytest.mark.parametrize("execution", [CPU, TWO], ids=["here", "processes"])
def test_shards_behind_a_gap_are_kept(
    world: Sharded, alone: dict[str, StepRecord], execution: ExecutionConfig
) -> None:
    """The record and two parts are deleted, as an owner that died leaves the shards of several workers."""
    world.run(world.sample)
    folder = Path(world.url) / world.sample.path
    kept = {name: (folder / name).read_bytes() for name in SHARDS}
    for name in ("done.json", SHARDS[1], SHARDS[3]):
        (folder / name).unlink()
    assert part_numbers(world.store, world.sample.path) == [0, 2, 4]
    seen: list[int] = []
    same(world.run(world.sample, execution, lambda done, *_: seen.append(done)), alone["sample"])
    assert min(seen) > 256 + 256 + 244 - 1 and max(seen) == 5 * 256 - 12
    assert all((folder / name).read_bytes() == kept[name] for name in (SHARDS[0], SHARDS[2], SHARDS[4]))
    assert len(world.shards_written(world.sample)) == 7


# ------------------------------------------------------------------------------------------------- refusing


@slow
def test_the_error_of_a_process_is_the_steps(world: Sharded) -> None:
    wrong = world.sample.model_copy(update={"fields": world.sample.fields | {"max_parity_nats": -1.0}})
    with pytest.raises(SeraError, match=r"above sampling\.max_parity_nats = -1"):
        world.run(wrong, TWO)


def test_as_many_replicas_as_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(**settings: Any) -> int:
        return replica_processes(ExecutionConfig(distribute="processes", **settings))

    monkeypatch.setattr(devices, "accelerator_here", lambda _: False)
    assert (count(), count(replicas=3), count(replicas="auto")) == (1, 3, 1)
    monkeypatch.setattr(devices, "accelerator_here", lambda _: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (count(), count(replicas=3), count(replicas="auto")) == (1, 3, 4)
    with pytest.raises(SeraError, match=r"execution\.replicas = 5, but 4 GPUs are visible"):
        count(replicas=5)
