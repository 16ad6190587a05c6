"""Every form of a preference row gives the same pair; every malformed row is refused by name."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.artifacts import canonical
from sera_core.data.parsing import parse_pair, parse_prompt
from sera_core.data.preferences import Pair, drop_degenerate, under_both_labels
from sera_core.data.sources import Row
from sera_core.errors import InputError


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pair(**data) -> Pair:
    return parse_pair(Row("pairs.jsonl line 17", data))


USER, GOOD, BAD = says("user", "Hi?"), says("assistant", "Hello."), says("assistant", "Go away.")
SYSTEM = says("system", "Be kind.")
EARLIER = [says("user", "One?"), says("assistant", "1."), says("user", "Two?"), says("assistant", "2.")]


@pytest.mark.parametrize(
    ("data", "form"),
    [
        ({"prompt": "Hi?", "chosen": "Hello.", "rejected": "Go away."}, "standard"),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "conversational"),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, "conversational"),
        ({"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "conversational"),
        ({"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]}, "conversational"),
        ({"prompt": [USER], "chosen": "Hello.", "rejected": "Go away."}, "conversational"),
        (
            {"prompt": None, "chosen": [USER, GOOD | {"name": None}], "rejected": [USER, BAD]},
            "conversational",
        ),
    ],
)
def test_every_form_of_a_row_gives_the_same_pair(data, form):
    read = pair(**data)
    assert (read.prompt, read.chosen, read.rejected, read.format) == ([USER], [GOOD], [BAD], form)


def test_the_pair_id_is_the_hash_of_its_canonical_json_by_hand():
    """Keys sorted, no spaces, only role and content; the first 16 digits of its sha256."""
    import hashlib

    text = (
        '{"chosen":[{"content":"Hello.","role":"assistant"}],"prompt":[{"content":"Hi?","role":"user"}],'
        '"rejected":[{"content":"Go away.","role":"assistant"}]}'
    )
    assert (
        pair(prompt="Hi?", chosen="Hello.", rejected="Go away.").pair_id
        == hashlib.sha256(text.encode()).hexdigest()[:16]
    )


def test_a_three_turn_conversation_has_all_messages_before_the_last_answer_as_its_prompt():
    history = [SYSTEM, *EARLIER, USER]
    expected = (history, [GOOD], [BAD])
    for read in (
        pair(chosen=[*history, GOOD], rejected=[*history, BAD]),
        pair(prompt=history, chosen=[GOOD], rejected=[BAD]),
        pair(prompt=history[:2], chosen=[*history[2:], GOOD], rejected=[*history[2:], BAD]),
    ):
        assert (read.prompt, read.chosen, read.rejected) == expected


def test_answers_that_begin_alike_do_not_lengthen_the_prompt_of_a_conversation():
    read = pair(
        chosen=[USER, says("assistant", "It is blue")], rejected=[USER, says("assistant", "It is red")]
    )
    assert read.prompt == [USER]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("Q: sky?\n\nA: blue", "Q: sky?\n\nA: green", "Q: sky?\n\nA:"),
        ("Is it? yes", "Is it? yes sir", "Is it?"),
        ("Is it? yes.", "Is it? yes. Sir", "Is it?"),
        ("天空是什么颜色？蓝色", "天空是什么颜色？绿色", "天空是什么颜色？"),
    ],
)
def test_the_common_beginning_of_two_texts_is_the_prompt_and_no_word_is_divided(chosen, rejected, prompt):
    read = pair(chosen=chosen, rejected=rejected)
    assert read.prompt == [says("user", prompt)]
    assert prompt + read.chosen[0]["content"] == chosen
    assert prompt + read.rejected[0]["content"] == rejected


@pytest.mark.slow  # importing TRL takes seconds
@given(words=st.lists(st.sampled_from(["a", "sky", "blue?"]), min_size=1, max_size=5))
@settings(deadline=None)
def test_between_words_the_implicit_prompt_is_that_of_trl(words):
    from trl.data_utils import extract_prompt

    texts = {"chosen": " ".join([*words, "x1"]), "rejected": " ".join([*words, "y2"])}
    read, theirs = pair(**texts), extract_prompt(texts)
    assert [m[0]["content"] for m in (read.prompt, read.chosen, read.rejected)] == [
        theirs["prompt"],
        theirs["chosen"],
        theirs["rejected"],
    ]


TOOL_CALL = says("assistant", "x") | {"tool_calls": [{"name": "f"}]}
IMAGE = {"role": "user", "content": [{"type": "image"}]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"prompt": "a", "rejected": "c"}, r'no field "chosen" \(found: prompt, rejected\)'),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected is empty"),
        ({"prompt": "a", "chosen": " \n", "rejected": "c"}, "chosen is empty"),
        ({"prompt": "", "chosen": "b", "rejected": "c"}, "have no common beginning"),
        ({"prompt": [], "chosen": [GOOD], "rejected": [BAD]}, "prompt and chosen has no message from user"),
        ({"prompt": [USER], "chosen": [], "rejected": [BAD]}, "chosen is empty"),
        (
            {"prompt": [USER], "chosen": [says("assistant", "")], "rejected": [BAD]},
            "the answer of chosen is empty",
        ),
        (
            {"prompt": [says("user", " ")], "chosen": [GOOD], "rejected": [BAD]},
            r"message 1 of prompt and chosen \(user\) is empty",
        ),
        ({"chosen": "yes", "rejected": "no"}, r'no field "prompt", and .* no common beginning'),
        ({"prompt": "a", "chosen": "b", "rejected": [BAD]}, "one of chosen and rejected is text"),
        ({"prompt": "a", "chosen": 3, "rejected": 4}, "chosen must be text or a list"),
        ({"prompt": [USER], "chosen": ["b"], "rejected": [BAD]}, "chosen message 1 has no role and content"),
        (
            {"prompt": [USER, USER], "chosen": [GOOD], "rejected": [BAD]},
            r"roles out of order: message 2 .* from user",
        ),
        (
            {"prompt": [USER, SYSTEM], "chosen": [GOOD], "rejected": [BAD]},
            r"roles out of order: message 2 .* system",
        ),
        ({"prompt": [USER, GOOD], "chosen": [GOOD], "rejected": [BAD]}, r"roles out of order: message 3"),
        ({"prompt": [SYSTEM], "chosen": [GOOD], "rejected": [BAD]}, "has no message from user"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "has no message from user"),
        (
            {"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD]},
            "last message of chosen is from user",
        ),
        (
            {"prompt": [USER], "chosen": [TOOL_CALL], "rejected": [BAD]},
            r"'tool_calls'; tool calls are not supported",
        ),
        (
            {"prompt": [USER], "chosen": [says("tool", "x")], "rejected": [BAD]},
            r"'tool': tool calls are not supported",
        ),
        ({"prompt": [IMAGE], "chosen": [GOOD], "rejected": [BAD]}, r"prompt message 1 is not text \(images"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x.png"]},
            r"'images'; images, video and audio",
        ),
        ({"prompt": [says("bot", "x")], "chosen": [GOOD], "rejected": [BAD]}, r"'bot': unknown role"),
        ({"prompt": "a \ud800", "chosen": "b", "rejected": "c"}, "lone surrogate"),
    ],
)
def test_a_malformed_row_is_refused_with_its_row_and_a_remedy(data, message):
    with pytest.raises(InputError, match=message) as caught:
        pair(**data)
    assert str(caught.value).startswith("pairs.jsonl line 17")


DIVERGING = {
    "chosen": [USER, GOOD, says("user", "More?"), says("assistant", "Yes.")],
    "rejected": [USER, BAD, says("user", "Less?"), says("assistant", "No.")],
}


def test_conversations_that_diverge_before_the_last_turn_are_refused():
    with pytest.raises(
        InputError, match=r'17: diverges_before_last_turn: .* message 2, .*on_diverge = "split"'
    ):
        pair(**DIVERGING)


def test_diverging_conversations_are_split_at_the_first_differing_answer_on_request():
    read = parse_pair(Row("", DIVERGING), on_diverge="split")
    assert (read.prompt, read.chosen, read.rejected) == ([USER], [GOOD], [BAD])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([says("user", "Another?"), GOOD], "first differ in message 1 .* different prompts"),
        ([*EARLIER[:2], USER, GOOD], "beginning of the other"),
    ],
)
def test_conversations_without_two_comparable_answers_cannot_be_split(chosen, message):
    rejected = EARLIER[:2] if len(chosen) > 2 else [USER, BAD]
    with pytest.raises(InputError, match=message):
        parse_pair(Row("", {"chosen": chosen, "rejected": rejected}), on_diverge="split")


def test_a_prompt_row_is_text_or_messages_that_end_with_the_user():
    assert parse_prompt(Row("", {"prompt": "Hi?", "reference": "x"})).prompt == [USER]
    assert parse_prompt(Row("", {"prompt": [SYSTEM, USER]})).prompt == [SYSTEM, USER]
    assert parse_prompt(Row("", {"prompt": "Hi?"})).prompt_id == canonical.prompt_id([USER])
    with pytest.raises(InputError, match="line 3: the last message of prompt is from assistant"):
        parse_prompt(Row("p.jsonl line 3", {"prompt": [USER, GOOD]}))
    with pytest.raises(InputError, match='line 3: no field "prompt"'):
        parse_prompt(Row("p.jsonl line 3", {"text": "Hi?"}))


def texts(prompt: str, chosen: str, rejected: str) -> Pair:
    return pair(prompt=prompt, chosen=chosen, rejected=rejected)


def test_equal_answers_and_repetitions_are_dropped_with_their_reason():
    pairs = [texts("a", "b", "c"), texts("a", "b", "b"), texts("a", "b", "c"), texts("a", "c", "b")]
    kept, dropped = drop_degenerate("train", pairs)
    assert sorted(p.pair_id for p in kept) == sorted(p.pair_id for p in (pairs[0], pairs[3]))
    assert [drop.reason for drop in dropped] == ["equal", "duplicate"]
    assert under_both_labels(kept) == {pairs[0].pair_id, pairs[3].pair_id}


def test_equal_answers_refuse_the_file_on_request():
    with pytest.raises(
        InputError, match=r'line 17 \(pair [0-9a-f]{16}\): .*same text; .* data\.on_equal = "drop"'
    ):
        drop_degenerate("train", [texts("a", "b", "b")], on_equal="refuse")


LETTERS = st.sampled_from("abc")


@given(st.lists(st.builds(texts, LETTERS, LETTERS, LETTERS)), st.randoms())
def test_no_pair_is_lost_and_the_order_of_rows_decides_nothing(pairs, random):
    kept, dropped = drop_degenerate("train", pairs)
    assert len(kept) + len(dropped) == len(pairs)
    assert len({p.pair_id for p in kept}) == len(kept)
    shuffled = random.sample(pairs, len(pairs))
    assert drop_degenerate("train", shuffled)[0] == kept


# ------------------------------------------------------------------------------------------------- reasoning


def reasoned(reasoning, name="reasoning_content", role="assistant"):
    return {"role": role, "content": "42", name: reasoning}


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_an_answers_reasoning_is_kept_and_part_of_the_pair(name):
    found = pair(prompt=[USER], chosen=[reasoned("a", name)], rejected=[reasoned("b")])
    assert found.chosen == [{"role": "assistant", "content": "42", "reasoning_content": "a"}]
    assert drop_degenerate("train", [found])[0] == [found]
    without = pair(prompt=[USER], chosen=[reasoned(None, name)], rejected=[reasoned("b")])
    assert without.chosen == [{"role": "assistant", "content": "42"}]
    assert without.pair_id != found.pair_id and without.prompt_id == found.prompt_id


def test_reasoning_in_an_earlier_turn_is_part_of_the_prompt():
    prompts = [parse_prompt(Row("", {"prompt": [USER, reasoned(text), USER]})) for text in ("a", "b")]
    assert prompts[0].prompt_id != prompts[1].prompt_id


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (reasoned("a") | {"thinking": "b"}, "reasoning_content and thinking with different texts"),
        (reasoned(["a"]), "content of reasoning_content of chosen message 1 is not text"),
    ],
)
def test_reasoning_that_cannot_be_read_is_refused(message, said):
    with pytest.raises(InputError, match=said):
        pair(prompt=[USER], chosen=[message], rejected=[BAD])


def test_reasoning_of_another_role_is_refused():
    with pytest.raises(InputError, match=r"from user.*only an assistant"):
        parse_prompt(Row("line 1", {"prompt": [reasoned("a", role="user")]}))
