"""A round trained by two processes: the steps of one process, and what happens when one of them dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from trainable import CPU, Bench, same_steps

from sera_core.artifacts.manifest import StepRecord, StepSpec
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig, TrainConfig
from sera_core.errors import SeraError
from sera_core.models import devices
from sera_core.models.devices import training_processes
from sera_core.models.policies import load_policy
from tasks.engines import processes, ranks
from tasks.engines.ranks import Ranks

slow = pytest.mark.slow
TRAIN = TrainConfig(batch=3, epochs=1, beta=0.2, max_grad_norm=0.5)
"""Of 10 pairs: three steps of 3 pairs, which two processes cannot share evenly, and one of a single pair."""
LORA = TRAIN.model_copy(update={"method": "lora", "lora_rank": 4, "lora_alpha": 8})
EIGHT_BITS = TRAIN.model_copy(update={"optimizer": "adamw_8bit"})
ONE = CPU.model_copy(update={"micro_batch": 1, "checkpoint_steps": 2})
TWO = ONE.model_copy(update={"processes": 2})
TESTS = Path(__file__).parents[1]

OWNER = """
import sys
from sera_core.artifacts.manifest import StepSpec
from sera_core.config import ExecutionConfig
from tasks.step_functions import do_work

store, spec, execution = sys.argv[1:]
spec, execution = StepSpec.model_validate_json(spec), ExecutionConfig.model_validate_json(execution)
do_work(store, spec, execution, lambda done, *_: print(done, flush=True))
"""


class Killed(Exception):
    """Stands for a cancelled run."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("processes"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[psutil.Process]:
    """The processes of a training, in their order, as they start."""
    found, start = [], processes.start

    def noted(*args: Any, **kwargs: Any) -> Any:
        child = start(*args, **kwargs)
        found.append(psutil.Process(child.process.pid))
        return child

    monkeypatch.setattr(processes, "start", noted)
    return found


def gone_within(seconds: float, left: list[psutil.Process]) -> None:
    assert left and not psutil.wait_procs(left, timeout=seconds)[1]


# ------------------------------------------------------------------------------------------------ the result


@pytest.fixture(scope="module")
def alone(bench: Bench) -> StepRecord:
    return bench.run(bench.spec(bench.mixture(), TRAIN), ONE)


@slow
def test_two_processes_take_the_steps_of_one(
    bench: Bench, alone: StepRecord, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every loss, margin, accuracy and gradient norm, and the weights, which Adam moves by 1e-3 a step.

    That the pairs of each step are the planned ones is asserted in each process, in every step.
    """
    two = bench.again(bench.spec(bench.mixture(), TRAIN), TWO, name="two")
    assert capfd.readouterr() == ("", "")
    assert two.environment["processes"] == 2 and "processes" not in alone.environment
    same_steps(bench.log(alone), bench.log(two, "two"))
    assert two.metrics.keys() == alone.metrics.keys()
    assert two.metrics["step0/largest_margin"] <= two.metrics["step0/bound"]
    assert two.counts == alone.counts and two.files.keys() == alone.files.keys()
    folders = (bench.result(alone), bench.result(two, "two"))
    one, other = (load_policy(folder / "policy").parameters() for folder in folders)
    for a, b in zip(one, other, strict=True):
        assert (a - b).abs().max().item() <= 1e-5


@slow
@pytest.mark.parametrize(
    ("train", "dtype", "bound"),
    [(LORA, "float32", 1e-5), (TRAIN, "bfloat16", 2e-2), (EIGHT_BITS, "float32", 1e-3)],
    ids=["lora", "bfloat16", "8-bit"],
)
def test_two_processes_train_adapters_rounded_weights_and_moments_and_the_first_one_tracks(
    bench: Bench, train: TrainConfig, dtype: Any, bound: float
) -> None:
    """A sum in another order may be rounded to the next bfloat16 weight, or the next of 256 moments."""
    spec = bench.spec(bench.mixture(dtype=dtype), train, dtype=dtype)
    name = f"{train.method}-{dtype}"
    spec = spec.model_copy(update={"where": {"logs": str(bench.folder / f"logs-{name}")}})
    one = bench.run(spec, ONE)
    two = bench.again(spec, TWO.model_copy(update={"tracking": "tensorboard"}), name=name)
    same_steps(bench.log(one), bench.log(two, name), bound)
    assert len(list((bench.folder / f"logs-{name}").rglob("events.*"))) == 1


# ------------------------------------------------------------------------------------------------- resuming


@slow
@pytest.mark.parametrize(
    ("dies", "first", "then"),
    [(1, TWO, ONE), (0, TWO, TWO), (None, ONE, TWO)],
    ids=["two-one", "two-two", "one-two"],
)
def test_a_training_whose_process_dies_fails_at_once_and_resumes_with_another_number(
    bench: Bench,
    alone: StepRecord,
    started: list[psutil.Process],
    dies: int | None,
    first: ExecutionConfig,
    then: ExecutionConfig,
) -> None:
    """Killed in the third step; there is a checkpoint after the second."""
    name = f"killed-{dies}"
    spec, store = bench.spec(bench.mixture(), TRAIN), bench.copy(name)
    killed: list[float] = []

    def progress(done: int, *_: Any) -> None:
        if done < 9:
            return
        if dies is None:
            raise Killed
        killed.append(time.monotonic())
        started[dies].kill()

    if dies is None:
        with pytest.raises(Killed):
            bench.run(spec, first, progress, store)
    else:
        said = rf"step train: process {dies + 1} of 2 was ended by signal 9 .*others were ended; run the same"
        with pytest.raises(SeraError, match=said):
            bench.run(spec, first, progress, store)
        assert time.monotonic() - killed[0] < 10
        gone_within(5, started)
    seen: list[int] = []
    resumed = bench.run(spec, then, lambda done, *_: seen.append(done), store)
    assert seen == [9, 10], "it began again instead of at the checkpoint"
    same_steps(bench.log(alone), bench.log(resumed, name))


@slow
def test_a_cancelled_training_leaves_no_process(bench: Bench, started: list[psutil.Process]) -> None:
    def progress(*_: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        bench.run(bench.spec(bench.mixture(), TRAIN), TWO, progress, bench.copy("cancelled"))
    assert len(started) == 2
    gone_within(5, started)


@slow
def test_no_process_outlives_a_killed_owner(bench: Bench) -> None:
    spec, store = bench.spec(bench.mixture(), TRAIN), bench.copy("orphans").url
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, store, spec.model_dump_json(), TWO.model_dump_json()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))},
        stdout=subprocess.PIPE,
    )
    assert owner.stdout is not None and owner.stdout.readline() == b"3\n"
    family = psutil.Process(owner.pid).children(recursive=True)
    assert len(family) >= 3  # the server, and the two that it forked
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    gone_within(10, family)


# ------------------------------------------------------------------------------------------------- refusing


@slow
def test_a_wrong_reference_is_refused_by_two_processes_too_after_a_second_try(
    bench: Bench, started: list[psutil.Process]
) -> None:
    third = bench.rows[2]["pair_id"]
    changes: dict[str, Any] = {third: {"ref_chosen_logps": -20.0}}
    wrong = bench.mixture(**changes)
    with pytest.raises(
        SeraError, match=rf"pair {third}: margin .* nats at step 0 \(-?\d.* in the first try\)"
    ):
        bench.run(bench.spec(wrong, TRAIN), TWO)
    assert len(started) == 4


@slow
def test_an_unexpected_error_is_told_with_its_traceback(
    bench: Bench, started: list[psutil.Process], caplog: pytest.LogCaptureFixture
) -> None:
    attempt = Attempt(bench.copy("unexpected"), bench.spec(bench.mixture(), TRAIN), TWO)
    with pytest.raises(SeraError, match=r"step train: AttributeError: .* no attribute 'no_such'"):
        processes.train_in_processes(attempt, 2, "tasks.training:no_such")
    assert "printed last:\nTraceback (most recent call last)" in caplog.text
    gone_within(5, started)


def test_weights_that_differ_between_processes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process holds 1 where this one holds 2, in the second of two tensors."""
    other = torch.tensor([0, 0, int(torch.ones(1).view(torch.int32))])

    def reduce(values: torch.Tensor, op: Any) -> None:
        values.copy_((torch.minimum if op == ranks.dist.ReduceOp.MIN else torch.maximum)(values, other))

    monkeypatch.setattr(ranks.dist, "all_reduce", reduce)
    weights = {"same": torch.nn.Parameter(torch.zeros(1)), "odd": torch.nn.Parameter(torch.ones(1))}
    Ranks(0, 2).refuse_apart(weights, 0)
    weights["odd"].data += 1
    with pytest.raises(
        SeraError, match=r"after 0 steps the 2 processes do not hold the same weights \(\['odd'\]\)"
    ):
        Ranks(0, 2).refuse_apart(weights, 0)


def test_as_many_processes_as_visible_gpus_and_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    def count(batch: int = 32, **settings: Any) -> int:
        return training_processes(ExecutionConfig(**settings), batch)

    monkeypatch.setattr(devices, "accelerator_here", lambda _: False)
    assert (count(), count(processes=3), count(processes="auto")) == (1, 3, 1)
    monkeypatch.setattr(devices, "accelerator_here", lambda _: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (count(), count(processes=3), count(processes="auto"), count(2, processes="auto")) == (1, 3, 4, 2)
    with pytest.raises(SeraError, match=r"execution\.processes = 5, but 4 GPUs are visible"):
        count(processes=5)


def test_each_process_sees_a_gpu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = Attempt(open_store(str(tmp_path)), StepSpec(step="train", version=1, fields={}, inputs={}), TWO)

    def seen() -> list[dict[str, str]]:
        asked = processes.requests_of(attempt, 2, "module:function", str(tmp_path), None)
        return [request["environment"] for request in asked]

    assert seen() == [{}, {}]
    monkeypatch.setattr(processes, "device_of", lambda _: "cuda")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert seen() == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-8a")
    assert seen() == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "GPU-8a"}]
