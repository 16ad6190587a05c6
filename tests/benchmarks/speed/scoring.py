"""Scoring pairs and groups of responses, beside TRL's way and the machine's peak."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sera_core.models.logprobs import plain_sequence_logps, sequence_logps
from sera_core.models.policies import load_tokenizer
from tests.benchmarks.speed.data import Bench, Item, multiplications, tokens_of
from tests.benchmarks.speed.peers import trl_scorer
from tests.benchmarks.speed.timing import median_seconds

PLAIN = 16
"""Responses that the plain float32 loop computes too."""


def pairs(bench: Bench, peaks: Mapping[str, float]) -> dict[str, Any]:
    """Both responses of each pair, by dtype."""
    return _measured(bench, peaks, bench.items)


def groups(bench: Bench, peaks: Mapping[str, float], responses: int) -> dict[str, Any]:
    """So many responses to each prompt, by dtype."""
    return _measured(bench, peaks, bench.groups(responses))


def _measured(bench: Bench, peaks: Mapping[str, float], items: Sequence[Item]) -> dict[str, Any]:
    items = list(items)
    truth = plain_sequence_logps(bench.policy("float32"), items[:PLAIN])
    return {dtype: _of(bench, dtype, peaks[dtype], items, truth) for dtype in bench.dtypes}


def _of(bench: Bench, dtype: str, peak: float, items: list[Item], truth: np.ndarray) -> dict[str, Any]:
    model = bench.policy(dtype)
    operations, tokens = multiplications(model, items), tokens_of(items)
    sequence_logps(model, items[:4])  # warm up, and the probe that picks the engine
    size = bench.tokens_per_batch
    ours, found = median_seconds(lambda: sequence_logps(model, items, tokens_per_batch=size))
    score = trl_scorer(model, load_tokenizer(bench.folder))  # from here on the model's forward is TRL's
    score(items[:2])
    theirs, peer = median_seconds(lambda: score(items))
    errors = [float(np.abs(values[:PLAIN] - truth).max()) for values in (found, peer)]
    return {
        "ratio_trl": round(theirs / ours, 3),
        "peak_fraction": round(operations / ours / 1e9 / peak, 3),
        "max_diff_nats": errors[0],
        "diff_ratio_trl": round(errors[0] / errors[1], 3),
        "tokens_per_second": round(tokens / ours),
        "trl_tokens_per_second": round(tokens / theirs),
        "responses": len(items),
    }
