"""The processes that train a round together: what each computes, and how they add up their results.

Every process reads the same global batch and computes its share of the batch's micro-batches. The sums of
gradients and the values of the pairs are then added over the processes, so that each of them takes the same
step as one process alone would, up to the order in which numbers are added. Every process has the whole
model, or its rows of it (`sharded_weights`).

Torch's DistributedDataParallel is not used: it averages over processes, adds up in every backward pass, and
wants equally many passes in each of them; here a loss is a mean over the pairs of the batch, and a batch that
cannot be divided gives some process a pass more.
"""

import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sera_core.errors import SeraError

LONGEST = timedelta(hours=2)
"""Longest wait for another process: the first one may upload a checkpoint meanwhile."""
LOOPBACK = ("lo", "lo0")


@dataclass(frozen=True)
class Ranks:
    """One of `count` processes, by its `rank` from 0."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes, logs and reports for all."""
        return self.rank == 0

    def share(self, micros: Sequence[Any]) -> Sequence[Any]:
        """The micro-batches of a global batch that this process computes; they are sorted by length."""
        return micros[self.rank :: self.count]

    def passes(self, micros: Sequence[Any]) -> int:
        """The most micro-batches of a global batch that any process computes."""
        return math.ceil(len(micros) / self.count)

    def wait(self) -> None:
        """Until all processes are here."""
        dist.barrier()

    @torch.no_grad()
    def add_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes; one that no process has stays without."""
        if self.count == 1:
            return
        has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        dist.all_reduce(has, op=dist.ReduceOp.MAX)
        waiting = []
        for parameter, present in zip(parameters, has.tolist(), strict=True):
            if not present:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            waiting.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in waiting:
            work.wait()

    def whole(
        self, sizes: Sequence[int], names: Sequence[str], parts: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The values of all pairs of a global batch, each [pair], in the order of the micro-batches.

        `row` is a whole number, all others are float64.

        Args:
            sizes: pairs in each micro-batch.
            names: names of the values.
            parts: values of this process's micro-batches, each [pair].
        """
        table = torch.zeros(len(names), sum(sizes), dtype=torch.float64)
        slots = self.share(table.split(list(sizes), dim=1))
        for slot, part in zip(slots, parts, strict=True):
            slot.copy_(torch.stack([part[name].double().cpu() for name in names]))
        dist.all_reduce(table)  # exact: all but one process have zero there
        return {name: v.long() if name == "row" else v for name, v in zip(names, table, strict=True)}

    @torch.no_grad()
    def refuse_apart(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Check that all processes hold the same weights, bit by bit.

        Args:
            parameters: the trained weights, float32.
            step: number of updates so far.

        Raises:
            SeraError: they differ, so something is wrong with a process or its device.
        """
        if self.count == 1:
            return
        sums = [values.detach().view(torch.int32).sum(dtype=torch.int64) for values in parameters.values()]
        ours = torch.cat([torch.tensor([step]), torch.stack(sums).cpu()])
        least, most = ours.clone(), ours.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        if not torch.equal(least, most):
            odd = [
                name for name, same in zip(parameters, (least == most)[1:].tolist(), strict=True) if not same
            ]
            raise SeraError(
                f"after {step} steps the {self.count} processes do not hold the same weights ({odd[:3]}); "
                "nothing more is written: run the same command again to continue from the last checkpoint, "
                "or with execution.processes = 1"
            )


ALONE = Ranks()


def meet(file: Path, rank: int, count: int, device: str) -> Ranks:
    """Join the other processes of a training.

    Args:
        file: a path that all of them know, and where no file is yet.
        rank: number of this process, from 0.
        count: number of processes.
        device: "cpu", or "cuda": the only visible device of this process.
    """
    names = [name for _, name in socket.if_nameindex() if name in LOOPBACK]
    if names:  # nothing leaves the machine, whatever its name resolves to
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
    dist.init_process_group(
        "gloo" if device == "cpu" else f"cpu:gloo,{device}:nccl",
        init_method=f"file://{file}",
        rank=rank,
        world_size=count,
        timeout=LONGEST,
    )
    assert (dist.get_rank(), dist.get_world_size()) == (rank, count), "not the processes that were started"
    return Ranks(rank, count)


def part() -> None:
    """Leave the other processes, at the end of a training."""
    dist.destroy_process_group()
