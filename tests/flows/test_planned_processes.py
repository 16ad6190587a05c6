"""What a plan expects of a training in several processes: seconds, memory, and what it refuses."""

from types import SimpleNamespace
from typing import Any

import pytest

from flows.planning import estimates
from flows.planning.estimates import Estimator, Workload, refuse_what_cannot_fit
from sera_core.artifacts.manifest import StepSpec
from sera_core.config import SeraConfig
from sera_core.errors import InputError
from sera_core.models.memory_estimate import least_training_memory, shape_of

HIDDEN, LAYERS, WORDS = 64, 4, 100
SHAPE = shape_of(
    {"embed": (WORDS, HIDDEN), **{f"model.layers.{n}.w.weight": (HIDDEN, 9 * HIDDEN) for n in range(LAYERS)}}
)
SIZE = Workload(100, 10, 0, 100, 20.0, 30.0, 40, [(40, 60, 60)], SHAPE)
TRAIN = StepSpec(
    step="train", version=1, fields={"dtype": "float32", "round": 0, "token_budget": 1000}, inputs={}
)
GPUS = 8


def config(train: dict[str, Any] | None = None, **execution: Any) -> SeraConfig:
    return SeraConfig.model_validate(
        {
            "model": {"source": "tiny"},
            "data": {"train": [{"path": "pairs.jsonl"}]},
            "train": train or {},
            "execution": execution,
        }
    )


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Any:
    """plan(apart, finished steps, **execution) -> what is expected of a training."""
    monkeypatch.setattr(estimates, "gigaflops", lambda: 1e-3)
    monkeypatch.setattr(
        estimates, "training_processes", lambda execution, batch: min(int(execution.processes), GPUS)
    )

    def plan(apart: bool, done: list[Any], **execution: Any) -> dict[str, Any]:
        monkeypatch.setattr(estimates, "accelerator_here", lambda device: apart)
        monkeypatch.setattr(estimates, "find_record", lambda store, step, key: done[key])
        refs = [SimpleNamespace(step="train", key=number) for number in range(len(done))]
        records: Any = SimpleNamespace(rounds=lambda: [SimpleNamespace(used=refs)])
        found = Estimator(config(micro_batch=1, **execution), None, records, SIZE)  # pyright: ignore[reportArgumentType]
        return found.expected(TRAIN, None)

    return plan


def trained(seconds: float, processes: int | None) -> Any:
    """A finished training of 1,000 tokens."""
    environment = {} if processes is None else {"processes": processes}
    metrics = {"tokens/trained": 1000.0}
    return SimpleNamespace(step="train", fields={}, metrics=metrics, seconds=seconds, environment=environment)


def test_accelerators_share_the_seconds_of_a_training_and_processes_on_a_cpu_its_threads(planned):
    one, four = (planned(True, [], processes=count)["seconds"] for count in (1, 4))
    assert four - 2 == pytest.approx((one - 2) / 4, abs=0.1) and one > 10
    assert planned(False, [], processes=4)["seconds"] == planned(False, [], processes=1)["seconds"] == one


def test_seconds_measured_with_other_numbers_of_processes_are_those_of_one_accelerator(planned):
    """40 s on one and 10 s on four: 40 s for 1,000 tokens on one."""
    done = [trained(40.0, None), trained(10.0, 4)]
    assert planned(True, done, processes=2)["seconds"] == 20.0
    assert planned(False, done, processes=2)["seconds"] == 25.0


def test_shared_weights_need_less_memory_for_each_process(planned):
    whole, shared = (
        planned(True, [], processes=4, shard_weights=shares)["memory"] for shares in (False, True)
    )
    gathered = 2 * 4 * (WORDS * HIDDEN + 2 * HIDDEN * 9 * HIDDEN)
    assert whole - shared == pytest.approx(16 * SHAPE.parameters * 3 / 4 - gathered, rel=1e-3)


def test_a_training_that_fits_only_with_shared_weights_is_refused_with_that_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Weights, gradients and two moments of 4 bytes, on a card that holds a half and loads a fourth."""
    least = least_training_memory(SHAPE, "float32", config().train)
    monkeypatch.setattr(estimates, "accelerator_here", lambda device: True)
    monkeypatch.setattr(estimates, "training_processes", lambda execution, batch: int(execution.processes))
    monkeypatch.setattr(estimates, "device_memory", lambda device: (least // 2, least // 2))
    with pytest.raises(InputError, match=r"cannot fit.*set execution\.shard_weights = true, or set train"):
        refuse_what_cannot_fit(config(processes=2), SHAPE)
    refuse_what_cannot_fit(config(processes=2, shard_weights=True), SHAPE)
    monkeypatch.setattr(estimates, "device_memory", lambda device: (least // 5, least // 5))
    with pytest.raises(InputError, match="cannot fit") as refused:
        refuse_what_cannot_fit(config(processes=8, shard_weights=True), SHAPE)  # it is loaded whole
    assert "shard_weights" not in str(refused.value)
    eight = config({"optimizer": "adamw_8bit"}, processes=2)
    with pytest.raises(InputError, match="cannot fit") as refused:
        refuse_what_cannot_fit(eight, SHAPE)
    assert "shard_weights" not in str(refused.value)
