"""Text in markdown that stays text: whatever a model or a data set says, it is shown and does nothing."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from sera_core.guards.shown import shown, shown_line

SHOWN_CHARACTERS = 1200
"""Of a longer text the beginning is shown; the report has it whole."""


def escape(text: str) -> str:
    """Text as one line that markdown and HTML leave as it is: no link, image, code, list, table or tag."""
    line = _plain(text)
    line = re.sub(r"([\\`*_\[\]|~@])", r"\\\1", line)
    line = re.sub(r"(?i)(?=://)|(?<=www)(?=\.)", r"\\", line)  # a bare address becomes a link too
    line = re.sub(r"^(\s*\d*)(?=[#+\-=:.)])", r"\1\\", line)  # heading, list, rule, column of a table
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def quote(text: str) -> str:
    """A text of several lines as a quotation, each line escaped, a long one cut."""
    rest = len(text) - SHOWN_CHARACTERS
    lines = [escape(line).strip() for line in shown(text[:SHOWN_CHARACTERS]).split("\n")] or [""]
    if rest > 0:
        lines.append(f"*… and {rest:,} more characters, see the report*")
    ends = ["\\" if line and after else "" for line, after in pairwise([*lines, ""])]
    return "\n".join(f"> {line}{end}" for line, end in zip(lines, ends, strict=True))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def verbatim(lines: Sequence[str]) -> str:
    """Lines to copy, between a fence that none of them can close."""
    text = "\n".join(map(shown_line, lines))
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{text}\n{fence}"


def _plain(text: str) -> str:
    """One line: a line end is a space, what acts or hides is shown escaped."""
    return re.sub(r"[\n\t]", " ", shown(text))
