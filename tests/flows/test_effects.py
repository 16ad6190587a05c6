"""A setting without effect in its combination is refused by name; with what it needs it is accepted."""

import json

import pytest
import tinyrun
from pydantic import ValidationError

from flows.experiments import load_experiment
from flows.orchestration.form import config_from_form
from sera_core.config import SeraConfig
from sera_core.effects import EFFECTS

NO_SHARE = {"mix": {"shares": [0.0]}}
SIDE = [{"path": "side.jsonl"}]
CASES = {
    "start.sft_learning_rate": (1e-4, {"start": {"sft": "chosen"}}, {}),
    "start.sft_epochs": (2, {"start": {"sft": "chats.jsonl"}}, {}),
    "start.sft_batch": (8, {"start": {"sft": "hub:a/b"}}, {}),
    "start.sft_split": ("train_sft", {"start": {"sft": "hub:a/b"}}, {"start": {"sft": "chats.jsonl"}}),
    "data.heldout_fraction": (0.3, {}, {"data": {"heldout": SIDE}}),
    "data.test_fraction": (0.3, {}, {"data": {"test": SIDE}}),
    "data.prompts": (SIDE, {}, NO_SHARE),
    "data.split_seed": (3, {}, {"data": {"heldout_fraction": 0.0}}),
    "data.completions": ("random", {"data": {"format": "ultrafeedback"}}, {"data": {"format": "hh"}}),
    "data.on_overlap": ("drop", {"start": {"sft": "chats.jsonl"}}, {"start": {"sft": "chosen"}}),
    "review.reference": ("previous", {}, {"train": {"losses": ["simpo"]}}),
    "review.crossfit": (2, {"select": {"rule": "random"}}, {"select": {"rule": "none"}}),
    "review.ensemble": ("ema", {}, {"review": {"gamma": 0.0}}),
    "sampling.responses": (5, {}, NO_SHARE),
    "sampling.temperature": (0.5, {}, NO_SHARE),
    "sampling.top_p": (0.5, {}, NO_SHARE),
    "sampling.max_tokens": (7, {}, NO_SHARE),
    "sampling.prompts": (5, {}, NO_SHARE),
    "sampling.engine": ("vllm", NO_SHARE, {**NO_SHARE, "evaluate": {"prompts": 0}}),
    "sampling.dtype": ("bfloat16", NO_SHARE, {**NO_SHARE, "evaluate": {"prompts": 0}}),
    "sampling.max_parity_nats": (0.5, {}, {"sampling": {"dtype": "bfloat16"}}),
    "pairing.rule": ("all", {}, NO_SHARE),
    "pairing.by": ("word-count", {}, NO_SHARE),
    "pairing.allow_cut": (True, {}, NO_SHARE),
    "mix.ramp_start": (0.1, {"mix": {"shares": []}}, {"mix": {"shares": [], "ramp_rounds": 1}}),
    "mix.ramp_end": (0.9, {"mix": {"shares": []}}, {}),
    "mix.ramp_rounds": (5, {"mix": {"shares": []}}, {}),
    "mix.on_short": ("fill", {}, NO_SHARE),
    "train.label_smoothing": (0.1, {}, {"train": {"losses": ["ipo", "hinge"]}}),
    "train.ld_alpha": (
        0.5,
        {"train": {"losses": ["hinge", "sft"]}},
        {"train": {"losses": ["sigmoid", "ipo"]}},
    ),
    "train.epochs": (2, {"train": {"tokens": [0, 60]}}, {"train": {"tokens": [60]}}),
    "train.target_margin": (0.5, {"train": {"losses": ["simpo"]}}, {}),
    "train.lora_rank": (8, {"train": {"method": "lora"}}, {}),
    "train.lora_alpha": (8, {"train": {"method": "lora"}}, {}),
    "train.lora_targets": (["q_proj"], {"train": {"method": "lora"}}, {}),
    "train.use_rslora": (True, {"train": {"method": "lora"}}, {}),
    "train.use_dora": (True, {"train": {"method": "lora"}}, {}),
    "train.reference": ("previous", {}, {"train": {"losses": ["simpo"]}}),
    "evaluate.responses": (3, {}, {"evaluate": {"prompts": 0}}),
    "evaluate.max_tokens": (3, {}, {"evaluate": {"prompts": 0}}),
    "decide.feature": ("words", {}, {"decide": {"metric": "accuracy"}}),
    "evaluate.harness_items": (3, {"evaluate": {"harness": ["task.yaml"]}}, {}),
    "decide.judge": ("constant", {"decide": {"metric": "win-rate"}}, {}),
    "decide.uncalibrated": ("allow", {"decide": {"metric": "win-rate", "judge": "constant"}}, {}),
    "decide.review_hours": (2.0, {"decide": {"review": "alarm"}}, {}),
    "decide.review_default": ("stop", {"decide": {"review": "always"}}, {}),
    "execution.shard_weights": (True, {"execution": {"processes": 2}}, {}),
    "execution.sampling_batch": (8, {}, {"sampling": {"engine": "vllm"}}),
    "execution.replicas": (2, {"execution": {"distribute": "processes"}}, {}),
    "execution.gpus_per_replica": (
        0.5,
        {"execution": {"distribute": "ray"}},
        {"execution": {"distribute": "processes"}},
    ),
    "execution.address": ("10.0.0.1:6379", {"execution": {"distribute": "ray"}}, {}),
    "select_generated.rule": ("none", {}, NO_SHARE),
} | {
    f"{section}.{name}": (value, {section: {"rule": rule}}, {section: {"rule": idle}})
    for section in ("select", "select_generated")
    for name, value, rule, idle in (
        ("fraction", 0.5, "bottom", "threshold"),
        ("k", 9, "top-k", "top-fraction"),
        ("threshold", 1.0, "threshold", "none"),
        ("min_margin", 1.0, "random", "relabel"),
        ("direction", "small", "bottom", "middle"),
    )
}
"""By field: a value, settings it has an effect with, settings that rob it of that."""


def settings(field, value, sections):
    """The smallest experiment with these."""
    base = {"model": {"source": "tiny"}, "data": {"train": [{"path": "pairs.jsonl"}]}}
    section, _, name = field.partition(".")
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in base.keys() | sections.keys()}
    return {**merged, section: {**merged.get(section, {}), name: value}}


def test_the_table_has_a_case_for_each_row():
    assert set(CASES) == {row.field for row in EFFECTS}


@pytest.mark.parametrize("field", CASES)
def test_a_setting_is_accepted_with_what_it_needs_and_refused_without(field):
    value, needed, idle = CASES[field]
    SeraConfig.model_validate(settings(field, value, needed))
    robbed = settings(field, value, idle)
    with pytest.raises(ValidationError, match=rf"{field} = .* has no effect here: it has one"):
        SeraConfig.model_validate(robbed)
    assert SeraConfig.stored(robbed)  # a run of an older version is read all the same
    default = SeraConfig.model_validate(settings(field, value, needed)).model_dump(mode="json")
    SeraConfig.model_validate(default)  # what is spelled out at its default asks for nothing


def test_automatic_prompts_need_a_share_as_a_number_does_and_nothing_else_is_taken_for_a_number():
    assert SeraConfig.model_validate(settings("sampling.prompts", "auto", {})).sampling.prompts == "auto"
    with pytest.raises(ValidationError, match=r'sampling\.prompts = "auto" has no effect here'):
        SeraConfig.model_validate(settings("sampling.prompts", "auto", NO_SHARE))
    for value in ("all", 0, -3, 2.5, []):
        with pytest.raises(ValidationError, match='give a whole number above 0, or "auto"') as failed:
            SeraConfig.model_validate(settings("sampling.prompts", value, {}))
        assert failed.value.error_count() == 1


@pytest.mark.parametrize(
    "where",
    [
        NO_SHARE,
        {"review": {"gamma": 0.0}},
        {"pairing": {"by": "word-count"}},
        {"train": {"losses": ["ipo"]}},
    ],
)
def test_smoothing_by_consistency_needs_two_heads_that_order_responses(where):
    smoothed = settings("train.label_smoothing", "consistency", {})
    assert SeraConfig.model_validate(smoothed).train.smooths_by_consistency
    with pytest.raises(ValidationError, match=r'train\.label_smoothing = "consistency" has no effect here'):
        SeraConfig.model_validate(settings("train.label_smoothing", "consistency", where))


def test_a_split_is_refused_for_a_file_and_read_for_a_hub_data_set():
    SeraConfig.model_validate(settings("data.train", [{"path": "hub:a/b", "split": "test"}], {}))
    with pytest.raises(ValidationError, match=r"data\.train\.0\.split"):
        SeraConfig.model_validate(settings("data.train", [{"path": "a.jsonl", "split": "test"}], {}))


def test_the_command_names_every_one_and_writes_nothing(tmp_path, sera):
    experiment = tinyrun.experiment(
        tmp_path, train={"lora_rank": 8, "losses": ["ipo"], "label_smoothing": 0.1}, select={"k": 4}
    )
    said = sera("run", experiment, "--store", tmp_path / "store", code=2).err
    lines = [line for line in said.splitlines() if "has no effect here" in line]
    assert len(lines) == 3 and all("tiny.toml" in line for line in lines)
    assert all(
        name in said for name in ("train.lora_rank = 8", "train.label_smoothing = 0.1", "select.k = 4")
    )
    assert not (tmp_path / "store").exists()


def test_a_control_of_a_sound_file_need_not_take_out_what_the_change_robs_of_its_effect(tmp_path):
    """Its file samples; `--set mix.shares=[0.0]` is the same experiment without generated pairs."""
    experiment = str(tinyrun.experiment(tmp_path))
    control = load_experiment(experiment, ["mix.shares=[0.0]"])
    default = SeraConfig.model_validate(settings("mix.shares", [0.0], {}))
    assert (control.sampling, control.pairing) == (default.sampling, default.pairing)
    with pytest.raises(ValueError, match=r"sampling\.top_p"):
        load_experiment(experiment, ["mix.shares=[0.0]", "sampling.top_p=0.9"])


def test_a_form_drops_what_the_preset_says_in_vain_and_refuses_what_the_person_says_in_vain():
    three = {"model": "tiny", "data": "/pairs.jsonl", "rounds": 3, "preset": "demo"}
    assert config_from_form({**three, "overrides": {"mix": {"shares": [0.0]}}}).sampling.responses == 8
    with pytest.raises(ValueError, match=r"sampling\.responses = 5"):
        config_from_form({**three, "overrides": {"mix.shares": [0.0], "sampling.responses": 5}})
    with pytest.raises(ValueError, match=r"train\.lora_rank"):
        config_from_form({**three, "overrides": {"train": {"method": "full", "lora_rank": 4}}})


def test_the_bundled_experiments_say_nothing_in_vain():
    for name in ("demo", "demo-quick", "lab", "lab-ultrafeedback", "mistral-7b", "mistral-7b-qlora"):
        assert json.loads(load_experiment(f"bundled:{name}").model_dump_json())
