"""Write a policy folder as a GGUF file for llama.cpp: weights, rotary settings, tokenizer, chat template.

Architectures that are written exactly: Llama and Mistral (llama.cpp's `llama`), Qwen2, Qwen2.5 and Qwen3. For
`llama` the rows of query and key weights are interleaved, because llama.cpp rotates neighbouring values where
transformers rotates the two halves of a head. Tensors are read and written one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sera_core.errors import InputError
from sera_core.models.gguf_tokenizer import Vocabulary, add_vocabulary

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

FileType = Literal["f16", "q8_0", "bf16", "f32"]
"""Type of the weight matrices. Vectors (norms, biases) are always float32."""
FILE_TYPES: tuple[FileType, ...] = get_args(FileType)
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""transformers' model types, and llama.cpp's architectures."""
_BLOCK = 32
"""Values that q8_0 rounds with one scale; a row that is no multiple of it is stored as f16."""
_LARGEST_F16 = 65504.0


@dataclass(frozen=True)
class Layout:
    """What a file holds besides the vocabulary."""

    architecture: str
    """llama.cpp's name."""
    config: Any
    """transformers' configuration."""
    tensors: dict[str, str]
    """Each tensor of the policy that is written, and its name in the file."""

    @property
    def head_dim(self) -> int:
        """Values of an attention head."""
        config = self.config
        return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def layout_of(folder: Path) -> Layout:
    """How this policy folder would be written.

    Raises:
        InputError: its architecture, or one of its settings or tensors, is not written; the message names it.
    """
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    name = ARCHITECTURES.get(config.model_type)
    if name is None:
        raise _refused(f"architecture {config.model_type!r} is not written ({', '.join(ARCHITECTURES)} are)")
    _check_settings(config)
    kind = next(kind for kind, text in gguf.MODEL_ARCH_NAMES.items() if text == name)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    found = {}
    for tensor, _ in _shapes(folder):
        if config.tie_word_embeddings and tensor == "lm_head.weight":
            continue
        target = names.get_name(tensor, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise _refused(f"tensor {tensor!r} has no name in llama.cpp's {name}")
        found[tensor] = target
    return Layout(name, config, found)


def write_gguf(
    folder: Path,
    path: Path,
    file_type: FileType,
    vocabulary: Vocabulary,
    chat_template: str,
    about: Mapping[str, str],
) -> None:
    """Write the policy folder as one file.

    Args:
        folder: a policy folder with all weights (not an adapter).
        path: the file to create.
        file_type: type of the weight matrices.
        vocabulary: of the policy's tokenizer.
        chat_template: Jinja text.
        about: further metadata, by key.

    Raises:
        InputError: the policy cannot be written (see `layout_of`), or a weight is too large for f16.
    """
    import gguf

    layout = layout_of(folder)
    writer = gguf.GGUFWriter(path, layout.architecture)
    try:
        _add_config(writer, layout, file_type)
        add_vocabulary(writer, vocabulary)
        writer.add_chat_template(chat_template)
        for key, value in about.items():
            writer.add_string(key, value)
        _add_tensors(writer, layout, folder, file_type)
    finally:
        writer.close()


def rope_factors(config: Any) -> np.ndarray | None:
    """By how much each rotary frequency is divided, float32 [head_dim / 2]; None: by nothing.

    Llama 3.1 divides the low frequencies; llama.cpp reads the divisors from the tensor `rope_freqs.weight`.
    """
    if config.rope_parameters.get("rope_type", "default") != "llama3":
        return None
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    dim = 2 * len(scaled)
    plain = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, dim, 2).float() / dim)
    return (plain / scaled).numpy()


# ------------------------------------------------------------------------------------------------ settings


def _refused(why: str) -> InputError:
    return InputError(f"no GGUF file of this policy: {why}; export it without --gguf")


def _check_settings(config: Any) -> None:
    """Refuse settings that llama.cpp would ignore."""
    if config.hidden_act != "silu":
        raise _refused(f"hidden_act is {config.hidden_act!r}, not 'silu'")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise _refused(f"{name} is true")
    kind = config.rope_parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise _refused(f"rotary embedding of type {kind!r} is not written")
    if config.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise _refused("only a part of each head is rotated")


def context_length(config: Any) -> int:
    """Positions that the model reads in full: an attention window, which llama.cpp ignores, ends them."""
    window = getattr(config, "sliding_window", None)
    return min(config.max_position_embeddings, window or config.max_position_embeddings)


def _add_config(writer: GGUFWriter, layout: Layout, file_type: FileType) -> None:
    import gguf

    config, rope = layout.config, layout.config.rope_parameters
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(layout.head_dim)
    writer.add_value_length(layout.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(layout.head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    kinds = {"f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "bf16": "MOSTLY_BF16", "f32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[kinds[file_type]])
    if file_type == "q8_0":
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


# ------------------------------------------------------------------------------------------------- tensors


def _shapes(folder: Path) -> Iterator[tuple[str, Sequence[int]]]:
    """(name, shape) of every tensor of a policy folder."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (it is no mapping)
                yield name, weights.get_slice(name).get_shape()


def _add_tensors(writer: GGUFWriter, layout: Layout, folder: Path, file_type: FileType) -> None:
    """Announce all tensors, write the metadata, then write them one at a time in the same order."""
    import numpy as np
    from gguf import quant_shape_to_byte_shape

    factors = rope_factors(layout.config)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype("float32"), factors.nbytes)
    for name, shape in _shapes(folder):
        if name in layout.tensors:
            kind = _stored_as(shape, file_type)
            packed = quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(
                layout.tensors[name], packed, np.dtype("uint8"), int(np.prod(packed)), raw_dtype=kind
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for name, weight in _weights(folder, layout):
        writer.write_tensor_data(_packed(name, weight, _stored_as(weight.shape, file_type)))


def _stored_as(shape: Sequence[int], file_type: FileType) -> GGMLQuantizationType:
    from gguf import GGMLQuantizationType

    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if file_type == "q8_0" and shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    return GGMLQuantizationType[file_type.upper()]


def _weights(folder: Path, layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    """(name, weight in float32 in llama.cpp's order) of every tensor that is written."""
    from safetensors import safe_open

    config = layout.config
    heads = {".q_proj.": config.num_attention_heads, ".k_proj.": config.num_key_value_heads}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                if name not in layout.tensors:
                    continue
                weight = weights.get_tensor(name).float().numpy()
                own = next((count for part, count in heads.items() if part in name), None)
                if layout.architecture == "llama" and own is not None:
                    weight = interleaved(weight, own)
                yield name, weight


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head with its two halves interleaved, as llama.cpp rotates them.

    Args:
        weight: [heads · head_dim, hidden].
        heads: number of heads.
    """
    import numpy as np

    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _packed(name: str, weight: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The weight as bytes of its type."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if kind == GGMLQuantizationType.F16 and (largest := float(np.abs(weight).max())) > _LARGEST_F16:
        raise _refused(f"tensor {name!r} has the value {largest:g}, too large for f16 (give bf16 or f32)")
    return quantize(weight, kind)
