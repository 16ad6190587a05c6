"""The pairs a round trains on, and the order it sees them in."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.artifacts.streaming import Rows, column, compute, keys, row_groups
from sera_core.errors import InputError

if TYPE_CHECKING:
    from datasets import Dataset

ORIGINS = ("human", "generated")
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCES = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass(frozen=True)
class Mixture:
    """The pairs trained on, in the file's order. Ids and lengths are in memory, token ids stay in files."""

    path: Path
    pair_ids: np.ndarray
    """In UTF-8."""
    lengths: np.ndarray
    """Tokens of prompt, chosen and rejected of each pair, [pair, 3]."""
    needs_reference: bool
    smoothing: Mapping[str, float]

    @classmethod
    def read(cls, path: Path, needs_reference: bool, smoothing: Mapping[str, float]) -> "Mixture":
        """Read mixture.parquet.

        Args:
            smoothing: label smoothing of the pairs by origin.

        Raises:
            InputError: a pair has no finite reference log-probability.
        """
        pair_ids = keys(column(path, schema.MIXTURE, "pair_id"))
        for name in REFERENCES if needs_reference else ():
            values = column(path, schema.MIXTURE, name)
            finite = compute.fill_null(compute.is_finite(values), False).to_numpy()
            if not finite.all():
                row = int(np.argmin(finite))
                raise InputError(
                    f"pair {pair_ids[row].decode()}: {name} is {values[row].as_py()}; score the mixture's "
                    "reference again"
                )
        pieces = [_lengths(table) for table in row_groups(path, schema.MIXTURE, IDS)]
        lengths = np.concatenate([np.empty((0, 3), dtype=np.int64), *pieces])
        return cls(path, pair_ids, lengths, needs_reference, smoothing)

    def pair_id(self, row: int) -> str:
        """The id of the pair in this row."""
        return self.pair_ids[row].decode()

    @cached_property
    def tokens(self) -> list[int]:
        """Training tokens of each pair: 2|x| + |y_w| + |y_l|, a shared prompt counted twice."""
        return (self.lengths @ np.array([2, 1, 1])).tolist()

    @cached_property
    def longest(self) -> int:
        """Positions of the longest pair, its prompt computed once."""
        return int(self.lengths.sum(axis=1).max())

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest prompt with one of its answers."""
        return int(self._sequences().max())

    def _sequences(self) -> np.ndarray:
        """Tokens of each prompt with the longer of its answers."""
        return self.lengths[:, 0] + self.lengths[:, 1:].max(axis=1)

    def refuse_lengths(self, positions: int | None) -> None:
        """Refuse empty sequences and those longer than the model's positions; nothing is truncated.

        Raises:
            InputError: a pair is empty or too long; the message names it.
        """
        empty, sequences = (self.lengths == 0).any(axis=1), self._sequences()
        wrong = empty if positions is None else empty | (sequences > positions)
        if not wrong.any():
            return
        row = int(np.argmax(wrong))
        if empty[row]:
            raise InputError(
                f"pair {self.pair_id(row)}: prompt, chosen or rejected has no tokens; drop the pair"
            )
        raise InputError(
            f"pair {self.pair_id(row)}: {sequences[row]} tokens, but the model has {positions} positions; "
            "lower data.max_prompt_tokens or data.max_response_tokens"
        )

    def take(self, rows: Sequence[int]) -> list[dict[str, Any]]:
        """Token ids of a few pairs."""
        return Rows(self.path, IDS).take(rows)

    def dataset(self, folder: Path) -> "Dataset":
        """The pairs as the trainer takes them, mapped into memory from a file that is written to `folder`."""
        from datasets import Dataset
        from datasets.table import MemoryMappedTable

        file, first = folder / "pairs.arrow", 0
        with pa.ipc.new_stream(file, _training_schema()) as out:
            for table in row_groups(self.path, schema.MIXTURE, ["origin", *IDS, *REFERENCES]):
                out.write_table(self._training_rows(table, first))
                first += table.num_rows
        return Dataset(MemoryMappedTable.from_file(str(file)))

    def _training_rows(self, table: pa.Table, first: int) -> pa.Table:
        rows, references = table.num_rows, list(REFERENCES)
        columns = {name: table[name] for name in IDS}
        columns |= {n: table[n] if self.needs_reference else pa.repeat(0.0, rows) for n in references}
        columns["label_smoothing"] = pa.array(
            [self.smoothing[origin] for origin in table["origin"].to_pylist()]
        )
        columns["row"] = pa.array(np.arange(first, first + rows))
        return schema.table(_training_schema(), columns)


def _lengths(table: pa.Table) -> np.ndarray:
    """Tokens of each pair's texts, [pair, 3]."""
    columns = [compute.list_value_length(table[name]).to_numpy() for name in IDS]
    return np.stack(columns, axis=1).astype(np.int64)


def _training_schema() -> pa.Schema:
    """What the trainer sees of a pair."""
    mixed = [schema.MIXTURE.field(name) for name in (*IDS, *REFERENCES)]
    return pa.schema([*mixed, pa.field("label_smoothing", pa.float64()), pa.field("row", pa.int64())])


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
