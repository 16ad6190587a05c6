"""The data and render steps: every row accounted for, bytes decided by content, text turned into tokens."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from tiny import CHATML, write_tokenizer

from sera_core import steps
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact, StepRecord, StepSpec
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import LocalStore
from sera_core.config import ExecutionConfig, SeraConfig
from sera_core.data.parsing import parse_pair, parse_prompt
from sera_core.data.sources import Row, source_digest
from sera_core.data.splitting import group_key
from sera_core.errors import InputError
from tasks.data import load_pairs, render_pairs

PAIR_SIDES = ("train", "heldout", "test")
SIDES = (*PAIR_SIDES, "prompts")


def rows(*prompts: str, chosen: str = "yes", rejected: str = "no") -> list[dict]:
    return [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt in prompts]


class Lab:
    """A store, and sources written as jsonl."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = LocalStore(folder / "store")
        self.template = CHATML

    def config(self, settings: dict | None = None, **sides: list[dict]) -> SeraConfig:
        self.folder.mkdir(parents=True, exist_ok=True)
        sources = {}
        for side, data in sides.items():
            path = self.folder / f"{side}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in data))
            sources[side] = [{"path": str(path)} | (settings or {}).pop(f"{side}_source", {})]
        return SeraConfig.stored({"model": {"source": "tiny"}, "data": sources | (settings or {})})

    def data_spec(self, config: SeraConfig) -> StepSpec:
        digests = {
            side: [source_digest(s.path, s.split) for s in getattr(config.data, side)] for side in SIDES
        }
        return steps.data(config, digests)

    def load(self, settings: dict | None = None, **sides: list[dict]) -> Artifact:
        return self.run(self.data_spec(self.config(settings, **sides)), load_pairs)

    def run(self, spec: StepSpec, work) -> Artifact:
        return Artifact(self.store, run_step(self.store, spec, work, ExecutionConfig()).ref)

    def model(self) -> StepRecord:
        def work(attempt):
            write_tokenizer(attempt.write("policy/tokenizer.json").parent, attempt.fields["template"])
            return [f"policy/{path.name}" for path in sorted((attempt.folder / "policy").iterdir())]

        spec = StepSpec(step="model", version=1, fields={"template": self.template}, inputs={})
        return run_step(self.store, spec, work, ExecutionConfig())

    def render(self, settings: dict | None = None, **sides: list[dict]) -> Artifact:
        config = self.config(settings, **sides)
        data = run_step(self.store, self.data_spec(config), load_pairs, ExecutionConfig())
        return self.run(steps.render(config, data.ref, self.model().ref), render_pairs)


@pytest.fixture
def lab(tmp_path) -> Lab:
    return Lab(tmp_path)


def read(step: Artifact, side: str) -> list[dict]:
    return list(schema.iter_rows(step.path(f"{side}.parquet")))


def check_account(step: Artifact) -> None:
    """read = Σ sides + Σ reasons, and the counts are those of the files."""
    counts = Counter(step.record.counts)
    reasons = Counter({name: n for name, n in counts.items() if name not in (*SIDES, "read")})
    assert counts["read"] == sum(counts[side] for side in SIDES) + reasons.total()
    for side in PAIR_SIDES:
        assert len(read(step, side)) == counts[side]
    ledger = read(step, "dropped")
    own = [row for row in ledger if row["stage"].startswith(step.ref.step)]
    assert Counter(row["reason"] for row in own) == reasons
    assert not any(row["kept"] for row in ledger)


# ------------------------------------------------------------------------------------------------------- data


def test_every_row_is_on_one_side_or_in_the_ledger_with_its_reason(lab):
    train = [
        *rows(*"abcdefghij"),
        *rows("a"),
        *rows("b", chosen="no"),
        *rows("a", chosen="no", rejected="yes"),
    ]
    step = lab.load(
        {"train_pairs": 5, "heldout_pairs": 2, "heldout_fraction": 0.3, "test_fraction": 0.1}, train=train
    )
    check_account(step)
    counts = step.record.counts
    assert (counts["read"], counts["train"], counts["heldout"]) == (13, 5, 2)
    assert (counts["duplicate"], counts["equal"]) == (1, 1)
    assert counts["test"] in (1, 2)
    assert {row["stage"] for row in read(step, "dropped")} == {"data", "data_heldout"}


def test_files_hold_the_schema_with_text_and_no_ids_in_the_order_of_their_ids(lab):
    step = lab.load(train=rows(*"abcdef"), prompts=[{"prompt": "z"}, {"prompt": "y"}, {"prompt": "z"}])
    train = read(step, "train")
    assert list(train[0]) == schema.PAIRS.names
    assert [(r["prompt_id"], r["pair_id"]) for r in train] == sorted(
        (r["prompt_id"], r["pair_id"]) for r in train
    )
    assert {(r["origin"], r["round"], r["prompt_ids"], r["chosen_ids"]) for r in train} == {
        ("human", 0, None, None)
    }
    first = parse_pair(
        Row("", {"prompt": train[0]["prompt"][0]["content"], "chosen": "yes", "rejected": "no"})
    )
    assert (train[0]["pair_id"], train[0]["prompt_id"]) == (first.pair_id, first.prompt_id)
    assert len(read(step, "prompts")) == 2
    check_account(step)


PROMPT = st.sampled_from("abcdefgh")
ANSWER = st.sampled_from(["yes", "no", "maybe"])
ROW = st.fixed_dictionaries({"prompt": PROMPT, "chosen": ANSWER, "rejected": ANSWER})


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(ROW, min_size=1, max_size=20), random=st.randoms(), flips=st.sampled_from([0.0, 0.5]))
def test_a_permutation_of_the_rows_gives_the_same_bytes_and_loses_nothing(tmp_path, data, random, flips):
    chosen = {"heldout_fraction": 0.3, "train_pairs": 4, "flip_fraction": flips}
    source = {"train_source": {"weight": 0.8}}
    base = tmp_path / random.randbytes(6).hex()
    try:
        first = Lab(base / "1").load(chosen | source, train=data)
    except InputError:  # too few different pairs to divide
        reject()
    second = Lab(base / "2").load(chosen | source, train=random.sample(data, len(data)))
    check_account(first)
    assert second.ref.digest == first.ref.digest
    sides = [{group_key(row["prompt"]) for row in read(first, side)} for side in ("train", "heldout")]
    assert not sides[0] & sides[1]


def test_given_sides_are_taken_as_they_are_and_nothing_is_split_off(lab):
    step = lab.load(
        {"heldout_fraction": 0.5, "test_fraction": 0.3},
        train=rows(*"abcd"),
        heldout=rows(*"xy"),
        test=rows("z"),
    )
    assert {side: step.record.counts[side] for side in PAIR_SIDES} == {"train": 4, "heldout": 2, "test": 1}
    assert step.record.metrics["groups"] == {"train": 4, "heldout": 2, "test": 1, "prompts": 0}
    assert step.record.metrics["groups_shared_with_train"] == 0


@pytest.mark.parametrize("side", ["heldout", "test", "prompts"])
def test_a_given_source_that_shares_prompts_with_train_is_refused_or_taken_out_of_train(lab, side):
    other = [{"prompt": "A"}, {"prompt": "y"}] if side == "prompts" else rows("A", "y", chosen="si")
    sides = {"train": rows(*"abcd"), side: other}
    with pytest.raises(
        InputError, match=rf"data\.{side} shares 1 of its 2 different prompts with data\.train, .* 1 pairs"
    ):
        lab.load(**sides)
    step = lab.load({"on_overlap": "drop", "heldout_fraction": 0.0}, **sides)
    assert (step.record.counts["train"], step.record.counts["overlap"], step.record.counts[side]) == (3, 1, 2)
    check_account(step)


def test_heldout_gives_way_to_test_and_prompt_only_rows_to_both(lab):
    sides = {
        "train": rows("a"),
        "heldout": rows("x", "y"),
        "test": rows("y"),
        "prompts": [{"prompt": p} for p in "xyz"],
    }
    with pytest.raises(
        InputError, match=r"data\.test shares 1 of its 1 different prompts with data\.heldout"
    ):
        lab.load(**sides)
    step = lab.load({"on_overlap": "drop"}, **sides)
    assert {side: step.record.counts[side] for side in SIDES} == {
        "train": 1,
        "heldout": 1,
        "test": 1,
        "prompts": 1,
    }
    prompt_rows = [row for row in read(step, "dropped") if row["stage"] == "data_prompts"]
    assert [(row["pair_id"], row["reason"]) for row in prompt_rows] == [(None, "overlap")] * 2
    check_account(step)


def test_flipped_labels_are_listed_under_the_ids_they_have_in_the_file(lab):
    step = lab.load({"flip_fraction": 0.4, "heldout_fraction": 0.0}, train=rows(*"abcde"))
    flipped = json.loads(step.path("flipped.json").read_text())
    turned = [row for row in read(step, "train") if row["chosen"][0]["content"] == "no"]
    assert flipped == sorted(row["pair_id"] for row in turned)
    assert len(flipped) == step.record.metrics["flipped"] == 2


def test_pairs_under_both_labels_are_kept_and_counted(lab):
    train = [*rows(*"abc"), *rows("a", chosen="no", rejected="yes")]
    step = lab.load({"heldout_fraction": 0.0}, train=train)
    assert (step.record.counts["train"], step.record.metrics["both_labels"]) == (4, 1)


def test_a_source_that_changes_after_its_digest_was_taken_is_refused(lab):
    config = lab.config(train=rows("a", "b"))
    spec = lab.data_spec(config)
    (lab.folder / "train.jsonl").write_text(json.dumps(rows("c")[0]))
    with pytest.raises(InputError, match=r"data\.train: .*train\.jsonl changed during the run"):
        lab.run(spec, load_pairs)


def test_a_side_of_which_nothing_is_left_is_refused_with_the_reasons(lab):
    with pytest.raises(InputError, match=r"data\.train: no row is left \(1 duplicate, 2 overlap\)"):
        lab.load({"on_overlap": "drop"}, train=rows("a", "b", "a"), heldout=rows("a", "b"))
    with pytest.raises(InputError, match=r"data\.heldout: no row is left \(1 equal\)"):
        lab.load(train=rows("a"), heldout=rows("b", chosen="no"))


def test_a_malformed_row_refuses_the_file_by_its_line(lab):
    with pytest.raises(InputError, match=r'train\.jsonl line 2: no field "chosen"'):
        lab.load(train=[*rows("a"), {"prompt": "b", "rejected": "no"}])


TRANSCRIPT = {
    side: f"\n\nHuman: q\n\nAssistant: {text}" for side, text in (("chosen", "y"), ("rejected", "n"))
}
RATED = {"instruction": "u", "completions": [{"response": "x", "score": 3}, {"response": "z", "score": 1}]}
TIED = {"instruction": "t", "completions": [{"response": "x", "score": 3}]}


def test_rows_of_several_formats_are_counted_and_bad_ones_are_in_the_ledger_by_kind(lab):
    bad = [
        *rows("e", chosen=" "),
        {"prompt": [{"role": "system", "content": "s"}], "chosen": "y", "rejected": "n"},
    ]
    data = lab.load(
        {"on_bad_row": "drop", "heldout_fraction": 0.0},
        train=[*rows("a", "b"), TRANSCRIPT, RATED, TIED, *bad],
        prompts=[{"question": "p"}, {"prompt": ""}],
    )
    record = data.record
    assert record.metrics["formats"] == {
        "train": {"hh": 1, "preference": 4, "ultrafeedback": 2},
        "prompts": {"orca": 1, "preference": 1},
    }
    dropped = Counter(
        (row["stage"], row["reason"], row["pair_id"])
        for row in schema.iter_rows(data.path("dropped.parquet"))
    )
    assert dropped == {
        ("data", "empty_answer", None): 1,
        ("data", "no_user_turn", None): 1,
        ("data", "tied_ratings", None): 1,
        ("data_prompts", "no_user_turn", None): 1,
    }
    assert record.counts["read"] == 9 == record.counts["train"] + record.counts["prompts"] + dropped.total()


def test_a_mapped_column_must_be_in_one_of_the_sources(lab):
    asked = [{"ask": "a", "chosen": "yes", "rejected": "no"}]
    data = lab.load({"columns": {"prompt": "ask"}}, train=asked * 1 + rows("b"), heldout=rows("c"))
    assert data.record.counts["train"] == 2
    with pytest.raises(InputError, match=r"data\.columns: prompt is mapped to 'aks'"):
        lab.load({"columns": {"prompt": "aks"}}, train=rows("a", "b"), heldout=rows("c"))


def test_what_is_probably_not_meant_is_counted_and_said(lab, caplog):
    templated = rows("<|im_start|>user", "b", chosen="b, yes", rejected="b, no")
    rendered = lab.render({"heldout_fraction": 0.0}, train=templated)
    assert rendered.record.metrics["special_tokens"] == 1
    said = " ".join(record.message for record in caplog.records)
    assert "in 1 pairs chosen and rejected both begin with the prompt" in said
    assert "1 rows contain special tokens" in said


# ----------------------------------------------------------------------------------------------------- render


def test_rendered_answers_are_their_tokens_and_the_end_of_turn(lab):
    from transformers import AutoTokenizer

    step = lab.render(
        {"heldout_fraction": 0.0}, train=rows("What is 12?", chosen="The river.", rejected="A lake.")
    )
    tokenizer = AutoTokenizer.from_pretrained(Artifact(lab.store, lab.model().ref).folder("policy"))
    row = read(step, "train")[0]
    assert (
        tokenizer.decode(row["prompt_ids"])
        == "<|im_start|>user\nWhat is 12?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(row["chosen_ids"]) == "The river.<|im_end|>"
    assert tokenizer.decode(row["rejected_ids"]) == "A lake.<|im_end|>"


LONG = "boat " * 30


def test_what_cannot_be_rendered_is_in_the_ledger_of_its_side(lab):
    train = [*rows("a", "b"), *rows("c", chosen=LONG), *rows(LONG)]
    heldout = [*rows("x"), *rows("y", rejected=LONG)]
    prompts = [{"prompt": "p"}, {"prompt": LONG + "p"}]
    limits = {"max_prompt_tokens": 20, "max_response_tokens": 8}
    step = lab.render(limits, train=train, heldout=heldout, prompts=prompts)
    check_account(step)
    own = {(row["stage"], row["reason"], row["pair_id"] is None) for row in read(step, "dropped")}
    assert own == {
        ("render", "too_long", False),
        ("render", "prompt_too_long", False),
        ("render_heldout", "too_long", False),
        ("render_prompts", "prompt_too_long", True),
    }
    assert step.record.metrics["sides"]["train"] == {
        "read": 4,
        "kept": 2,
        "too_long": 1,
        "prompt_too_long": 1,
    }


def test_long_answers_are_cut_on_request_and_equal_ones_then_dropped(lab):
    train = [*rows("a", chosen=LONG), *rows("b", chosen=LONG + "x", rejected=LONG + "y")]
    limits = {"max_response_tokens": 8, "on_long": "cut", "heldout_fraction": 0.0}
    step = lab.render(limits, train=train)
    check_account(step)
    row = read(step, "train")[0]
    assert len(row["chosen_ids"]) == 8
    assert row["chosen_ids"][-1] != row["rejected_ids"][-1]  # no end of turn behind a cut
    assert (step.record.counts["equal"], step.record.metrics["cut"]) == (1, 1)
    with pytest.raises(InputError, match=r"pair [0-9a-f]{16} .*same tokens after the cut") as refused:
        lab.render({**limits, "on_equal": "refuse"}, train=train)
    assert LONG[:20] not in str(refused.value)  # Prefect shows it


def test_prompts_to_sample_from_are_the_train_prompts_once_and_the_prompt_only_rows(lab):
    train = [*rows("a", "b"), *rows("a", chosen="si")]
    step = lab.render({"heldout_fraction": 0.0}, train=train, heldout=rows("x"), prompts=[{"prompt": "p"}])
    held = read(step, "prompts")
    assert sorted(row["prompt"][0]["content"] for row in held) == ["a", "b", "p"]
    assert [row["prompt_id"] for row in held] == sorted(row["prompt_id"] for row in held)
    assert all(row["prompt_ids"] for row in held)
    assert step.record.metrics["sampled_from"] == 3


def test_the_rows_dropped_by_the_data_step_and_the_flipped_ids_go_along(lab):
    train = [*rows(*"abcd"), *rows("a"), *rows("e", chosen=LONG)]
    options = {"heldout_fraction": 0.0, "max_response_tokens": 8, "flip_fraction": 0.5}
    step = lab.render(options, train=train)
    assert [(row["stage"], row["reason"]) for row in read(step, "dropped")] == [
        ("data", "duplicate"),
        ("render", "too_long"),
    ]
    assert len(json.loads(step.path("flipped.json").read_text())) == 3


def test_answers_that_differ_in_text_but_not_in_tokens_are_equal(lab):
    lab.template = CHATML.replace("message['content']", "message['content'] | trim")
    step = lab.render({"heldout_fraction": 0.0}, train=[*rows("a"), *rows("b", chosen="no ")])
    assert (step.record.counts["train"], step.record.counts["equal"]) == (1, 1)
    check_account(step)


def test_a_conversation_that_the_template_refuses_is_named(lab):
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    lab.template = refusal + CHATML
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "b"}]
    pair = {"prompt": system, "chosen": "yes", "rejected": "no"}
    named = parse_pair(Row("", pair)).pair_id
    with pytest.raises(InputError, match=rf"pair {named}: .* rejects .* no system role"):
        lab.render({"heldout_fraction": 0.0}, train=[*rows("a", "c"), pair])


def test_a_pair_whose_answer_the_template_cuts_is_refused_by_its_id(lab):
    lab.template = CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    given_rows = [*rows("a", "b"), *rows("c", chosen="<think>hm</think>yes")]
    pair = parse_pair(Row("", given_rows[-1]))
    with pytest.raises(InputError, match=rf"pair {pair.pair_id}: .*reasoning.*model\.chat_template"):
        lab.render({"heldout_fraction": 0.0}, train=given_rows)


def test_a_prompt_that_the_template_does_not_write_is_refused_by_its_id(lab):
    lab.template = CHATML.replace("message['content']", "message['content'][:60]")
    prompt = parse_prompt(Row("", {"prompt": "y" * 61}))
    with pytest.raises(InputError, match=rf"prompt {prompt.prompt_id}: .*message 1 \(role user"):
        lab.render({"heldout_fraction": 0.0}, train=rows("a", "b"), prompts=[{"prompt": "y" * 61}])


def test_template_arguments_are_part_of_the_render_step_alone_and_only_where_given(lab):
    lab.template = "{% if brief %}{{ 'Be brief. ' }}{% endif %}" + CHATML
    config = lab.config({"heldout_fraction": 0.0}, train=rows("a", "b"))
    asked = config.model_copy(
        update={"model": config.model.model_copy(update={"template_kwargs": {"brief": True}})}
    )
    assert config.result_fields() != asked.result_fields()
    assert "template_kwargs" not in config.result_fields()["model"]
    data = run_step(lab.store, lab.data_spec(config), load_pairs, ExecutionConfig())
    specs = [steps.render(one, data.ref, lab.model().ref) for one in (config, asked)]
    assert "template_kwargs" not in specs[0].fields
    plain, brief = (lab.run(spec, render_pairs) for spec in specs)
    for without, with_it in zip(read(plain, "train"), read(brief, "train"), strict=True):
        assert len(with_it["prompt_ids"]) > len(without["prompt_ids"])
        assert with_it["chosen_ids"] == without["chosen_ids"]
