"""Generate the table of settings from the configuration classes.

python -m sera_core.reference deployments/experiments/README.md      # writes it between the two markers
"""

import json
import sys
import typing
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sera_core.config import SeraConfig

BEGIN, END = "<!-- settings: made by `make reference` -->", "<!-- end of settings -->"


def settings_table() -> str:
    """Every setting with its default and help text, one table per section."""
    lines: list[str] = []
    for name, field in SeraConfig.model_fields.items():
        section = _section(field)
        if section is None:
            lines += ["", f"**{name}** (default {_default(field)}): {_help(field)}"]
            continue
        doc = " ".join((field.description or section.__doc__ or "").split())
        lines += ["", f"**[{name}]** {doc}", "", "| setting | default | what it does |", "|---|---|---|"]
        for key, inner in section.model_fields.items():
            lines.append(f"| `{key}` | {_default(inner)} | {_help(inner)} |")
    return "\n".join(lines).strip()


def _section(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default: Any = field.default
    if default is None or default in ((), {}):
        return "empty"
    if isinstance(default, tuple):
        default = list(default)
    return f"`{json.dumps(default)}`"


def _help(field: FieldInfo) -> str:
    text = " ".join((field.description or "").split()).replace("|", "\\|")
    choices = [c for a in (field.annotation, *typing.get_args(field.annotation)) for c in _literals(a)]
    named = " · ".join(f"`{choice}`" for choice in dict.fromkeys(choices))
    return f"{named}. {text}" if named else text


def _literals(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) is typing.Literal else ()


def with_table(text: str) -> str:
    """The document's text with the table between the markers replaced.

    Raises:
        ValueError: a marker is missing.
    """
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    return f"{text[:start]}\n\n{settings_table()}\n\n{text[end:]}"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_table(file.read_text()))
