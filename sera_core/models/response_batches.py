"""Batch responses for scoring, and run a forward pass: packed, padded, or through the model's own logits.

Memory depends on the tokens per batch, not on the number of items. Hidden states are projected to the
vocabulary only at response tokens, a few hundred rows at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch

from sera_core.models.architecture import rope_boundary
from sera_core.models.packed_attention import Layout, packed_attention

Mode = Literal["packed", "padded", "full"]
_LOGITS_AT_ONCE = 2**24  # 64 MiB of float32 logits: 341 rows of a vocabulary of 49,152


class Item(NamedTuple):
    """One response to score; a plain (prompt_ids, response_ids) tuple works too."""

    prompt_ids: Sequence[int]
    response_ids: Sequence[int]


class Group(NamedTuple):
    """Responses that share a prompt and are computed together."""

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    indices: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.responses))


def response_batches(model: Any, items: Sequence[Any], mode: Mode, budget: int) -> Iterator[list[Group]]:
    """Yield batches of at most `budget` tokens, in an order that does not depend on the items' order.

    If rotary embeddings depend on the length, items below and above the boundary are in separate batches.

    Args:
        model: the scoring model.
        items: (prompt_ids, response_ids).
        mode: scoring mode.
        budget: maximum tokens per batch; a longer item is a batch by itself.
    """
    boundary = rope_boundary(model)
    sides: dict[bool, list[int]] = defaultdict(list)
    for index, (prompt, response) in enumerate(items):
        sides[boundary is not None and len(prompt) + len(response) > boundary].append(index)
    cut = _packed_batches if mode == "packed" else _padded_batches
    for side in sorted(sides):
        yield from cut(_sorted_groups(items, sides[side]), budget)


def batch_logps(model: Any, batch: list[Group], mode: Mode) -> torch.Tensor:
    """Log-probabilities of a batch's response tokens in batch order, float32 [response token]."""
    return _LOGPS[mode](model, batch)


# ----------------------------------------------------------------------------------------------- batching


def _sorted_groups(items: Sequence[Any], indices: Sequence[int]) -> list[Group]:
    """Items grouped by prompt, longest group first, in an order that does not depend on the items' order."""
    members: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = defaultdict(list)
    for index in indices:
        prompt, response = items[index]
        members[tuple(map(int, prompt))].append((tuple(map(int, response)), index))
    groups = []
    for prompt, responses in members.items():
        responses.sort(key=lambda pair: (-len(pair[0]), pair))
        groups.append(Group(prompt, tuple(r for r, _ in responses), tuple(index for _, index in responses)))
    return sorted(groups, key=lambda group: (-group.tokens, group.prompt, group.responses))


def _packed_batches(groups: list[Group], budget: int) -> Iterator[list[Group]]:
    """Fill batches of at most `budget` tokens; larger groups are split between responses."""
    batch: list[Group] = []
    for group in (part for whole in groups for part in _cut(whole, budget)):
        if batch and sum(member.tokens for member in batch) + group.tokens > budget:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _cut(group: Group, budget: int) -> Iterator[Group]:
    start, tokens = 0, len(group.prompt)
    for end, response in enumerate(group.responses):
        if end > start and tokens + len(response) > budget:
            yield Group(group.prompt, group.responses[start:end], group.indices[start:end])
            start, tokens = end, len(group.prompt)
        tokens += len(response)
    yield Group(group.prompt, group.responses[start:], group.indices[start:])


def _padded_batches(groups: list[Group], budget: int) -> Iterator[list[Group]]:
    """One response per group, rows of similar length together, rows · longest row at most `budget`."""
    rows = [
        Group(group.prompt, (response,), (index,))
        for group in groups
        for response, index in zip(group.responses, group.indices, strict=True)
    ]
    rows.sort(key=lambda row: (-row.tokens, row.prompt, row.responses, row.indices))
    start = 0
    while start < len(rows):
        count = max(1, budget // rows[start].tokens)
        yield rows[start : start + count]
        start += count


# ------------------------------------------------------------------------------------------------- forward


def _packed_logps(model: Any, batch: list[Group]) -> torch.Tensor:
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
    layout = Layout([(len(group.prompt), [len(r) for r in group.responses]) for group in batch], {})
    with packed_attention(model, layout):
        hidden = model.base_model(
            input_ids=torch.tensor([ids], device=model.device),
            position_ids=torch.tensor([positions], device=model.device),
            use_cache=False,
        ).last_hidden_state[0]
    return _label_logps(model, hidden[torch.tensor(sources, device=hidden.device)], labels)


def _padded_row_ids(
    model: Any, batch: list[Group]
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


def _padded_logps(model: Any, batch: list[Group]) -> torch.Tensor:
    """As `_packed_logps`, with one padded row per response."""
    ids, mask, sources, labels = _padded_row_ids(model, batch)
    hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return _label_logps(model, hidden.flatten(0, 1)[sources], labels)


def _full_logps(model: Any, batch: list[Group]) -> torch.Tensor:
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


_LOGPS: dict[Mode, Callable[[Any, list[Group]], torch.Tensor]] = {
    "packed": _packed_logps,
    "padded": _padded_logps,
    "full": _full_logps,
}
