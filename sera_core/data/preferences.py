"""Pairs and prompts, and records of those that are dropped, with the reason."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sera_core.artifacts import canonical
from sera_core.data.sources import Row
from sera_core.errors import InputError

Message = dict[str, str]


@dataclass(frozen=True)
class Unread:
    """A row that was dropped before it could be parsed into a pair or a prompt."""

    row: Row
    pair_id: None = None

    @cached_property
    def prompt_id(self) -> str:
        """First 16 hex digits of the hash of the raw row, which has no prompt."""
        return canonical.sha256_json(json.loads(json.dumps(self.row.data, default=str)))[:16]


@dataclass(frozen=True)
class Prompt:
    """A prompt without answers."""

    prompt: list[Message]
    where: str = field(default="", compare=False)
    pair_id: None = None

    @cached_property
    def prompt_id(self) -> str:
        """First 16 hex digits of the hash of the prompt (DESIGN, section 4)."""
        return canonical.prompt_id(self.prompt)


@dataclass(frozen=True)
class Pair:
    """A prompt with a chosen and a rejected answer, each one assistant message.

    Attributes:
        format: `standard` if the row was plain text, else `conversational`; not part of pair_id.
        where: file and row, for messages.
        values: a user's columns by name, as they stand in the row: of the chosen and of the rejected answer.
    """

    format: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    where: str = field(default="", compare=False)
    values: Mapping[str, tuple[Any, Any]] = field(default_factory=dict, compare=False)

    @cached_property
    def pair_id(self) -> str:
        """First 16 hex digits of the hash of prompt, chosen and rejected."""
        return canonical.pair_id(self.prompt, self.chosen, self.rejected)

    @cached_property
    def prompt_id(self) -> str:
        """First 16 hex digits of the hash of the prompt."""
        return canonical.prompt_id(self.prompt)

    @property
    def row(self) -> dict[str, Any]:
        """The pair's columns in `schema.PAIRS`, but for token ids."""
        names = ("pair_id", "prompt_id", "format", "prompt", "chosen", "rejected")
        return {name: getattr(self, name) for name in names} | {"origin": "human", "round": 0}

    @property
    def turned(self) -> "Pair":
        """The pair with chosen and rejected swapped."""
        values = {name: (rejected, chosen) for name, (chosen, rejected) in self.values.items()}
        return Pair(self.format, self.prompt, self.rejected, self.chosen, self.where, values)


@dataclass(frozen=True)
class Drop:
    """A dropped pair or prompt, and why.

    Attributes:
        side: `train`, `heldout`, `test` or `prompts`: the side it was given for or assigned to.
        reason: `equal`, `duplicate`, `not_drawn`, `overlap`, `over_limit`, `tied_ratings` or one of
            `parsing.KINDS`.
    """

    side: str
    item: Pair | Prompt | Unread
    reason: str


# ------------------------------------------------------------------------------------------- degenerate pairs


def drop_degenerate(
    side: str, pairs: Iterable[Pair], on_equal: str = "drop"
) -> tuple[list[Pair], list[Drop]]:
    """Drop pairs with equal answers and all but the first of repeated pairs.

    Returns:
        the kept pairs, sorted by (prompt_id, pair_id), and the dropped ones.

    Raises:
        InputError: a pair has equal answers and on_equal = "refuse".
    """
    dropped, different = [], []
    for pair in pairs:
        if pair.chosen != pair.rejected:
            different.append(pair)
        elif on_equal == "refuse":
            raise InputError(
                f"{pair.where} (pair {pair.pair_id}): chosen and rejected are the same text; remove the row, "
                'or set data.on_equal = "drop"'
            )
        else:
            dropped.append(Drop(side, pair, "equal"))
    kept, repeated = _first_of_each(side, sorted(different, key=lambda pair: (*sort_key(pair), pair.format)))
    return kept, dropped + repeated


def drop_repeated_prompts(prompts: Iterable[Prompt]) -> tuple[list[Prompt], list[Drop]]:
    """Distinct prompts, sorted by prompt_id, and the repetitions."""
    return _first_of_each("prompts", sorted(prompts, key=sort_key))


def _first_of_each(side: str, items: Sequence[Any]) -> tuple[list[Any], list[Drop]]:
    kept, dropped, seen = [], [], set()
    for item in items:
        if sort_key(item) in seen:
            dropped.append(Drop(side, item, "duplicate"))
        else:
            seen.add(sort_key(item))
            kept.append(item)
    return kept, dropped


def sort_key(item: Pair | Prompt) -> tuple[str, str]:
    """Sort key of the rows in every file: (prompt_id, pair_id)."""
    return item.prompt_id, item.pair_id or ""


def under_both_labels(pairs: Sequence[Pair]) -> set[str]:
    """pair_ids of the pairs that also occur with chosen and rejected swapped."""
    ids = {pair.pair_id for pair in pairs}
    return {pair.pair_id for pair in pairs if pair.turned.pair_id in ids}
