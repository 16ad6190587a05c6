"""Attention inside a packed row: several prompts and their responses, concatenated without padding.

Each prompt is computed once; each response attends to its prompt and itself. Inside `packed_attention`,
transformers calls `_attend_packed` instead of its own attention.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

_NAME = "sera_packed"
_UNDERSTOOD = frozenset(
    {
        "cache_position",
        "dropout",
        "head_mask",
        "is_causal",
        "layer_idx",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)
"""Arguments that have no effect here, or that are checked below."""


class Layout(NamedTuple):
    """Segments of a packed row: for each group the length of its prompt and of its responses."""

    segments: list[tuple[int, list[int]]]
    masks: dict[tuple[int, int], torch.Tensor]

    @property
    def longest(self) -> int:
        """Maximum tokens of a prompt with one of its responses."""
        return max(prompt + max(responses, default=0) for prompt, responses in self.segments)


_LAYOUT: contextvars.ContextVar[Layout] = contextvars.ContextVar("sera_packed_layout")


@contextmanager
def packed_attention(model: Any, layout: Layout) -> Iterator[None]:
    """Make the model attend by the layout's segments inside the block; restores the model afterwards."""
    from transformers import AttentionInterface, PreTrainedModel

    AttentionInterface.register(_NAME, _attend_packed)
    parts = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [(config, config._attn_implementation) for config in parts]
    token = _LAYOUT.set(layout)
    try:
        model.set_attn_implementation(_NAME)
        yield
    finally:
        for config, implementation in before:  # outer configurations first: setting one overwrites its parts
            config._attn_implementation = implementation
        _LAYOUT.reset(token)


def _attend_packed(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention inside a packed row: prompts causally, each response to its prompt and itself.

    Args:
        query: [1, head, token, head_dim]; key and value likewise, with as many or fewer heads.
        attention_mask: None, because transformers creates none for custom attention.
        scaling: factor of the scores, None for 1/√head_dim.

    Raises:
        NotImplementedError: the layer needs more than plain causal attention.
    """
    layout = _LAYOUT.get()
    _refuse_more_than_causal(module, query, key, attention_mask, kwargs, layout)
    if query.shape[1] != key.shape[1] and query.device.type != "cpu":
        # with a mask, CUDA's fast kernels do not take grouped heads
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    attend = _attention(scaling, query.shape[1] != key.shape[1])
    output = torch.empty((*query.shape[:-1], value.shape[-1]), dtype=query.dtype, device=query.device)
    end = 0
    for prompt, responses in layout.segments:
        start, end = end, end + prompt
        ours = slice(start, end)
        prompt_key, prompt_value = key[:, :, ours], value[:, :, ours]
        output[:, :, ours] = attend(query[:, :, ours], prompt_key, prompt_value, is_causal=True)
        for length in responses:
            start, end = end, end + length
            ours = slice(start, end)
            output[:, :, ours] = attend(
                query[:, :, ours],
                torch.cat([prompt_key, key[:, :, ours]], dim=2),
                torch.cat([prompt_value, value[:, :, ours]], dim=2),
                attn_mask=_response_mask(layout, prompt, length, query),
            )
    return output.transpose(1, 2).contiguous(), None


def _refuse_more_than_causal(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
    layout: Layout,
) -> None:
    """Raise if a layer needs a feature that packed attention does not have."""
    if attention_mask is not None:
        raise NotImplementedError("packed attention supports no custom mask")
    if key.shape[2] != query.shape[2]:
        raise NotImplementedError("packed attention supports no cached keys")
    if kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise NotImplementedError("packed attention is causal")
    for window in (kwargs.get("sliding_window"), getattr(module, "sliding_window", None)):
        if isinstance(window, int) and 0 < window < layout.longest:
            raise NotImplementedError(f"packed attention supports no window of {window}")
    for name, value in kwargs.items():
        if name not in _UNDERSTOOD and value is not None and value is not False:
            raise NotImplementedError(f"packed attention supports no {name}")


def _attention(scaling: float | None, grouped: bool) -> Callable[..., torch.Tensor]:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=grouped, **kwargs)

    return attend


def _response_mask(layout: Layout, prompt: int, length: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask [response token, prompt + response token]: the whole prompt, the response causally."""
    mask = layout.masks.get((prompt, length))
    if mask is None:
        blocked = torch.ones(length, prompt + length, dtype=torch.bool, device=like.device).triu(prompt + 1)
        mask = torch.zeros(length, prompt + length, dtype=like.dtype, device=like.device)
        layout.masks[prompt, length] = mask.masked_fill_(blocked, float("-inf"))
    return layout.masks[prompt, length]
