"""What a model's configuration says of its limits: positions, windows, vocabulary, rotary frequencies.

Composite models (text beside images or sound) keep all of this in the configuration of their text part, so
every reading goes through `text_config`. Whoever batches, packs, pads or refuses reads it here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sera_core.errors import InputError

PACKABLE_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layer that keep nothing from token to token but keys and values."""
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
_MAY_BOUND_SIGHT = ("window", "chunk", "topk", "block_size")


def text_config(model: Any) -> Any:
    """The configuration of the part that reads and writes text; the whole one where there is only text.

    Raises:
        InputError: the configuration has several text parts.
    """
    try:
        return model.config.get_text_config()
    except ValueError as error:
        raise unsupported(model, f"its configuration has no single text part ({error})") from error


def architecture(model: Any) -> str:
    """Class and type, as a message names them: `Llama4ForCausalLM (llama4_text)`."""
    return f"{type(model).__name__} ({model.config.model_type})"


def unsupported(model: Any, why: str) -> InputError:
    """The refusal of a model that this package cannot run, by name."""
    return InputError(f"{architecture(model)} is not supported: {why}; use a causal language model.")


def positions(model: Any) -> int | None:
    """Most tokens of one sequence, None where the configuration sets no limit."""
    config = text_config(model)
    found = (getattr(config, name, None) for name in _POSITIONS)
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def vocabulary(model: Any) -> int:
    """Token ids that the model both reads and predicts.

    Raises:
        InputError: it has no embedding of token ids, or no projection to them.
    """
    try:
        tables = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    except (AttributeError, NotImplementedError) as error:
        raise unsupported(
            model, "it has no single embedding of its token ids, or no projection to them"
        ) from error
    return min(len(table) for table in tables)


def window(model: Any) -> int | None:
    """Tokens that the shortest-sighted layer looks back over, None where all layers see everything.

    Sliding windows, attention chunks, local attention and sparse top-k alike. A window that the configuration
    states and does not use counts too.
    """
    config = text_config(model)
    return min(
        (size for name in _WINDOWS for size in _sizes(getattr(config, name, None))),
        default=None,
    )


def refuse_beyond_sparse_sight(model: Any, longest: int) -> None:
    """Refuse sequences that are longer than what sparse attention picks its tokens from (`index_topk`).

    The scores it picks by are often equal (a ReLU makes them zero), and which of equal ones are picked
    depends on the length of the sequence and of its batch: the values of a token depend on what follows.

    Raises:
        InputError: names the number and the lengths to lower.
    """
    seen = getattr(text_config(model), "index_topk", None)
    if isinstance(seen, int) and longest > seen:
        raise InputError(
            f"{architecture(model)} sees {seen} tokens at a time (index_topk), and which ones depends on the "
            f"length where scores are equal, so sequences of {longest} tokens have no definite "
            "log-probability: lower data.max_prompt_tokens and data.max_response_tokens"
        )


def probe_length(model: Any, longest: int) -> int:
    """Tokens that a probe needs to reach past every bound of sight that sequences of `longest` tokens reach.

    Any number of the configuration that may be such a bound counts, known or not; 0 where there is none.
    """
    names = text_config(model).to_dict()
    sizes = (
        size
        for name, value in names.items()
        if name in _WINDOWS or any(part in name for part in _MAY_BOUND_SIGHT)
        for size in _sizes(value)
    )
    beyond = max((size for size in sizes if size < longest), default=0)
    return min(longest, beyond + max(8, beyond // 8)) if beyond else 0


def rope_boundary(model: Any) -> int | None:
    """Tokens up to which rotary positions use short factors, None where they do not depend on the length.

    Beyond, *every* position of the batch uses the long factors (longrope: Phi-3, LongRoPE,
    arXiv 2402.13753), so sequences on either side must not share a forward pass, and keys that were cached on
    one side mean nothing on the other. Dynamic NTK needs no such care: it begins beyond `positions`.
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
    """Whether some layer carries a state from token to token, other than keys and values."""
    kinds = set(getattr(text_config(model), "layer_types", None) or ())
    return bool(getattr(model, "_is_stateful", False) or kinds - PACKABLE_LAYERS)


def _sizes(value: Any) -> Iterator[int]:
    """Positive whole numbers of a setting: one, or several by layer or kind."""
    if isinstance(value, dict):
        value = list(value.values())
    for size in value if isinstance(value, list | tuple) else [value]:
        if isinstance(size, int) and not isinstance(size, bool) and size > 0:
            yield size


def _rope_parts(parameters: Any) -> Iterator[dict[str, Any]]:
    """The rotary settings, one dictionary, or one a kind of layer."""
    if isinstance(parameters, dict):
        yield parameters
        for part in parameters.values():
            yield from _rope_parts(part)
