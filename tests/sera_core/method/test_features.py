import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.errors import InputError
from sera_core.method import features
from sera_core.method.panel import (
    FEATURES,
    column_difference,
    feature_differences,
    feature_values,
)

light = settings(max_examples=80, deadline=None, derandomize=True)
ANSWER = """Sure! Here are **two** ways:

# Ways
1. Walk to the lake.
- Take the bus, it's quick.
```py
print("x")
```
"""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("words", 19),  # 5 in the first line, Ways, 5 in the next, 5 after it, py, print, x
        ("list_items", 2),
        ("headings", 1),
        ("bold", 1),
        ("code_fences", 1),
        ("markdown", 5),
        ("opening", 1),
        ("refusal", 0),
    ],
)
def test_an_answer_counted_by_hand(name, value):
    assert FEATURES.entries[name]("How do I get to the lake?", ANSWER) == value


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("One.", 1),
        ("One. Two! Three?", 3),
        ("It costs 3.50 dollars.", 1),
        ("No end", 1),
        ("A line\nanother line\n\nand one more", 3),
        ("Wait... what?!", 2),
        ('He said "go." Then he went.', 2),
        ("...", 0),
    ],
)
def test_sentences_are_counted_by_their_ends_and_by_lines(text, count):
    assert features.sentences("", text) == count


@pytest.mark.parametrize(
    ("text", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", 1),
        ("I cannot provide instructions for this.", 1),
        ("As an AI language model, I don't have opinions.", 1),
        ("That would be against my guidelines.", 1),
        ("I am unable to open files.", 1),
        ("I can’t assist with that request.", 1),
        ("You can't help loving it.", 0),
        ("Sorry for the delay, here is the answer.", 0),
        ("I can provide three examples.", 0),
    ],
)
def test_phrases_of_refusal(text, refuses):
    assert features.refusal("", text) == refuses


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("Sure, here you go", 1),
        ("  **Certainly!** Let us", 1),
        ("As an AI, I", 1),
        ("Great question! It", 1),
        ("The sea is blue. Sure.", 0),
        ("High tide is at noon", 0),
        ("Hereditary rule", 0),
        ("Surely not", 0),
    ],
)
def test_formulaic_openings_are_at_the_beginning_only(text, formula):
    assert features.opening("", text) == formula


def test_overlap_with_the_prompt_by_hand():
    """Words of "the red fox ran": the, red, fox of 4 are in the prompt; trigrams: (the red fox) of 2."""
    prompt, response = "Tell me of the red fox.", "The red fox ran"
    assert features.word_overlap(prompt, response) == 3 / 4
    assert features.trigram_overlap(prompt, response) == 1 / 2
    assert features.trigram_overlap(prompt, "red fox") == 0


@light
@given(st.text(), st.text())
def test_every_feature_of_any_text_is_finite_and_not_negative(prompt, response):
    for name, feature in FEATURES.entries.items():
        value = feature(prompt, response)
        assert isinstance(value, float) and value >= 0 and np.isfinite(value), name
        if name in ("refusal", "opening", "word_overlap", "trigram_overlap"):
            assert value <= 1


@light
@given(st.text(min_size=1), st.text(alphabet="ab c.", min_size=1))
def test_more_text_is_never_shorter(prompt, response):
    for name in ("characters", "words", "sentences", "list_items"):
        assert FEATURES.entries[name](prompt, response + "\nOne more.") > FEATURES.entries[name](
            prompt, response
        ) - (name == "list_items")


@light
@given(st.lists(st.sampled_from(["red", "blue", "fox"]), min_size=1))
def test_a_response_that_repeats_its_prompt_overlaps_fully(found):
    text = " ".join(found)
    assert features.word_overlap(text, text) == 1
    assert features.trigram_overlap(text, text) == (len(found) >= 3)
    assert features.words("", text) == len(re.split(" ", text))


def test_differences_are_chosen_less_rejected(tmp_path, monkeypatch):
    own = "def vowels(prompt, response):\n    return sum(letter in 'aeiou' for letter in response)\n"
    (tmp_path / "own_feature.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SERA_EXTENSIONS", "own_feature")
    named = {"words": FEATURES.named("words"), "mine": FEATURES.named("own_feature:vowels")}
    got = feature_differences(named, ["p", "p"], ["one two three", "a"], ["one", "one two"])
    assert got["words"].tolist() == [2, -1]
    assert got["mine"].tolist() == [3, -2]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("word", "did you mean 'words'"),
        ("no_such_module_here:f", "importing no_such_module_here failed"),
        ("math:no_such", "no function"),
        ("math:pi", r"no function pi; it is called as feature\(prompt, response\)"),
        ("os:system", "SERA_EXTENSIONS=os"),
    ],
)
def test_an_unusable_feature_is_refused_by_name(name, said, monkeypatch):
    monkeypatch.setenv("SERA_EXTENSIONS", "math,no_such_module_here")
    with pytest.raises(InputError, match=said):
        FEATURES.named(name)


def test_a_feature_that_fails_says_where():
    with pytest.raises(InputError, match="row 1: TypeError"):
        feature_values("own", lambda p, r: None if r == "b" else 1.0, ["p", "p"], ["a", "b"])  # type: ignore
    with pytest.raises(InputError, match="row 0: nan"):
        feature_values("own", lambda p, r: float("nan"), ["p"], ["a"])


def test_a_column_is_refused_where_values_are_missing_or_it_is_constant():
    assert column_difference("stars", [5, True], [3.5, 0]).tolist() == [1.5, 1]
    with pytest.raises(InputError, match=r"1 of 2 rejected values .* row 1: None"):
        column_difference("stars", [5, 4], [3, None])
    with pytest.raises(InputError, match="all 2 pairs"):
        column_difference("stars", [5, 4], [5, 4])
    with pytest.raises(InputError, match="1 chosen and 2 rejected"):
        column_difference("stars", [5], [5, 4])
