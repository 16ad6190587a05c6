"""Train a small chat model from scratch on texts: the start policy of the laboratory."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sera_core.artifacts.step import Attempt

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML."""
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>")
PAD, END = 0, 2
"""Token ids of the first and the last of them."""
IGNORED = -100
"""Label of a token that the loss leaves out."""


@dataclass(frozen=True)
class Recipe:
    """Size and training of the model: 2.3 M parameters with these values, which are ours."""

    vocabulary: int = 3000
    hidden: int = 192
    layers: int = 4
    heads: int = 6
    intermediate: int = 512
    epochs: int = 6
    batch: int = 32
    learning_rate: float = 1e-3
    warmup: float = 0.05
    seed: int = 0


def base_model(prompts: Sequence[str], texts: Sequence[str]) -> Callable[[Attempt], list[str]]:
    """The work of the step `base`: model/, a model that answers any of the prompts with one of the texts.

    The step's fields hold the recipe and the sha256 of prompts and texts.
    """

    def work(attempt: Attempt) -> list[str]:
        folder = attempt.write("model/config.json").parent
        recipe = Recipe(**attempt.fields["recipe"])
        loss = train_base_model(prompts, texts, folder, recipe, attempt.progress)
        attempt.metrics["train_loss"] = round(loss, 4)
        return [f"model/{path.name}" for path in sorted(folder.iterdir())]

    return work


def train_base_model(
    prompts: Sequence[str],
    texts: Sequence[str],
    folder: Path,
    recipe: Recipe,
    progress: Callable[[int, int, str], None],
) -> float:
    """Train a model to answer any prompt with one of the texts, and save it with its tokenizer.

    On one CPU process equal inputs give equal bytes.

    Args:
        prompts: user turns; each text follows a random one.
        texts: answers, one sequence each.
        folder: where config.json, model.safetensors and the tokenizer go.
        recipe: size and training.
        progress: called with (steps done, all steps, "steps").

    Returns:
        Loss of the last batch, nats per token.
    """
    tokenizer = _tokenizer([*prompts, *texts], recipe.vocabulary)
    draw = random.Random(recipe.seed)
    torch.manual_seed(recipe.seed)
    model = _model(tokenizer, recipe)
    steps = recipe.epochs * -(-len(texts) // recipe.batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps, recipe.warmup))
    done, last = 0, float("nan")
    for _ in range(recipe.epochs):
        order = draw.sample(range(len(texts)), len(texts))
        for start in range(0, len(order), recipe.batch):
            chosen = order[start : start + recipe.batch]
            rows = [_row(tokenizer, draw.choice(prompts), texts[at]) for at in chosen]
            loss = model(**_batch(rows)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            done, last = done + 1, float(loss.detach())
            progress(done, steps, "steps")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return last


def _model(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            intermediate_size=recipe.intermediate,
            tie_word_embeddings=True,
            max_position_embeddings=1024,
            pad_token_id=PAD,
            eos_token_id=END,
            bos_token_id=None,
        )
    )


def _rate(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up, then linear decay to 0."""
    ramp = max(1, round(warmup * steps))
    return min((step + 1) / ramp, (steps - step) / max(1, steps - ramp))


def _tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with a chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|im_end|>", model_max_length=1024
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def _row(tokenizer: PreTrainedTokenizerFast, prompt: str, text: str) -> tuple[list[int], list[int]]:
    """Token ids and labels: the loss is on the answer and its end token."""
    asked = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    before = tokenizer(asked, add_special_tokens=False)["input_ids"]
    answer = tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"]
    return before + answer, [IGNORED] * len(before) + answer


def _batch(rows: Sequence[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = [ids + [PAD] * (longest - len(ids)) for ids, _ in rows]
    labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in rows]
    mask = [[1] * len(i) + [0] * (longest - len(i)) for i, _ in rows]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
    }
