"""How much is read of a file before it is refused: of any, and of one that holds far more than its size says.

A server may send without end, and what is larger than memory would end the process without a word. A
megabyte of gzip can hold a gigabyte, and a few hundred kilobytes of parquet millions of long rows.
"""

import faulthandler
import gzip
import io
import os
import resource
import signal
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, NoReturn

from sera_core.errors import InputError
from sera_core.guards.memory import main_memory

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

EXPANDED_VARIABLE, ROW_VARIABLE = "SERA_MAX_EXPANDED_BYTES", "SERA_MAX_ROW_BYTES"
PLAIN_BYTES = 2**32
"""Of a file, a download or a hub's data set."""
LEAST_EXPANDED = 2**28
EXPANSION = 200
"""A compressed file may hold so many times its own bytes, or `LEAST_EXPANDED` if that is more."""
ROW_BYTES = 64 * 2**20
DEPTH = 100
"""Levels of lists and objects in a row; messages have four."""
_PIECE = 2**20
_BATCH = 1024
_HELD = 3
"""How often a text file's bytes are in memory at once, at least: as bytes, as text and in its rows."""
_METADATA_SECONDS = 10.0
_VALUE_BYTES = 4
"""What the shortest value takes in memory, at least: its place."""


@dataclass(frozen=True)
class Limits:
    """What a file of rows may hold.

    Attributes:
        name: the file, for messages.
        held: its own bytes.
    """

    name: str
    held: int

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return _setting(ROW_VARIABLE, ROW_BYTES)

    @property
    def expanded(self) -> int:
        """Bytes of all that a compressed file holds."""
        return _setting(EXPANDED_VARIABLE, max(LEAST_EXPANDED, EXPANSION * self.held))

    def check_expanded(self, found: int, read: int = 0) -> None:
        """Refuse a file that expands to so many bytes or more, some of which are in memory already.

        Raises:
            InputError: they are more than allowed, or than fit into memory.
        """
        if found > (most := self.expanded):
            raise InputError(
                f"{self.name}: its {self.held:,} bytes expand to {found:,} or more, and at most {most:,} are "
                f"read; give it uncompressed or in several files, or set {EXPANDED_VARIABLE} if it is meant"
            )
        self._check_memory(found, read)

    @property
    def plain(self) -> int:
        """Bytes of a file as it is stored or sent."""
        return _setting(EXPANDED_VARIABLE, PLAIN_BYTES)

    def check_plain(self, found: int, read: int = 0) -> None:
        """Refuse a file, a download or a data set of so many bytes, some of which are in memory already.

        Raises:
            InputError: they are more than allowed, or than fit into memory.
        """
        if found > (most := self.plain):
            raise InputError(
                f"{self.name}: {found:,} bytes or more, and at most {most:,} are read; give it in several "
                f"files, or set {EXPANDED_VARIABLE} if it is meant"
            )
        self._check_memory(found, read)

    def _check_memory(self, found: int, read: int) -> None:
        if found > _PIECE and _HELD * found - read > (free := main_memory()[1]):
            raise InputError(
                f"{self.name}: its {found:,} bytes need {_HELD} times that of memory to be read, and "
                f"{max(0, free):,.0f} are available; give fewer rows, or take a machine with more memory"
            )

    def check_row(self, where: str, found: int) -> None:
        """Refuse a row of so many bytes.

        Raises:
            InputError: they are more than allowed.
        """
        if found > (most := self.row):
            raise InputError(
                f"{where}: a row of {found:,} bytes, and one may have {most:,}; shorten it or leave it out, "
                f"or set {ROW_VARIABLE} if it is meant"
            )

    def check_text_row(self, where: str, text: str) -> None:
        """The same of a row that is written as text; cheap for a short one."""
        if len(text) * 4 > self.row:  # UTF-8 has at most four bytes a character
            self.check_row(where, len(text.encode("utf-8", "surrogatepass")))


def read_limited(name: str, stream: IO[bytes]) -> bytes:
    """All of a stream, which may turn out to have no end.

    Raises:
        InputError: it has more than allowed.
    """
    limits, pieces, found = Limits(name, 0), [], 0
    while piece := stream.read(_PIECE):
        found += len(piece)
        limits.check_plain(found, found)
        pieces.append(piece)
    return b"".join(pieces)


def _setting(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise InputError(f"{variable}={text!r}: not a number of bytes above 0; correct it, or unset it")
    return int(text)


def check_depth(where: str, value: Any) -> None:
    """Refuse a row whose lists and objects lie too deep in each other.

    Raises:
        InputError: deeper than `DEPTH` levels.
    """
    if is_deep(value):
        raise InputError(
            f"{where}: lists and objects nested more than {DEPTH} deep, which no row of messages is; "
            "correct the row"
        )


def is_deep(value: Any) -> bool:
    """Whether lists and objects lie in each other for more than `DEPTH` levels."""
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        if (depth := depth + 1) > DEPTH:
            return True
    return False


def check_rows(name: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows that come as values, such as a hub's, each with where it stands, while they are within the limits.

    Raises:
        InputError: one, or all together, have more bytes than allowed, or one is nested too deep.
    """
    limits, found = Limits(name, 0), 0
    for where, row in rows:
        check_depth(where, row)
        size = _bytes_of(row)
        limits.check_row(where, size)
        if (found := found + size) > limits.plain:
            limits.check_plain(found)
        yield where, row


def _bytes_of(row: Any) -> int:
    """Bytes of a row's texts, and what its other values take at least."""
    size, waiting = 0, [row]
    while waiting:
        value = waiting.pop()
        if isinstance(value, (str, bytes)):
            size += len(value)
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, list):
            waiting += value
        size += _VALUE_BYTES
    return size


def _inside(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in inner if isinstance(item, (dict, list))]


def unzipped(name: str, data: bytes) -> bytes:
    """What a gzip file holds, read piece by piece.

    Raises:
        InputError: it is none, not complete, or holds more than allowed.
    """
    limits, pieces, found = Limits(name, len(data)), [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            while piece := stream.read(_PIECE):
                found += len(piece)
                limits.check_expanded(found, found)
                pieces.append(piece)
    except InputError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{name}: not a complete gzip file ({error}); write it again") from error
    return b"".join(pieces)


def parquet_rows(name: str, held: int, file: "pq.ParquetFile") -> Iterator[dict[str, Any]]:
    """The rows of a parquet file, in batches whose bytes are counted before they become Python's.

    Args:
        name: the file, for messages.
        held: its own bytes.
        file: it, opened.

    Raises:
        InputError: it, or one of its rows, holds more than allowed.
    """
    limits, found, number = Limits(name, held), 0, 0
    _try_metadata(name, file)
    _check_metadata(limits, file)
    for group in range(file.num_row_groups):
        for batch in file.iter_batches(_batch_rows(limits, file, group), row_groups=[group]):
            plain = _without_dictionaries(batch)
            found += plain.nbytes
            limits.check_expanded(found, found)
            if plain.nbytes > limits.row:
                for row in range(plain.num_rows):
                    limits.check_row(f"{name} row {number + row + 1}", plain.slice(row, 1).nbytes)
            number += plain.num_rows
            yield from plain.to_pylist()


def _try_metadata(name: str, file: "pq.ParquetFile") -> None:
    """Read what the file says of its columns in a copy of this process first.

    pyarrow ends the whole process where a column's part of the metadata is damaged: it does not catch the
    exception of its own C++ library there.

    Raises:
        InputError: the copy was ended.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the copy needs none of them
        child = os.fork()
    if child == 0:
        _end_after(lambda: _column_values(file))
    until = time.monotonic() + _METADATA_SECONDS
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.0005)
    if os.WIFSIGNALED(ended[1]) and os.WTERMSIG(ended[1]) != signal.SIGKILL:  # by us: a busy machine
        raise InputError(f"{name}: not a readable parquet file (its metadata is damaged); write it again")


def _end_after(work: Callable[[], object]) -> NoReturn:
    """Do the work in a copy of the process and end it there, without a word on stderr or a core file."""
    try:
        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work()
    finally:
        os._exit(0)


def _column_values(file: "pq.ParquetFile") -> int:
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    return sum(group.column(column).num_values for group in groups for column in range(group.num_columns))


def _check_metadata(limits: Limits, file: "pq.ParquetFile") -> None:
    """What the file says of itself, before any of it is read."""
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    held = _VALUE_BYTES * _column_values(file)
    limits.check_expanded(max(sum(group.total_byte_size for group in groups), held))
    for column in range(len(file.schema)):
        if (depth := file.schema.column(column).path.count(".")) > DEPTH:
            raise InputError(
                f"{limits.name}: a column nested {depth} deep, and at most {DEPTH} are read; correct the file"
            )


def _batch_rows(limits: Limits, file: "pq.ParquetFile", group: int) -> int:
    """Rows read at a time: no value is longer than its group, so that many rows stay below the limit."""
    return max(1, min(_BATCH, limits.expanded // max(file.metadata.row_group(group).total_byte_size, 1)))


def _without_dictionaries(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """The batch with repeated values written out: they are counted as often as they are read."""
    import pyarrow as pa

    columns = [c.dictionary_decode() if isinstance(c, pa.DictionaryArray) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
