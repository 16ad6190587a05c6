"""Training checkpoints without pickles: safetensors for tensors, JSON for numbers.

    weights.safetensors     the trained weights in float32 (of an adapter only the adapter's)
    optimizer.safetensors   the optimizer state, `<parameter>.<name>`: moments and step
    rng.safetensors         states of the random generators
    state.json              step, learning rate, tokens and the log so far

Processes that share the weights by rows each write theirs, in parallel: `weights-00001-of-00002.safetensors`
and `optimizer-00001-of-00002.safetensors`. Nothing is gathered. A reader takes the rows that it keeps from
the files that have them, so any number of processes can go on, with shared weights or not.

Mixture and seed determine the order of the data, so the step is the position in the data.
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sera_core.errors import SeraError
from tasks.engines.ranks import ALONE, Ranks
from tasks.engines.sharded_weights import here, rows_kept

NAMED = 3
"""Maximum number of tensors in an error message."""
SHARED = ("qmap1", "qmap2")
"""Code tables of bitsandbytes: one tensor for all parameters, which safetensors does not write."""


def _name(kind: str, part: Ranks) -> str:
    """The file of weights or moments that one of the processes writes that share them."""
    number = "" if part.count == 1 else f"-{part.rank + 1:05d}-of-{part.count:05d}"
    return f"{kind}{number}.safetensors"


def checkpoint_files(count: int = 1) -> list[str]:
    """Names of all files of a checkpoint that so many processes have written."""
    tensors = [_name(kind, Ranks(rank, count)) for kind in ("weights", "optimizer") for rank in range(count)]
    return [*tensors, "rng.safetensors", "state.json"]


FILES = tuple(checkpoint_files())


def save_checkpoint(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    part: Ranks = ALONE,
) -> None:
    """Write a checkpoint into a folder.

    Args:
        folder: where.
        parameters: those of `TrainedWeights.named`.
        optimizer: theirs.
        state: see the file of this name; written by the first process only, as the generators' states are.
        part: this process among those that share the weights, each of which writes its rows.
    """
    moments = {
        f"{name}.{key}": value.clone() if key in SHARED else torch.as_tensor(value)  # step may be an int
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    _save(parameters, folder / _name("weights", part))
    _save(moments, folder / _name("optimizer", part))
    if part.first:
        _save(rng_states(), folder / "rng.safetensors")
        (folder / "state.json").write_text(json.dumps(state, indent=1, sort_keys=True) + "\n")


def load_checkpoint(
    paths: Mapping[str, Path], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore weights and optimizer state; returns `state`. For the random generators see `restore_rng`."""
    with ExitStack() as files, torch.no_grad():
        weights, moments = (_Rows(paths, kind, files) for kind in ("weights", "optimizer"))
        if weights.names != set(parameters):
            odd = sorted(weights.names ^ set(parameters))
            raise ValueError(
                f"checkpoint {weights.first}: its parameters differ from the model's: {odd[:3]} …"
            )
        for name, parameter in parameters.items():
            here(parameter).copy_(weights.read(name, rows_kept(parameter)))
        for key in sorted(moments.names):
            name, entry = key.rsplit(".", 1)
            _restore(optimizer.state[parameters[name]], entry, parameters[name], moments, key)
    return json.loads(paths["state.json"].read_text())


def _restore(state: dict[str, Any], entry: str, parameter: nn.Parameter, stored: "_Rows", key: str) -> None:
    """Set one entry of a parameter's optimizer state."""
    value = stored.read(key, rows_kept(parameter)).to(parameter.device)
    if value.dtype == torch.int64:
        state[entry] = int(value)
    elif value.ndim and here(parameter) is not parameter:
        state[entry] = torch.zeros_like(parameter)  # sharded as the parameter is
        here(state[entry]).copy_(value)
    else:
        state[entry] = value


class _Rows:
    """Tensors of one kind in a checkpoint, each in one file or by rows in several."""

    def __init__(self, paths: Mapping[str, Path], kind: str, opened: ExitStack) -> None:
        names = sorted(name for name in paths if name.startswith(kind))
        self.first = paths[names[0]]
        self.files: list[Any] = [opened.enter_context(safe_open(paths[name], "pt")) for name in names]
        self.names = set(self.files[0].keys())

    def read(self, name: str, rows: slice) -> Tensor:
        """These rows of a tensor; of a number itself."""
        parts, at, found = [file.get_slice(name) for file in self.files], 0, []
        if not parts[0].get_shape():
            return self.files[0].get_tensor(name)
        for part in parts:
            count = part.get_shape()[0]
            first, end = max(rows.start - at, 0), min(rows.stop - at, count)
            if first < end:
                found.append(part[first:end])
            at += count
        return torch.cat(found) if found else parts[0][:0]


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
    odd = [name for name, parameter in parameters.items() if not torch.isfinite(here(parameter)).all()]
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
    save_file({name: here(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}, path)
