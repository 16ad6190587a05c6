"""The pairs a round trains on, and the order it sees them in."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.errors import InputError

ORIGINS = ("human", "generated")
COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]


@dataclass(frozen=True)
class Mixture:
    """The pairs trained on, in the file's order."""

    table: pa.Table
    pair_ids: list[str]

    @classmethod
    def read(cls, path: Path, needs_reference: bool, smoothing: Mapping[str, float]) -> "Mixture":
        """Read mixture.parquet.

        Args:
            smoothing: label smoothing of the pairs by origin.

        Raises:
            InputError: a pair has no finite reference log-probability.
        """
        table = schema.read_table(path, schema.MIXTURE)
        pair_ids, origins = table.column("pair_id").to_pylist(), table.column("origin").to_pylist()
        smoothings = pa.array([smoothing[origin] for origin in origins], pa.float64())
        table = table.select(COLUMNS)
        for name in COLUMNS[3:]:
            values = table.column(name).to_pylist()
            if not needs_reference:
                values = [0.0] * len(values)
            for pair_id, value in zip(pair_ids, values, strict=True):
                if value is None or not math.isfinite(value):
                    raise InputError(
                        f"pair {pair_id}: {name} is {value}; score the mixture's reference again"
                    )
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values, pa.float64()))
        table = table.append_column("label_smoothing", smoothings)
        return cls(table.append_column("row", pa.array(range(len(pair_ids)), pa.int64())), pair_ids)

    @cached_property
    def lengths(self) -> list[tuple[int, ...]]:
        """Tokens of prompt, chosen and rejected of each pair."""
        columns = ([len(ids) for ids in self.table.column(name).to_pylist()] for name in COLUMNS[:3])
        return list(zip(*columns, strict=True))

    @cached_property
    def tokens(self) -> list[int]:
        """Training tokens of each pair: 2|x| + |y_w| + |y_l|, a shared prompt counted twice."""
        return [2 * prompt + chosen + rejected for prompt, chosen, rejected in self.lengths]

    @cached_property
    def longest(self) -> int:
        """Positions of the longest pair, its prompt computed once."""
        return max(map(sum, self.lengths))

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with one of its answers."""
        return max(prompt + max(chosen, rejected) for prompt, chosen, rejected in self.lengths)

    def refuse_lengths(self, positions: int | None) -> None:
        """Refuse empty sequences and those longer than the model's positions; nothing is truncated.

        Raises:
            InputError: a pair is empty or too long; the message names it.
        """
        for pair_id, (prompt, chosen, rejected) in zip(self.pair_ids, self.lengths, strict=True):
            if 0 in (prompt, chosen, rejected):
                raise InputError(f"pair {pair_id}: prompt, chosen or rejected has no tokens; drop the pair")
            longest = prompt + max(chosen, rejected)
            if positions is not None and longest > positions:
                raise InputError(
                    f"pair {pair_id}: {longest} tokens, but the model has {positions} positions; lower "
                    "data.max_prompt_tokens or data.max_response_tokens"
                )


def fold_order(
    tokens: Sequence[int],
    outside: Sequence[int],
    folds: int,
    batch: int,
    epochs: int,
    seed: Sequence[int],
    budget: int | None = None,
) -> list[int]:
    """Rows in training order of a policy trained without one fold, for 1/folds of the round's tokens.

    Args:
        tokens: training tokens of each row of the whole mixture.
        outside: rows that are not in the fold, ascending.
        folds: number of folds.
        batch, epochs, seed, budget: of the round's own training, as in `training_order`.
    """
    spent = sum(tokens[row] for row in training_order(tokens, batch, epochs, seed, budget))
    part = math.ceil(spent / folds)
    return [outside[row] for row in training_order([tokens[row] for row in outside], batch, 1, seed, part)]


def training_order(
    tokens: Sequence[int], batch: int, epochs: int, seed: Sequence[int], budget: int | None = None
) -> list[int]:
    """Rows in training order: the first pass in the file's order, later passes shuffled.

    Args:
        tokens: training tokens of each row.
        batch: pairs per optimizer step.
        epochs: number of passes, unless there is a budget.
        seed: seed of the shuffles, combined with the pass number.
        budget: training tokens; the order ends with the first batch that reaches it.
    """
    order: list[int] = []
    passes = 0
    while tokens and (passes < epochs if budget is None else sum(tokens[row] for row in order) < budget):
        rows = list(range(len(tokens)))
        if passes:
            random.Random(derived_seed("pass", *seed, passes)).shuffle(rows)
        order, passes = order + rows, passes + 1
    if budget is None:
        return order
    seen = 0
    for start in range(0, len(order), batch):
        seen += sum(tokens[row] for row in order[start : start + batch])
        if seen >= budget:
            return order[: start + batch]
    return order
