"""A checkpoint brings back weights, optimizer and generators exactly, and is no pickle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tasks.engines.checkpoints import FILES, load_checkpoint, restore_rng, save_checkpoint, trainable
from tasks.engines.optimizers import adamw, adamw_8bit


def model_and_optimizer(seed: int, hidden: int = 4) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, hidden), nn.Tanh(), nn.Linear(hidden, 1))
    return model, adamw(model, 0.1)


def in_8_bits(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Moments of the first layer in 8 bits, of the second in float32, as it is small."""
    model, _ = model_and_optimizer(seed, hidden=2000)
    return model, adamw_8bit(model, 0.1)


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        optimizer.step()


def paths(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in FILES}


@pytest.mark.parametrize("made", [model_and_optimizer, in_8_bits])
def test_training_goes_on_from_a_checkpoint_bit_by_bit(tmp_path: Path, made: Any) -> None:
    model, optimizer = made(seed=0)
    steps(model, optimizer, 3)
    save_checkpoint(tmp_path, model, optimizer, {"step": 3})
    steps(model, optimizer, 2)

    other, other_optimizer = made(seed=1)
    assert load_checkpoint(paths(tmp_path), other, other_optimizer) == {"step": 3}
    restore_rng(tmp_path / "rng.safetensors")
    steps(other, other_optimizer, 2)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_moments_are_in_8_bits_but_those_of_embeddings_and_small_tensors() -> None:
    model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64))
    optimizer = adamw_8bit(model, 0.1)
    model(torch.tensor([3, 4])).square().mean().backward()
    optimizer.step()
    dtypes = {
        name: {optimizer.state[parameter][key].dtype for key in ("state1", "state2")}
        for name, parameter in model.named_parameters()
    }
    float32, eight = {torch.float32}, {torch.uint8}
    assert dtypes == {"0.weight": float32, "1.weight": eight, "1.bias": float32}


def test_only_trained_parameters_are_written(tmp_path: Path) -> None:
    model, _ = model_and_optimizer(seed=0)
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(trainable(model).values(), lr=0.1, fused=True)
    steps(model, optimizer, 1)
    save_checkpoint(tmp_path, model, optimizer, {})
    from safetensors import safe_open

    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["2.bias", "2.weight"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer(seed=0)
    steps(model, optimizer, 1)
    save_checkpoint(tmp_path, model, optimizer, {})
    other = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"parameters differ from the model's: \['2\.bias'"):
        load_checkpoint(paths(tmp_path), other, torch.optim.AdamW(other.parameters()))
