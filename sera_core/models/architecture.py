"""Limits of a model from its configuration: positions, attention windows, vocabulary, rotary frequencies.

Multimodal models keep these in the configuration of their text part, so always read through `text_config`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sera_core.errors import InputError

PACKABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layer types whose only state is keys and values."""
_POSITIONS = ("max_position_embeddings", "n_positions", "max_target_positions", "max_seq_len")
_WINDOWS = (
    "sliding_window",
    "sliding_windows",
    "sliding_window_size",
    "attention_chunk_size",
    "attention_window",
    "attention_window_size",
    "window_size",
    "local_attention",
    "local_window_size",
    "index_topk",
)
_WINDOW_NAME_PARTS = ("window", "chunk", "topk", "block_size")


def text_config(model: Any) -> Any:
    """Configuration of a model's text part; the whole configuration of a text-only model.

    Raises:
        InputError: the configuration has several text parts.
    """
    try:
        return model.config.get_text_config()
    except ValueError as error:
        raise unsupported(model, f"its configuration has no single text part ({error})") from error


def architecture(model: Any) -> str:
    """Class and model type for messages: `Llama4ForCausalLM (llama4_text)`."""
    return f"{type(model).__name__} ({model.config.model_type})"


def unsupported(model: Any, why: str) -> InputError:
    """The error for a model that this package cannot run."""
    return InputError(f"{architecture(model)} is not supported: {why}; use a causal language model.")


def positions(model: Any) -> int | None:
    """Maximum tokens of a sequence; None if the configuration sets no limit."""
    config = text_config(model)
    found = (getattr(config, name, None) for name in _POSITIONS)
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def vocabulary(model: Any) -> int:
    """Number of token ids that the model can both read and predict.

    Raises:
        InputError: it has no input embedding or no output projection.
    """
    try:
        tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    except (AttributeError, NotImplementedError) as error:
        raise unsupported(model, "it has no single input embedding or no output projection") from error
    return min(len(table) for table in tables)


def window(model: Any) -> int | None:
    """Smallest attention window of any layer, in tokens; None if all layers attend to everything.

    Includes sliding windows, attention chunks, local attention and sparse top-k, and windows that the
    configuration sets but does not use.
    """
    config = text_config(model)
    return min(
        (size for name in _WINDOWS for size in _sizes(getattr(config, name, None))),
        default=None,
    )


def refuse_beyond_index_topk(model: Any, longest: int) -> None:
    """Refuse sequences longer than the number of tokens that sparse attention selects (`index_topk`).

    Its selection scores are often tied (a ReLU makes them zero), and the choice among ties depends on the
    lengths of sequence and batch: a token's values would depend on the tokens that follow.

    Raises:
        InputError: a sequence is longer; the message names the settings to lower.
    """
    seen = getattr(text_config(model), "index_topk", None)
    if isinstance(seen, int) and longest > seen:
        raise InputError(
            f"{architecture(model)} attends to {seen} tokens (index_topk), and the choice among tied scores "
            f"depends on the sequence length, so sequences of {longest} tokens have no well-defined "
            "log-probability: lower data.max_prompt_tokens and data.max_response_tokens"
        )


def probe_length(model: Any, longest: int) -> int:
    """Tokens that a probe needs to exceed every attention window shorter than `longest` tokens.

    Counts every number in the configuration whose name suggests a window; 0 if there is none.
    """
    names = text_config(model).to_dict()
    sizes = (
        size
        for name, value in names.items()
        if name in _WINDOWS or any(part in name for part in _WINDOW_NAME_PARTS)
        for size in _sizes(value)
    )
    beyond = max((size for size in sizes if size < longest), default=0)
    return min(longest, beyond + max(8, beyond // 8)) if beyond else 0


def rope_boundary(model: Any) -> int | None:
    """Sequence length up to which rotary embeddings use the short factors; None if they do not depend on it.

    Beyond it, *every* position of the batch uses the long factors (longrope: Phi-3, LongRoPE,
    arXiv 2402.13753). So sequences on different sides must not share a forward pass, and cached keys are
    valid on one side only. Dynamic NTK needs no special handling, because it starts beyond `positions`.
    """
    config = text_config(model)
    found = [
        part.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", 0)
        for source in ("rope_parameters", "rope_scaling")
        for part in _rope_parts(getattr(config, source, None))
        if "longrope" in (part.get("rope_type"), part.get("type"))
    ]
    return min((int(boundary) for boundary in found if boundary), default=None)


def keeps_state(model: Any) -> bool:
    """Whether a layer has state other than keys and values."""
    kinds = set(getattr(text_config(model), "layer_types", None) or ())
    return bool(getattr(model, "_is_stateful", False) or kinds - PACKABLE_LAYERS)


def _sizes(value: Any) -> Iterator[int]:
    """Positive integers in a setting: one, or several by layer or type."""
    if isinstance(value, dict):
        value = list(value.values())
    for size in value if isinstance(value, list | tuple) else [value]:
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            yield size


def _rope_parts(parameters: Any) -> Iterator[dict[str, Any]]:
    """The rotary settings: one dictionary, or one per layer type."""
    if isinstance(parameters, dict):
        yield parameters
        for part in parameters.values():
            yield from _rope_parts(part)
