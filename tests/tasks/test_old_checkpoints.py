"""Old checkpoints leave the store: the last few stay while training is unfinished, none once it is done."""

import logging
from pathlib import Path
from typing import Any

import objectstores
import pytest
from trainable import CPU, Bench, shas

from sera_core.artifacts.local_store import LocalStore
from sera_core.artifacts.manifest import StepSpec
from sera_core.artifacts.store import Store, open_store
from sera_core.config import TrainConfig
from sera_core.errors import StoreError
from tasks.engines.checkpoints import FILES
from tasks.engines.stored_checkpoints import superseded

slow = pytest.mark.slow
TRAIN = TrainConfig(batch=2, epochs=1, beta=0.2)
"""Five steps: checkpoints after the first four."""


class Killed(Exception):
    """Stands for SIGKILL."""


def keeping(count: int) -> Any:
    return CPU.model_copy(update={"checkpoint_steps": 1, "keep_checkpoints": count})


def kill_at(pairs: int) -> Any:
    def progress(done: int, total: int, unit: str) -> None:
        if unit == "pairs" and done >= pairs:
            raise Killed

    return progress


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def held(bench: Bench, spec: StepSpec) -> dict[str, list[str]]:
    """Files of each checkpoint that the store still has, by the checkpoint's folder."""
    found: dict[str, list[str]] = {}
    for path in sorted((bench.folder / "store" / spec.path).glob("*/checkpoint-*/*")):
        found.setdefault(path.parent.name, []).append(path.name)
    return found


def parts(bench: Bench, spec: StepSpec) -> list[str]:
    return sorted(path.name for path in (bench.folder / "store" / spec.path).glob("part-*.json"))


def test_the_checkpoints_of_the_most_steps_are_kept_whatever_their_number() -> None:
    """A second process may commit behind the first: the last number need not be the last step."""
    steps = [{"info": {"step": step}} for step in (10, 20, 40, 30)]
    assert superseded(steps, 1) == [0, 1, 3]
    assert superseded(steps, 2) == [0, 1]
    assert superseded(steps, 4) == superseded(steps, 9) == []


@slow
@pytest.mark.parametrize("keep", [1, 2, 9])
def test_an_unfinished_training_holds_the_last_few_and_every_record(bench: Bench, keep: int) -> None:
    spec = bench.spec(bench.mixture(), TRAIN, rate=1e-3 + keep * 1e-9)
    with pytest.raises(Killed):
        bench.run(spec, keeping(keep), kill_at(10))
    last = ["checkpoint-000001", "checkpoint-000002", "checkpoint-000003", "checkpoint-000004"][-keep:]
    assert held(bench, spec) == {name: sorted(FILES) for name in last}
    assert parts(bench, spec) == [f"part-0000{number}.json" for number in range(4)]
    resumed = bench.run(spec, keeping(keep))
    assert held(bench, spec) == {}
    assert shas(resumed) == shas(bench.again(spec, name=f"whole-{keep}"))


@slow
@pytest.mark.parametrize("removals", [0, 2, 4, 10, 12, 14])
def test_a_kill_before_or_amid_a_deletion_costs_nothing(
    bench: Bench, removals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four files a checkpoint: 12 removals in training, 4 behind done.json, whose remains gc takes."""
    spec = bench.spec(bench.mixture(), TRAIN, rate=2e-3 + removals * 1e-9)
    real, left = LocalStore.remove, [removals]

    def until_killed(store: LocalStore, path: str) -> None:
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        real(store, path)

    with monkeypatch.context() as patched:
        patched.setattr(LocalStore, "remove", until_killed)
        with pytest.raises(Killed):
            bench.run(spec, keeping(1))
    assert (bench.folder / "store" / spec.path / "done.json").exists() == (removals >= 12)
    resumed = bench.run(spec, keeping(1))
    remains = [name for files in held(bench, spec).values() for name in files]
    assert len(remains) == (16 - removals if removals >= 12 else 0)
    assert shas(resumed) == shas(bench.again(spec, name=f"whole-removals-{removals}"))


@slow
def test_a_store_that_lets_nothing_be_deleted_keeps_them_with_a_warning(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(store: LocalStore, path: str) -> None:
        raise StoreError(f"{path}: may not be deleted")

    monkeypatch.setattr(LocalStore, "remove", refuse)
    spec = bench.spec(bench.mixture(), TRAIN, rate=3e-3)
    with caplog.at_level(logging.WARNING):
        record = bench.run(spec, keeping(2))
    assert len(held(bench, spec)) == 4
    assert caplog.text.count("cannot delete its files, so they stay") == 4
    assert shas(record) == shas(bench.again(spec, name="whole-refusing"))


@pytest.mark.s3
def test_in_a_bucket_too(bench: Bench) -> None:
    """Killed before it is done, then resumed; the objects that are left."""
    spec = bench.spec(bench.mixture(), TRAIN, rate=4e-3)
    with objectstores.moto() as server, server.in_environment():
        url = server.bucket()
        store = open_store(url)
        copy_store(bench.folder / "store", store)
        with pytest.raises(Killed):
            bench.run(spec, keeping(1), kill_at(10), store=store)
        kept = [name for name in server.objects(url) if "/checkpoint-" in name]
        assert sorted(Path(name).name for name in kept) == sorted(FILES)
        assert all("/checkpoint-000004/" in name for name in kept)
        resumed = bench.run(spec, keeping(1), store=store)
        assert not [name for name in server.objects(url) if "/checkpoint-" in name]
    assert shas(resumed) == shas(bench.again(spec, name="whole-bucket"))


def copy_store(folder: Path, store: Store) -> None:
    """The steps that training reads."""
    for path in folder.glob("steps/*/*/**/*"):
        relative = path.relative_to(folder).as_posix()
        if path.is_file() and not relative.startswith("steps/train/"):
            store.create(relative, path.read_bytes())
