"""Log-probabilities of responses: the project's only shift-and-mask code, and a fast implementation.

    log π(y|x) = Σ_t log π(y_t | x, y_<t)                    in nats, summed over the response's tokens

Each prompt is computed once for all its responses, and several prompts share one packed row without padding
(each response attends to its prompt and itself; its positions start at the prompt's end). Models that cannot
be packed (effective sliding windows, state space layers, attention sinks, soft-capped logits, …) are detected
by their configuration and by a probe, and scored in padded batches. A model for which neither agrees with the
plain loop is refused.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from sera_core.errors import InputError
from sera_core.models.architecture import (
    keeps_state,
    positions,
    probe_length,
    refuse_beyond_index_topk,
    rope_boundary,
    text_config,
    unsupported,
    vocabulary,
    window,
)
from sera_core.models.response_batches import Group, Item, Mode, batch_logps, response_batches

__all__ = [
    "UNSUPPORTED_ERRORS",
    "Item",
    "Mode",
    "check_items",
    "plain_sequence_logps",
    "probe_items",
    "response_token_logps",
    "score_tokens",
    "scoring_mode",
    "sequence_logps",
]

LOG = logging.getLogger("sera.logprobs")
Progress = Callable[[int, int], None]

TOKENS_PER_BATCH = 2048
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
UNSUPPORTED_ERRORS = (
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions that transformers raises for features that an architecture does not have."""

# ------------------------------------------------------------------------------------------------- public


def sequence_logps(
    model: Any,
    items: Sequence[Item | tuple[Sequence[int], Sequence[int]]],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> np.ndarray:
    """log π(y|x) of every item, in nats, summed over the response's tokens.

    Args:
        model: a transformers causal language model in eval mode.
        items: (prompt_ids, response_ids); items with the same prompt share its computation.
        tokens_per_batch: maximum tokens per batch (a longer item is a batch by itself).
        progress: called after each batch with the number of items scored so far and the total.

    Returns:
        float64 of shape [item], in the order of the items. The same items in another order give identical
        bits; other items in the same batch change a value only by float noise.

    Raises:
        InputError: an item (named by its index) or the model (named by its architecture) cannot be scored.
    """
    sums = np.zeros(len(items), dtype=np.float64)
    for index, logps in _token_logps(model, items, tokens_per_batch, progress):
        sums[index] = logps.sum()
    return sums


def response_token_logps(
    model: Any,
    items: Sequence[Item | tuple[Sequence[int], Sequence[int]]],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: Progress | None = None,
) -> list[np.ndarray]:
    """log π(y_t | x, y_<t) in nats: per item a float64 array of shape [response token].

    Arguments and errors as in `sequence_logps`, whose values are the sums of these.
    """
    tokens: list[np.ndarray] = [np.empty(0)] * len(items)
    for index, logps in _token_logps(model, items, tokens_per_batch, progress):
        tokens[index] = logps
    return tokens


def plain_sequence_logps(
    model: Any, items: Sequence[Item | tuple[Sequence[int], Sequence[int]]]
) -> np.ndarray:
    """As `sequence_logps`, by a plain loop over one sequence at a time: the reference for tests and probes.

    The log-softmax is computed in float64, because torch's float32 one on CPU has a bias of about 6e-6 nats
    per token at a vocabulary of 49,152 (1.3e-3 nats for a response of 300 tokens).
    """
    check_items(model, items)
    sums = [_plain_token_logps(model, prompt, response).sum() for prompt, response in items]
    return np.array(sums, dtype=np.float64)


def _plain_token_logps(model: Any, prompt: Sequence[int], response: Sequence[int]) -> np.ndarray:
    """log π(y_t | x, y_<t) of one response, float64 [response token], by a separate forward pass."""
    ids = torch.tensor([[*prompt, *response]], device=model.device)
    some = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        some = {"logits_to_keep": len(response) + 1}  # logits of a long prompt would fill the memory
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False, **some).logits[0, -1 - len(response) : -1]
        logps = logits.double().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
    return logps.cpu().numpy()


def score_tokens(items: Iterable[Item | tuple[Sequence[int], Sequence[int]]]) -> int:
    """Tokens computed to score these items: every distinct prompt once, and every response."""
    prompts, responses = set(), 0
    for prompt, response in items:
        prompts.add(tuple(prompt))
        responses += len(response)
    return sum(map(len, prompts)) + responses


def check_items(model: Any, items: Sequence[Item | tuple[Sequence[int], Sequence[int]]]) -> None:
    """Refuse items that this model cannot score.

    Raises:
        InputError: an empty prompt or response, an id outside the vocabulary, more tokens than positions, or
            a model in training mode.
    """
    if model.training:
        raise InputError(
            "the scoring model is in training mode, with dropout active: call model.eval() first."
        )
    known, limit = vocabulary(model), positions(model)
    for index, (prompt, response) in enumerate(items):
        if len(prompt) == 0 or len(response) == 0:
            what = "prompt" if len(prompt) == 0 else "response"
            raise InputError(
                f"item {index}: the {what} is empty, so it has no log-probability: drop the item."
            )
        low, high = min(*prompt, *response), max(*prompt, *response)
        if low < 0 or high >= known:
            raise InputError(
                f"item {index}: token id {low if low < 0 else high} is outside the model's vocabulary of "
                f"{known}: render the text with this model's tokenizer."
            )
        if limit is not None and len(prompt) + len(response) > limit:
            raise InputError(
                f"item {index}: {len(prompt)} prompt and {len(response)} response tokens exceed the "
                f"model's {limit} positions: lower the token limits of the data, or drop the item."
            )


# ------------------------------------------------------------------------------------------------- engine


def _token_logps(
    model: Any, items: Sequence[Any], tokens_per_batch: int, progress: Progress | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (item index, float64 log-probabilities of its response tokens), batch by batch."""
    check_items(model, items)
    if not items:
        return
    mode = scoring_mode(model, max(len(prompt) + len(response) for prompt, response in items))
    scored = 0
    for indices, logps in _scored_batches(model, items, mode, tokens_per_batch):
        yield from zip(indices, logps, strict=True)
        scored += len(indices)
        if progress is not None:
            progress(scored, len(items))


def _scored_batches(
    model: Any, items: Sequence[Any], mode: Mode, tokens_per_batch: int
) -> Iterator[tuple[list[int], list[np.ndarray]]]:
    """For each batch its item indices, and the log-probabilities of each item's response tokens.

    If the device runs out of memory, the rest is scored in batches of half as many tokens.
    """
    left, size = list(range(len(items))), tokens_per_batch
    while left:
        scored: set[int] = set()
        batch: list[Group] = []
        try:
            for batch in response_batches(model, [items[index] for index in left], mode, size):
                with torch.inference_mode():
                    logps = batch_logps(model, batch, mode).double().cpu().numpy()
                indices = [left[place] for group in batch for place in group.indices]
                ends = np.cumsum([len(response) for group in batch for response in group.responses])
                scored.update(indices)
                yield indices, np.split(logps, ends[:-1])
        except torch.OutOfMemoryError:
            if sum(len(group.responses) for group in batch) <= 1:
                raise
            size = max(1, min(size, sum(group.tokens for group in batch)) // 2)
            LOG.warning("out of memory with %d tokens per batch; going on with %d", 2 * size, size)
            torch.cuda.empty_cache()
        left = [index for index in left if index not in scored]


# -------------------------------------------------------------------------------------------------- probe

_MODES: WeakKeyDictionary[Any, dict[tuple[int, bool], Mode]] = WeakKeyDictionary()


def scoring_mode(model: Any, longest: int = 0) -> Mode:
    """The scoring mode of a model: `packed`, `padded`, or `full` if it changes its projected logits.

    A probe compares each mode with the plain loop, once per model, and again with a longer probe if items
    exceed an attention window.

    Args:
        model: a transformers causal language model in eval mode.
        longest: tokens of the longest item; a window shorter than it excludes packing.

    Raises:
        InputError: the model is not causal, its plain forward pass fails, no mode agrees with it, or
            `longest` exceeds the tokens that sparse attention selects.
    """
    refuse_beyond_index_topk(model, longest)
    decided, bound = _MODES.setdefault(model, {}), window(model)
    length = probe_length(model, longest)
    packable = bool(
        getattr(model, "_supports_attention_backend", False)
        and not keeps_state(model)
        and (bound is None or longest <= bound)
    )
    if (length, packable) not in decided:
        decided[length, packable] = _probe(model, length, packable)
    return decided[length, packable]


def _probe(model: Any, length: int, packable: bool) -> Mode:
    """The fastest mode that agrees with the plain loop on short items and one of `length` tokens."""
    items = probe_items(model, length)
    expected = _plain_probe(model, items)
    modes: list[Mode] = ["full"]
    text = text_config(model)
    if all(getattr(text, name, None) in (None, 1, 1.0) for name in _LOGIT_CHANGES):
        modes = [*(("packed",) if packable else ()), "padded", "full"]
    budget = max(1024, 2 * length)
    found: Mode | None = next((mode for mode in modes if _agrees(model, mode, items, budget, expected)), None)
    if found is None:
        raise unsupported(
            model,
            "its log-probabilities in a batch differ from those of one response at a time",
        )
    return found


def probe_items(model: Any, length: int = 0) -> list[Item]:
    """Two prompts with two responses each, with fixed arbitrary tokens, and one item of `length` tokens.

    Without special tokens: some stand for images or padding.
    """
    count = 40 + length
    words = sorted(set(range(vocabulary(model))) - _special_ids(model))
    places = torch.randint(0, len(words), (count,), generator=torch.Generator().manual_seed(0))
    draw = [words[place] for place in places.tolist()]
    items = [
        Item(draw[:7], draw[7:12]),
        Item(draw[:7], draw[12:20]),
        Item(draw[20:25], draw[25:34]),
        Item(draw[20:25], draw[34:40]),
    ]
    if length > 1:
        response = min(8, length - 1)
        items.append(Item(draw[40 : count - response], draw[count - response :]))
    return items


def _special_ids(model: Any) -> set[int]:
    """Every token id in the configuration."""
    found: set[int] = set()
    for config in (model.config, text_config(model)):
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index", "_token_ids")):
                found.update(value if isinstance(value, list) else [value])
    return found


def _plain_probe(model: Any, items: Sequence[Item]) -> np.ndarray:
    """The plain loop's values for the probe.

    Raises:
        InputError: the loop fails, or the model is not causal.
    """
    try:
        values = plain_sequence_logps(model, items)
        causal = all(_is_causal(model, item) for item in (items[0], items[-1]))
    except torch.OutOfMemoryError:
        raise
    except UNSUPPORTED_ERRORS as error:
        said = str(error).strip().split("\n")[0]
        raise unsupported(
            model, f"its forward pass over plain text fails ({type(error).__name__}: {said})"
        ) from error
    if not causal:
        raise unsupported(
            model,
            "it is not causal (its predictions depend on later tokens; encoders need "
            "is_decoder in their config.json)",
        )
    return values


def _is_causal(model: Any, item: Item) -> bool:
    """Whether no token's value depends on later tokens.

    In float32 also if there are none. In 16 bits, where values change with the number of tokens by rounding
    alone, only sequences of one length are compared.
    """
    ids = [*item.prompt_ids, *item.response_ids]
    ends = [end for end in (positions(model), rope_boundary(model)) if end is not None and end >= len(ids)]
    room = min(ends, default=2 * len(ids)) - len(ids)
    few, many = min(4, room), min(len(ids), room)
    groups = [[ids[:few], ids[::-1][:few]], [ids[:many], ids[::-1][:many]]]
    if model.dtype == torch.float32:
        groups = [[[], ids[:few], ids[::-1][:many]]]
    return all(_equal_before(model, ids, tails) for tails in groups)


def _equal_before(model: Any, ids: Sequence[int], tails: Sequence[Sequence[int]]) -> bool:
    """Whether the values of `ids` are the same before each of these tails."""
    logps = [_plain_token_logps(model, ids[:1], [*ids[1:], *tail])[: len(ids) - 1] for tail in tails]
    bound = 1e-5 if model.dtype == torch.float32 else 1e-3
    return all(np.allclose(logps[0], found, rtol=bound, atol=bound, equal_nan=True) for found in logps[1:])


def _agrees(model: Any, mode: Mode, items: Sequence[Item], budget: int, expected: np.ndarray) -> bool:
    """Whether this mode gives the plain loop's values within the tolerance of the dtype."""
    sums = np.zeros(len(items))
    try:
        for indices, logps in _scored_batches(model, items, mode, budget):
            sums[indices] = [values.sum() for values in logps]
    except torch.OutOfMemoryError:
        raise
    except UNSUPPORTED_ERRORS:
        return False
    tolerance = _tolerance(model)
    return np.allclose(sums, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def _tolerance(model: Any) -> float:
    return 1e-5 if model.dtype == torch.float32 else 1e-2
