"""`sera data`: what a preference file holds, counted a second way."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import tinyrun

from sera_core.data.look import chosen_has_more
from sera_core.data.rendering import Renderer
from sera_core.data.sources import read_rows

LONG, SHORT = "one two three four five six", "one two"


def row(number, chosen, rejected):
    return {"prompt": f"Question {number}?", "chosen": chosen, "rejected": rejected}


@pytest.fixture
def rows():
    """Seven pairs, three of which have the longer chosen answer and one the same length."""
    return [
        row(0, LONG, SHORT),
        row(1, LONG, SHORT),
        row(2, LONG, SHORT),
        row(3, SHORT, LONG),
        row(4, "good one", "bad one"),
        row(5, f"{SHORT} **bold**", SHORT),
        row(5, SHORT, f"{SHORT} **bold**"),
        row(0, LONG, SHORT),
        row(6, "same", "same"),
        row(7, "", "no answer beside it"),
    ]


@pytest.fixture
def file(tmp_path, rows):
    return tinyrun.write_rows(tmp_path / "pairs.jsonl", rows)


def test_it_counts_pairs_and_what_is_left_out_and_conflicts(sera, file):
    found = sera("data", file, "--json").json
    assert (found["rows"], found["pairs"], found["prompts"]) == (10, 7, 6)
    assert found["dropped"] == {"duplicate": 1, "empty_answer": 1, "equal": 1}
    assert found["rows"] == found["pairs"] + sum(found["dropped"].values())
    assert found["both_labels"] == 1
    assert found["unit"] == "words" and found["special_tokens"] is None
    assert found["lengths"]["chosen"] == {"median": 3, "p95": 6, "most": 6}
    words, bold = found["chosen_has_more"]["words"], found["chosen_has_more"]["bold"]
    assert words["value"] == pytest.approx(4 / 6) and (words["pairs"], words["prompts"]) == (6, 5)
    assert bold["value"] == 0.5 and bold["pairs"] == 2
    assert found["chosen_has_more"]["code_fences"]["value"] is None
    assert [one["chosen"] for one in found["shown"]] == [LONG] * 3


def test_the_text_names_the_first_row_of_each_reason_and_what_50_percent_means(sera, file):
    said = sera("data", file, "--show", 1).out
    assert "duplicate: the same row again (the first: " in said and "pairs.jsonl" in said
    assert "label conflicts: 1 pairs are there under both labels" in said
    assert "67% " in said and "no answers differ" in said and "Far from 50 %" in said
    assert said.count("--- chosen") == 1


def test_with_a_model_lengths_are_its_tokens_and_pairs_its_text(sera, file, tmp_path):
    policy = tiny.tiny_policy(tmp_path / "policy")
    found = sera("data", file, "--model", policy, "--json").json
    renderer = Renderer(policy)
    question = [{"role": "user", "content": "Question 3?"}]
    assert found["unit"] == "tokens"
    assert found["lengths"]["rejected"]["most"] == len(renderer.response_ids(question, LONG))
    assert found["lengths"]["prompt"]["median"] == len(renderer.prompt_ids(question))
    assert found["chosen_has_more"]["tokens"]["pairs"] >= 6
    shown = found["shown"][0]
    assert shown["prompt"] == renderer.chat_text([{"role": "user", "content": "Question 0?"}], True)
    assert LONG in shown["chosen"]


def test_what_it_writes_is_read_as_the_same_pairs(sera, file, tmp_path):
    out = tmp_path / "ours.parquet"
    first = sera("data", file, "--out", out, "--json").json
    again = sera("data", out, "--json").json
    assert again["pairs"] == first["pairs"] == pq.read_metadata(out).num_rows and not again["dropped"]
    assert again["chosen_has_more"] == first["chosen_has_more"] and again["lengths"] == first["lengths"]
    assert "already exists" in sera("data", file, "--out", out, code=2).err
    sera("data", file, "--out", out, "--force")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--on-bad-row", "refuse"], "chosen is empty"),
        (["--show", "-1"], "--show -1: must be 0 or more"),
        (["--chat-template", "chatml"], "only with --model"),
        (["--model", "nowhere"], "nowhere"),
        (["--columns", "prompt=question"], "question"),
    ],
)
def test_bad_input_gets_one_message(sera, file, flags, said):
    told = sera("data", file, *flags, code=2)
    assert said in told.err and not told.out


def test_a_file_without_a_usable_pair_is_refused_with_its_reasons(sera, tmp_path):
    file = tinyrun.write_rows(tmp_path / "pairs.jsonl", [row(0, "same", "same")])
    assert "no row is left (1 equal)" in sera("data", file, code=2).err


def test_the_interval_holds_the_true_share_nineteen_times_in_twenty():
    rng, held = np.random.default_rng(0), 0
    for trial in range(200):
        values = np.where(rng.random(120) < 0.7, 1.0, -1.0)
        found = chosen_has_more({"words": values}, [f"{n}" for n in range(120)], seed=trial)["words"]
        held += found.low <= 0.7 <= found.high
    assert 0.9 <= held / 200 <= 0.99


def test_shares_of_real_pairs_are_those_of_a_plain_count(sera):
    found = sera("data", "bundled:ultrafeedback_short.jsonl", "--show", 0, "--json").json
    answers = [
        (row.data["chosen"], row.data["rejected"]) for row in read_rows("bundled:ultrafeedback_short.jsonl")
    ]
    more, less = (
        sum(sign * (len(text(chosen)) - len(text(rejected))) > 0 for chosen, rejected in answers)
        for sign in (1, -1)
    )
    share = found["chosen_has_more"]["characters"]
    assert share["value"] == pytest.approx(more / (more + less)) and share["pairs"] == more + less
    assert not found["shown"]


def text(answer):
    return (answer if isinstance(answer, str) else answer[-1]["content"]).strip()
