"""Tables and text on stdout; data is never interpreted as markup."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flows.display.round_card import with_interval
from sera_core.guards.shown import shown

MIN_TABLE_WIDTH = 60
"""Narrower terminals get a list instead of a table."""


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; on a narrow terminal, a list."""
    console = Console()
    if console.is_terminal and console.width < MIN_TABLE_WIDTH:
        print_text("\n".join(_listed(title, columns, rows)))
        return
    table = Table(title=escape(shown(title)), title_justify="left")
    for name in columns:
        table.add_column(escape(shown(name)), overflow="fold")
    for row in rows:
        table.add_row(*(Text(shown(_cell(value))) for value in row))
    if not console.is_terminal:  # pipes and logs have no width
        console = Console(width=160)
    console.print(table)


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
    """Print text without wrapping it."""
    Console(soft_wrap=True).print(Text(shown(text)))


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
