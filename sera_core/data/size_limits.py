"""Size limits for data files, plain and compressed.

A server may send data without end, and a file larger than memory would kill the process without a message.
A megabyte of gzip can expand to a gigabyte, and a few hundred kilobytes of parquet to millions of long rows.
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
"""Default limit in bytes of a file, a download or a hub data set."""
LEAST_EXPANDED = 2**28
EXPANSION = 200
"""A compressed file may expand to this many times its size, or `LEAST_EXPANDED` if that is more."""
ROW_BYTES = 64 * 2**20
DEPTH = 100
"""Maximum nesting of lists and objects in a row; messages have four levels."""
_PIECE = 2**20
_BATCH = 1024
_HELD = 3
"""Minimum number of copies of a text file in memory: as bytes, as text and as rows."""
_METADATA_SECONDS = 10.0
_VALUE_BYTES = 4
"""Minimum bytes of a value in memory: its pointer."""


@dataclass(frozen=True)
class Limits:
    """Size limits for one file.

    Attributes:
        name: the file, for messages.
        held: its size in bytes.
    """

    name: str
    held: int

    @property
    def row(self) -> int:
        """Maximum bytes of a row."""
        return _setting(ROW_VARIABLE, ROW_BYTES)

    @property
    def expanded(self) -> int:
        """Maximum bytes of a compressed file after decompression."""
        return _setting(EXPANDED_VARIABLE, max(LEAST_EXPANDED, EXPANSION * self.held))

    def check_expanded(self, found: int, read: int = 0) -> None:
        """Refuse a file that expands to `found` bytes or more, `read` of which are already in memory.

        Raises:
            InputError: more than allowed, or than memory can hold.
        """
        if found > (most := self.expanded):
            raise InputError(
                f"{self.name}: its {self.held:,} bytes expand to {found:,} or more, above the limit of "
                f"{most:,}; decompress it, split it into several files, or raise {EXPANDED_VARIABLE}"
            )
        self._check_memory(found, read)

    @property
    def plain(self) -> int:
        """Maximum bytes of a file as stored or sent."""
        return _setting(EXPANDED_VARIABLE, PLAIN_BYTES)

    def check_plain(self, found: int, read: int = 0) -> None:
        """Refuse a file, download or data set of `found` bytes, `read` of which are already in memory.

        Raises:
            InputError: more than allowed, or than memory can hold.
        """
        if found > (most := self.plain):
            raise InputError(
                f"{self.name}: {found:,} bytes or more, above the limit of {most:,}; split it into several "
                f"files, or raise {EXPANDED_VARIABLE}"
            )
        self._check_memory(found, read)

    def _check_memory(self, found: int, read: int) -> None:
        if found > _PIECE and _HELD * found - read > (free := main_memory()[1]):
            raise InputError(
                f"{self.name}: reading its {found:,} bytes needs {_HELD} times as much memory, but "
                f"{max(0, free):,.0f} bytes are available; use fewer rows or a machine with more memory"
            )

    def check_row(self, where: str, found: int) -> None:
        """Refuse a row of too many bytes.

        Raises:
            InputError: it has more than allowed.
        """
        if found > (most := self.row):
            raise InputError(
                f"{where}: a row of {found:,} bytes, above the limit of {most:,}; shorten or remove it, or "
                f"raise {ROW_VARIABLE}"
            )

    def check_text_row(self, where: str, text: str) -> None:
        """As `check_row`, for a row in text form; fast for short rows."""
        if len(text) * 4 > self.row:  # UTF-8 has at most four bytes per character
            self.check_row(where, len(text.encode("utf-8", "surrogatepass")))


def read_limited(name: str, stream: IO[bytes]) -> bytes:
    """Read a whole stream, which may be endless.

    Raises:
        InputError: it has more bytes than allowed.
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
        raise InputError(f"{variable}={text!r}: not a positive number of bytes; correct or unset it")
    return int(text)


def check_depth(where: str, value: Any) -> None:
    """Refuse a row whose lists and objects are nested too deeply.

    Raises:
        InputError: deeper than `DEPTH` levels.
    """
    if is_deep(value):
        raise InputError(
            f"{where}: lists and objects are nested more than {DEPTH} levels deep; correct the row"
        )


def is_deep(value: Any) -> bool:
    """Whether lists and objects are nested more than `DEPTH` levels deep."""
    level, depth = [value], 0
    while level := [inner for outer in level for inner in _inside(outer)]:
        if (depth := depth + 1) > DEPTH:
            return True
    return False


def check_rows(name: str, rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows given as Python values (with their location), while they are within the limits.

    Raises:
        InputError: a row, or all together, have more bytes than allowed, or one is nested too deeply.
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
    """Bytes of a row's texts, and the minimum size of its other values."""
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
    """Decompress a gzip file piece by piece.

    Raises:
        InputError: it is not a complete gzip file, or expands to more than allowed.
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
        raise InputError(f"{name}: not a complete gzip file ({error}); create it again") from error
    return b"".join(pieces)


def parquet_rows(name: str, held: int, file: "pq.ParquetFile") -> Iterator[dict[str, Any]]:
    """The rows of a parquet file; sizes are checked before rows become Python objects.

    Args:
        name: the file, for messages.
        held: its size in bytes.
        file: the open file.

    Raises:
        InputError: the file or one of its rows is larger than allowed.
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
    """Check sizes and nesting in the file's metadata, before any row is read."""
    groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
    held = _VALUE_BYTES * _column_values(file)
    limits.check_expanded(max(sum(group.total_byte_size for group in groups), held))
    for column in range(len(file.schema)):
        if (depth := file.schema.column(column).path.count(".")) > DEPTH:
            raise InputError(
                f"{limits.name}: a column is nested {depth} levels deep, more than {DEPTH}; correct the file"
            )


def _batch_rows(limits: Limits, file: "pq.ParquetFile", group: int) -> int:
    """Rows per batch: no value is larger than its row group, so that a batch stays below the limit."""
    return max(1, min(_BATCH, limits.expanded // max(file.metadata.row_group(group).total_byte_size, 1)))


def _without_dictionaries(batch: "pa.RecordBatch") -> "pa.RecordBatch":
    """The batch with dictionary columns decoded, so that repeated values count every time."""
    import pyarrow as pa

    columns = [c.dictionary_decode() if isinstance(c, pa.DictionaryArray) else c for c in batch.columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
