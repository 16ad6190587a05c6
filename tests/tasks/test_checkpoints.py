"""A checkpoint brings back weights, optimizer and generators exactly, and is no pickle."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tasks.engines.checkpoints import FILES, load_checkpoint, restore_rng, save_checkpoint
from tasks.engines.optimizers import adamw, adamw_8bit
from tasks.engines.trained_weights import TrainedWeights

Made = tuple[nn.Module, TrainedWeights, torch.optim.Optimizer]


def model_and_optimizer(
    seed: int, hidden: int = 4, dtype: torch.dtype = torch.float32, make: Any = adamw
) -> Made:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    copies = None if dtype == torch.float32 else dict(copy.deepcopy(model).named_parameters())
    weights = TrainedWeights(model.to(dtype), copies)
    optimizer = make(weights, 0.1)
    weights.follow(optimizer)
    return model, weights, optimizer


def in_8_bits(seed: int) -> Made:
    """Moments of the first layer in 8 bits, of the second in float32, as it is small."""
    return model_and_optimizer(seed, hidden=2000, make=adamw_8bit)


def in_bfloat16(seed: int) -> Made:
    return model_and_optimizer(seed, dtype=torch.bfloat16)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        model.zero_grad()
        inputs = torch.randn(5, 3).to(next(model.parameters()).dtype)
        model(inputs).square().mean().backward()
        optimizer.step()


def paths(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in FILES}


@pytest.mark.parametrize("made", [model_and_optimizer, in_8_bits, in_bfloat16])
def test_training_goes_on_from_a_checkpoint_bit_by_bit(tmp_path: Path, made: Any) -> None:
    model, weights, optimizer = made(seed=0)
    steps(model, optimizer, 3)
    save_checkpoint(tmp_path, weights.named, optimizer, {"step": 3})
    steps(model, optimizer, 2)

    other, other_weights, other_optimizer = made(seed=1)
    assert load_checkpoint(paths(tmp_path), other_weights.named, other_optimizer) == {"step": 3}
    other_weights.to_model()
    restore_rng(tmp_path / "rng.safetensors")
    steps(other, other_optimizer, 2)
    for one, two in zip(weights.named.values(), other_weights.named.values(), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, two)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_bfloat16_weights_are_the_float32_ones_rounded_and_gradients_are_added_up_in_float32() -> None:
    """255 gradients of 1/256 beside one of 1 are lost in bfloat16, where 1 + 1/256 is 1."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    exact = torch.tensor([[0.12345678]])
    weights = TrainedWeights(model, {"weight": exact})
    weights.to_model()
    assert torch.equal(model.weight, exact.bfloat16())
    for scale in [1.0] + [1 / 256] * 255:
        (scale * model(torch.ones(1, 1, dtype=torch.bfloat16))).sum().backward()
    assert model.weight.grad is None
    summed = weights.named["weight"].grad
    assert summed is not None and summed.item() == 1 + 255 / 256
    assert weights.clip(0.5).item() == pytest.approx(1 + 255 / 256) and summed.item() == pytest.approx(0.5)
    optimizer = torch.optim.SGD(weights.named.values(), lr=1e-4)
    weights.follow(optimizer)
    optimizer.step()
    after = weights.named["weight"]
    assert after.item() == pytest.approx(0.12345678 - 0.5e-4) and summed.item() == 0
    assert torch.equal(model.weight, after.bfloat16())
    weights.finish(model)
    assert model.weight.dtype == torch.float32 and torch.equal(model.weight, after)


def test_moments_are_in_8_bits_but_those_of_embeddings_and_small_tensors() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64))
    optimizer = adamw_8bit(TrainedWeights(model), 0.1)
    model(torch.tensor([3, 4])).square().mean().backward()
    optimizer.step()
    dtypes = {
        name: {optimizer.state[parameter][key].dtype for key in ("state1", "state2")}
        for name, parameter in model.named_parameters()
    }
    float32, eight = {torch.float32}, {torch.uint8}
    assert dtypes == {"0.weight": float32, "1.weight": eight, "1.bias": float32}


def test_only_trained_parameters_are_written(tmp_path: Path) -> None:
    model, *_ = model_and_optimizer(seed=0)
    model[0].requires_grad_(False)
    weights = TrainedWeights(model)
    optimizer = adamw(weights, 0.1)
    steps(model, optimizer, 1)
    save_checkpoint(tmp_path, weights.named, optimizer, {})
    from safetensors import safe_open

    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["2.bias", "2.weight"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model, weights, optimizer = model_and_optimizer(seed=0)
    steps(model, optimizer, 1)
    save_checkpoint(tmp_path, weights.named, optimizer, {})
    other = TrainedWeights(nn.Sequential(nn.Linear(3, 4)))
    with pytest.raises(ValueError, match=r"parameters differ from the model's: \['2\.bias'"):
        load_checkpoint(paths(tmp_path), other.named, adamw(other, 0.1))
