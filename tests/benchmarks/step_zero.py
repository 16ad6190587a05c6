"""Repeat the first training step under load: how far the margins are from zero, and whether anything moves.

    python -m tests.benchmarks.step_zero [--times 200] [--load 2]

SmolLM2-135M in float32, full fine-tuning, the two longest of the repository's short UltraFeedback pairs.
Start policy and reference are the same; the reference values are scored once, together with other pairs. Each
time the policy is loaded anew, the probe is scored and the step is checked as in a run. The load is processes
that multiply matrices of random sizes, so that threads are interrupted and memory is not as it was.

Prints one line of JSON; exit 1 if a step was refused.
"""

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules
from trainable import CPU
from trainable import Bench as Trainable

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import StepRef, StepSpec
from sera_core.artifacts.step import Attempt, run_step
from sera_core.config import TrainConfig
from sera_core.models.logprobs import sequence_logps
from sera_core.models.model_sources import materialise
from sera_core.models.policies import load_policy
from tasks.engines.start_check import StartDiffersError
from tasks.training import TrainingRun
from tests.benchmarks.speed.__main__ import machine
from tests.benchmarks.speed.data import MODEL, Bench

PAIRS = 2
SCORED_WITH = 10
"""Other pairs that the reference values are scored together with."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Repeat the step; 1 if one was refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.step_zero")
    parser.add_argument("--times", type=int, default=200, help="first steps (default: 200)")
    parser.add_argument("--load", type=int, default=2, help="processes beside them (default: 2)")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Trainable(Path(scratch), policy=lambda folder: materialise(MODEL, folder))
        mixture = _mixture(bench)
        load = [
            multiprocessing.Process(target=_multiply, args=(seed,), daemon=True) for seed in range(args.load)
        ]
        for one in load:
            one.start()
        try:
            found = [_first_step(bench, mixture, number) for number in range(args.times)]
        finally:
            for one in load:
                one.kill()
    steps = [step for step in found if step is not None]
    largest = [step["step0/largest_margin"] for step in steps]
    told = {
        "machine": machine(),
        "steps": len(found),
        "refused": len(found) - len(steps),
        "load": args.load,
        "distinct_margins": len({step["step0/rewards/margins"] for step in steps}),
        "largest_margin": max(largest, default=None),
        "largest_probe": max((step["step0/probe"] for step in steps), default=None),
        "bound": min((step["step0/bound"] for step in steps), default=None),
    }
    print(json.dumps(told))
    return 1 if told["refused"] else 0


def _mixture(bench: Trainable) -> StepRef:
    """The longest pairs with the start policy's log-probabilities, scored among others."""
    rows = Bench(bench.folder / "tiny", pairs=PAIRS + SCORED_WITH).rows
    rows.sort(key=lambda row: -len(row["chosen_ids"]) - len(row["rejected_ids"]))
    items = [(row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    values = sequence_logps(load_policy(bench.folder / "tiny", "float32"), items)
    bench.rows = [
        {
            **row,
            "pair_id": f"{number:016x}",
            "prompt_id": f"{number:016x}",
            "origin": "human",
            "round": 0,
            "ref_chosen_logps": float(values[2 * number]),
            "ref_rejected_logps": float(values[2 * number + 1]),
        }
        for number, row in enumerate(rows[:PAIRS])
    ]

    def work(attempt: Attempt) -> list[str]:
        schema.write_table(schema.from_rows(schema.MIXTURE, bench.rows), attempt.write("mixture.parquet"))
        return ["mixture.parquet"]

    return run_step(bench.store, StepSpec(step="mix", version=1, fields={}, inputs={}), work, CPU).ref


def _first_step(bench: Trainable, mixture: StepRef, number: int) -> dict[str, float] | None:
    """Metrics of one first step; None if it was refused."""
    reached: list[dict[str, float]] = []

    def work(attempt: Attempt) -> list[str]:
        run = TrainingRun(attempt)
        with tempfile.TemporaryDirectory() as scratch:
            run.build(Path(scratch)).train()
        reached.append(run.step0)
        attempt.write("step0.json").write_text(json.dumps(run.step0))
        return ["step0.json"]

    spec = bench.spec(mixture, TrainConfig(method="full", batch=PAIRS, epochs=1), repeat=number)
    try:
        run_step(bench.store, spec, work, CPU)
    except StartDiffersError as error:
        print(f"step {number}: {error}", file=sys.stderr, flush=True)
        return None
    print(f"step {number + 1}: {reached[0]['step0/largest_margin']:.3g} nats", file=sys.stderr, flush=True)
    return reached[0]


def _multiply(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    while True:
        rows, columns = torch.randint(64, 1024, (2,), generator=draw).tolist()
        torch.matmul(torch.randn(rows, columns), torch.randn(columns, rows))


if __name__ == "__main__":
    sys.exit(main())
