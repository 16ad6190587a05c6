"""A round trained by two processes: the steps of one process, and what happens when one of them dies."""

import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from trainable import CPU, Bench

from sera_core.artifacts.manifest import StepRecord
from sera_core.config import TrainConfig
from sera_core.errors import SeraError

pytestmark = pytest.mark.slow
TRAIN = TrainConfig(batch=3, epochs=2, beta=0.2, max_grad_norm=0.5)
"""Of 10 pairs: batches of 3 for two processes, and a last one of 2."""
ALONE = CPU.model_copy(update={"micro_batch": 1})
TWO = ALONE.model_copy(update={"processes": 2})
RATE = 1e-4


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def alone(bench: Bench) -> StepRecord:
    return bench.run(bench.spec(bench.mixture(), TRAIN, rate=RATE), ALONE)


def test_two_processes_take_the_steps_of_one(bench: Bench, alone: StepRecord) -> None:
    two = bench.again(bench.spec(bench.mixture(), TRAIN, rate=RATE), TWO, name="two")
    print(two)
