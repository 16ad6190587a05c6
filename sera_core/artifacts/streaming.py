"""Read and write parquet by row group, so that memory does not grow with the number of rows.

A step keeps numbers (numpy) and ids of all rows in memory; texts and token ids are read by row group.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sera_core.artifacts.schema import ROW_GROUP, as_held

_GROUPS_HELD = 2
_MAX_BLOCKS = 64
_PLACE = "__place"


def row_groups(path: Path, schema: pa.Schema, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """The file's row groups in order, as tables of the schema's columns (or of the named ones)."""
    wanted = pa.schema([schema.field(name) for name in columns or schema.names])
    with pq.ParquetFile(path) as file:
        wanted = as_held(wanted, file.schema_arrow)
        for group in range(file.num_row_groups):
            yield (
                file.read_row_group(group, columns=wanted.names, use_threads=False)
                .select(wanted.names)
                .cast(wanted)
            )


def numbers(path: Path, schema: pa.Schema, name: str) -> np.ndarray:
    """A column of numbers, [row]; a null becomes nan (and the array float)."""
    pieces = [table[name].to_numpy() for table in row_groups(path, schema, [name])]
    return np.concatenate(pieces) if pieces else np.empty(0)


def strings(path: Path, schema: pa.Schema, name: str) -> np.ndarray:
    """A column of short strings (ids), [row], as numpy's fixed-width text."""
    pieces = [texts(table[name]) for table in row_groups(path, schema, [name])]
    return np.concatenate(pieces) if pieces else texts(pa.chunked_array([], pa.string()))


def texts(column: pa.ChunkedArray) -> np.ndarray:
    """Short strings without nulls, as numpy's fixed-width text."""
    return np.array(column.to_pylist(), dtype=np.str_)


class Lookup:
    """Index of each id in an array of distinct ids."""

    def __init__(self, ids: np.ndarray) -> None:
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]

    def places(self, wanted: np.ndarray) -> np.ndarray:
        """Index of each wanted id, int64 of wanted's shape; -1 if it is absent."""
        if not self._sorted.size:
            return np.full(wanted.shape, -1, dtype=np.int64)
        found = np.minimum(np.searchsorted(self._sorted, wanted), self._sorted.size - 1)
        return np.where(self._sorted[found] == wanted, self._order[found], -1)


class Rows:
    """Rows of a parquet file by number, with two row groups in memory.

    Any order works; roughly the file's order is fast.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self._file, self._columns = pq.ParquetFile(path), list(columns)
        meta = self._file.metadata
        sizes = [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._held: OrderedDict[int, pa.Table] = OrderedDict()

    def __len__(self) -> int:
        return self._file.metadata.num_rows

    def take(self, wanted: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
        """The rows with these numbers, in this order, as dictionaries."""
        asked = np.asarray(wanted, dtype=np.int64)
        groups = np.searchsorted(self._ends, asked, side="right")
        found: dict[int, dict[str, Any]] = {}
        for group in np.unique(groups).tolist():
            here = np.unique(asked[groups == group])
            table = self._group(group)
            first = int(self._ends[group]) - table.num_rows
            found.update(zip(here.tolist(), table.take(here - first).to_pylist(), strict=True))
        return [found[number] for number in asked.tolist()]

    def _group(self, number: int) -> pa.Table:
        if number not in self._held:
            while len(self._held) >= _GROUPS_HELD:
                self._held.popitem(last=False)
            self._held[number] = self._file.read_row_group(number, columns=self._columns, use_threads=False)
        self._held.move_to_end(number)
        return self._held[number]


class Writer:
    """Writes tables one by one; the file has the same bytes as one `schema.write_table` of all of them."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = 0
        self._schema, self._waiting = schema, schema.empty_table()
        self._file = pq.ParquetWriter(path, schema, compression="zstd", store_schema=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and (self._waiting.num_rows or not self.rows):
            self._file.write_table(self._waiting, row_group_size=ROW_GROUP)
        self._file.close()

    def write(self, table: pa.Table) -> None:
        """Add a table's rows; complete row groups are written to the file."""
        self.rows += table.num_rows
        waiting = pa.concat_tables([self._waiting, table.cast(self._schema)]).combine_chunks()
        whole = waiting.num_rows // ROW_GROUP * ROW_GROUP
        if whole:
            self._file.write_table(waiting.slice(0, whole), row_group_size=ROW_GROUP)
            waiting = waiting.slice(whole).combine_chunks()
        self._waiting = waiting


class Scatter:
    """Sorts rows by a given place, through blocks on disk.

    Args:
        folder: an empty folder for the blocks.
        total: number of rows; their places are 0 … total − 1, each once.
    """

    def __init__(self, folder: Path, schema: pa.Schema, total: int) -> None:
        groups = -(-total // ROW_GROUP)
        self._block = ROW_GROUP * max(1, -(-groups // _MAX_BLOCKS))
        self._schema = schema.append(pa.field(_PLACE, pa.int64()))
        self._paths = [folder / f"{number:02d}.arrow" for number in range(-(-total // self._block))]
        self._files: list[Any] = [pa.ipc.new_stream(path, self._schema) for path in self._paths]

    def add(self, places: np.ndarray, table: pa.Table) -> None:
        """Add rows with the place of each."""
        placed = table.append_column(_PLACE, pa.array(places, pa.int64())).cast(self._schema)
        blocks = places // self._block
        for block in np.unique(blocks).tolist():
            for batch in placed.take(np.flatnonzero(blocks == block)).to_batches():
                self._files[block].write_batch(batch)

    def tables(self) -> Iterator[pa.Table]:
        """All rows in order, a block at a time."""
        for file in self._files:
            file.close()
        for path in self._paths:
            with pa.ipc.open_stream(path) as stream:
                table = stream.read_all()
            yield table.take(np.argsort(table[_PLACE].to_numpy())).drop_columns([_PLACE])
