"""What a terminal or a page may show: nothing that acts or hides, and all text that only says something."""

import json
import unicodedata

import pytest
from hidden import HIDDEN, hidden_in
from hypothesis import example, given
from hypothesis import strategies as st

from sera_core.guards.shown import shown, shown_json, shown_line
from sera_core.reporting import plots
from sera_core.reporting.pages import _environment

TEXT = st.text(st.one_of(st.sampled_from(HIDDEN), st.characters(exclude_categories=[])), max_size=40)
ORDINARY = [
    "two\nlines\tand a tab",
    "café, cafe\u0301, naïve, Ω ≤ β, 数学, 한국어",
    "مرحبا بالعالم",
    "שָׁלוֹם",
    "می\u200cخواهم",  # a non-joiner that Persian spells with
    "क्\u200dष",  # a joiner that Devanagari spells with
    "👩\u200d👩\u200d👧, ❤\ufe0f, 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    r"a path C:\x1b and a \u202e that somebody typed",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_of_any_script_stays(text):
    assert shown(text) == text
    assert json.loads(shown_json(text)) == text


@pytest.mark.parametrize(("text", "expected"), [
    ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    ("a\x7fb\x9bc", r"a\x7fb\x9bc"),
    ("abc\u202ecod.exe", r"abc\u202ecod.exe"),
    ("one\r\ntwo\rthree", "one\ntwo\\rthree"),
    ("\ufeffx\u2028y", r"\ufeffx\u2028y"),
    ("\U000e0041\ud800", r"\U000e0041\ud800"),
])  # fmt: skip
def test_what_acts_or_hides_is_shown_escaped(text, expected):
    assert shown(text) == expected


@given(TEXT)
@example("\r\r\n")
def test_nothing_shown_acts_or_hides(text):
    assert not hidden_in(shown(text)) and not hidden_in(shown_json(text))
    assert shown(shown(text)) == shown(text)
    assert "\n" not in shown_line(text) and "\t" not in shown_line(text)
    shown(text).encode()  # half characters would not go through


@given(st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"]), max_size=40))
def test_text_without_such_characters_is_as_it_was(text):
    assert shown(text) == text


@given(TEXT)
def test_json_that_is_shown_says_the_same(text):
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert json.loads(shown_json({"text": whole})) == {"text": whole}


def test_every_control_and_every_bidi_control_of_unicode_is_known():
    turning = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    for code in range(0x110000):
        one = chr(code)
        acts = (
            unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(one) in turning
        )
        if acts and one not in "\n\t":
            assert shown(one) != one, hex(code)


def test_pages_show_facts_and_leave_markup_of_our_own():
    page = _environment().from_string("{{ said }}<b>{{ plot }}</b>")
    plot = plots.lines([plots.Series("a\x1b", "a", [plots.Point(0, 1.0)])], "b\x9b", "c\u202e")
    said = page.render(said="<\x1b>", plot=plot)
    assert said.startswith(r"&lt;\x1b&gt;<b><svg") and not hidden_in(said)
