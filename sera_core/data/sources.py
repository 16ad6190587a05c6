"""Read the rows of a data source: a local or remote file, a file shipped with the package, or a hub data set.

A file is read once, hashed and parsed, so a digest always belongs to its rows. Only formats that cannot run
code are read: jsonl, json, csv and parquet.
"""

import csv
import difflib
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from sera_core.data.file_checks import placeholder_problem, refuse_special
from sera_core.data.remote import reading_remote
from sera_core.data.size_limits import (
    DEPTH,
    Limits,
    check_depth,
    check_rows,
    parquet_rows,
    read_limited,
    unzipped,
)
from sera_core.errors import InputError
from sera_core.guards.urls import refuse_secrets

FORMATS = (".jsonl", ".json", ".csv", ".parquet")
"""Supported formats; `.ndjson` is jsonl, and all but parquet may end in `.gz`."""
_MESSAGES = re.compile(r"\s*\[?\s*\{\s*['\"](role|content|from|value)['\"]\s*:")
_HUB_NAME = re.compile(r"[\w-]+/[\w.-]+")
_HERE = Path(__file__).parents[1]
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Row:
    """One raw row.

    Attributes:
        where: file and line (or row) for error messages: `pairs.jsonl line 17`.
        data: the row's fields; an absent value is None or missing.
    """

    where: str
    data: dict[str, Any]


def is_message_text(text: str) -> bool:
    """Whether text begins like a message or a list of messages in JSON."""
    return _MESSAGES.match(text) is not None


def read_rows(path: str, split: str = "train") -> list[Row]:
    """Every row of a source, in file order.

    Args:
        path: local path, fsspec URL, `bundled:<name>` or `hub:<id>[@revision]`.
        split: split of a hub data set; ignored for files.
    """
    return read_source(path, split)[1]


def source_digest(path: str, split: str = "train") -> str:
    """sha256 of the source's bytes; for a hub data set, the current commit of its revision."""
    del split  # a commit covers all splits
    return (
        _hub_commit(*_hub_id(path))
        if path.startswith("hub:")
        else hashlib.sha256(_read_bytes(path)).hexdigest()
    )


def read_source(path: str, split: str = "train") -> tuple[str, list[Row]]:
    """Digest and rows of a source, from one read."""
    if path.startswith("hub:"):
        return _read_hub(path, split)
    data = _read_bytes(path)
    name = _display_name(path)
    if what := placeholder_problem(data):
        raise InputError(f"{path}: {what}")
    plain = unzipped(name, data) if name.lower().endswith(".gz") else data
    rows = list(_parser(name, path)(name, plain))
    if not rows:
        raise InputError(f"{path}: the file has no rows; use a file with at least one, or remove this source")
    return hashlib.sha256(data).hexdigest(), rows


def bundled_file(kind: str, name: str) -> Path:
    """Path of a file shipped with the package, in a checkout or an installed wheel.

    Args:
        kind: `data`, `experiments`, `judges` or `work_pools`; empty: none of them.
        name: the file's name.
    """
    folders = [_HERE.parent / "deployments" / kind, _HERE / "bundled" / kind]
    held = {path.name: path for folder in reversed(folders) for path in _files(folder)}
    if name not in held:
        listed = ", ".join(sorted(held)) or "none"
        raise InputError(
            f"bundled:{name}: no such file is shipped with the package{_nearest(name, held)} "
            f"(shipped: {listed})"
        )
    return held[name]


# ---------------------------------------------------------------------------------------------- reading bytes


def _read_bytes(path: str) -> bytes:
    if path.startswith("bundled:"):
        return bundled_file("data", path.removeprefix("bundled:")).read_bytes()
    if "://" in path and not path.startswith("file://"):
        return _read_url(path)
    return _read_local(Path(path.removeprefix("file://")).expanduser())


def _read_local(path: Path) -> bytes:
    if path.is_dir():
        names = ", ".join(file.name for file in _files(path)[:5] if _suffix(file.name) in FORMATS)
        inside = f" (it contains {names})" if names else ""
        raise InputError(f"{path}: this is a folder; name one file in it{inside}")
    refuse_special(path)
    try:
        Limits(str(path), 0).check_plain(path.stat().st_size)
        with path.open("rb") as stream:
            return read_limited(str(path), stream)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(_missing(path)) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _read_url(url: str) -> bytes:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    refuse_secrets(url)
    with reading_remote(url):
        # http:// is read as one stream: a server may ignore a range request and send more
        more: dict[str, Any] = {"block_size": 0} if url.startswith(("http://", "https://")) else {}
        file: Any = fsspec.open(url, "rb", **more)
        if isinstance(file.fs, LocalFileSystem):  # local://
            refuse_special(Path(file.path))
        with file as stream:
            shown = _display_name(url)
            Limits(shown, 0).check_plain(getattr(stream, "size", None) or 0)
            return read_limited(shown, stream)


def _missing(path: Path) -> str:
    """The message for a missing path, with the most similar existing name."""
    known = path
    while not known.parent.is_dir():
        known = known.parent
    names = [entry.name for entry in known.parent.iterdir()]
    what = "no such file" if known == path else f"there is no {known}, so no such file"
    nearest = _nearest(known.name, names, known.parent)
    name = f"{path.parent.name}/{path.name}"
    if known == path.parent and _HUB_NAME.fullmatch(name) and _suffix(path.name) not in FORMATS:
        nearest = f"; did you mean the hub's data set, hub:{name}?"
    return f"{path}: {what}{nearest}; correct the path (relative paths start at {Path.cwd()})"


def _nearest(name: str, names: Any, folder: Path | None = None) -> str:
    match = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean {folder / match[0] if folder else match[0]}?" if match else ""


def _files(folder: Path) -> list[Path]:
    """The files of a folder, without what is about them."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_file() and path.suffix != ".md")


# ---------------------------------------------------------------------------------------------------- parsing


def _display_name(path: str) -> str:
    """The file's name without folders, URL parameters and `bundled:`."""
    where = urlsplit(path).path if "://" in path else path.removeprefix("bundled:")
    return PurePosixPath(where).name


def _suffix(name: str) -> str:
    suffix = PurePosixPath(name.lower().removesuffix(".gz")).suffix
    return {".ndjson": ".jsonl"}.get(suffix, suffix)


def _parser(name: str, path: str) -> Callable[[str, bytes], Iterator[Row]]:
    parsers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if _suffix(name) not in parsers:
        found = (
            f"{PurePosixPath(name).suffix} files are"
            if PurePosixPath(name).suffix
            else "a name without extension is"
        )
        raise InputError(
            f"{path}: {found} not read; give one of {', '.join(FORMATS)} (text formats also with .gz)"
        )
    return parsers[_suffix(name)]


def _text(name: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{name} line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8"
        ) from error


def _jsonl(name: str, data: bytes) -> Iterator[Row]:
    # Split only at \n: str.splitlines also splits at U+2028, which may occur inside a JSON string.
    limits = Limits(name, len(data))
    for number, line in enumerate(_text(name, data).split("\n"), 1):
        if line.strip():
            where = f"{name} line {number}"
            limits.check_text_row(where, line)
            try:
                value = json_value(line)
            except InputError as error:
                raise InputError(f"{where}: {error}") from error
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{where}: not valid JSON ({error}); write one object per line, or remove the line"
                ) from error
            if isinstance(value, list):
                raise InputError(
                    f"{where}: expected one object per line, found a list of rows; name the file .json"
                )
            if line.count("[") + line.count("{") > DEPTH:
                check_depth(where, value)
            yield _row(where, value)


def json_value(text: str, **parsers: Any) -> Any:
    """Parse JSON and refuse repeated keys in an object, because they are ambiguous.

    Args:
        text: the JSON.
        parsers: number parsers for `json.loads`.

    Raises:
        InputError: an object has a repeated key.
        ValueError, RecursionError: Python cannot parse the JSON.
    """
    return json.loads(text, object_pairs_hook=_once_each, **parsers)


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise InputError(f"an object has the key {repeated!r} twice; remove one")
    return found


def _json(name: str, data: bytes) -> Iterator[Row]:
    if not data.strip():
        return
    try:
        value = json_value(_text(name, data))
    except json.JSONDecodeError as error:
        hint = (
            "one object per line is jsonl, so name it .jsonl"
            if error.msg == "Extra data"
            else "correct it there"
        )
        raise InputError(f"{name} line {error.lineno}: not valid JSON ({error}); {hint}") from error
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    except ValueError as error:  # a number with more digits than Python reads
        raise InputError(f"{name}: cannot be read as JSON ({error}); correct the file") from error
    except RecursionError as error:
        raise InputError(f"{name}: the JSON is nested too deeply; use a list of objects") from error
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise InputError(
            f'{name}: contains {_kind(value)} without rows; use a list of objects, or {{"data": [...]}}'
        )
    limits = Limits(name, len(data))
    for number, row in enumerate(rows, 1):
        where = f"{name} row {number}"
        check_depth(where, row)
        if len(data) > limits.row:
            limits.check_text_row(where, json.dumps(row, ensure_ascii=False))
        yield _row(where, row)


def _csv(name: str, data: bytes) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # an answer may be longer than the default 128 KiB
    reader = csv.DictReader(io.StringIO(_text(name, data), newline=""), strict=True)
    limits, number = Limits(name, len(data)), 0
    try:
        _refuse_repeated(name, reader.fieldnames or ())
        for number, cells in enumerate(reader, 1):
            where = f"{name} row {number}"
            if None in cells or None in cells.values():
                raise InputError(
                    f"{where}: the number of cells differs from the header; quote cells that contain commas"
                )
            limits.check_row(where, sum(map(len, cells.values())))
            yield Row(where, {column: _cell(where, column, text) for column, text in cells.items()})
    except csv.Error as error:
        raise InputError(f"{name} row {number + 1}: not valid CSV ({error}); correct the quotes") from error


def _refuse_repeated(name: str, columns: Sequence[str]) -> None:
    repeated = [column for column, count in Counter(columns).items() if count > 1]
    if repeated:
        raise InputError(f"{name}: two columns are named {repeated[0]!r}; rename or remove one")


def _cell(where: str, column: str, text: str) -> Any:
    """A cell's value: messages if it contains them as JSON, otherwise text (even `[1, 2]`)."""
    if not is_message_text(text):
        return text
    try:
        return json_value(text)
    except InputError as error:
        raise InputError(f"{where}: in the cell {column!r} {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{where}: the cell {column!r} looks like messages but is not valid JSON ({error}); use "
            "json.dumps, or convert the file to jsonl or parquet"
        ) from error


def _parquet(name: str, data: bytes) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(data))
        _refuse_repeated(name, file.schema_arrow.names)
        rows = list(parquet_rows(name, len(data), file))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{name}: not a readable parquet file ({error}); create it again") from error
    yield from (Row(f"{name} row {number}", row) for number, row in enumerate(rows, 1))


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise InputError(
            f"{where}: expected an object with named fields, found {_kind(value)}; correct the row"
        )
    return Row(where, value)


def _kind(value: Any) -> str:
    kinds = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), "a number")


# -------------------------------------------------------------------------------------------------------- hub


def _hub_id(path: str) -> tuple[str, str]:
    name, _, revision = path.removeprefix("hub:").partition("@")
    return name, revision or "main"


def _hub_commit(name: str, revision: str) -> str:
    """The current commit of a hub data set and revision: from the hub, else from the local cache."""
    if _COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    commit = None
    try:
        commit = HfApi().dataset_info(name, revision=revision).sha
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(
            f"hub:{name}: no data set at revision {revision!r} on the hub (or it needs HF_TOKEN); correct "
            "the name"
        ) from error
    except Exception as error:  # offline mode, no route, proxies: transports raise their own classes
        commit = _cached_commit(name, revision)
        if commit is None:
            raise InputError(
                f"hub:{name}: cannot reach the hub ({type(error).__name__}) and the data set is not in the "
                "local cache; go online once, or use a local file"
            ) from error
    if commit is None:
        raise InputError(
            f"hub:{name}: the hub has no commit for revision {revision!r}; give a commit after @"
        )
    return commit


def _cached_commit(name: str, revision: str) -> str | None:
    from huggingface_hub.constants import HF_HUB_CACHE

    ref = Path(HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}" / "refs" / revision
    return ref.read_text().strip() if ref.is_file() else None


def _read_hub(path: str, split: str) -> tuple[str, list[Row]]:
    name, revision = _hub_id(path)
    commit = _hub_commit(name, revision)
    import datasets

    try:
        loaded = datasets.load_dataset(name, split=split, revision=commit)
    except (ValueError, OSError) as error:  # unknown split, several configurations, not downloaded
        raise InputError(
            f"{path} split {split!r}: cannot be read ({error}); correct the name or the split"
        ) from error
    rows: Sequence[Any] = loaded  # pyright: ignore[reportAssignmentType]
    held = getattr(getattr(loaded, "data", None), "nbytes", 0)  # bytes of an Arrow table
    Limits(path, 0).check_plain(held)
    named = ((f"{path} {split} row {number}", dict(row)) for number, row in enumerate(rows, 1))
    return commit, [Row(where, row) for where, row in check_rows(path, named)]
