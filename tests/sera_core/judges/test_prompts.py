"""What a chat model is asked, and what its answer says."""

import pytest

from sera_core.errors import InputError
from sera_core.judges.comparison import Comparison
from sera_core.judges.prompts import PLACEHOLDERS, filled, read_template, verdict_in


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
    assert verdict_in(text) == better


def test_texts_are_filled_in_once():
    item = Comparison([{"role": "user", "content": "{answer_b}?"}], "{prompt}", "{answer_a} {x}")
    assert filled("{prompt}|{answer_a}|{answer_b}|{x}", item) == "{answer_b}?|{prompt}|{answer_a} {x}|{x}"


def test_a_conversation_keeps_its_roles():
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "And?")]
    item = Comparison([{"role": role, "content": text} for role, text in turns], "a", "b")
    assert (
        filled("{prompt}", item) == "[system]\nBe kind.\n\n[user]\nHi\n\n[assistant]\nHello\n\n[user]\nAnd?"
    )


def test_the_bundled_template_has_its_placeholders():
    assert all(read_template(None).count(place) == 1 for place in PLACEHOLDERS)


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
