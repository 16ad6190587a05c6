"""How far the losses of a round trained by two processes are from those of one, step by step."""

import tempfile
from pathlib import Path
from typing import Any

from trainable import CPU, Bench

from sera_core.config import TrainConfig

PAIRS = 40
TRAIN = TrainConfig(batch=4, epochs=2, beta=0.2, max_grad_norm=0.5)
FORMS = {"whole_copies": {"processes": 2}, "shared_weights": {"processes": 2, "shard_weights": True}}
"""Settings of each: every process has all weights, or its part of the rows of each."""


def run() -> dict[str, float]:
    """Largest difference of a step's loss from that of one process, in nats: of each form, and of all."""
    with tempfile.TemporaryDirectory(prefix="sera-training-") as folder:
        bench = Bench(Path(folder), PAIRS)
        spec = bench.spec(bench.mixture(), TRAIN)
        alone = CPU.model_copy(update={"micro_batch": 1})
        expected = _losses(bench.log(bench.run(spec, alone)))
        found = {}
        for name, form in FORMS.items():
            two = bench.again(spec, alone.model_copy(update=form), name)
            found[name] = _difference(expected, _losses(bench.log(two, name)))
    return {"loss_max_diff": max(found.values()), **found, "steps": len(expected)}


def _losses(log: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in log]


def _difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
