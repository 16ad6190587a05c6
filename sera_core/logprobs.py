"""Log-probabilities of responses: the only shift-and-mask in the project, and the fast engine behind it.

    log π(y|x) = Σ_t log π(y_t | x, y_<t)                    in nats, summed over the response's tokens

How it is made fast: a prompt is computed once for all its responses, several prompts lie in one packed row
without padding (each response attends to its prompt and to itself, positions restart at the prompt's end),
hidden states are projected to the vocabulary only where a response token is predicted, and a few hundred
rows at a time. Memory depends on `tokens_per_batch`, not on the number of items. A model that cannot be
packed (sliding windows that matter, state space layers, attention sinks, soft-capped logits, …) is found by
comparing both ways on a small probe, and scored in padded batches instead.
"""

from __future__ import annotations

import contextvars
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F

from sera_core.errors import InputError

Mode = Literal["packed", "padded", "full"]
Progress = Callable[[int, int], None]

TOKENS_PER_BATCH = 2048
_LOGITS_AT_ONCE = 2**24  # 64 MiB of float32 logits: 341 rows of a vocabulary of 49,152
_ATTENTION = "sera_packed"
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class Item(NamedTuple):
    """One response to score; a plain (prompt_ids, response_ids) tuple does as well."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]


class _Group(NamedTuple):
    """Responses that share a prompt and are computed together."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    indices: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


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
        tokens_per_batch: most tokens computed at once (a longer single item still goes through alone).
        progress: called after each batch with the number of items scored so far and that of all.

    Returns:
        float64 of shape [item], in the order of the items. The same items in another order give the same
        bits; other companions in a batch change a value by float noise only.

    Raises:
        InputError: an item that cannot be scored, named by its index.
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
    """The same by the plainest loop, one whole sequence at a time: the reference of tests and probes.

    The log-softmax is taken in float64, since torch's float32 one on CPU is off by about 6e-6 nats a token
    at a vocabulary of 49,152 (1.3e-3 nats on a response of 300 tokens, always in one direction).
    """
    check_items(model, items)
    sums = np.zeros(len(items), dtype=np.float64)
    with torch.inference_mode():
        for index, (prompt, response) in enumerate(items):
            ids = torch.tensor([[*prompt, *response]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            logps = logits.double().log_softmax(-1).gather(1, ids[0, len(prompt) :, None])
            sums[index] = logps.sum().item()
    return sums


def score_tokens(items: Iterable[Item | tuple[Sequence[int], Sequence[int]]]) -> int:
    """Tokens that scoring these items takes: every distinct prompt once, and every response."""
    prompts, responses = set(), 0
    for prompt, response in items:
        prompts.add(tuple(prompt))
        responses += len(response)
    return sum(map(len, prompts)) + responses


def check_items(model: Any, items: Sequence[Item | tuple[Sequence[int], Sequence[int]]]) -> None:
    """Refuse items that have no log-probability under this model.

    Raises:
        InputError: an empty prompt or response, an id outside the vocabulary, more tokens than positions, or
        a
            model in training mode.
    """
    if model.training:
        raise InputError(
            "the model to score with is in training mode, where dropout is active: call model.eval() first."
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    positions = getattr(model.config, "max_position_embeddings", None)
    for index, (prompt, response) in enumerate(items):
        if len(prompt) == 0 or len(response) == 0:
            what = "prompt" if len(prompt) == 0 else "response"
            raise InputError(
                f"item {index}: the {what} is empty, so it has no log-probability: drop the item first."
            )
        low, high = min(*prompt, *response), max(*prompt, *response)
        if low < 0 or high >= vocabulary:
            raise InputError(
                f"item {index}: token id {low if low < 0 else high} is not in the model's vocabulary of "
                f"{vocabulary}: "
                "render the text with this model's own tokenizer."
            )
        if positions is not None and len(prompt) + len(response) > positions:
            raise InputError(
                f"item {index}: {len(prompt)} prompt and {len(response)} response tokens do not fit the "
                "model's "
                f"{positions} positions: lower the token limits of the data, or drop the item."
            )


# ------------------------------------------------------------------------------------------------- engine


def _token_logps(
    model: Any, items: Sequence[Any], tokens_per_batch: int, progress: Progress | None
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (item index, float64 log-probabilities of its response tokens), batch by batch."""
    check_items(model, items)
    if not items:
        return
    longest = max(len(prompt) + len(response) for prompt, response in items)
    mode = scoring_mode(model, longest)
    score = {"packed": _packed_logps, "padded": _padded_logps, "full": _full_logps}[mode]
    batches = _packed_batches if mode == "packed" else _padded_batches
    scored = 0
    for batch in batches(_sorted_groups(items), tokens_per_batch):
        with torch.inference_mode():
            logps = score(model, batch).double().cpu().numpy()
        position = 0
        for group in batch:
            for index, response in zip(group.indices, group.responses, strict=True):
                yield index, logps[position : position + len(response)]
                position += len(response)
        scored += sum(len(group.indices) for group in batch)
        if progress is not None:
            progress(scored, len(items))


def _sorted_groups(items: Sequence[Any]) -> list[_Group]:
    """Items grouped by prompt, longest group first, in an order that does not depend on the items' order."""
    members: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = defaultdict(list)
    for index, (prompt, response) in enumerate(items):
        members[tuple(map(int, prompt))].append((tuple(map(int, response)), index))
    groups = []
    for prompt, responses in members.items():
        responses.sort(key=lambda pair: (-len(pair[0]), pair))
        groups.append(_Group(prompt, tuple(r for r, _ in responses), tuple(index for _, index in responses)))
    return sorted(groups, key=lambda group: (-group.tokens, group.prompt, group.responses))


def _packed_batches(groups: list[_Group], budget: int) -> Iterator[list[_Group]]:
    """Fill batches of at most `budget` tokens; a group above it is cut between responses."""
    batch: list[_Group] = []
    for group in (part for whole in groups for part in _cut(whole, budget)):
        if batch and sum(member.tokens for member in batch) + group.tokens > budget:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _cut(group: _Group, budget: int) -> Iterator[_Group]:
    start, tokens = 0, len(group.prompt)
    for end, response in enumerate(group.responses):
        if end > start and tokens + len(response) > budget:
            yield _Group(group.prompt, group.responses[start:end], group.indices[start:end])
            start, tokens = end, len(group.prompt)
        tokens += len(response)
    yield _Group(group.prompt, group.responses[start:], group.indices[start:])


def _padded_batches(groups: list[_Group], budget: int) -> Iterator[list[_Group]]:
    """One response a group, rows of like length together, rows · longest row at most `budget`."""
    rows = [
        _Group(group.prompt, (response,), (index,))
        for group in groups
        for response, index in zip(group.responses, group.indices, strict=True)
    ]
    rows.sort(key=lambda row: (-row.tokens, row.prompt, row.responses, row.indices))
    start = 0
    while start < len(rows):
        count = max(1, budget // rows[start].tokens)
        yield rows[start : start + count]
        start += count


# ------------------------------------------------------------------------------------------------- packed


class _Layout(NamedTuple):
    """Where the segments of a packed row lie: per group the prompt's length and the responses' lengths."""

    segments: list[tuple[int, list[int]]]
    masks: dict[tuple[int, int], torch.Tensor]


_LAYOUT: contextvars.ContextVar[_Layout] = contextvars.ContextVar("sera_packed_layout")


def _packed_logps(model: Any, batch: list[_Group]) -> torch.Tensor:
    """Log-probabilities of a batch's response tokens in batch order, float32 [response token]."""
    ids: list[int] = []
    positions: list[int] = []
    sources: list[int] = []  # the packed position whose hidden state predicts each response token
    labels: list[int] = []
    for group in batch:
        last = len(ids) + len(group.prompt) - 1
        ids += group.prompt
        positions += range(len(group.prompt))
        for response in group.responses:
            sources += [last, *range(len(ids), len(ids) + len(response) - 1)]
            positions += range(len(group.prompt), len(group.prompt) + len(response))
            ids += response
            labels += response
    layout = _Layout([(len(group.prompt), [len(r) for r in group.responses]) for group in batch], {})
    with _packed_attention(model, layout):
        hidden = model.base_model(
            input_ids=torch.tensor([ids], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            use_cache=False,
        ).last_hidden_state[0]
    return _label_logps(model, hidden[torch.tensor(sources, device=hidden.device)], labels)


@contextmanager
def _packed_attention(model: Any, layout: _Layout) -> Iterator[None]:
    """Let the model attend by the layout's segments while inside."""
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend_packed)
    token = _LAYOUT.set(layout)
    before = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
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
        attention_mask: ignored; transformers makes none for an attention of this name.
        scaling: factor of the scores, None for 1/√head_dim.

    Raises:
        NotImplementedError: the layer asks for something that is not plain causal attention.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"packed attention has no {name}")
    layout = _LAYOUT.get()
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


def _attention(scaling: float | None, grouped: bool) -> Callable[..., torch.Tensor]:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=grouped, **kwargs)

    return attend


def _response_mask(layout: _Layout, prompt: int, length: int, like: torch.Tensor) -> torch.Tensor:
    """Additive mask [response token, prompt + response token]: all of the prompt, the response causally."""
    mask = layout.masks.get((prompt, length))
    if mask is None:
        blocked = torch.ones(length, prompt + length, dtype=torch.bool, device=like.device).triu(prompt + 1)
        mask = torch.zeros(length, prompt + length, dtype=like.dtype, device=like.device)
        layout.masks[prompt, length] = mask.masked_fill_(blocked, float("-inf"))
    return layout.masks[prompt, length]


# ------------------------------------------------------------------------------------------------- padded


def _padded_row_ids(
    model: Any, batch: list[_Group]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """ids and attention mask [row, token], flat source positions and labels of all response tokens."""
    width = max(row.tokens for row in batch)
    ids, mask = (
        torch.zeros(len(batch), width, dtype=torch.long),
        torch.zeros(len(batch), width, dtype=torch.long),
    )
    sources: list[int] = []
    labels: list[int] = []
    for number, row in enumerate(batch):
        ids[number, : row.tokens] = torch.tensor([*row.prompt, *row.responses[0]])
        mask[number, : row.tokens] = 1
        first = number * width + len(row.prompt) - 1
        sources += range(first, first + len(row.responses[0]))
        labels += row.responses[0]
    device = model.device
    return ids.to(device), mask.to(device), torch.tensor(sources, device=device), labels


def _padded_logps(model: Any, batch: list[_Group]) -> torch.Tensor:
    """As `_packed_logps`, one padded row a response."""
    ids, mask, sources, labels = _padded_row_ids(model, batch)
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return _label_logps(model, hidden.flatten(0, 1)[sources], labels)


def _full_logps(model: Any, batch: list[_Group]) -> torch.Tensor:
    """As `_padded_logps` through the model's own logits, for models that change them after the projection."""
    ids, mask, sources, labels = _padded_row_ids(model, batch)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.flatten(0, 1)
    rows = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    targets = torch.tensor(labels, device=logits.device)
    chunks = zip(sources.split(rows), targets.split(rows), strict=True)
    return torch.cat([_gathered(logits[chosen], target) for chosen, target in chunks])


def _label_logps(model: Any, hidden: torch.Tensor, labels: list[int]) -> torch.Tensor:
    """Project hidden states [token, hidden] and take the labels' log-probabilities, float32 [token]."""
    project = model.get_output_embeddings()
    rows = max(1, _LOGITS_AT_ONCE // project.weight.shape[0])
    targets = torch.tensor(labels, device=hidden.device)
    chunks = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([_gathered(project(states), target) for states, target in chunks])


def _gathered(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """log softmax(logits)[label] in float32; logits are [token, vocabulary] in any dtype."""
    logits = logits.float()
    return logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(dim=-1)


# -------------------------------------------------------------------------------------------------- probe

_MODES: WeakKeyDictionary[Any, Mode] = WeakKeyDictionary()


def scoring_mode(model: Any, longest: int = 0) -> Mode:
    """How this model is scored: `packed`, `padded`, or `full` where it changes its projected logits.

    Decided once a model by running a probe of a few tokens each way against the plain loop.

    Args:
        model: a transformers causal language model in eval mode.
        longest: tokens of the longest item; a sliding window shorter than it rules packing out.
    """
    if model not in _MODES:
        _MODES[model] = _probe(model)
    mode, window = _MODES[model], getattr(model.config, "sliding_window", None)
    return "padded" if mode == "packed" and window is not None and longest > window else mode


def _probe(model: Any) -> Mode:
    text = model.config.get_text_config()
    if any(getattr(text, name, None) not in (None, 1, 1.0) for name in _LOGIT_CHANGES):
        return "full"
    items = _probe_items(model)
    expected = plain_sequence_logps(model, items)
    groups = _sorted_groups(items)
    if model._supports_attention_backend and _agrees(model, _packed_logps, groups, expected):
        return "packed"
    rows = [row for batch in _padded_batches(groups, 1024) for row in batch]
    return "padded" if _agrees(model, _padded_logps, rows, expected) else "full"


def _probe_items(model: Any) -> list[Item]:
    """Two prompts with two responses each, of arbitrary but fixed tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    draw = torch.randint(0, vocabulary, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    return [
        Item(draw[:7], draw[7:12]),
        Item(draw[:7], draw[12:20]),
        Item(draw[20:25], draw[25:34]),
        Item(draw[20:25], draw[34:40]),
    ]


def _agrees(
    model: Any, score: Callable[[Any, list[_Group]], torch.Tensor], groups: list[_Group], expected: np.ndarray
) -> bool:
    """Whether this way of scoring gives the plain loop's values, to what the dtype can hold."""
    try:
        with torch.inference_mode():
            logps = score(model, groups).double().cpu().numpy()
    except NotImplementedError:
        return False
    owners = [
        index
        for group in groups
        for index, response in zip(group.indices, group.responses, strict=True)
        for _ in response
    ]
    sums = np.bincount(owners, weights=logps, minlength=len(expected))
    tolerance = 1e-5 if model.dtype == torch.float32 else 1e-2
    return bool(np.all(np.abs(sums - expected) <= tolerance * np.maximum(1.0, np.abs(expected))))
