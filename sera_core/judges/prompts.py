"""The text that a chat model is asked with, and what its answer says."""

import json
import re
from pathlib import Path
from typing import Any

from sera_core.data.sources import bundled_file
from sera_core.errors import InputError
from sera_core.judges.comparison import Better, Comparison, as_text

PLACEHOLDERS = ("{prompt}", "{answer_a}", "{answer_b}")
LARGEST = 100_000
"""Bytes of a template at most."""
RESPONSE_FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "verdict",
        "strict": True,
        "schema": {
            "type": "object",
            "properties": {"better": {"type": "string", "enum": ["A", "B", "tie"]}},
            "required": ["better"],
            "additionalProperties": False,
        },
    },
}
"""The answer's form, for servers with structured outputs."""
_PLACE = re.compile("|".join(map(re.escape, PLACEHOLDERS)))
_DECODER = json.JSONDecoder()
_WORDS: dict[str, Better] = {"a": "A", "b": "B", "tie": "tie"}


def read_template(path: Path | None) -> str:
    """The template in a file, or the one shipped with the package.

    Raises:
        InputError: no such file, not text, too large, or a placeholder is missing.
    """
    file = bundled_file("judges", "pairwise.txt") if path is None else path
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
    missing = [place for place in PLACEHOLDERS if place not in text]
    if missing:
        raise InputError(
            f"--template {file}: lacks {' and '.join(missing)}; a template shows the judge "
            f"{', '.join(PLACEHOLDERS)}"
        )
    return text


def filled(template: str, comparison: Comparison) -> str:
    """The template with conversation and answers in place; placeholders in those texts stay as they are."""
    texts = (as_text(comparison.prompt), comparison.first, comparison.second)
    values: dict[str, str] = dict(zip(PLACEHOLDERS, texts, strict=True))
    return _PLACE.sub(lambda found: values[found[0]], template)


def verdict_in(text: str) -> Better | None:
    """What the last JSON object with `better` in an answer says; None if there is none, or it says no place.

    Text around the object, such as reasoning or a code fence, is ignored.
    """
    found, start = None, text.find("{")
    while start >= 0:
        value, end = _object_at(text, start)
        if isinstance(value, dict) and "better" in value:
            found = value["better"]
        start = text.find("{", end)
    return None if found is None else _WORDS.get(str(found).strip().lower())


def _object_at(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins here and where it ends; None and the next place if there is none."""
    try:
        return _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None, start + 1
