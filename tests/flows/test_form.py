"""The form a run is started with in the browser: few fields with the demo's values, clear refusals."""

import json
from functools import cache
from pathlib import Path

import pytest
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import build_error_obj, validate
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import to_json

from flows.experiments import load_experiment
from flows.orchestration.form import FormConfig, RunForm, config_from_form
from flows.sera import sera
from sera_core.config import SeraConfig
from sera_core.errors import InputError

SNAPSHOT = Path(__file__).with_name("form_schema.json")
FORM = TypeAdapter(FormConfig)
THREE = {"model": "/models/policy", "data": "/data/pairs.jsonl", "rounds": 3}
SECTIONS = {
    name: field.annotation
    for name, field in SeraConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


def schema() -> dict:
    return FORM.json_schema()


def filled_in() -> dict:
    """What the form holds when it opens."""
    return {name: field["default"] for name, field in schema()["properties"].items() if "default" in field}


@cache
def ui_schema() -> dict:
    """What Prefect's UI has its server check a form by: without the keys that the UI does not know."""
    known = {"definitions", "position", "$ref", "anyOf", "allOf", "default", "const", "description", "enum"}
    known |= {"items", "properties", "required", "title", "type", "maxItems", "minItems"}

    def kept(part: dict) -> dict:
        part = {key: value for key, value in part.items() if key in known}
        for nested in ("properties", "definitions"):
            if nested in part:
                part[nested] = {name: kept(field) for name, field in part[nested].items()}
        return part

    return kept(parameter_schema(sera).model_dump())


def ui_errors(config: dict, **more) -> list:
    """What Prefect's UI marks at Submit."""
    return build_error_obj(validate({"config": config, **more}, ui_schema()))["errors"]


def marked(*path: str, errors: list) -> str:
    """The message at a field."""
    for name in path:
        (errors,) = [one["errors"] for one in errors if one["property"] == name]
    return errors[0]


def test_the_schema_of_the_form_is_what_it_was():
    """Renew it with: python -m flows.orchestration.form > tests/flows/form_schema.json."""
    assert schema() == json.loads(SNAPSHOT.read_text())


def test_the_form_has_six_fields_in_order_each_with_one_short_line_of_help():
    fields = sorted(schema()["properties"].items(), key=lambda field: field[1]["position"])
    assert [name for name, _ in fields] == ["model", "data", "preset", "rounds", "learning_rate", "overrides"]
    assert all(0 < len(field["description"]) <= 125 for _, field in fields)
    assert not any("$ref" in field or "anyOf" in field for _, field in fields)  # no boxes in boxes, no tabs


def test_the_run_has_a_name_of_another_label_than_prefects_own():
    shown = parameter_schema(sera).properties
    assert [field["title"] for field in shown.values()] == ["config", "name", "store", "dry_run"]


def test_submit_as_the_form_opens_is_the_demo():
    assert ui_errors(filled_in(), run="sera-{data}") == []
    assert config_from_form(filled_in()) == load_experiment("bundled:demo")


@pytest.mark.parametrize("emptied", ["model", "data", "rounds"])
def test_an_emptied_field_is_asked_for_and_never_filled_in_unseen(emptied):
    left = {name: value for name, value in filled_in().items() if name != emptied}
    assert "required" in marked("config", emptied, errors=ui_errors(left))
    with pytest.raises(InputError, match=rf"config\.{emptied}: missing"):
        config_from_form(left)


@pytest.mark.parametrize("preset", ["quick", "demo", "full"])
def test_what_is_not_shown_takes_the_presets_value(preset):
    config = config_from_form({**THREE, "preset": preset})
    assert (config.model.source, config.data.train[0].path) == ("/models/policy", "/data/pairs.jsonl")
    assert f"{preset} {config.learning_rate:g}" in str(RunForm.model_fields["learning_rate"].description)
    if preset == "full":
        named = {"model": {"source": "/models/policy"}, "data": {"train": [{"path": "/data/pairs.jsonl"}]}}
        assert config == SeraConfig.model_validate({**named, "limits": {"rounds": 3}})
        return
    example = load_experiment({"quick": "bundled:demo-quick", "demo": "bundled:demo"}[preset])
    for section in ("review", "select", "sampling", "mix", "train", "evaluate", "decide"):
        assert getattr(config, section) == getattr(example, section)


def test_the_quick_preset_is_quick_with_any_data():
    data = config_from_form({**filled_in(), "preset": "quick"}).data
    assert (data.train_pairs, data.heldout_pairs) == (8, 4)


@pytest.mark.parametrize("typed", ["2e-5", "2E-5", "0.00002", ".00002", "2.0e-05"])
def test_a_learning_rate_is_typed_as_people_write_it(typed):
    form = {**THREE, "learning_rate": typed}
    assert ui_errors(form) == []
    assert config_from_form(form).train.learning_rate == 2e-5


def test_a_learning_rate_from_the_api_may_be_a_number():
    assert config_from_form({**THREE, "learning_rate": 2e-5}).train.learning_rate == 2e-5


@pytest.mark.parametrize("typed", ["2-5", "2e", "0,00002", "two", "1.2.3", "-2e-5", "0", "0e5", "nan", "inf"])
def test_what_is_no_number_above_0_is_refused_at_its_field(typed):
    form = {**THREE, "learning_rate": typed}
    assert repr(typed) in marked("config", "learning_rate", errors=ui_errors(form))
    with pytest.raises(InputError, match=r"config\.learning_rate: .*no number above 0"):
        config_from_form(form)


def test_every_setting_is_reached_by_its_section_and_by_its_dotted_name():
    needed = {"source": "/m", "train": "/p.jsonl"}
    for section, part in SECTIONS.items():
        held = {name: needed.get(name, field.default) for name, field in part.model_fields.items()}
        values = json.loads(to_json(held, inf_nan_mode="constants"))
        for overrides in ({section: values}, {f"{section}.{name}": value for name, value in values.items()}):
            form = {**THREE, "overrides": overrides}
            assert ui_errors(form) == [] and config_from_form(form)
    assert config_from_form({**THREE, "overrides": {"seed": 7}}).seed == 7


def test_overrides_win_and_both_ways_to_write_them_mix():
    given = {"train.beta": 0.2, "train": {"epochs": 2}, "limits.rounds": 9, "data.heldout": "/held.jsonl"}
    given |= {"select": {"rule": "bottom"}, "sampling.engine": "transformers"}
    config = config_from_form({**THREE, "learning_rate": "3e-6", "overrides": given})
    assert (config.train.beta, config.train.epochs, config.train.learning_rate) == (0.2, 2, 3e-6)
    assert (config.limits.rounds, config.data.heldout[0].path) == (9, "/held.jsonl")
    assert (config.select.rule, config.sampling.engine) == ("bottom", "transformers")
    with pytest.raises(InputError, match=r"config\.overrides: train\.beta is given twice"):
        config_from_form({**THREE, "overrides": {"train.beta": 0.2, "train": {"beta": 0.3}}})


@pytest.mark.parametrize(
    ("overrides", "path", "message"),
    [
        ({"train": {"betta": 1}}, ("train",), "'betta' is not one of ['losses'"),
        ({"train.betta": 1}, (), "'train.betta' is not one of ['train.losses'"),
        ({"trian": {"beta": 1}}, (), "'trian' does not match '^(model|start|data|"),
        ({"train": {"beta": 0}}, ("train", "beta"), "0 is less than or equal to the minimum of 0"),
        ({"select.fraction": 2}, ("select.fraction",), "2 is greater than the maximum of 1"),
        ({"train": {"epochs": "2e-5"}}, ("train", "epochs"), "'2e-5' is not of type"),
    ],
)
def test_a_wrong_override_is_refused_in_the_form_before_anything_starts(overrides, path, message):
    form = {**THREE, "overrides": overrides}
    assert message in marked("config", "overrides", *path, errors=ui_errors(form))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"overrides": {"train": {"betta": 1}}}, "config.overrides: train.betta: unknown key"),
        ({"overrides": {"train.betta": 1}}, "train.betta: unknown key; did you mean train.beta"),
        ({"overrides": {"trian": {}}}, "config.overrides: trian: unknown key; did you mean train"),
        ({"overrides": {"select.fraction": 2}}, "config.overrides: select.fraction: "),
        ({"overrides": {"data": "/p.jsonl"}}, "config.overrides: data: "),
        ({"overrides": {"data.test": "t.jsonl"}}, "config.overrides.data.test: 't.jsonl' is a relative path"),
        ({"rounds": 0}, "config.rounds: "),
        ({"data": "pairs.jsonl"}, "config.data: 'pairs.jsonl' is a relative path"),
        ({"modell": "m"}, "config.modell: no field of the form, which has model, data"),
        ({"select": {"fraction": 0.5}}, "config.select: no field of the form: give its settings as"),
        ({"model": {"source": "/m"}}, "config.model: give one text: it was a section in earlier versions"),
        ({"data": {"train": "/p.jsonl"}}, "config.data: give one text"),
    ],
)  # fmt: skip
def test_the_flow_refuses_a_wrong_value_by_the_forms_field(change, named):
    with pytest.raises(ValidationError) as refused:
        FORM.validate_python({**THREE, **change})
    assert named in str(refused.value)


@pytest.mark.parametrize("name", ["sera-{data}", "nightly-{date}", "a.b_c-1", "{date}"])
def test_a_name_may_hold_the_date_and_the_data(name):
    assert ui_errors(THREE, run=name) == []


@pytest.mark.parametrize("name", ["../up", "two words", "{run}", "-x"])
def test_a_wrong_name_is_refused_at_its_field(name):
    assert repr(name) in marked("run", errors=ui_errors(THREE, run=name))


def test_a_number_of_rounds_out_of_range_and_a_relative_path_are_marked():
    errors = ui_errors({**THREE, "rounds": 0, "data": "pairs.jsonl"})
    assert "less than the minimum of 1" in marked("config", "rounds", errors=errors)
    assert "'pairs.jsonl'" in marked("config", "data", errors=errors)


def test_a_configuration_from_python_passes_as_it_is():
    config = config_from_form(THREE)
    assert FORM.validate_python(config) is config
