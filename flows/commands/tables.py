"""Tables and text on stdout; data is never interpreted as markup."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flows.commands.folding import MIN_WIDTH, fold, fold_path, folded
from flows.display.round_card import with_interval
from sera_core.guards.shown import shown

PIPE_WIDTH = 160
"""Of tables in pipes and logs, which have no width, unless COLUMNS gives one."""
FOLDED_WIDTH = 14
"""Columns that a folded column of compared values needs at least, to be readable."""
_BORDERS = 3
"""Columns that a table's column takes besides its text."""

Cells = Sequence[Sequence[str]]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], keys: int = 1) -> None:
    """Print a table. One that is too wide is cut into tables below each other.

    A terminal of less than MIN_WIDTH columns gets a list.

    Args:
        title: above it.
        columns: heads.
        rows: cells.
        keys: how many of the first columns name a row: each part of a wide table begins with them.
    """
    console = _console()
    if console.is_terminal and console.width < MIN_WIDTH:
        print_text("\n".join(_listed(title, columns, rows)))
        return
    heads, cells = _shown(columns, rows)
    if _width(_widths(heads, cells)) <= console.width or console.width < MIN_WIDTH:
        console.print(_table(title, heads, cells))
        return
    for part in _parts(title, heads, cells, console.width, keys):
        console.print(part)


def leaves_room(columns: Sequence[str], rows: Sequence[Sequence[Any]], wanted: int) -> bool:
    """Whether a table with these columns leaves so many columns of text for another one."""
    width = _console().width
    return width < MIN_WIDTH or _width([*_widths(*_shown(columns, rows)), wanted]) <= width


def print_folding_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], name: str) -> None:
    """Print a table whose column `name` is folded at words into the space that the others leave."""
    console = _console()
    if console.is_terminal and console.width < MIN_WIDTH:
        print_text("\n".join(_listed(title, columns, rows)))
        return
    heads, cells = _shown(columns, rows)
    widths, folding = _widths(heads, cells), list(columns).index(name)
    left = console.width - _width(widths) + widths[folding]
    widths[folding] = max(1, min(widths[folding], left))
    console.print(_table(title, heads, cells, widths))


def print_compared_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table whose columns are compared: they stay side by side, their cells folded where needed.

    Where the first column leaves the others too little, a list has them below each other, row by row.
    """
    console, (heads, cells) = _console(), _shown(columns, rows)
    widths = _widths(heads, cells)
    if _width([widths[0], *(min(width, FOLDED_WIDTH) for width in widths[1:])]) > console.width:
        print_text("\n".join(_listed(title, columns, rows)))
        return
    console.print(_table(title, heads, cells, [widths[0], *[None] * (len(heads) - 1)]))


def _console() -> Console:
    console = Console()
    has_width = console.is_terminal or os.environ.get("COLUMNS")
    return console if has_width else Console(width=PIPE_WIDTH)


def _shown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> tuple[list[str], list[list[str]]]:
    return [shown(name) for name in columns], [[shown(_cell(value)) for value in row] for row in rows]


def _parts(title: str, columns: Sequence[str], cells: Cells, width: int, keys: int) -> Iterator[Table | Text]:
    """A wide table in parts of at most so many columns: tables, and below them the cells that fit in none."""
    widths = _widths(columns, cells, by_word=True)
    room = width - _width(widths[:keys]) - _BORDERS
    if room < MIN_WIDTH // 3:  # the key columns alone are too wide to stand in every part
        lines = [line for one in _listed(title, columns, cells) for line in fold(one, width)]
        yield Text("\n".join(lines))
        return
    long = [number for number in range(keys, len(columns)) if widths[number] > room]
    if len(columns) == 2 and long:  # only the long cells of the second column go below
        short = [row for row in cells if cell_len(row[1]) <= room]
        yield _table(title, columns, short)
        yield _below([row for row in cells if cell_len(row[1]) > room], 1, width)
        return
    for block in _blocks(widths, long, width, keys):
        numbers = [*range(keys), *block]
        kept = [[row[number] for number in numbers] for row in cells]
        yield _table(title, [columns[n] for n in numbers], kept, [widths[n] for n in numbers])
        title = ""
    for number in long:
        yield _below(cells, number, width, f"{columns[number]}:")


def _blocks(widths: Sequence[int], long: Sequence[int], width: int, keys: int) -> Iterator[list[int]]:
    """Columns that fit beside the key columns, in order."""
    block: list[int] = []
    for number in range(keys, len(widths)):
        if number in long:
            continue
        if block and _width([*widths[:keys], *(widths[n] for n in block), widths[number]]) > width:
            yield block
            block = []
        block.append(number)
    if block:
        yield block


def _below(cells: Cells, number: int, width: int, *heads: str) -> Text:
    """A column as lines: the row's first cell, and below it the long one."""
    lines, room = [*heads], width - 4
    for row in cells:
        text = row[number]
        parts = fold_path(text, room) if "/" in text and " " not in text else fold(text, room)
        lines += [f"  {row[0]}", *(f"    {part}" for part in parts)]
    return Text("\n".join(lines))


def _table(
    title: str, columns: Sequence[str], cells: Cells, widths: Sequence[int | None] | None = None
) -> Table:
    table = Table(title=escape(shown(title)) or None, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(escape(name), overflow="fold", width=None if widths is None else widths[number])
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _widths(columns: Sequence[str], cells: Cells, by_word: bool = False) -> list[int]:
    """Columns of text that each column needs; `by_word`: with its head folded at words."""
    heads = [max(map(cell_len, name.split()), default=0) if by_word else cell_len(name) for name in columns]
    return [
        max([head, *(cell_len(line) for row in cells for line in row[number].split("\n"))])
        for number, head in enumerate(heads)
    ]


def _width(widths: Sequence[int]) -> int:
    """Columns of a table whose columns have these."""
    return sum(widths) + _BORDERS * len(widths) + 1


def _listed(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """Lines of `name: value`, grouped by row; of two columns the first is the name."""
    yield title
    for row in rows:
        cells = [_cell(value) for value in row]
        if len(columns) == 2:
            yield f"  {cells[0]}: {cells[1]}"
            continue
        yield ""
        yield from (f"  {name}: {cell}" for name, cell in zip(columns, cells, strict=True))
    yield ""


def print_text(text: str) -> None:
    """Print text; on a terminal, long lines are folded at words."""
    Console(soft_wrap=True).print(Text(folded(shown(text), sys.stdout)))


def metric_cell(value: Any) -> Any:
    """A metric as a table cell: a rate with its interval, nested values as JSON."""
    if isinstance(value, dict) and "value" in value:
        return with_interval(value)
    return json.dumps(value) if isinstance(value, dict | list) else value


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if 0 < abs(value) < 0.001 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
