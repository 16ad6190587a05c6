"""Sampling with the transformers engine, beside `generate` with the same batch."""

from typing import Any

import torch

from tasks.engines.hf_sampler import HFSampler
from tasks.engines.sampler import Request, Settings
from tests.benchmarks.speed.data import Bench
from tests.benchmarks.speed.timing import median_seconds

RESPONSES = 4
"""Responses to each prompt."""


def sampling(bench: Bench, dtype: str, batches: tuple[int, ...], tokens: int) -> dict[str, Any]:
    """New tokens per second by responses in a batch; a response ends at `tokens` tokens, not before."""
    return {str(batch): _of(bench, dtype, batch, tokens) for batch in batches}


def _of(bench: Bench, dtype: str, batch: int, tokens: int) -> dict[str, float]:
    prompts = [row["prompt_ids"] for row in bench.rows] * batch
    prompts = prompts[: -(-batch // RESPONSES)]
    requests = [
        Request(tuple(prompt), 100 * n + r) for n, prompt in enumerate(prompts) for r in range(RESPONSES)
    ][:batch]
    sampler = HFSampler(bench.folder, dtype=dtype, device=bench.device, batch=batch)
    never = Settings(temperature=1.0, top_p=0.95, max_tokens=tokens, stop_ids=())
    sampler.sample(requests[:1], never)
    ours, found = median_seconds(lambda: sampler.sample(requests, never), 1)
    assert all(len(response.ids) == tokens for response in found)
    sampler.close()
    model = bench.policy(dtype)
    _generated(model, requests[:1], tokens)
    theirs, _ = median_seconds(lambda: _generated(model, requests, tokens), 1)
    return {
        "ratio_generate": round(theirs / ours, 3),
        "tokens_per_second": round(batch * tokens / ours),
        "generate_tokens_per_second": round(batch * tokens / theirs),
    }


@torch.inference_mode()
def _generated(model: Any, requests: list[Request], tokens: int) -> Any:
    width = max(len(request.prompt_ids) for request in requests)
    rows = [[2] * (width - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests]
    kept = [[0] * (width - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests]
    return model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(kept, device=model.device),
        do_sample=True,
        top_p=0.95,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=2,
    )
