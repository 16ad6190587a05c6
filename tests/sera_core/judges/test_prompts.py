"""What a chat model is asked, and what its answer says."""

import pytest

from sera_core.errors import InputError
from sera_core.judges.comparison import Comparison
from sera_core.judges.prompts import PAIRWISE, SINGLE, compared_text, rated_text, read_template


@pytest.mark.parametrize(
    ("text", "better"),
    [
        ('{"better": "A"}', "A"),
        ('{"better": "b"}', "B"),
        ('Reasons.\n```json\n{"better": "Tie"}\n```', "tie"),
        ('<think>{"better": "A"}? No.</think> {"better": "B"}', "B"),
        ('{"why": "x", "better": " A "}', "A"),
        ('{"why": "uses {x} and {\\"better\\": 1}", "better": "A"}', "A"),
        ('{"why": {"better": "B"}, "better": "A"} }{', "A"),
        ('{"better": "B"} and {not json} {', "B"),
        ("{" * 3000 + '{"better": "A"}', "A"),
        ('{"better": ' + "[" * 100_000, None),
        ("A", None),
        ('{"better": "both"}', None),
        ('{"winner": "A"}', None),
        ('{"better": ', None),
        ('{"better": null}', None),
        ("", None),
    ],
)
def test_a_verdict_is_read_from_the_last_object(text, better):
    assert PAIRWISE.read(text) == better


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ('{"rating": 7}', 7.0),
        ('Good.\n```json\n{"rating": "8"}\n```', 8.0),
        ('{"rating": 2} no: {"rating": 9.5}', 9.5),
        ('{"rating": 0}', None),
        ('{"rating": 11}', None),
        ('{"rating": true}', None),
        ('{"rating": "nan"}', None),
        ('{"rating": "high"}', None),
        ('{"rating": [7]}', None),
        ("7", None),
    ],
)
def test_a_rating_is_read_from_the_last_object(text, rating):
    assert SINGLE.read(text) == rating


def test_texts_are_filled_in_once():
    item = Comparison([{"role": "user", "content": "{answer_b}?"}], "{prompt}", "{answer_a} {x}")
    assert (
        compared_text("{prompt}|{answer_a}|{answer_b}|{x}", item) == "{answer_b}?|{prompt}|{answer_a} {x}|{x}"
    )
    assert rated_text("{prompt}|{answer}", "{answer}?", "{prompt}") == "{answer}?|{prompt}"


def test_a_conversation_keeps_its_roles():
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And?")]
    item = Comparison([{"role": role, "content": text} for role, text in turns], "a", "b")
    assert (
        compared_text("{prompt}", item)
        == "[system]\nBe kind.\n\n[user]\nHi\n\n[assistant]\nHello\n\n[user]\nAnd?"
    )


@pytest.mark.parametrize("form", [PAIRWISE, SINGLE])
def test_a_bundled_template_has_its_placeholders(form):
    assert all(read_template(None, form).count(place) == 1 for place in form.placeholders)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{prompt} {answer_a}", "lacks {answer_b}"),
        (b"\xff{prompt}{answer_a}{answer_b}", "not UTF-8"),
        (b"x" * 100_001, "at most"),
        (None, "no such file"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tmp_path, content, said):
    file = tmp_path / "template.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=said):
        read_template(file)
