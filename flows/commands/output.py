"""Command output: the result on stdout as text or one JSON object, and files written atomically."""

import argparse
import os
import secrets
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pyarrow as pa

from flows.commands.folding import folded
from flows.outputs import check_place
from sera_core.artifacts import schema
from sera_core.artifacts.canonical import finite
from sera_core.errors import InputError
from sera_core.guards.shown import shown, shown_json


def print_result(args: argparse.Namespace, value: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Print the result: with --json the value as one object, else the lines."""
    text = shown_json(finite(value)) if args.json else folded(shown("\n".join(lines)), sys.stdout)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Redirect what libraries print to stderr, C++ code included; stdout holds only the result."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def print_note(line: str) -> None:
    """Print a line to stderr."""
    sys.stderr.write(folded(shown(line), sys.stderr) + "\n")
    sys.stderr.flush()


def check_output(path: Path, force: bool) -> None:
    """Refuse an output file that exists or cannot be written.

    Raises:
        InputError: the file exists and --force was not given, or its folder cannot be written to.
    """
    if path.is_dir():
        raise InputError(f"{path}: this is a folder; name a file in it")
    if os.path.lexists(path) and not force:
        raise InputError(f"{path}: already exists; name another file, or give --force to replace it")
    check_place(path)


def write_output(table: pa.Table, path: Path) -> None:
    """Write a parquet file atomically."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        schema.write_table(table, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Refuse flags that are not above 0."""
    for name in names:
        if getattr(args, name) < 1:
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: must be a whole number above 0"
            )


def rate(tokens: int, seconds: float) -> float:
    """Tokens per second."""
    return round(tokens / max(seconds, 1e-9), 1)
