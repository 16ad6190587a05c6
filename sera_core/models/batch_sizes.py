"""Batch sizes that `auto` stands for: fixed on a CPU, on an accelerator what fits into its free memory."""

import math
from collections.abc import Callable, Sequence

from sera_core.config import AUTO, ExecutionConfig, TrainConfig
from sera_core.guards.memory import accelerator_here, device_memory
from sera_core.models.memory_estimate import (
    ModelShape,
    sampling_memory,
    scoring_memory,
    training_memory,
)

SHARE = 0.8
"""Of the free memory; the rest is for what the estimates do not know."""
PAIRS_ON_CPU = 1
"""As fast as more: a CPU has nothing to fill."""
TOKENS_ON_CPU = 2048
RESPONSES_ON_CPU = 32
MOST_TOKENS = 131_072
MOST_RESPONSES = 256


def micro_batch(
    execution: ExecutionConfig,
    train: TrainConfig,
    shape: ModelShape,
    dtype: str,
    tokens: Sequence[int],
    row: int,
    processes: int = 1,
) -> int:
    """Pairs per forward pass in training: the setting, or the largest power of two that fits.

    Args:
        execution: execution settings.
        train: training settings; the most is a process's part of its batch.
        shape: the model.
        dtype: `model.dtype`.
        tokens: tokens of each pair.
        row: tokens of the longest pair.
        processes: number of processes that share a batch.
    """
    device = _device(execution)
    longest = sorted(tokens, reverse=True)

    def needs(pairs: int) -> int:
        recompute = execution.gradient_checkpointing
        shares = processes if execution.shard_weights else 1
        return training_memory(shape, dtype, train, sum(longest[:pairs]), row, recompute, device, shares)

    most = math.ceil(train.batch / processes)
    return _fitting(execution.micro_batch, device, PAIRS_ON_CPU, 1, most, needs)


def tokens_per_batch(execution: ExecutionConfig, shape: ModelShape, dtype: str, row: int) -> int:
    """Tokens per scoring batch: the setting, or the largest power of two that fits.

    Args:
        execution, shape, dtype: as in `micro_batch`.
        row: tokens of the longest prompt with a response.
    """
    device = _device(execution)

    def needs(tokens: int) -> int:
        return scoring_memory(shape, dtype, max(tokens, row), row, device)

    size = execution.tokens_per_batch
    return _fitting(size, device, TOKENS_ON_CPU, TOKENS_ON_CPU, MOST_TOKENS, needs)


def few_tokens(execution: ExecutionConfig) -> int:
    """Tokens per scoring batch where a few responses are scored as a check: the setting, or as on a CPU."""
    size = execution.tokens_per_batch
    return TOKENS_ON_CPU if size == AUTO else int(size)


def sampling_batch(execution: ExecutionConfig, shape: ModelShape, dtype: str, row: int) -> int:
    """Responses that the transformers engine samples at once: the setting, or the most that fit.

    Args:
        execution, shape, dtype: as in `micro_batch`.
        row: tokens of the longest prompt and response.
    """
    device = _device(execution)

    def needs(responses: int) -> int:
        return sampling_memory(shape, dtype, responses, row, device)

    return _fitting(execution.sampling_batch, device, RESPONSES_ON_CPU, 1, MOST_RESPONSES, needs)


def _device(execution: ExecutionConfig) -> str:
    return "cuda" if accelerator_here(execution.device) else "cpu"  # torch is not imported for a CPU


def _fitting(
    setting: int | str, device: str, on_cpu: int, least: int, most: int, needs: Callable[[int], int]
) -> int:
    if setting != AUTO:
        return int(setting)
    if device == "cpu":
        return on_cpu
    size, room = least, SHARE * device_memory(device)[1]
    while 2 * size <= most and needs(2 * size) <= room:
        size *= 2
    return size
