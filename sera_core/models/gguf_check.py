"""Is a GGUF file the policy it was written from? Read back, and compared on real texts.

Two questions, each about the file alone: does its tokenizer give the policy's ids, and does a model with its
weights and settings give the policy's log-probabilities?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sera_core.errors import InputError, SeraError
from sera_core.models.gguf import gguf_reader, rotary_order
from sera_core.models.gguf_tokenizer import read_tokenizer
from sera_core.models.gguf_writing import FileType

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LARGEST_MEAN: dict[FileType, float] = {"f32": 0.001, "f16": 0.01, "bf16": 0.1, "q8_0": 0.25}
"""Largest mean difference of a token's log-probability that is rounding, in nats. A file with a mistake in it
(rows in another order, another rotary base) is off by more than a nat."""
PROBES = (
    "It's 2026, isn't it?  WE'LL see:\n\n\tdef f(x_1): return 3.14159 * x_1  # 1,234,567\r\n",
    "Ünïcödé naïve café — 漢字かな 한국어 русский العربية हिन्दी 👩‍🚀🇫🇷 «quoted» …",
    " leading and trailing spaces   ",
)
"""Texts on which tokenizers tend to differ."""


class Difference(NamedTuple):
    """Log-probabilities of a file against its policy's, in nats per token."""

    mean: float
    largest: float
    tokens: int


class Refused(SeraError):
    """A file that is not the policy it was written from."""


def load_gguf(path: Path) -> PreTrainedModel:
    """The model in a GGUF file, in float32, with the settings in its metadata.

    transformers' own reader would read the vocabulary three times, which takes minutes for a large one.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from sera_core.models.policies import quiet_transformers

    reader = gguf_reader(path)
    config = _config(reader)
    with quiet_transformers():
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
        state = _state(reader, config, empty.state_dict())
        model: Any = type(empty).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    _divide_frequencies(model, reader)
    return model.eval()


def check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> int:
    """The number of texts that the file's tokenizer and the policy's give the same ids.

    Raises:
        Refused: a text has other ids.
    """
    import unicodedata

    backend: Any = tokenizer
    own, read = backend.backend_tokenizer, read_tokenizer(gguf_reader(path))
    seen = list(dict.fromkeys(unicodedata.normalize("NFC", text) for text in (*PROBES, *texts) if text))
    for text in seen:
        ids, found = (one.encode(text, add_special_tokens=False).ids for one in (own, read))
        if ids != found:
            at = next((n for n, pair in enumerate(zip(ids, found, strict=False)) if pair[0] != pair[1]), -1)
            raise Refused(
                f"the GGUF tokenizer gives other ids than the policy's for {text[:60]!r} (token {at}: "
                f"{found[at : at + 3]}, not {ids[at : at + 3]}); the file is not written"
            )
    return len(seen)


def compare_logps(
    expected: Sequence[np.ndarray], found: Sequence[np.ndarray], file_type: FileType
) -> Difference:
    """The difference of log-probabilities, one array [response token] for each response.

    Raises:
        Refused: it is more than rounding to this type.
    """
    apart = np.abs(np.concatenate(list(expected)) - np.concatenate(list(found)))
    if not len(apart):
        raise InputError("no text to compare a GGUF file's log-probabilities on")
    difference = Difference(float(apart.mean()), float(apart.max()), len(apart))
    if not difference.mean <= LARGEST_MEAN[file_type]:
        raise Refused(
            f"the GGUF file's log-probabilities are {difference.mean:.3g} nats a token from the policy's, "
            f"more than {LARGEST_MEAN[file_type]:g} of rounding to {file_type}; the file is not written"
        )
    return difference


def _config(reader: GGUFReader) -> PreTrainedConfig:
    """transformers' configuration, from nothing but the file's metadata."""
    from transformers import AutoConfig

    architecture = reader.fields["general.architecture"].contents()

    def field(name: str) -> Any:
        found = reader.get_field(f"{architecture}.{name}")
        return None if found is None else found.contents()

    rope = {"rope_type": "default", "rope_theta": field("rope.freq_base")}
    if (kind := field("rope.scaling.type")) is not None:
        rope |= {"rope_type": kind, "factor": field("rope.scaling.factor")}
    return AutoConfig.for_model(
        architecture,
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        head_dim=field("attention.key_length"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters=rope,
        vocab_size=field("vocab_size"),
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
    )


def _state(reader: GGUFReader, config: Any, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Every weight that the model wants, float32, with the rows that llama.cpp interleaves put back.

    Raises:
        Refused: the file has no tensor for one of them.
    """
    import gguf
    import torch
    from gguf.quants import dequantize

    heads = {".attn_q.": config.num_attention_heads, ".attn_k.": config.num_key_value_heads}
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    held = {tensor.name: tensor for tensor in reader.tensors}
    state = {}
    for name in wanted:
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        tensor = held.get(names.get_name(name, try_suffixes=(".weight", ".bias")) or "")
        if tensor is None:
            raise Refused(f"the GGUF file has no tensor for {name!r}; the file is not written")
        weight = dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=False)
        own = next((count for part, count in heads.items() if part in tensor.name), None)
        if config.model_type == "llama" and own is not None:
            weight = rotary_order(weight, own)
        state[name] = torch.from_numpy(np.array(weight))
    return state


def _divide_frequencies(model: Any, reader: GGUFReader) -> None:
    """Divide the rotary frequencies by the file's `rope_freqs.weight`, as llama.cpp does."""
    import torch

    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            rotary = model.model.rotary_emb
            rotary.inv_freq = rotary.inv_freq / torch.from_numpy(np.array(tensor.data))
