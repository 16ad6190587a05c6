"""Convert a llama GGUF file to a policy folder: float32 weights, tokenizer rebuilt from the metadata.

Uses only the `gguf` package (no torch, no transformers): one pass over the file, a few seconds for 135 M
parameters. Undoes llama.cpp's changes: query and key rows are put back into the order of transformers' rotary
embedding, and float32 metadata gets its shortest decimal form (1e-5, not 9.99…e-06).
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sera_core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader

_CONTROL, _USER_DEFINED = (
    3,
    4,
)  # llama.cpp's token types: special tokens, and added tokens that are not special
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r")  # pre-tokenizers that split digits one by one
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_gguf_policy(path: Path, folder: Path) -> None:
    """Write config.json, generation_config.json, model.safetensors, tokenizer files and chat_template.jinja.

    Args:
        path: a GGUF file of architecture `llama` with a byte-level BPE (`gpt2`) tokenizer.
        folder: an existing folder.

    Raises:
        InputError: another architecture or tokenizer, or no chat template.
    """
    from safetensors.numpy import save_file

    reader = gguf_reader(path)
    architecture, tokenizer = _field(reader, "general.architecture"), _field(reader, "tokenizer.ggml.model")
    pre_tokenizer = _field(reader, "tokenizer.ggml.pre", "default")
    if (
        architecture != "llama"
        or tokenizer != "gpt2"
        or pre_tokenizer not in (*_DIGITS_APART, "default", "gpt-2")
    ):
        raise InputError(
            f"GGUF file {path.name} has architecture {architecture!r}, tokenizer {tokenizer!r} "
            f"({pre_tokenizer!r}); only "
            "llama with a gpt2 or smollm tokenizer is read: give the model as safetensors (hub id or "
            "folder) instead."
        )
    config = _config(reader)
    save_file(_tensors(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", {"_from_model_config": True} | ids)
    _write_tokenizer(reader, folder)


def gguf_reader(path: Path) -> GGUFReader:
    """The file's reader. Reading a vocabulary takes seconds, so the last is kept."""
    found = path.stat()
    return _kept_reader(path, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=1)
def _kept_reader(path: Path, mtime: int, size: int) -> GGUFReader:
    from gguf import GGUFReader

    return GGUFReader(path)


def _field(reader: GGUFReader, name: str, default: Any = None) -> Any:
    field = reader.get_field(name)
    return default if field is None else field.contents()


def _short(value: float) -> float:
    """The shortest decimal that rounds to the same float32."""
    import numpy as np

    return float(str(np.float32(value)))


def _config(reader: GGUFReader) -> dict[str, Any]:
    """The transformers config of a llama GGUF file."""

    def number(name: str) -> Any:
        return _field(reader, f"llama.{name}")

    heads, hidden = number("attention.head_count"), number("embedding_length")
    eos = _field(reader, "tokenizer.ggml.eos_token_id")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "head_dim": number("rope.dimension_count") or hidden // heads,
        "initializer_range": 0.02,
        "intermediate_size": number("feed_forward_length"),
        "max_position_embeddings": number("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": number("block_count"),
        "num_key_value_heads": number("attention.head_count_kv") or heads,
        "pretraining_tp": 1,
        "rms_norm_eps": _short(number("attention.layer_norm_rms_epsilon")),
        "rope_parameters": {
            "rope_theta": _short(number("rope.freq_base") or 10000.0),
            "rope_type": "default",
        },
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "use_cache": True,
        "vocab_size": len(_field(reader, "tokenizer.ggml.tokens")),
        "bos_token_id": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": _field(reader, "tokenizer.ggml.padding_token_id", eos),
    }


def _tensors(reader: GGUFReader, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """All weights in float32 under transformers' names."""
    from gguf.quants import dequantize

    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=False)
        if tensor.name in _WHOLE:
            tensors[_WHOLE[tensor.name]] = weight
            continue
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if block is None or block[2] not in _BLOCK:
            raise InputError(
                f"GGUF tensor {tensor.name!r} is unknown for a llama model: use the model as safetensors."
            )
        if block[2] in heads:
            weight = rotary_order(weight, heads[block[2]])
        tensors[f"model.layers.{block[1]}.{_BLOCK[block[2]]}.weight"] = weight
    return tensors


def rotary_order(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's interleaving of each head's two halves; weight is [heads · head_dim, hidden]."""
    import numpy as np

    rows, columns = weight.shape
    halves = weight.reshape(heads, rows // heads // 2, 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _write_tokenizer(reader: GGUFReader, folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = _field(reader, "tokenizer.ggml.tokens"), _field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(
        models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    )
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = _field(reader, "tokenizer.ggml.pre") in _DIGITS_APART
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level]) if apart else byte_level
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        (token, kind) for token, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token, kind in added if kind == _CONTROL]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in added if kind == _USER_DEFINED]
    )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")

    template = _field(reader, "tokenizer.chat_template")
    if template is None:
        raise InputError(
            "the GGUF file has no chat template: use the model as safetensors (hub id or folder) instead."
        )
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    eos = _field(reader, "tokenizer.ggml.eos_token_id")
    special = {
        "bos_token": _field(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token": eos,
        "pad_token": _field(reader, "tokenizer.ggml.padding_token_id", eos),
        "unk_token": _field(reader, "tokenizer.ggml.unknown_token_id"),
    }
    config = {name: tokens[index] for name, index in special.items() if index is not None}
    limit = _field(reader, "llama.context_length")
    fixed = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", config | fixed | {"model_max_length": limit})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
