"""The form a run is started with in the browser: few fields, help from the configuration, clear refusals."""

import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from flows.experiments import load_experiment
from flows.orchestration.form import FormConfig, config_from_form
from sera_core.config import SeraConfig

SNAPSHOT = Path(__file__).with_name("form_schema.json")
FORM = TypeAdapter(FormConfig)
TWO = {"model": {"source": "/models/policy"}, "data": {"train": "/data/pairs.jsonl"}}


def schema() -> dict:
    return FORM.json_schema()


def leaves(part: dict, definitions: dict) -> list[str]:
    """The fields that can be filled in: a constant, such as a tab's engine, cannot."""
    names = []
    for name, field in part["properties"].items():
        if "const" in field:
            continue
        options = [field, *field.get("anyOf", [])]
        inner = [definitions[option["$ref"].split("/")[-1]] for option in options if "$ref" in option]
        names += [f"{name}.{leaf}" for one in inner for leaf in leaves(one, definitions)] if inner else [name]
    return names


def test_the_schema_of_the_form_is_what_it_was():
    """Renew it with: python -m flows.orchestration.form > tests/flows/form_schema.json."""
    assert schema() == json.loads(SNAPSHOT.read_text())


def test_the_form_has_at_most_25_fields_each_with_help():
    shown = schema()
    definitions = shown["$defs"]
    assert len(leaves(shown, definitions)) <= 25
    for part in (shown, *definitions.values()):
        for name, field in part["properties"].items():
            described = [field, *(definitions[o["$ref"].split("/")[-1]] for o in [field] if "$ref" in o)]
            assert any(one.get("description") for one in described), name


def test_ranges_stand_in_words_and_choices_are_selects():
    parts = schema()["$defs"]
    assert "at least 0, below 1" in parts["ReviewSection"]["properties"]["gamma"]["description"]
    assert "top-fraction" in parts["SelectSection"]["properties"]["rule"]["enum"]


def test_the_engine_is_chosen_by_tabs():
    engine = schema()["$defs"]["SamplingSection"]["properties"]["engine"]
    assert [kind["$ref"].split("/")[-1] for kind in engine["anyOf"]] == [
        "AutoEngine",
        "TransformersEngine",
        "VllmEngine",
    ]


def test_two_fields_start_a_run_with_the_demos_settings():
    config = config_from_form(TWO)
    demo = load_experiment("bundled:demo")
    assert config.model.source == "/models/policy" and config.data.train[0].path == "/data/pairs.jsonl"
    for section in ("review", "select", "sampling", "mix", "train", "evaluate", "decide", "limits"):
        assert getattr(config, section) == getattr(demo, section)


@pytest.mark.parametrize(("preset", "rounds"), [("quick", 2), ("demo", 3), ("full", 4)])
def test_empty_fields_take_the_presets_values(preset, rounds):
    assert config_from_form({**TWO, "preset": preset}).limits.rounds == rounds


def test_the_full_preset_is_the_methods_defaults():
    plain = SeraConfig.model_validate(
        {"model": {"source": "/models/policy"}, "data": {"train": [{"path": "/data/pairs.jsonl"}]}}
    )
    assert config_from_form({**TWO, "preset": "full"}) == plain


def test_every_field_of_the_form_reaches_the_configuration():
    config = config_from_form(
        {
            "model": {"source": "/m", "dtype": "bfloat16"},
            "data": {"train": "/a.jsonl", "heldout": "/b.jsonl"},
            "review": {"gamma": 0.1, "show_text": False},
            "select": {"rule": "bottom", "fraction": 0.5},
            "sampling": {
                "engine": {"engine": "vllm", "dtype": "float32"},
                "responses": 5,
                "temperature": 0.6,
                "max_tokens": 99,
            },
            "mix": {"shares": [0.2]},
            "train": {"losses": ["ipo"], "method": "full", "beta": 0.3, "learning_rate": 1e-6},
            "decide": {"review": "always", "review_hours": 2},
            "limits": {"rounds": 7},
            "overrides": {"train": {"epochs": 2}, "seed": 3},
        }
    )
    assert (config.model.dtype, config.data.heldout[0].path) == ("bfloat16", "/b.jsonl")
    assert (config.review.gamma, config.review.show_text) == (0.1, False)
    assert (config.select.rule, config.select.fraction) == ("bottom", 0.5)
    sampling = config.sampling
    assert (sampling.engine, sampling.dtype, sampling.responses) == ("vllm", "float32", 5)
    assert (sampling.temperature, sampling.max_tokens, config.mix.shares) == (0.6, 99, (0.2,))
    train = config.train
    assert (train.losses, train.method, train.beta, train.learning_rate) == (("ipo",), "full", 0.3, 1e-6)
    assert (config.decide.review, config.decide.review_hours, config.limits.rounds) == ("always", 2, 7)
    assert (train.epochs, config.seed) == (2, 3)


def test_the_transformers_tab_sets_its_batch():
    form = {**TWO, "sampling": {"engine": {"engine": "transformers", "batch": 7}}}
    assert config_from_form(form).execution.sampling_batch == 7
    form["sampling"]["engine"].pop("batch")
    assert config_from_form(form).execution.sampling_batch == "auto"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"select": {"fraction": 2}}, "select.fraction"),
        ({"overrides": {"train": {"betta": 1}}}, "did you mean train.beta"),
        ({"selekt": {}}, "selekt"),
        ({"data": {"train": "pairs.jsonl"}}, "data.train: 'pairs.jsonl' is a relative path"),
        ({"data": {}}, "train"),
    ],
)
def test_a_wrong_value_is_refused_with_its_fields_name(change, named):
    with pytest.raises(ValidationError) as refused:
        FORM.validate_python({**TWO, **change})
    assert named in str(refused.value)


def test_a_configuration_from_python_passes_as_it_is():
    config = config_from_form(TWO)
    assert FORM.validate_python(config) is config
