"""Training checkpoints without pickles: safetensors for tensors, JSON for numbers.

    weights.safetensors     the trained weights in float32 (of an adapter only the adapter's)
    optimizer.safetensors   the optimizer state, `<parameter>.<name>`: moments and step
    rng.safetensors         states of the random generators
    state.json              step, learning rate, tokens and the log so far

Mixture and seed determine the order of the data, so the step is the position in the data.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sera_core.errors import SeraError

NAMED = 3
"""Maximum number of tensors in an error message."""
SHARED = ("qmap1", "qmap2")
"""Code tables of bitsandbytes: one tensor for all parameters, which safetensors does not write."""
FILES = ("weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")


def save_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
) -> None:
    """Write `FILES` into a folder; the parameters are those of `TrainedWeights.named`."""
    moments = {
        f"{name}.{key}": value.clone() if key in SHARED else torch.as_tensor(value)  # step may be an int
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    _save(parameters, folder / "weights.safetensors")
    _save(moments, folder / "optimizer.safetensors")
    _save(rng_states(), folder / "rng.safetensors")
    (folder / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")


def load_checkpoint(
    paths: Mapping[str, Path], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore weights and optimizer state; returns `state`. For the random generators see `restore_rng`."""
    weights, moments = load_file(paths["weights.safetensors"]), load_file(paths["optimizer.safetensors"])
    if set(weights) != set(parameters):
        odd = sorted(set(weights) ^ set(parameters))
        raise ValueError(
            f"checkpoint {paths['weights.safetensors']}: its parameters differ from the model's: {odd[:3]} …"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for key, value in moments.items():
        name, entry = key.rsplit(".", 1)
        parameter = parameters[name]
        counts = value.dtype == torch.int64
        optimizer.state[parameter][entry] = int(value) if counts else value.to(parameter.device)
    return json.loads(paths["state.json"].read_text())


def refuse_not_finite(
    parameters: Mapping[str, nn.Parameter], step: int, rate: str = "train.learning_rate"
) -> None:
    """Refuse weights that are infinite or NaN after an update.

    The loss is checked before each update, so an error in the last update would otherwise go unnoticed.

    Args:
        parameters: the trained weights.
        step: number of the last update, from 0.
        rate: the setting of the learning rate, for the message.

    Raises:
        SeraError: some trained weights are not finite.
    """
    odd = [name for name, parameter in parameters.items() if not torch.isfinite(parameter).all()]
    if odd:
        more = ", …" if len(odd) > NAMED else ""
        raise SeraError(
            f"after the update of step {step}, weights are not finite in {len(odd)} of {len(parameters)} "
            f"tensors ({', '.join(odd[:NAMED])}{more}); they are not written, and the previous policy "
            f"is kept: lower {rate} and run again"
        )


def rng_states() -> dict[str, Tensor]:
    """States of torch's random generators: CPU and, if there is one, accelerator."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(path: Path) -> None:
    """Set torch's generators to the states in a checkpoint."""
    states = load_file(path)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
