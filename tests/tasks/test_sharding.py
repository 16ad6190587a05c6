"""A round trained by two processes that share the weights by rows: the steps of one that has them all."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from trainable import CPU, Bench, same_steps
from transformers import AutoModelForCausalLM

from sera_core.artifacts.manifest import StepRecord, StepSpec
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig, TrainConfig
from sera_core.errors import InputError, SeraError
from sera_core.models.policies import load_policy
from tasks.engines import processes, sharded_weights
from tasks.engines.checkpoints import checkpoint_files, load_checkpoint, save_checkpoint
from tasks.engines.optimizers import adamw
from tasks.engines.ranks import Ranks, meet, part
from tasks.engines.sharded_weights import (
    ShardedWeights,
    assert_sharded,
    blocks_of,
    own_rows,
    refuse_uneven_passes,
)
from tasks.engines.trained_weights import TrainedWeights

slow = pytest.mark.slow
TRAIN = TrainConfig(batch=3, epochs=1, beta=0.2, max_grad_norm=0.5)
"""Of 10 pairs: three steps of 3 pairs, which two processes cannot share evenly, and one of a single pair."""
LORA = TRAIN.model_copy(update={"method": "lora", "lora_rank": 3, "lora_alpha": 6})
"""A rank that two processes cannot share evenly either."""
ONE = CPU.model_copy(update={"micro_batch": 1, "checkpoint_steps": 2})
TWO = ONE.model_copy(update={"processes": 2})
SHARED = TWO.model_copy(update={"shard_weights": True})


class Killed(Exception):
    """Stands for a cancelled run."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("sharding"))


@pytest.fixture(scope="module")
def spec(bench: Bench) -> StepSpec:
    return bench.spec(bench.mixture(), TRAIN)


@pytest.fixture(scope="module")
def alone(bench: Bench, spec: StepSpec) -> StepRecord:
    return bench.run(spec, ONE)


def same_policies(one: Path, other: Path, bound: float) -> None:
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    names = [path.name for path in one.glob("*.safetensors")]
    assert len(names) == 1
    a, b = (load_file(folder / names[0]) for folder in (one, other))
    assert a.keys() == b.keys()
    for name, values in a.items():
        assert (values - b[name]).abs().max().item() <= bound, name


# ------------------------------------------------------------------------------------------------ the result


@slow
@pytest.mark.parametrize(
    ("train", "dtype", "bound"),
    [(LORA, "bfloat16", 2e-2), (TRAIN, "bfloat16", 2e-2)],
    ids=["lora", "full"],
)
def test_adapters_and_rounded_weights_are_shared_too_and_computed_again(
    bench: Bench, train: TrainConfig, dtype: Any, bound: float
) -> None:
    """A sum in another order may be rounded to the next bfloat16 weight; activations are computed again."""
    name, rounded = train.method, bench.spec(bench.mixture(dtype=dtype), train, dtype=dtype)
    one = bench.run(rounded, ONE)
    again = SHARED.model_copy(update={"gradient_checkpointing": True, "checkpoint_steps": 0})
    two = bench.again(rounded, again, name=name)
    same_steps(bench.log(one), bench.log(two, name), bound)
    folders = bench.result(one) / "policy", bench.result(two, name) / "policy"
    same_policies(*folders, bound=1e-3)
    assert one.metrics["trainable_parameters"] == two.metrics["trainable_parameters"]


# ------------------------------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def half(bench: Bench, spec: StepSpec) -> str:
    """A store whose training ended in its third step, when a process died that shared the weights."""
    found, start = [], processes.start

    def noted(*args: Any, **kwargs: Any) -> Any:
        child = start(*args, **kwargs)
        found.append(psutil.Process(child.process.pid))
        return child

    def progress(done: int, *_: Any) -> None:
        if done >= 9:
            found[1].kill()

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(processes, "start", noted)
        with pytest.raises(
            SeraError, match=r"step train: process 2 of 2 was ended by signal 9 .*run the same"
        ):
            bench.run(spec, SHARED, progress, bench.copy("half"))
    return "half"


@slow
def test_each_process_writes_the_half_of_every_tensor_that_it_has(bench: Bench, half: str) -> None:
    """Weights and moments, as they lie in the memory of the two processes."""
    (folder,) = (bench.folder / half).glob("steps/train/*/*/checkpoint-000002")
    assert sorted(path.name for path in folder.iterdir()) == sorted(checkpoint_files(2))
    whole = dict(load_policy(bench.folder / "tiny").named_parameters())
    for rank in range(2):
        weights, moments = (
            load_file(folder / f"{kind}-{rank + 1:05d}-of-00002.safetensors")
            for kind in ("weights", "optimizer")
        )
        assert weights.keys() == whole.keys()
        for name, values in weights.items():
            rows = slice(*own_rows(len(whole[name]), rank, 2))
            assert values.shape == whole[name][rows].shape == moments[f"{name}.exp_avg_sq"].shape
            assert len(values) == pytest.approx(len(whole[name]) / 2, abs=0.5)


@slow
@pytest.mark.parametrize("then", [ONE, TWO, SHARED], ids=["one", "two-whole", "two-shared"])
def test_a_training_of_shared_weights_resumes_in_any_form(
    bench: Bench, spec: StepSpec, alone: StepRecord, half: str, then: ExecutionConfig
) -> None:
    name = f"then-{then.processes}-{then.shard_weights}"
    shutil.copytree(bench.folder / half, bench.folder / name)
    seen: list[int] = []
    resumed = bench.run(spec, then, lambda done, *_: seen.append(done), open_store(str(bench.folder / name)))
    assert seen == [9, 10], "it began again instead of at the checkpoint"
    same_steps(bench.log(alone), bench.log(resumed, name))
    same_policies(bench.result(alone) / "policy", bench.result(resumed, name) / "policy", 1e-5)


@slow
def test_a_training_of_one_process_goes_on_with_shared_weights(
    bench: Bench, spec: StepSpec, alone: StepRecord, capfd: pytest.CaptureFixture[str]
) -> None:
    def progress(done: int, *_: Any) -> None:
        if done >= 9:
            raise Killed

    store = bench.copy("from-one")
    with pytest.raises(Killed):
        bench.run(spec, ONE, progress, store)
    capfd.readouterr()
    resumed = bench.run(spec, SHARED, store=store)
    assert capfd.readouterr() == ("", "")
    same_steps(bench.log(alone), bench.log(resumed, "from-one"))
    assert resumed.metrics.keys() == alone.metrics.keys() and resumed.files.keys() == alone.files.keys()
    same_policies(bench.result(alone) / "policy", bench.result(resumed, "from-one") / "policy", 1e-5)


def test_three_parts_of_a_checkpoint_are_read_as_one_bit_by_bit(tmp_path: Path) -> None:
    """Four rows are two, two and none; the moments are the same numbers as the weights' own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4))
    weights = TrainedWeights(model)
    optimizer = adamw(weights, 0.1)
    model(torch.randn(5, 3)).square().mean().backward()
    optimizer.step()
    for rank in range(3):
        rows = slice(*own_rows(4, rank, 3))
        mine = {name: nn.Parameter(value.detach()[rows]) for name, value in weights.named.items()}
        theirs = torch.optim.AdamW(mine.values())
        for name, value in weights.named.items():
            state = optimizer.state[value]
            theirs.state[mine[name]] = {key: v[rows] if v.ndim else v for key, v in state.items()}
        save_checkpoint(tmp_path, mine, theirs, {"step": 1}, Ranks(rank, 3))
    names = checkpoint_files(3)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    other = TrainedWeights(nn.Sequential(nn.Linear(3, 4)))
    restored = adamw(other, 0.1)
    assert load_checkpoint({n: tmp_path / n for n in names}, other.named, restored) == {"step": 1}
    for name, value in weights.named.items():
        assert torch.equal(other.named[name], value)
        for key, moment in optimizer.state[value].items():
            assert torch.equal(restored.state[other.named[name]][key], moment)


# ------------------------------------------------------------------------------------------------- asserting


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Ranks]:
    """A group of this process alone."""
    yield meet(tmp_path / "meeting", 0, 1, "cpu")
    part()


def small(kind: str, **settings: Any) -> Any:
    from transformers import AutoConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 32}
    given = AutoConfig.for_model(kind, **sizes, **settings)
    return AutoModelForCausalLM.from_config(given)


def test_weights_that_are_not_sharded_are_noticed(group: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small("gpt_neox", intermediate_size=32)
    with pytest.raises(AssertionError, match=r"embed_in\.weight is not sharded"):
        assert_sharded(model, group)
    blocks, real = blocks_of(model), sharded_weights.fully_shard
    assert len(blocks) == 3
    monkeypatch.setattr(sharded_weights, "blocks_of", lambda _: blocks[:1])
    ShardedWeights(model, model, group, "cpu")
    assert_sharded(model, group)
    with pytest.raises(AssertionError, match=r"weights are here instead of"):
        assert_sharded(model, SimpleNamespace(rank=0, count=2))
    monkeypatch.setattr(sharded_weights, "fully_shard", lambda module, **_: real(nn.Linear(1, 1)))
    with pytest.raises(AssertionError, match="is not sharded"):
        ShardedWeights(small("gpt_neox", intermediate_size=32), model, group, "cpu")
    assert dist.get_world_size() == 1


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("gpt2", {}), ("gemma3_text", {"head_dim": 8}), ("qwen2", {"num_key_value_heads": 1})],
)
def test_the_layers_of_other_architectures_are_found(kind: str, settings: dict[str, Any]) -> None:
    model = small(kind, **settings)
    blocks = blocks_of(model)
    inside = {id(p) for block in blocks for p in block.parameters()}
    outside = [name for name, p in model.named_parameters() if id(p) not in inside]
    assert len(blocks) == 3 and outside
    assert not [name for name in outside if ".layers." in name or ".h." in name]


def test_a_model_that_cannot_be_sharded_is_refused_by_name() -> None:
    model = small("qwen2", num_key_value_heads=1)
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(
        InputError, match=r"Qwen2ForCausalLM .* no list of 3 layers with weights of their own"
    ):
        blocks_of(model)
    model.config.rope_parameters = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    with pytest.raises(InputError, match=r"beyond 64 tokens in passes of their own.*shard_weights = false"):
        refuse_uneven_passes(model, False)
    refuse_uneven_passes(model, True)
