"""The text that a chat model is asked with, and what its answer says: a better answer, or a rating."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sera_core.data.sources import bundled_file
from sera_core.errors import InputError
from sera_core.judges.comparison import Better, Comparison, as_text

LARGEST = 100_000
"""Bytes of a template at most."""
LOWEST, HIGHEST = 1, 10
"""Bounds of a rating."""
_DECODER = json.JSONDecoder()
_WORDS: dict[str, Better] = {"a": "A", "b": "B", "tie": "tie"}


@dataclass(frozen=True)
class Form:
    """One kind of question: its bundled template, what the template shows, and how the answer is read."""

    file: str
    placeholders: tuple[str, ...]
    field: str
    """The field of the JSON answer."""
    schema: Mapping[str, Any]
    """JSON schema of that field."""
    value: Callable[[Any], Any]
    """What the field says; None if nothing usable."""

    @property
    def response_format(self) -> dict[str, Any]:
        """The answer's form, for servers with structured outputs."""
        schema = {
            "type": "object",
            "properties": {self.field: dict(self.schema)},
            "required": [self.field],
            "additionalProperties": False,
        }
        return {
            "type": "json_schema",
            "json_schema": {"name": "verdict", "strict": True, "schema": schema},
        }

    def read(self, text: str) -> Any:
        """What the last JSON object with the field in an answer says; None if there is none, or nonsense.

        Text around the object, such as reasoning or a code fence, is ignored.
        """
        found, start = None, text.find("{")
        while start >= 0:
            value, end = _object_at(text, start)
            if isinstance(value, dict) and self.field in value:
                found = value[self.field]
            start = text.find("{", end)
        return None if found is None else self.value(found)


def _better(found: Any) -> Better | None:
    return _WORDS.get(str(found).strip().lower())


def _rating(found: Any) -> float | None:
    """A number between the bounds, also as text."""
    try:
        number = float(found) if isinstance(found, str | int | float) and found is not True else math.nan
    except ValueError:
        return None
    return number if LOWEST <= number <= HIGHEST else None


PAIRWISE = Form(
    "pairwise.txt",
    ("{prompt}", "{answer_a}", "{answer_b}"),
    "better",
    {"type": "string", "enum": ["A", "B", "tie"]},
    _better,
)
SINGLE = Form(
    "single.txt",
    ("{prompt}", "{answer}"),
    "rating",
    {"type": "integer", "minimum": LOWEST, "maximum": HIGHEST},
    _rating,
)


def read_template(path: Path | None, form: Form = PAIRWISE) -> str:
    """The template in a file, or the one shipped with the package.

    Raises:
        InputError: no such file, not text, too large, or a placeholder is missing.
    """
    file = bundled_file("judges", form.file) if path is None else path
    try:
        data = file.read_bytes() if file.is_file() else None
    except OSError as error:
        raise InputError(f"--template {file}: cannot be read ({error.strerror})") from error
    if data is None:
        raise InputError(f"--template {file}: no such file; give a text file, or leave the flag out")
    if len(data) > LARGEST:
        raise InputError(f"--template {file}: {len(data):,} bytes; a template has {LARGEST:,} at most")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"--template {file}: not UTF-8 text ({error.reason})") from error
    missing = [place for place in form.placeholders if place not in text]
    if missing:
        raise InputError(
            f"--template {file}: lacks {' and '.join(missing)}; a template shows the judge "
            f"{', '.join(form.placeholders)}"
        )
    return text


def compared_text(template: str, comparison: Comparison) -> str:
    """The template with conversation and both answers in place."""
    texts = (as_text(comparison.prompt), comparison.first, comparison.second)
    return _filled(template, dict(zip(PAIRWISE.placeholders, texts, strict=True)))


def rated_text(template: str, conversation: str, answer: str) -> str:
    """The template with conversation and answer in place."""
    return _filled(template, dict(zip(SINGLE.placeholders, (conversation, answer), strict=True)))


def _filled(template: str, values: Mapping[str, str]) -> str:
    """All placeholders filled at once, so that one inside a text stays as it is."""
    places = re.compile("|".join(map(re.escape, values)))
    return places.sub(lambda found: values[found[0]], template)


def _object_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins here and where it ends; None and the next place if there is none."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start + 1
