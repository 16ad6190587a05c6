"""Read and write parquet by row group, so that memory does not grow with the number of rows.

A step keeps numbers (numpy) and ids of all rows in memory; texts and token ids are read by row group.

A table is one parquet file, also with millions of rows. Its row groups are written one after another and
read from any place, so several files a table would need no less memory, and each would cost a record and a
hash. Only the footer is read whole, and grows with the row groups.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from sera_core.artifacts.schema import ROW_GROUP, as_held, open_writer, row_group
from sera_core.method.ordinals import hex_numbers

compute: Any = pyarrow.compute
"""Arrow's functions, which it makes when it is imported, so that type checkers do not know them."""
_GROUPS_HELD = 2
_MAX_BLOCKS = 64
_PLACE = "__place"
_YIELDED = 16 * ROW_GROUP
JOINED = 2 * 2**20
"""`size` of `row_groups` where no row is turned into Python's objects."""


def row_groups(
    path: Path, schema: pa.Schema, columns: Sequence[str] | None = None, size: int = 0
) -> Iterator[pa.Table]:
    """The file's rows in order, as tables of the schema's columns (or of the named ones), a row group each.

    Args:
        size: join row groups up to so many bytes of uncompressed data (all columns), which is faster where
            rows are short; 0: never.
    """
    with pq.ParquetFile(path) as file:
        wanted = as_held(
            pa.schema([schema.field(name) for name in columns or schema.names]), file.schema_arrow
        )
        yield from _ahead(_read(file, groups, wanted) for groups in _together(file.metadata, size))


def _read(file: pq.ParquetFile, groups: list[int], wanted: pa.Schema) -> pa.Table:
    table = file.read_row_groups(groups, columns=wanted.names, use_threads=False)
    return table.select(wanted.names).cast(wanted)


def _ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The tables; a thread makes the next one while the caller works on one."""
    with ThreadPoolExecutor(1, thread_name_prefix="sera-ahead") as thread:
        coming = thread.submit(next, tables, None)
        while (table := coming.result()) is not None:
            coming = thread.submit(next, tables, None)
            yield table


def _together(meta: pq.FileMetaData, most: int) -> Iterator[list[int]]:
    """Numbers of the row groups that are read together."""
    groups, size = list[int](), 0
    for number in range(meta.num_row_groups):
        more = meta.row_group(number).total_byte_size
        if groups and size + more > most:
            yield groups
            groups, size = [], 0
        groups.append(number)
        size += more
    if groups:
        yield groups


def column(path: Path, schema: pa.Schema, name: str) -> pa.ChunkedArray:
    """A whole column."""
    return columns(path, schema, [name])[0]


def columns(path: Path, schema: pa.Schema, names: Sequence[str]) -> list[pa.ChunkedArray]:
    """Whole columns, in the order of their names; faster than one by one, because the footer is read once."""
    with pq.ParquetFile(path) as file:
        table = file.read(columns=list(names), use_threads=False)
    return [table[name].cast(schema.field(name).type) for name in names]


def numbers(path: Path, schema: pa.Schema, name: str) -> np.ndarray:
    """A column of numbers, [row]; a null becomes nan (and the array float)."""
    return values(column(path, schema, name))


def values(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers in memory, as `numbers`."""
    return column.to_numpy() if len(column) else np.empty(0)


def strings(path: Path, schema: pa.Schema, name: str) -> np.ndarray:
    """A column of short strings (ids), [row], as numpy's fixed-width text."""
    return texts(column(path, schema, name))


def texts(column: pa.ChunkedArray) -> np.ndarray:
    """Short strings without nulls, as numpy's fixed-width text."""
    found = keys(column)
    plain = not (np.ascontiguousarray(found).view(np.uint8) > 127).any()
    return found.astype(np.str_) if plain else np.char.decode(found, "utf-8")


def keys(column: pa.ChunkedArray) -> np.ndarray:
    """Short strings without nulls, as numpy's fixed-width UTF-8 bytes, which sort as the strings do."""
    pieces = [_fixed_width(chunk) for chunk in column.chunks if len(chunk)]
    return np.concatenate(pieces) if pieces else np.empty(0, dtype="S1")


def _fixed_width(chunk: pa.StringArray) -> np.ndarray:
    """One piece; strings of one length are taken as they lie in memory."""
    span = compute.min_max(compute.binary_length(chunk))
    width = span["max"].as_py()
    if width and span["min"].as_py() == width and not chunk.null_count:
        _, ends, data = chunk.buffers()
        first = np.frombuffer(ends, dtype=np.int32)[chunk.offset]
        return np.frombuffer(data, dtype=f"S{width}", count=len(chunk), offset=first)
    return np.array(chunk.cast(pa.binary()).to_pylist(), dtype=np.bytes_)


class Lookup:
    """Index of each id in an array of ids; of equal ones, the first."""

    def __init__(self, ids: np.ndarray) -> None:
        """`ids`: texts, UTF-8 bytes or numbers; what is looked up must be of the same kind."""
        found, fits = hex_numbers(ids)
        self._hex = bool(fits.all())
        held = found if self._hex else ids
        self._order = np.argsort(held, kind="stable")
        self._sorted = held[self._order]

    def places(self, wanted: np.ndarray) -> np.ndarray:
        """Index of each wanted id, int64 of wanted's shape; -1 if it is absent."""
        if not self._sorted.size:
            return np.full(wanted.shape, -1, dtype=np.int64)
        asked, fits = hex_numbers(wanted) if self._hex else (wanted, True)
        found = np.minimum(np.searchsorted(self._sorted, asked), self._sorted.size - 1)
        return np.where(fits & (self._sorted[found] == asked), self._order[found], -1)


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
    """Writes tables one by one; the file has the same bytes as one `schema.write_table` of all of them.

    A thread compresses a table while the caller makes the next one.
    """

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.rows = 0
        self._path, self._schema, self._group = path, schema, row_group(schema)
        self._waiting: list[pa.Table] = [schema.empty_table()]
        self._file: pq.ParquetWriter | None = None  # opened when it is known whether the table is short
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sera-parquet")
        self._writing: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
                if self._rows_waiting() or not self.rows:
                    self._write(pa.concat_tables(self._waiting))
        finally:
            self._thread.shutdown()
            if self._file is not None:
                self._file.close()

    def write(self, table: pa.Table) -> None:
        """Add a table's rows; complete row groups are written to the file."""
        self._finish()
        self.rows += table.num_rows
        if (
            self._rows_waiting() + table.num_rows <= self._group
        ):  # too little for the thread, or for the layout
            self._waiting.append(table.cast(self._schema))
        else:
            self._writing = self._thread.submit(self._append, table)

    def _rows_waiting(self) -> int:
        return sum(table.num_rows for table in self._waiting)

    def _append(self, table: pa.Table) -> None:
        waiting = pa.concat_tables([*self._waiting, table.cast(self._schema)])
        whole = waiting.num_rows // self._group * self._group
        self._write(waiting.slice(0, whole))
        self._waiting = [waiting.slice(whole).combine_chunks()]

    def _write(self, table: pa.Table) -> None:
        if self._file is None:
            self._file = open_writer(self._path, self._schema, self.rows)
        self._file.write_table(table.combine_chunks(), row_group_size=self._group)

    def _finish(self) -> None:
        """Wait for the thread, and raise its error."""
        if self._writing is not None:
            self._writing.result()
            self._writing = None


class Scatter:
    """Sorts rows by a given place, through blocks on disk. Several threads may add rows.

    Args:
        folder: an empty folder for the blocks.
        total: number of rows; their places are 0 … total − 1, each once.
    """

    def __init__(self, folder: Path, schema: pa.Schema, total: int) -> None:
        groups = -(-total // ROW_GROUP)
        self._block = ROW_GROUP * max(1, -(-groups // _MAX_BLOCKS))
        self.schema = schema
        self._placed, self._adding = schema.append(pa.field(_PLACE, pa.int64())), Lock()
        self._paths = [folder / f"{number:02d}.arrow" for number in range(-(-total // self._block))]
        self._files: list[Any] = [pa.ipc.new_stream(path, self._placed) for path in self._paths]

    def add(self, places: np.ndarray, table: pa.Table) -> None:
        """Add rows with the place of each; fastest if the places ascend."""
        blocks = places // self._block
        placed = table.append_column(_PLACE, pa.array(places, pa.int64())).cast(self._placed)
        if (np.diff(blocks) < 0).any():
            order = np.argsort(blocks, kind="stable")
            placed, blocks = placed.combine_chunks().take(order), blocks[order]
        found, starts = np.unique(blocks, return_index=True)
        with self._adding:
            for block, start, end in zip(found, starts, [*starts[1:], blocks.size], strict=True):
                for batch in placed.slice(start, end - start).to_batches():
                    self._files[block].write_batch(batch)

    def tables(self) -> Iterator[pa.Table]:
        """All rows in order; a block is in memory at a time."""
        for file in self._files:
            file.close()
        for path in self._paths:
            with pa.ipc.open_stream(path) as stream:
                table = stream.read_all()
            table = table.take(np.argsort(table[_PLACE].to_numpy())).drop_columns([_PLACE])
            for start in range(0, table.num_rows, _YIELDED):
                yield table.slice(start, _YIELDED)
