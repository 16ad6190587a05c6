"""Long lines folded at words for a terminal; pipes and logs get them whole."""

import os
import textwrap
from collections.abc import Iterator
from typing import TextIO

from rich.cells import cell_len

COMMANDS = ("sera ", "vllm ", "llama-server ")
"""Beginnings of lines to copy into a shell."""
MIN_WIDTH = 60
"""Narrower terminals fold by themselves."""


def text_width(stream: TextIO) -> int | None:
    """Columns to fold text to: of a terminal, or $COLUMNS; None for a pipe, a log and a narrow terminal."""
    width = _columns() or (os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0)
    return width if width >= MIN_WIDTH else None


def _columns() -> int | None:
    given = os.environ.get("COLUMNS", "")
    return int(given) if given.isdecimal() else None


def folded(text: str, stream: TextIO) -> str:
    """The text as it is written to a stream: lines that are too long are folded."""
    width = text_width(stream)
    return (
        text if width is None else "\n".join(part for line in text.split("\n") for part in fold(line, width))
    )


def fold(line: str, width: int) -> Iterator[str]:
    """A line in lines of at most so many columns; a longer word stays whole.

    A command is folded so that the shell still reads it as one, its comment on a line before it.
    """
    indent = line[: len(line) - len(line.lstrip())]
    if cell_len(line) <= width:
        yield line
    elif line.lstrip().startswith(COMMANDS):
        command, _, comment = line.partition("      # ")
        if comment:
            yield from fold(f"{indent}# {comment}", width)
        *parts, last = _words(command, width - 2, indent, indent + "    ")
        yield from (f"{part} \\" for part in parts)
        yield last
    else:
        yield from _words(line, width, indent, indent + "  ")


def _words(line: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        line.lstrip(),
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def fold_path(path: str, width: int) -> list[str]:
    """A path or URI in pieces of at most so many columns, each but the last ending with a slash."""
    pieces = [""]
    for part in path.split("/"):
        if pieces[-1] and len(pieces[-1]) + len(part) + 1 > width:
            pieces.append("")
        pieces[-1] += part + "/"
    pieces[-1] = pieces[-1].removesuffix("/")
    return pieces
