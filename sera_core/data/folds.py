"""Folds of the human pairs for cross-fitting: a pair is reviewed by a policy that was not trained on it.

A prompt group (`data.splitting`) is in one fold with all its pairs, in every round. The fold is drawn from
the run's seed and the group alone, so no step needs the other groups; folds are about equally large.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.data.preferences import Message
from sera_core.data.splitting import group_key
from sera_core.errors import InputError


@dataclass(frozen=True)
class Fold:
    """One of `of` folds: number `out`, from 0. Its policy is trained without the pairs of the fold."""

    of: int
    out: int
    seed: int
    """The run's seed."""

    @classmethod
    def every(cls, of: int, seed: int) -> "list[Fold]":
        """All folds."""
        return [cls(of, out, seed) for out in range(of)]

    def holds(self, prompt: Sequence[Message]) -> bool:
        """Whether the pairs of this prompt are in the fold."""
        return fold_number(self.of, self.seed, group_key(prompt)) == self.out

    def rows(self, pairs: Path) -> Int[np.ndarray, " row"]:
        """Numbers of the rows of a file of pairs (column `prompt`) that are in the fold, ascending."""
        prompts = schema.iter_rows(pairs, ["prompt"])
        return np.flatnonzero(np.array([self.holds(row["prompt"]) for row in prompts], dtype=bool))


def fold_of(fields: Mapping[str, Any]) -> Fold | None:
    """The fold in a step's fields; None if the step is not of one."""
    return Fold(**fields["fold"]) if "fold" in fields else None


def fold_number(of: int, seed: int, group: str) -> int:
    """The fold that a prompt group is in, from 0."""
    return derived_seed("fold", seed, group) % of


def refuse_empty_folds(pairs: Path, of: int, seed: int, left: str) -> None:
    """Refuse pairs that do not fill the folds.

    Args:
        pairs: a file with the column `prompt`.
        of: number of folds.
        seed: the run's seed.
        left: what the pairs are left of, for the message.

    Raises:
        InputError: fewer prompts than folds, or a fold without pairs; with the counts.
    """
    pairs_of = Counter(group_key(row["prompt"]) for row in schema.iter_rows(pairs, ["prompt"]))
    sizes = [0] * of
    for group, count in pairs_of.items():
        sizes[fold_number(of, seed, group)] += count
    if len(pairs_of) >= of and all(sizes):
        return
    raise InputError(
        f"review.crossfit = {of}: the {sum(sizes)} train pairs {left} have {len(pairs_of)} different prompts "
        f"and make folds of {', '.join(map(str, sizes))} pairs, but each fold needs one; lower "
        "review.crossfit, add prompts, or change the seed"
    )
