"""Every knob of the configuration changes what a run would do, or is listed as one that may not."""

import json
import typing
from functools import cache
from pathlib import Path

import pytest
import tiny
import tinyrun
from pydantic import BaseModel, ValidationError

from flows.experiments import without_idle
from flows.planning.plan import walk_rounds
from flows.running.open_run import resolved, source_digests
from sera_core.artifacts.history import History
from sera_core.artifacts.manifest import StepRef
from sera_core.artifacts.store import open_store
from sera_core.config import SeraConfig

MAY_NOT_CHANGE_A_STEP = {
    "execution.device", "execution.micro_batch", "execution.tokens_per_batch", "execution.sampling_batch",
    "execution.checkpoint_steps", "execution.keep_checkpoints", "execution.tracking",
    "execution.gradient_checkpointing", "execution.processes", "execution.shard_weights",
    "execution.distribute", "execution.replicas", "execution.gpus_per_replica", "execution.address",
    "execution.child", "execution.limit", "execution.accept_racy_store",  # how the work is done
    "limits.hours", "limits.tokens",  # where it stops: tested in test_stopping.py
    "decide.review_hours", "decide.review_default",  # what is written when nobody answers: test_reviewing.py
    "decide.uncalibrated",  # whether a judge is refused: test_win_rate.py
    "review.show_text",  # what cards show: tested in test_cards.py
    "model.revision",  # the commit it resolves to is in the source's digest; a folder has none
}  # fmt: skip

HARNESS = str(Path(__file__).parents[1] / "fixtures" / "harness" / "sums.yaml")
OTHER = {
    "model.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    "model.template_kwargs": {"enable_thinking": False},
    "start.sft": "chosen",
    "start.sft_learning_rate": 1e-4,
    "data.train.weight": 0.5,
    "data.train.split": "validation",
    "data.heldout_fraction": 0.5,
    "data.test_fraction": 0.25,
    "data.train_pairs": 7,
    "data.heldout_pairs": 3,
    "data.columns": {"prompt": "question"},
    "review.score": "simpo",
    "review.crossfit": 2,
    "select.fraction": 0.5,
    "select_generated.fraction": 0.5,
    "sampling.dtype": "bfloat16",
    "sampling.prompts": 5,
    "sampling.max_parity_nats": 0.5,
    "pairing.by": "word-count",
    "mix.shares": (0.4,),
    "mix.size": 9,
    "train.losses": ("ipo",),
    "train.loss_weights": (2.0,),
    "train.label_smoothing": 0.1,
    "train.ld_alpha": 0.5,
    "train.learning_rate": 2e-4,
    "train.lora_targets": ("q_proj",),
    "train.tokens": (60,),
    "decide.panel": ("tokens", "words"),
    "decide.feature": "words",
    "decide.judge": "constant",
    "evaluate.harness": (HARNESS,),
    "evaluate.harness_items": 3,
    "limits.rounds": 2,
    "execution.limit": "sera-device",
}
"""A second value, where no other value of the type is sure to be valid."""

HUB_ONLY = {"data.train.split", "start.sft_split"}
"""Fields that files ignore, and that are refused with one (test_effects.py)."""

NEEDS = {
    "start.sft_learning_rate": {"start": {"sft": "chosen"}},
    "start.sft_epochs": {"start": {"sft": "chosen"}},
    "start.sft_batch": {"start": {"sft": "chosen"}},
    "data.on_overlap": {"data": {"test": "side"}},
    "review.ensemble": {"limits": {"rounds": 4}},  # the forms differ from the third head on
    "select.k": {"select": {"rule": "top-k"}},
    "select.threshold": {"select": {"rule": "threshold"}},
    "select_generated.k": {"select_generated": {"rule": "top-k"}},
    "select_generated.threshold": {"select_generated": {"rule": "threshold"}},
    "mix.ramp_start": {"mix": {"shares": []}},
    "mix.ramp_end": {"mix": {"shares": []}},
    "mix.ramp_rounds": {"mix": {"shares": []}},
    "train.lora_rank": {"train": {"method": "lora"}},
    "train.lora_alpha": {"train": {"method": "lora"}},
    "train.lora_targets": {"train": {"method": "lora"}},
    "train.use_rslora": {"train": {"method": "lora"}},
    "train.use_dora": {"train": {"method": "lora"}},
    "train.target_margin": {"train": {"losses": ["simpo"]}},
    "evaluate.harness_items": {"evaluate": {"harness": [HARNESS]}},
    "decide.judge": {"decide": {"metric": "win-rate", "judge": "word-count"}},
    "execution.shard_weights": {"execution": {"processes": 2}},
}
"""An experiment that uses the field."""


def leaves(model: type[BaseModel] = SeraConfig, prefix: str = "") -> list[str]:
    found = []
    for name, info in model.model_fields.items():
        inner = [a for a in (info.annotation, *typing.get_args(info.annotation)) if isinstance(a, type)]
        part = next((a for a in inner if issubclass(a, BaseModel)), None)
        if part is None:
            found.append(prefix + name)
        else:
            found += leaves(part, f"{prefix}{name}.")
    return [name for name in found if not name.startswith(("data.heldout.", "data.test.", "data.prompts."))]


FIELDS = [*leaves(), "data.heldout", "data.test", "data.prompts"]


DIGESTS: dict[str, dict] = {}


def digests_of(config: SeraConfig) -> dict:
    """Digests of the sources; hashed once, since nothing rewrites them."""
    given = (config.model.source, config.pairing.by, config.decide.judge, config.evaluate.harness)
    named = f"{given} {config.data.model_dump_json()}"
    if named not in DIGESTS:
        DIGESTS[named] = source_digests(config)
    return DIGESTS[named]


def keys_of(config: SeraConfig) -> set[str]:
    """Keys of all steps, each taken to produce content that depends on its key alone."""
    keys: set[str] = set()

    class Pretend:
        round = 0
        store = open_store("no-such-store")

        def do(self, spec):
            keys.add(spec.key)
            return StepRef(step=spec.step, key=spec.key, digest=spec.key)

        def look(self, ref):
            return None

    walk_rounds(config, digests_of(config), History([]), Pretend())
    return keys


@cache
def keys_before(settings: str) -> set[str]:
    """`keys_of` of settings as JSON: most fields of a combination start from the same."""
    return keys_of(SeraConfig.stored(json.loads(settings)))


def other_value(field: str, old: object) -> object:
    if field in OTHER:
        return OTHER[field]
    section, name = field.split(".") if "." in field else (None, field)
    model = SeraConfig.model_fields[section].annotation if section else SeraConfig
    annotation = model.model_fields[name].annotation
    choices = [c for a in (annotation, *typing.get_args(annotation)) for c in typing.get_args(a)] + list(
        typing.get_args(annotation)
    )
    literals = [choice for choice in choices if isinstance(choice, str) and choice != old]
    if literals:
        return literals[0]
    if isinstance(old, bool):
        return not old
    if isinstance(old, int):
        return old + 1
    if isinstance(old, float):
        return old * 0.9 if old else 0.25
    raise AssertionError(f"no second value known for {field} = {old!r}; add it to OTHER")


def changed(folder: Path, field: str, together: dict | None = None) -> tuple[dict, dict]:
    """Settings that use the field, with `together` laid over them; and the same with another value of it."""
    before = settings_of(folder, NEEDS.get(field, {}) if together is None else together)
    if field in ("data.heldout", "data.test", "data.prompts"):
        value = side_of(folder, field)
    elif field == "data.train.path":
        value = [{"path": str(tinyrun.write_rows(folder / "other.jsonl", tinyrun.pairs(20, seed=5)))}]
        field = "data.train"
    elif field.startswith("data.train."):
        value = [{"path": before["data"]["train"][0]["path"], field.split(".")[2]: OTHER[field]}]
        field = "data.train"
    elif field == "model.source":
        value = str(folder / "other")
        if not (folder / "other").exists():
            tiny.tiny_policy(folder / "other", seed=1)
    else:
        old = SeraConfig.stored(before)
        for part in field.split("."):
            old = getattr(old, part)
        value = other_value(field, old)
    section, _, name = field.partition(".")
    after = {**before, section: {**before.get(section, {}), name: value} if name else value}
    return before, without_idle(after, {"data": {"heldout": value}}) if field == "data.heldout" else after


def settings_of(folder: Path, sections: dict) -> dict:
    filled = {
        name: {key: filled_in(folder, key, value) for key, value in section.items()}
        for name, section in sections.items()
    }
    return tinyrun.settings(folder, **filled)


def filled_in(folder: Path, key: str, value: object) -> object:
    if value == "candidates":
        rows = [{"prompt": "Why?", "response": text, "rating": n} for n, text in enumerate(("so", "no"))]
        return f"file:{tinyrun.write_rows(folder / 'rated.jsonl', rows)}"
    return side_of(folder, key) if value == "side" else value


def side_of(folder: Path, name: str) -> list[dict]:
    rows = [{**row, "prompt": f"{name} {n}"} for n, row in enumerate(plain())]
    return [{"path": str(tinyrun.write_rows(folder / f"{name}.jsonl", rows))}]


def plain() -> list[dict]:
    return [{"chosen": "yes it is", "rejected": "no"} for _ in range(8)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return tmp_path_factory.mktemp("fields")


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_the_plan_or_is_known_not_to(field, shared):
    if field in MAY_NOT_CHANGE_A_STEP | HUB_ONLY:
        return
    before, after = map(SeraConfig.model_validate, changed(shared, field))
    assert keys_of(before) != keys_of(after), f"{field} changes nothing"


def test_automatic_prompts_are_another_plan(shared):
    numbered, automatic = (tinyrun.config(shared, sampling={"prompts": prompts}) for prompts in (10, "auto"))
    assert keys_of(numbered) != keys_of(automatic)


TOGETHER = [
    {"start": {"sft": "chosen"}},
    {"data": {"heldout": "side"}},
    {"data": {"heldout": "side", "test": "side"}},
    {"data": {"prompts": "side"}},
    {"review": {"score": "simpo"}},
    {"review": {"gamma": 0.0}},
    {"review": {"reference": "previous"}},
    {"review": {"length_penalty": "dice"}},
    *({section: {"rule": rule}} for section in ("select", "select_generated")
      for rule in ("top-k", "threshold", "middle", "random", "bottom", "relabel", "none")),
    {"select_generated": {"rule": "prompt-variance"}},
    {"sampling": {"dtype": "bfloat16"}},
    {"model": {"dtype": "bfloat16"}},
    {"sampling": {"prompts": "auto"}},
    {"pairing": {"rule": "best-random"}},
    {"pairing": {"by": "word-count"}},
    {"pairing": {"by": "candidates"}},
    {"mix": {"shares": []}},
    {"mix": {"shares": [], "ramp_rounds": 1}},
    {"mix": {"shares": [0.0]}},
    {"mix": {"shares": [0.0]}, "evaluate": {"prompts": 0}},
    {"mix": {"shares": [1.0]}},
    {"mix": {"on_short": "fill"}},
    {"train": {"losses": ["ipo"]}},
    {"train": {"losses": ["sigmoid", "sft"]}},
    {"train": {"losses": ["sft", "simpo"]}},
    {"train": {"losses": ["robust"], "label_smoothing": 0.2}},
    {"train": {"label_smoothing": "consistency"}},
    {"train": {"losses": ["sppo_hard"]}},
    {"train": {"ld_alpha": 0.5, "pair_weights": "wpo"}},
    {"train": {"losses": ["simpo"]}},
    {"train": {"losses": ["sigmoid", "hinge"]}},
    {"train": {"method": "lora"}},
    {"train": {"start": "reference"}},
    {"train": {"tokens": [60]}},
    {"train": {"tokens": [0, 60]}},
    {"train": {"reference": "previous"}},
    {"evaluate": {"prompts": 0}},
    {"decide": {"review": "always"}},
    {"decide": {"metric": "accuracy"}},
    {"decide": {"metric": "worst-side"}},
    {"decide": {"metric": "win-rate", "judge": "word-count"}},
    {"evaluate": {"harness": [HARNESS]}},
]  # fmt: skip
"""Combinations that may rob other fields of their effect."""


SPELLED_OUT = [
    ("review.score", {"train": {"losses": ["simpo"]}}),
    ("review.score", {"train": {"losses": ["sft", "simpo"]}}),
    ("sampling.dtype", {"model": {"dtype": "bfloat16"}}),
]
"""Their second value is what the default means there: said twice, not in vain."""


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(TOGETHER)))
def test_a_field_without_effect_in_a_combination_is_refused(number, shared):
    """Whatever the combination accepts changes a step's key there too; `keys_of` knows no other judge."""
    together, idle_pairs = TOGETHER[number], []
    combined = {f"{section}.{name}" for section, part in together.items() for name in part}
    for field in FIELDS:
        if (field, together) in SPELLED_OUT:
            continue
        if field in MAY_NOT_CHANGE_A_STEP | HUB_ONLY | combined or field.startswith("data.train."):
            continue
        both = {
            name: {**NEEDS.get(field, {}).get(name, {}), **together.get(name, {})}
            for name in NEEDS.get(field, {}).keys() | together.keys()
        }
        before, after = changed(shared, field, both)
        try:
            accepted = SeraConfig.model_validate(after)
        except ValidationError:
            continue
        if keys_before(json.dumps(before, default=str)) == keys_of(accepted):
            idle_pairs.append(field)
    assert not idle_pairs, f"{together} leaves them without effect"


def test_what_changes_no_result_is_not_in_the_configuration_hash(tmp_path):
    config = tinyrun.config(tmp_path)
    other = tinyrun.config(
        tmp_path,
        execution={"micro_batch": 2},
        limits={"rounds": 9, "hours": 1.0},
        review={"show_text": False},
    )
    digests = source_digests(config)
    assert resolved(config, digests) == resolved(other, digests)
    assert keys_of(config) <= keys_of(other)
