"""A Llama of any size with random weights, and preference pairs of random tokens as long as real ones."""

from functools import cached_property
from pathlib import Path

import tiny
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from sera_core.data.parsing import parse_pair
from sera_core.data.sources import read_rows
from tests.benchmarks.speed.data import PAIRS, Bench

TOKENS_PER_CHARACTER = 0.25


def random_policy(folder: Path, hidden: int, layers: int, heads: int, vocabulary: int = 49_152) -> Path:
    """Write a policy folder; the weights are in bfloat16."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.to(torch.bfloat16).save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder


class RandomBench(Bench):
    """Random token ids in place of the words, so that no tokenizer is needed."""

    @cached_property
    def rows(self) -> list[dict[str, list[int]]]:
        """Token ids of the pairs, as a trainer takes them."""
        draw, rows = torch.Generator().manual_seed(0), []
        for row in read_rows(PAIRS)[: self.pairs]:
            pair = parse_pair(row)
            texts = {"prompt_ids": pair.prompt, "chosen_ids": pair.chosen, "rejected_ids": pair.rejected}
            lengths = {name: 1 + int(len(str(text)) * TOKENS_PER_CHARACTER) for name, text in texts.items()}
            rows.append(
                {
                    name: torch.randint(10, self.vocabulary, (length,), generator=draw).tolist()
                    for name, length in lengths.items()
                }
            )
        return rows
