"""A tiny random Llama policy folder: the model every fast test uses.

    folder = tiny_policy(tmp_path / "policy")   # 2 layers, hidden 64, vocabulary 512, 512 positions

head_dim is 32, the smallest that vLLM's CPU attention takes. The same arguments give the same bytes.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 512
SENTENCES = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "A good answer is short, clear and correct; a bad answer is long, vague and wrong.",
    "user assistant system: please write a short story about a small boat on a large lake.",
    "Here are three steps: first, heat the water; second, add the tea; third, wait for 4 minutes.",
    "I think that the film was wonderful, although the ending was a little too long for me.",
    "What is 12 + 30? The sum of twelve and thirty is forty-two, which is 42 in digits.",
    "Prefer the response that helps the person, and reject the response that does not.",
)


def tiny_policy(
    folder: Path | str,
    seed: int = 0,
    *,
    layers: int = 2,
    hidden: int = 64,
    positions: int = 512,
    dtype: str = "float32",
    template: str | None = CHATML,
    scale: float = 0.2,
) -> Path:
    """Write config, safetensors, a byte-level BPE tokenizer and a ChatML template; return the folder.

    Args:
        folder: created if absent.
        seed: of the weights.
        layers: number of transformer layers.
        hidden: hidden size, a multiple of 32.
        positions: largest number of positions.
        dtype: of the weights on disk.
        template: chat template, None for a model without one.
        scale: standard deviation of the initial weights; large enough that log-probabilities differ by nats.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=positions,
        initializer_range=scale,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    write_tokenizer(folder, template)
    return folder


def write_tokenizer(folder: Path | str, template: str | None = CHATML) -> None:
    """Write tokenizer.json, tokenizer_config.json and, unless it is None, chat_template.jinja."""
    folder = Path(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json(), encoding="utf-8")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, sort_keys=True), encoding="utf-8"
    )
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


@lru_cache(maxsize=1)
def tokenizer_json() -> str:
    """A byte-level BPE tokenizer trained on `SENTENCES`, at most `VOCAB_SIZE` entries, as its JSON file."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer=trainer)
    return tokenizer.to_str(pretty=True)


def tiny_reward_model(folder: Path) -> Path:
    """A random Llama with one score, on the tiny tokenizer."""
    import torch
    from transformers import LlamaForSequenceClassification

    from sera_core.models.policies import load_policy

    tiny_policy(folder, layers=1, hidden=32)
    config = load_policy(folder).config
    config.num_labels = 1
    torch.manual_seed(0)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder
