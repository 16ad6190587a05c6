"""Escape text of models and data sets in markdown."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from sera_core.guards.shown import shown, shown_line

SHOWN_CHARACTERS = 1200
"""Longer texts are cut; the report has the full text."""


def escape(text: str) -> str:
    """Escape text to one line without markdown or HTML markup."""
    line = _plain(text)
    line = re.sub(r"([\\`*_\[\]|~@])", r"\\\1", line)
    line = re.sub(r"(?i)(?=://)|(?<=www)(?=\.)", r"\\", line)  # bare URLs would become links
    line = re.sub(r"^(\s*\d*)(?=[#+\-=:.)])", r"\1\\", line)  # heading, list, rule, column of a table
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def quote(text: str) -> str:
    """Quote a text, with each line escaped and long texts cut."""
    rest = len(text) - SHOWN_CHARACTERS
    lines = [escape(line).strip() for line in shown(text[:SHOWN_CHARACTERS]).split("\n")] or [""]
    if rest > 0:
        lines.append(f"*… and {rest:,} more characters, see the report*")
    ends = ["\\" if line and after else "" for line, after in pairwise([*lines, ""])]
    return "\n".join(f"> {line}{end}" for line, end in zip(lines, ends, strict=True))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; cells are markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def verbatim(lines: Sequence[str]) -> str:
    """A code block; its fence is longer than any in the lines."""
    text = "\n".join(map(shown_line, lines))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _plain(text: str) -> str:
    """Text as one line, with control characters escaped."""
    return re.sub(r"[\n\t]", " ", shown(text))
