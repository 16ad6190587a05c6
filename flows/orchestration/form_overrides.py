"""`overrides` of Prefect's form: `{"train": {"beta": 0.2}}` by section, or `{"train.beta": 0.2}` dotted.

The schema lets Prefect refuse an unknown name and a number out of range when Submit is pressed.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from sera_core.config import SeraConfig
from sera_core.errors import InputError

_NUMBERS = {"integer", "number", "boolean", "null"}


def overrides_schema() -> dict[str, Any]:
    """JSON schema of the names of all settings, by section or dotted, and of the ranges of numbers.

    It uses `propertyNames` and `patternProperties`: the form would draw a field for each of `properties`.
    """
    names: list[dict[str, Any]] = [{"pattern": f"^({'|'.join(SeraConfig.model_fields)})(\\.|$)"}]
    values: dict[str, Any] = {}
    for section, field in SeraConfig.model_fields.items():
        part = field.annotation
        if not (isinstance(part, type) and issubclass(part, BaseModel)):
            values |= _range(section, field)
            continue
        dotted = [f"{section}.{name}" for name in part.model_fields]
        names.append({"if": {"pattern": f"^{section}\\."}, "then": {"enum": dotted}})
        inner: dict[str, Any] = {}
        for name, setting in part.model_fields.items():
            inner |= _range(name, setting)
            values |= _range(f"{section}.{name}", setting)
        known = {"enum": list(part.model_fields)}
        values[f"^{section}$"] = {"type": "object", "propertyNames": known, "patternProperties": inner}
    return {"propertyNames": {"allOf": names}, "patternProperties": values}


def _range(name: str, field: FieldInfo) -> dict[str, Any]:
    """Pattern of the name with the range of a number or switch; empty for other settings."""
    schema = TypeAdapter(field.rebuild_annotation()).json_schema()
    kinds = schema.get("anyOf", [schema])
    types = [kind.get("type") for kind in kinds]
    if not set(types) <= _NUMBERS:
        return {}
    bounds = {key: value for kind in kinds for key, value in kind.items() if key != "type"}
    return {f"^{re.escape(name)}$": {"type": types if len(types) > 1 else types[0], **bounds}}


def by_section(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides with dotted names moved into their sections.

    Raises:
        InputError: a setting is given twice.
    """
    nested: dict[str, Any] = {}
    for key, value in overrides.items():
        section, dot, name = key.partition(".")
        if not dot:
            _add(nested, section, value)
        else:
            _add(nested, section, {name: value})
    return nested


def _add(nested: dict[str, Any], section: str, value: Any) -> None:
    given = nested.get(section)
    if not isinstance(given, dict) or not isinstance(value, Mapping):
        nested[section] = dict(value) if isinstance(value, Mapping) else value
        return
    if twice := sorted(given.keys() & value.keys()):
        raise InputError(f"config.overrides: {section}.{twice[0]} is given twice; give it once")
    given.update(value)
