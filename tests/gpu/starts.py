"""Seconds until a step's own work begins in a process of its own, one step after another."""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from sera_core.artifacts.manifest import StepSpec
from sera_core.config import ExecutionConfig
from tasks.engines.fork_server import end_server
from tasks.step_functions import WORK, do_work

STEPS = 4


def step_starts(device: str) -> dict[str, Any]:
    """`first`: with the server's start and imports; `later`: each step after it; `whole`: until it has ended.

    Each step also does a product on the device, so that opening it counts.
    """
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    execution = ExecutionConfig.model_validate({"device": device, "child": "always"})
    begun: list[float] = []
    ended: list[float] = []
    known = WORK["logps"]
    WORK["logps"] = "childwork:multiply"
    try:
        for number in range(STEPS):
            with tempfile.TemporaryDirectory() as store:
                spec = StepSpec(
                    step="logps", version=1, fields={"number": number}, inputs={}, where={"device": device}
                )
                start, told = time.perf_counter(), []
                do_work(store, spec, execution, lambda *_, told=told: told.append(time.perf_counter()))
                begun.append(round(told[0] - start, 2))
                ended.append(round(time.perf_counter() - start, 2))
    finally:
        WORK["logps"] = known
        end_server()
    return {"first": begun[0], "later": begun[1:], "whole": ended[1:]}
