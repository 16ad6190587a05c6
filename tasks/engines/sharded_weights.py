"""Weights, gradients and moments in rows over the processes that train together: torch's `fully_shard`.

Each process keeps a part of the rows of every tensor (FSDP2; ZeRO's third stage, arXiv 1910.02054). A layer's
weights are gathered for its forward and its backward pass and given up after each; its gradient is added up
over the processes, and each keeps that of its own rows. The optimizer changes these rows.

`fully_shard` is applied here and not by the trainer's plug-in, which on a CPU trains whole copies instead and
does not say so; that it took effect is asserted.
"""

import contextlib
import ctypes
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from sera_core.errors import InputError
from sera_core.models.architecture import architecture, rope_boundary, text_config
from tasks.engines.ranks import Ranks
from tasks.engines.trained_weights import TrainedWeights

M_MMAP_THRESHOLD, MMAP_BYTES = -3, 2**18
"""glibc's malloc.h, and the size from which it uses mmap."""
LEFT_OUT = "set execution.shard_weights = false"


def own_rows(rows: int, rank: int, count: int) -> tuple[int, int]:
    """(first, behind the last) of the rows of a tensor that one of `count` processes keeps."""
    size = math.ceil(rows / count)
    return min(rank * size, rows), min((rank + 1) * size, rows)


def here(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this process keeps: all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def rows_kept(tensor: Tensor) -> slice:
    """Which rows of a tensor `here` gives."""
    if not isinstance(tensor, DTensor):
        return slice(0, sys.maxsize)
    mesh = tensor.device_mesh
    return slice(*own_rows(len(tensor), mesh.get_local_rank(), mesh.size()))


class ShardedWeights(TrainedWeights):
    """The weights by the model's names, of each the rows of this process, in float32.

    A bfloat16 model that trains all its weights becomes float32 and is rounded where a layer is gathered, so
    it computes with the same values as one with float32 copies beside it.
    """

    sharded = True

    def __init__(
        self,
        model: nn.Module,
        transformer: Any,
        ranks: Ranks,
        device: str,
        exact: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        """Shard a model that all processes hold whole.

        Args:
            model: what the trainer calls: a transformer, or an adapter around it.
            transformer: the causal language model inside.
            ranks: the processes.
            device: "cpu", or "cuda".
            exact: gives the float32 values of a bfloat16 model's weights; only the first process asks.

        Raises:
            InputError: the model cannot be sharded.
        """
        self.ranks, parts = ranks, (*blocks_of(transformer), model)
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        values: Mapping[str, Tensor] = {}
        if exact is not None:
            _refuse_mixed(transformer)
            values = exact() if ranks.first else {}
            policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        if device == "cpu":
            _give_back_freed_memory()
        mesh = init_device_mesh(device, (ranks.count,))
        for part in parts:
            if exact is not None:
                for parameter in _whole(part):
                    parameter.data = _from_first(values.get(names[id(parameter)]), parameter)
            sharded = fully_shard(part, mesh=mesh, mp_policy=policy)
            sharded.set_gradient_divide_factor(1.0)  # a loss is weighted by its share of the batch already
            sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction with a factor
        assert_sharded(model, ranks)
        super().__init__(model)

    def clip(self, norm: float) -> Tensor:
        """Clip the gradient of all weights, over all processes, to a norm; returns its norm before."""
        total = super().clip(norm)
        assert isinstance(total, DTensor)
        return total.full_tensor()

    def whole(self, model: nn.Module) -> dict[str, Tensor]:
        """What `save_policy` writes, gathered tensor by tensor; empty in all processes but the first."""
        adapter, found, seen = hasattr(model, "peft_config"), {}, {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if adapter and not parameter.requires_grad:
                continue
            if id(parameter) not in seen:  # a tied weight is gathered once
                assert isinstance(parameter, DTensor)
                gathered = parameter.full_tensor().detach()
                seen[id(parameter)] = gathered.cpu() if self.ranks.first else None
            if self.ranks.first:
                found[name] = seen[id(parameter)]
        if self.ranks.first and not adapter:
            parameters = dict(model.named_parameters(remove_duplicate=False))
            state = model.state_dict()
            found |= {name: value for name, value in state.items() if name not in parameters}
        return found


def blocks_of(transformer: Any) -> list[nn.Module]:
    """The layers of a transformer, which are sharded one by one.

    Raises:
        InputError: they cannot be told apart.
    """
    count = text_config(transformer).num_hidden_layers
    lists = [part for part in transformer.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    found = [parameter for layer in lists[0] for parameter in layer.parameters()] if lists else []
    if len({id(parameter) for parameter in found}) != len(found) or not found:
        raise InputError(
            f"execution.shard_weights = true: {architecture(transformer)} has no list of {count} layers with "
            f"weights of their own, so it cannot be sharded by layers; {LEFT_OUT}"
        )
    return list(lists[0])


def refuse_uneven_passes(transformer: Any, share: bool) -> None:
    """Refuse a model that computes a batch in a number of passes that depends on its lengths.

    All processes must gather a layer equally often.

    Args:
        transformer: a causal language model.
        share: whether a pair's responses share one row, and so one pass.

    Raises:
        InputError: it is such a model.
    """
    boundary = rope_boundary(transformer)
    if boundary is not None and not share:
        raise InputError(
            f"execution.shard_weights = true: {architecture(transformer)} computes responses beyond "
            f"{boundary} tokens in passes of their own, but all processes need equally many passes; "
            f"{LEFT_OUT}"
        )


def assert_sharded(model: nn.Module, ranks: Ranks) -> None:
    """Assert that every parameter is sharded by rows, and that this process keeps its part and no more."""
    held = expected = total = 0
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), f"{name} is not sharded"
        assert tuple(parameter.placements) == (Shard(0),), f"{name} is placed as {parameter.placements}"
        first, end = own_rows(len(parameter), ranks.rank, ranks.count)
        held += parameter.to_local().numel()
        expected += (end - first) * (parameter.numel() // max(1, len(parameter)))
        total += parameter.numel()
    assert held == expected, f"{held} of {total} weights are here instead of {expected}"
    everywhere = torch.tensor(held)
    dist.all_reduce(everywhere)
    assert everywhere.item() == total, f"{ranks.count} processes hold {everywhere} weights of {total}"


def _give_back_freed_memory() -> None:
    """Have glibc allocate large blocks by mmap, so that a layer's weights leave the process when given up.

    Otherwise glibc raises its threshold to 32 MiB and keeps them in a heap that fragments: 1 GiB more for a
    model of 135 million parameters.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


def _whole(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that are not sharded yet."""
    return (parameter for parameter in module.parameters() if not isinstance(parameter, DTensor))


def _from_first(value: Tensor | None, parameter: Tensor) -> Tensor:
    """A float32 value that only the first process has, in all of them."""
    like = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    if value is not None:
        like.copy_(value)
    dist.broadcast(like, src=0)
    return like


def _refuse_mixed(transformer: Any) -> None:
    """Refuse a bfloat16 model that keeps some weights in float32: the rest of a layer is gathered rounded."""
    kept = [name for name, p in transformer.named_parameters() if p.dtype != torch.bfloat16]
    if kept:
        raise InputError(
            f"execution.shard_weights = true: {architecture(transformer)} keeps weights in float32 beside "
            f"bfloat16 ones ({kept[0]}), which cannot be sharded together; {LEFT_OUT}, or model.dtype = "
            '"float32"'
        )
