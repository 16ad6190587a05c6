"""The form for starting a run in Prefect's UI: a few settings, generated from SeraConfig's fields.

An empty field takes the preset's value; all other settings go into `overrides`.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    WithJsonSchema,
    create_model,
)
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

from flows.experiments import load_settings, merged, parse_config, without_idle
from sera_core.config import CHOSEN, NO_SFT, SeraConfig
from sera_core.errors import InputError
from sera_core.guards.urls import CLEAN_PATTERN, refuse_secrets

Preset = Literal["quick", "demo", "full"]

SHOWN = {
    "model": ("dtype",),
    "review": ("gamma", "show_text"),
    "select": ("rule", "fraction"),
    "sampling": ("responses", "temperature", "max_tokens"),
    "mix": ("shares",),
    "train": ("losses", "method", "beta", "learning_rate"),
    "decide": ("review", "review_hours"),
    "limits": ("rounds",),
}
"""Settings shown in the form, by section; at most 25 with the extra fields below."""

_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}

_EMPTY = re.compile(r"[.;] [Ee]mpty: .*(?=\.$)")
"""A help text's sentence on empty values in a file; in the form, empty means the preset's value."""


def _in_order(schema: dict[str, Any]) -> None:
    """Number the fields: the form sorts by position, and Postgres does not keep the order of JSON keys."""
    for position, field in enumerate(schema.get("properties", {}).values()):
        field["position"] = position


class FormPart(BaseModel):
    """A section of the form: frozen, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, json_schema_extra=_in_order
    )


class AutoEngine(FormPart):
    """vLLM where the worker has it and a GPU, else transformers."""

    model_config = ConfigDict(title="auto")

    engine: Literal["auto"] = Field(default="auto", description="Engine.")

    def settings(self) -> dict[str, Any]:
        """The SeraConfig settings of this choice."""
        return {"sampling": {"engine": self.engine}}


def _without_default(schema: dict[str, Any]) -> None:
    """Drop the default, so that the form omits an empty field instead of sending null."""
    schema.pop("default", None)


class TransformersEngine(FormPart):
    """Samples with transformers, on CPU or GPU."""

    model_config = ConfigDict(title="transformers")

    engine: Literal["transformers"] = Field(default="transformers", description="Engine.")
    batch: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        json_schema_extra=_without_default,
        description="Responses sampled at once (at least 1); empty: what fits. Changes no result.",
    )

    def settings(self) -> dict[str, Any]:
        """The SeraConfig settings of this choice."""
        batch = {} if self.batch is None else {"execution": {"sampling_batch": self.batch}}
        return {"sampling": {"engine": self.engine}, **batch}


class VllmEngine(FormPart):
    """Samples with vLLM; the worker must have it installed."""

    model_config = ConfigDict(title="vllm")

    engine: Literal["vllm"] = Field(description="Engine.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="Precision of sampling; if it differs from the model's, samples are scored again.",
    )

    def settings(self) -> dict[str, Any]:
        """The SeraConfig settings of this choice."""
        return {"sampling": {"engine": self.engine, "dtype": self.dtype}}


def _optional(field: FieldInfo) -> tuple[Any, Any]:
    """A SeraConfig setting as an optional form field, with its range in words."""
    if field.annotation is bool:  # a switch cannot be empty
        return bool, Field(default=field.default, description=" ".join((field.description or "").split()))
    schema = TypeAdapter(field.rebuild_annotation()).json_schema()
    if "anyOf" in schema:
        schema = next(kind for kind in schema["anyOf"] if kind.get("type") != "null")
    words = [text.format(schema[bound]) for bound, text in _BOUNDS.items() if bound in schema]
    text = _EMPTY.sub("", " ".join((field.description or "").split()))
    text += f" Range: {', '.join(words)}." if any(word not in text for word in words) else ""
    kind = Annotated[field.annotation | None, WithJsonSchema(schema)]
    return kind, Field(
        default=None, description=f"{text} Empty: the preset's.", json_schema_extra=_without_default
    )


def _section(name: str, **named: Any) -> type[FormPart]:
    """A section of the form with SeraConfig's help texts."""
    part = SeraConfig.model_fields[name].annotation
    assert isinstance(part, type) and issubclass(part, BaseModel)
    fields: dict[str, Any] = {key: _optional(part.model_fields[key]) for key in SHOWN.get(name, ())}
    doc = " ".join((part.__doc__ or "").split())
    return create_model(f"{name.capitalize()}Section", __base__=FormPart, __doc__=doc, **named, **fields)


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


def _optional_no_credentials(schema: dict[str, Any]) -> None:
    _without_default(schema)
    schema.update(_NO_CREDENTIALS)


_SOURCE = (
    str,
    Field(
        description="Hub id, absolute folder, URL, or `package:<distribution>/<file>.gguf`.",
        json_schema_extra=_NO_CREDENTIALS,
    ),
)
_TRAIN = (
    str,
    Field(
        description="Preference pairs: absolute path or URL of a jsonl, json, csv or parquet file, "
        "`hub:<id>`, or `bundled:<name>`.",
        json_schema_extra=_NO_CREDENTIALS,
    ),
)
_HELDOUT = (
    Annotated[str | None, WithJsonSchema({"type": "string"})],
    Field(
        default=None,
        description="Held-out pairs, same forms. Empty: split off the train pairs.",
        json_schema_extra=_optional_no_credentials,
    ),
)
_ENGINE = (
    AutoEngine | TransformersEngine | VllmEngine,
    Field(default_factory=AutoEngine, description="Sampling engine."),
)


def _section_field(name: str, **named: Any) -> tuple[Any, Any]:
    section = _section(name, **named)
    return section, Field(default_factory=section, description=section.__doc__)


_EXTRA_FIELDS: dict[str, dict[str, Any]] = {"sampling": {"engine": _ENGINE}}
"""Extra fields that SeraConfig does not have."""

_SECTIONS: dict[str, Any] = {
    "model": (_section("model", source=_SOURCE), Field(description="The start policy.")),
    "data": (_section("data", train=_TRAIN, heldout=_HELDOUT), Field(description="The preference pairs.")),
    "preset": (
        Preset,
        Field(
            default="demo",
            description="Values of empty fields: quick (1 to 3 minutes on two cores), demo (ten minutes; "
            "at most 64 train pairs), full (the method's defaults: all pairs, long responses; needs a GPU).",
        ),
    ),
    **{name: _section_field(name, **_EXTRA_FIELDS.get(name, {})) for name in SHOWN if name != "model"},
    "overrides": (
        dict[str, Any],
        Field(
            default_factory=dict,
            description="Other settings of the configuration, as JSON by section: "
            '{"train": {"epochs": 2}}. Overrides the fields above.',
            json_schema_extra={"additionalProperties": _no_credentials(3)},  # data, train, first, path
        ),
    ),
}

RunForm: type[FormPart] = create_model(
    "RunForm",
    __base__=FormPart,
    __doc__="A run: give a model and a data set; all other fields have defaults.",
    **_SECTIONS,
)
"""The form in the browser and in the API."""

_PRESETS = {"quick": "bundled:demo-quick", "demo": "bundled:demo"}


def config_from_form(given: Mapping[str, Any]) -> SeraConfig:
    """Turn a filled-in form into a configuration: preset, then fields, then overrides.

    Raises:
        InputError: an unknown setting, a value out of range, or a relative path.
    """
    form = RunForm.model_validate(given)
    fields = form.model_dump(mode="json", exclude_none=True, exclude={"preset", "overrides"})
    if isinstance(losses := fields["train"].get("losses"), str):
        fields["train"]["losses"] = [losses]
    fields["sampling"].pop("engine")
    preset = getattr(form, "preset")  # noqa: B009 - the model is made at run time
    base = load_settings(_PRESETS[preset]) if preset in _PRESETS else {}
    base.pop("model", None)
    base.get("data", {}).pop("train", None)
    changes: dict[str, Any] = {}
    for more in (form.sampling.engine.settings(), fields, form.overrides):  # type: ignore[attr-defined]
        base, changes = merged(base, more), merged(changes, more)
    for side in ("train", "heldout", "test", "prompts"):
        given_side = base["data"].get(side)
        if isinstance(given_side, str):
            base["data"][side] = [{"path": given_side}]
        for source in base["data"].get(side, ()):
            _check_absolute(source["path"] if isinstance(source, dict) else source, f"data.{side}")
    if (sft := base.get("start", {}).get("sft", NO_SFT)) not in (NO_SFT, CHOSEN):
        _check_absolute(sft, "start.sft")
    return parse_config(without_idle(base, changes), "form")


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


if __name__ == "__main__":  # python -m flows.orchestration.form > tests/flows/form_schema.json
    import json
    import sys

    json.dump(TypeAdapter(FormConfig).json_schema(), sys.stdout, indent=1, ensure_ascii=False, sort_keys=True)
    sys.stdout.write("\n")
