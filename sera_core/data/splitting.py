"""Split into train, held-out and test by prompt group. The split depends on content, not on row order.

A *group* is all prompts with the same first user turn after NFKC, lower-casing and collapsing white space. No
group is on two sides. Random draws take the items with the smallest seeded hash.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from sera_core.artifacts.canonical import derived_seed
from sera_core.data.preferences import Drop, Message, Pair, Prompt, sort_key, under_both_labels
from sera_core.errors import InputError
from sera_core.method.selection import round_half_up

Item = TypeVar("Item", Pair, Prompt)
Side = Literal["train", "heldout", "test"]
CONVERSATIONS = "sft"
"""Side of the conversations of `start.sft`, for `remove_overlap`."""


def group_key(prompt: Sequence[Message]) -> str:
    """First 16 hex digits of the sha256 of the first user turn (NFKC, lower case, white space collapsed)."""
    turn = next(message["content"] for message in prompt if message["role"] == "user")
    folded = " ".join(unicodedata.normalize("NFKC", turn).lower().split())
    return hashlib.sha256(folded.encode()).hexdigest()[:16]


def groups_of(items: Iterable[Pair | Prompt]) -> set[str]:
    """Group keys of the items."""
    return {group_key(item.prompt) for item in items}


def split_groups(
    pairs: Sequence[Pair], heldout_fraction: float, test_fraction: float, seed: int
) -> dict[Side, list[Pair]]:
    """Split pairs into sides by whole groups.

    A fraction above 0 gives at least one group if there are two or more. Held-out groups come from one end of
    the seeded order and test groups from the other, so that changing one fraction does not change the other
    side.

    Raises:
        InputError: no group would be left for training.
    """
    groups = sorted(groups_of(pairs), key=_hashed(seed, "split"))
    heldout, test = (_group_count(fraction, len(groups)) for fraction in (heldout_fraction, test_fraction))
    if heldout + test >= len(groups):
        raise InputError(
            f"data: {len(groups)} different prompts are too few: {heldout} held out and {test} for the test "
            "side leave none for training; add prompts, or lower data.heldout_fraction or "
            "data.test_fraction"
        )
    side_of: dict[str, Side] = dict.fromkeys(groups, "train")
    side_of |= dict.fromkeys(groups[:heldout], "heldout")
    side_of |= dict.fromkeys(groups[len(groups) - test :], "test")
    sides: dict[Side, list[Pair]] = {"train": [], "heldout": [], "test": []}
    for pair in pairs:
        sides[side_of[group_key(pair.prompt)]].append(pair)
    return sides


def subset(items: Sequence[Item], count: int, seed: int, purpose: str) -> tuple[list[Item], list[Item]]:
    """A seeded subset of at most `count` items, and the rest; both in input order.

    Args:
        purpose: draws with different purposes are independent of each other.
    """
    key = _hashed(seed, purpose)
    drawn = set(sorted(range(len(items)), key=lambda i: key(*sort_key(items[i])))[:count])
    taken = [item for i, item in enumerate(items) if i in drawn]
    return taken, [item for i, item in enumerate(items) if i not in drawn]


def share(items: Sequence[Item], weight: float, seed: int) -> tuple[list[Item], list[Item]]:
    """A seeded share of a source's rows (at least one row), and the rest."""
    return subset(items, max(1, round_half_up(weight * len(items))), seed, "weight")


def remove_overlap(
    items: Sequence[Item],
    others: Mapping[str, Sequence[Pair | Prompt]],
    *,
    side: str,
    on_overlap: str,
) -> tuple[list[Item], list[Drop]]:
    """Remove prompt groups from a side that other given sources contain too, or refuse them.

    Args:
        items: the side to remove from.
        others: the other given sources by name.
        side: name of the side to remove from.
        on_overlap: `refuse`, `drop` (from `items`), or `keep` (allow shared groups).

    Raises:
        InputError: groups are shared and on_overlap = "refuse"; the message has counts and an example.
    """
    if on_overlap == "keep":
        return list(items), []
    keys = [group_key(item.prompt) for item in items]
    taken: set[str] = set()
    for name, other in others.items():
        groups = groups_of(other)
        shared = [item for item, key in zip(items, keys, strict=True) if key in groups]
        if shared and on_overlap == "refuse":
            raise InputError(_overlap_message(side, shared, name, len(groups)))
        taken |= groups
    kept = [item for item, key in zip(items, keys, strict=True) if key not in taken]
    return kept, [Drop(side, item, "overlap") for item, key in zip(items, keys, strict=True) if key in taken]


def _overlap_message(side: str, shared: Sequence[Pair | Prompt], name: str, groups: int) -> str:
    first = min(shared, key=sort_key)
    what = f"pair {first.pair_id}" if first.pair_id else f"prompt {first.prompt_id}"
    noun, given = "prompts" if side == "prompts" else "pairs", f"data.{side}"
    if side == CONVERSATIONS:
        what, noun, given = f"conversation {first.prompt_id}", "conversations", "start.sft"
    return (
        f"data.{name} shares {len(groups_of(shared))} of its {groups} different prompts with {given}, "
        f"where {len(shared)} {noun} have them; the first is {what} ({first.where}). Remove them from one of "
        f'the two, or set data.on_overlap = "drop" to remove them from {given}'
    )


def flip_labels(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[str]]:
    """Flip the labels of a seeded share of pairs (for experiments with known label noise).

    A pair that occurs with both labels is never flipped, because flipping one would duplicate the other.

    Returns:
        the pairs, and the sorted pair_ids (after flipping) of the round(fraction · n) flipped pairs.
    """
    twins = under_both_labels(pairs)
    candidates = [pair for pair in pairs if pair.pair_id not in twins]
    drawn, _ = subset(candidates, round_half_up(fraction * len(pairs)), seed, "flip")
    chosen = {pair.pair_id for pair in drawn}
    turned = [pair.turned if pair.pair_id in chosen else pair for pair in pairs]
    return turned, sorted(pair.turned.pair_id for pair in drawn)


def _group_count(fraction: float, groups: int) -> int:
    if fraction == 0 or groups < 2:
        return 0
    return max(1, round_half_up(fraction * groups))


def _hashed(seed: int, purpose: str) -> Callable[..., Any]:
    """A sort key: a seeded hash of the ids, then the ids themselves."""
    return lambda *ids: (derived_seed(seed, purpose, *ids), ids)
