"""The form for starting a run in Prefect's UI: a few fields with the demo's values; the rest are `overrides`.

At Submit, Prefect's UI has its server check the form by a schema that lacks keys such as `minimum` and
`pattern`, but keeps `allOf` as it is. So ranges and patterns stand in an `allOf`: the UI marks the field.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import CoreSchema, core_schema

from flows.experiments import SIDES, load_settings, merged, parse_config, without_idle
from flows.orchestration.form_overrides import by_section, overrides_schema
from sera_core.config import CHOSEN, NO_SFT, SeraConfig
from sera_core.errors import InputError
from sera_core.guards.urls import CLEAN_PATTERN, refuse_secrets

Preset = Literal["quick", "demo", "full"]

_DEMO = load_settings("bundled:demo")
_QUICK = merged(load_settings("bundled:demo-quick"), {"data": {"train_pairs": 8, "heldout_pairs": 4}})
"""With any data as small as with its own."""
_PRESETS: dict[str, dict[str, Any]] = {"quick": _QUICK, "demo": _DEMO, "full": {}}

NUMBER = r"^(?=[0.]*[1-9])[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$"
"""A number above 0 as text. Prefect's number input drops the e of 2e-5, and then the whole value."""


def _in_order(schema: dict[str, Any]) -> None:
    """Number the fields: the form sorts by position, and Postgres does not keep the order of JSON keys."""
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


def _number(given: Any) -> Any:
    if isinstance(given, str) and not re.match(NUMBER, given):
        raise ValueError(f"{given!r} is no number above 0; write it as 2e-5 or 0.00002")
    return given


_NO_CREDENTIALS: dict[str, Any] = {"pattern": CLEAN_PATTERN}
"""Schema only: the server refuses URLs with credentials before storing them."""


def _no_credentials(depth: int) -> dict[str, Any]:
    """A schema that allows no URL with credentials in values down to this depth."""
    inner = (
        {"items": _no_credentials(depth - 1), "additionalProperties": _no_credentials(depth - 1)}
        if depth
        else {}
    )
    return {**_NO_CREDENTIALS, **inner}


def _without_default(schema: dict[str, Any]) -> None:
    """Drop the default, so that the form omits an empty field instead of sending null."""
    schema.pop("default", None)


def _presets_rates() -> str:
    """The learning rate of each preset, for the help text."""
    named = {"model": {"source": "m"}, "data": {"train": [{"path": "/p"}]}}
    rates = {
        name: parse_config(merged(preset, named), name).learning_rate for name, preset in _PRESETS.items()
    }
    return ", ".join(f"{name} {rate:g}" for name, rate in rates.items())


class RunForm(BaseModel):
    """Model, data and a few settings of a run."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, json_schema_extra=_in_order
    )

    model: str = Field(
        description="Start policy: hub id, absolute folder, URL, or `package:<distribution>/<file>.gguf`.",
        json_schema_extra={"default": _DEMO["model"]["source"], **_NO_CREDENTIALS},
    )
    data: str = Field(
        description="Preference pairs: absolute path or URL of a jsonl, json, csv or parquet file, "
        "`hub:<id>`, or `bundled:<name>`.",
        json_schema_extra={
            "default": _DEMO["data"]["train"][0]["path"],
            "allOf": [{"pattern": "^/|:"}],
            **_NO_CREDENTIALS,
        },
    )
    preset: Preset = Field(
        default="demo",
        description="All other settings: quick (1 to 3 minutes on two cores), demo (ten minutes), "
        "full (all pairs; needs a GPU).",
    )
    rounds: Annotated[
        int,
        Field(ge=1),
        WithJsonSchema({"type": "integer", "allOf": [{"minimum": 1}]}),
    ] = Field(
        description="Number of rounds, including round 0.",
        json_schema_extra={"default": _DEMO["limits"]["rounds"]},
    )
    learning_rate: Annotated[
        float | None,
        Field(gt=0, allow_inf_nan=False),
        BeforeValidator(_number),
        WithJsonSchema({"type": "string", "allOf": [{"pattern": NUMBER}]}),
    ] = Field(
        default=None,
        description=f"Peak learning rate, such as 2e-5. Empty: the preset's ({_presets_rates()}).",
        json_schema_extra=_without_default,
    )
    overrides: dict[str, Any] = Field(
        default_factory=dict,
        description='Any other setting, such as `{"train.beta": 0.2}` or `{"train": {"beta": 0.2}}`; '
        "wins over the fields above.",
        json_schema_extra={
            "additionalProperties": _no_credentials(3),  # data, train, first, path
            "allOf": [overrides_schema()],
        },
    )

    @field_validator("model", "data", mode="before")
    @classmethod
    def _is_text(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            raise ValueError(
                "give one text: it was a section in earlier versions (`sera deploy` renews the form)"
            )
        return given

    def settings(self) -> dict[str, Any]:
        """The SeraConfig settings that the fields above `overrides` give."""
        rate = {} if self.learning_rate is None else {"train": {"learning_rate": self.learning_rate}}
        return {
            "model": {"source": self.model},
            "data": {"train": [{"path": self.data}]},
            "limits": {"rounds": self.rounds},
            **rate,
        }


def config_from_form(given: Mapping[str, Any]) -> SeraConfig:
    """Turn a filled-in form into a configuration: preset, then fields, then overrides.

    Raises:
        InputError: an unknown setting, a value out of range, or a relative path; it names the form's field.
    """
    form = _checked(given)
    overrides = by_section(form.overrides)
    changes = merged(form.settings(), overrides)
    base = merged(_PRESETS[form.preset], changes)
    refuse_secrets(form.model, "config.model")
    for side in SIDES:
        held = overrides.get("data")
        field = f"config.overrides.data.{side}" if isinstance(held, dict) and side in held else "config.data"
        _anchor(base["data"], side, field)
    sft = base["start"].get("sft") if isinstance(base.get("start"), dict) else None
    if isinstance(sft, str) and sft not in (NO_SFT, CHOSEN):
        _check_absolute(sft, "config.overrides.start.sft")
    return parse_config(without_idle(base, changes), "config.overrides")


def _checked(given: Mapping[str, Any]) -> RunForm:
    try:
        return RunForm.model_validate(given)
    except ValidationError as error:
        lines = [
            f"config.{'.'.join(map(str, problem['loc']))}: {_said(problem)}" for problem in error.errors()
        ]
        raise InputError("\n".join(lines)) from None


def _said(problem: Any) -> str:
    """What is wrong with a field of the form."""
    if problem["type"] == "missing":
        return "missing; every run needs it"
    if problem["type"] == "extra_forbidden":
        name = problem["loc"][0]
        if name in SeraConfig.model_fields:
            return f'no field of the form: give its settings as overrides, {{"{name}": …}}'
        return f"no field of the form, which has {', '.join(RunForm.model_fields)}"
    return str(problem["msg"]).removeprefix("Value error, ")


def _anchor(data: Any, side: str, field: str) -> None:
    """Turn plain paths of a side into sources, and refuse relative ones and those with credentials."""
    if not isinstance(data, dict) or side not in data:
        return
    if isinstance(data[side], str):
        data[side] = [{"path": data[side]}]
    for source in data[side] if isinstance(data[side], list) else ():
        path = source.get("path") if isinstance(source, dict) else source
        if isinstance(path, str):
            _check_absolute(path, field)


def _check_absolute(path: str, field: str) -> None:
    refuse_secrets(path, field)
    if ":" not in path and not path.startswith("/"):
        raise InputError(
            f"{field}: {path!r} is a relative path, which a worker cannot resolve; "
            "give an absolute path or a URL"
        )


class _Form:
    """Annotation: a SeraConfig parameter shown as RunForm."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Accept a SeraConfig or a filled-in form; the JSON schema is the form's."""

        def convert(value: Any) -> Any:
            return config_from_form(value) if isinstance(value, Mapping) else value

        return core_schema.no_info_before_validator_function(
            convert, handler(source), json_schema_input_schema=handler.generate_schema(RunForm)
        )


FormConfig = Annotated[SeraConfig, _Form()]
"""A SeraConfig that Prefect's form and API show as RunForm."""

RunName = Annotated[
    str,
    Field(
        json_schema_extra={
            "title": "name",  # Prefect's own field above is called Run Name
            "allOf": [{"pattern": r"^([A-Za-z0-9]|\{(data|date)\})([A-Za-z0-9._-]|\{(data|date)\})*$"}],
        }
    ),
]
"""The name of a run, which may hold `{date}` and `{data}`."""

StoreName = Annotated[str | None, WithJsonSchema({"type": "string"})]
"""A store as one text field, without the form's tab for None; empty is the worker's."""


if __name__ == "__main__":  # python -m flows.orchestration.form > tests/flows/form_schema.json
    import json
    import sys

    json.dump(TypeAdapter(FormConfig).json_schema(), sys.stdout, indent=1, ensure_ascii=False, sort_keys=True)
    sys.stdout.write("\n")
