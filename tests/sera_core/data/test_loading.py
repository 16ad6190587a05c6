"""Every format that preferences are published in, read as the pairs they mean; bad rows, by kind."""

import json

import pytest

from sera_core.data.formats import FORMATS, Reading, rating_of
from sera_core.data.loading import read_pairs, read_prompts, refuse_unmapped
from sera_core.data.sources import Row
from sera_core.errors import InputError

AUTO = Reading()


def rows(*data: dict) -> list[Row]:
    return [Row(f"pairs.jsonl line {number}", row) for number, row in enumerate(data, 1)]


def read(*data: dict, **settings):
    """(format, prompt, chosen, rejected) of each row, in messages' short form."""
    found = read_pairs("pairs.jsonl", rows(*data), Reading(**settings))
    return found, [(short(p.prompt), short(p.chosen), short(p.rejected)) for p in found.items]


def short(messages) -> str:
    return " | ".join(f"{m['role'][0]}: {m['content']}" for m in messages)


def said(*pairs: tuple[str, str]) -> list[dict]:
    return [{"from": speaker, "value": text} for speaker, text in pairs]


QUESTION = "u: Capital of Peru?"
PAIR = (QUESTION, "a: Lima.", "a: Quito.")
HH = "\n\nHuman: Capital of Peru?\n\nAssistant:"
ANSWERS = {"chosen": "Lima.", "rejected": "Quito."}
RATED = [
    {"response": "Cusco.", "annotations": {"help": {"Rating": "2"}, "truth": {"Rating": "2"}}},
    {"response": "Lima.", "annotations": {"help": {"Rating": "5"}, "truth": {"Rating": "N/A"}}},
    {"response": "Quito.", "annotations": {"help": {"Rating": "1"}, "truth": {"Rating": "2"}}},
]
ROLES = [{"role": "user", "content": "Capital of Peru?"}]
WHOLE = {
    "chosen": [*ROLES, {"role": "assistant", "content": "Lima."}],
    "rejected": [*ROLES, {"role": "assistant", "content": "Quito."}],
}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("preference", {"prompt": "Capital of Peru?", **ANSWERS}),
        ("preference", {"prompt": None, **WHOLE}),
        ("preference", {"prompt": "", **WHOLE}),
        ("preference", {"prompt": [], **WHOLE}),
        ("preference", {"prompt": ROLES, **WHOLE}),
        ("preference", {"prompt": json.dumps(ROLES), **ANSWERS}),
        ("preference", {side: json.dumps(messages) for side, messages in WHOLE.items()}),
        ("preference", {"prompt": "Capital of Peru?", **ANSWERS, "tools": "[]", "images": []}),
        (
            "preference",
            {"prompt": [{"role": "human", "content": [{"type": "text", "text": "Capital of Peru?"}]}]}
            | ANSWERS,
        ),
        (
            "preference",
            {
                side: json.dumps(said(("human", "Capital of Peru?"), ("gpt", answer)))
                for side, answer in ANSWERS.items()
            },
        ),
        ("hh", {"chosen": f"{HH} Lima.", "rejected": f"{HH} Quito."}),
        ("hh", {"prompt": HH, "response": " Lima.", "chosen": " Lima.", "rejected": " Quito."}),
        ("orca", {"question": "Capital of Peru?", **ANSWERS}),
        ("orca", {"input": "Capital of Peru?", **ANSWERS, "generations": ["x"]}),
        ("alpaca", {"instruction": "Capital of Peru?", "input": "", "output": ["Lima.", "Quito."]}),
        ("alpaca", {"instruction": "Capital of Peru?", "input": None, "output": '["Lima.", "Quito."]'}),
        (
            "sharegpt",
            {
                "conversations": said(("human", "Capital of Peru?")),
                "chosen": {"from": "gpt", "value": "Lima."},
                "rejected": {"from": "gpt", "value": "Quito."},
            },
        ),
        ("sharegpt", {"conversations": json.dumps(said(("human", "Capital of Peru?"))), **ANSWERS}),
        ("ultrafeedback", {"instruction": "Capital of Peru?", "completions": RATED}),
        ("ultrafeedback", {"instruction": "Capital of Peru?", "completions": json.dumps(RATED)}),
    ],
)
def test_a_row_of_every_format_is_the_pair_it_means(name, row):
    found, pairs = read(row)
    assert pairs == [PAIR]
    assert found.formats == {name: 1}
    if name != "preference":
        assert read(row, format=name)[1] == [PAIR]


def test_each_row_says_for_itself_what_it_is_and_the_counts_tell():
    found, pairs = read(
        {"question": "Capital of Peru?", **ANSWERS}, {"prompt": "Capital of Peru?", **ANSWERS}
    )
    assert pairs == [PAIR, PAIR]
    assert found.formats == {"orca": 1, "preference": 1}


def test_a_transcript_of_several_turns_is_as_many_messages():
    start = f"{HH} Lima.\n\nHuman: Of Chile?\n\nAssistant:"
    _, pairs = read({"chosen": f"{start} Santiago.\n\nIn the Andes.", "rejected": f"{start} Arica."})
    prompt = f"{QUESTION} | a: Lima. | u: Of Chile?"
    assert pairs == [(prompt, "a: Santiago.\n\nIn the Andes.", "a: Arica.")]


def test_transcripts_that_diverge_follow_the_rule_for_conversations():
    row = {
        "chosen": f"{HH} Lima.\n\nHuman: Sure?\n\nAssistant: Yes.",
        "rejected": f"{HH} Quito.\n\nHuman: Sure?\n\nAssistant: No.",
    }
    with pytest.raises(InputError, match="differ in message 2"):
        read(row)
    assert read(row, on_diverge="split")[1] == [PAIR]


def test_a_question_about_transcripts_stays_text():
    row = {"prompt": "What does 'Human: hi' mean?", "chosen": "A label.", "rejected": "Human: no idea."}
    assert read(row)[1] == [("u: What does 'Human: hi' mean?", "a: A label.", "a: Human: no idea.")]


def test_named_preference_takes_every_text_as_it_is():
    row = {"prompt": "Go on.", "chosen": f"{HH} Lima.", "rejected": f"{HH} Quito."}
    assert read(row, format="preference")[1] == [("u: Go on.", f"a: {HH} Lima.", f"a: {HH} Quito.")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Capital of Peru?", **ANSWERS},
        {"question": "Capital of Peru?", **ANSWERS},
        {"chosen": f"{HH} Lima.", "rejected": f"{HH} Quito."},
        {"conversations": said(("human", "Capital of Peru?")), **ANSWERS},
        WHOLE,
    ],
)
def test_a_system_column_is_the_first_message_in_every_format(row):
    for column in ("system", "system_prompt"):
        _, pairs = read(row | {column: "Be brief."})
        assert pairs == [(f"s: Be brief. | {QUESTION}", *PAIR[1:])]
    assert read(row | {"system": ""})[1] == [PAIR]


def test_a_system_column_that_repeats_the_first_message_is_it_and_another_is_refused():
    messages = [{"role": "system", "content": "Be brief."}, *ROLES]
    assert (
        read({"prompt": messages, "system": "Be brief.", **ANSWERS})[1][0][0] == f"s: Be brief. | {QUESTION}"
    )
    with pytest.raises(InputError, match=r"column system and the first message .* differ"):
        read({"prompt": messages, "system": "Be long.", **ANSWERS})


def test_alpaca_joins_the_input_and_puts_the_history_before_it():
    _, pairs = read(
        {
            "instruction": "Capital of",
            "input": "Peru?",
            "history": [["Hello", "Hi."]],
            "output": ["Lima.", "Quito."],
        }
    )
    assert pairs == [("u: Hello | a: Hi. | u: Capital of\nPeru?", "a: Lima.", "a: Quito.")]


def test_earlier_turns_are_lost_in_no_format():
    earlier = {"history": [["Hello", "Hi."]], **ANSWERS}
    for name in ("prompt", "question", "instruction"):
        _, pairs = read({name: "Capital of Peru?", **earlier})
        assert pairs == [(f"u: Hello | a: Hi. | {QUESTION}", *PAIR[1:])]
    with pytest.raises(InputError, match="history must be two texts"):
        read({"prompt": "Capital of Peru?", "history": [["Hello"]], **ANSWERS})


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": '[{"role": "user", "content": "a", "content": "b"}]', **ANSWERS},
        {"instruction": "a", "completions": '[{"response": "x", "score": 1, "score": 2}]'},
    ],
)
def test_json_text_that_names_a_key_twice_is_refused_too(row):
    with pytest.raises(InputError, match=r"line 1: .*an object has the key '\w+' twice"):
        read(row)


def test_ratings_are_the_mean_of_the_aspects_and_overall_score_only_without_them():
    assert rating_of({"annotations": {"a": {"Rating": "5"}, "b": {"Rating": 2}}, "overall_score": 10}) == 3.5
    assert rating_of({"annotations": {"a": {"Rating": "N/A"}}, "overall_score": 7.5}) == 7.5
    assert rating_of({"fine-grained_score": 4.25, "overall_score": 10}) == 4.25
    assert rating_of({"response": "x"}) is None


def test_the_rejected_completion_may_be_a_seeded_one_that_is_rated_lower():
    row = {"instruction": "Capital of Peru?", "completions": RATED}
    drawn = {read(row, completions="random", seed=seed)[1][0][2] for seed in range(20)}
    assert drawn == {"a: Cusco.", "a: Quito."}
    again = [read(row, completions="random", seed=3)[1] for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("completions", [RATED[:1], [RATED[0], RATED[0] | {"response": "Arica."}]])
def test_completions_of_one_rating_are_counted_and_dropped(completions):
    found, pairs = read({"instruction": "Capital of Peru?", "completions": completions})
    assert (pairs, [drop.reason for drop in found.dropped]) == ([], ["tied_ratings"])
    assert found.formats == {"ultrafeedback": 1}


@pytest.mark.parametrize(
    "other",
    [
        {"context": "Geography", "chosen": "Sure, Lima.", "rejected": "Sure, Quito."},
        {"messages": ROLES, "chosen": "Sure, Lima.", "rejected": "Sure, Quito."},
    ],
)
def test_no_prompt_is_invented_where_another_column_may_hold_it(other):
    with pytest.raises(InputError, match=r"\[data.columns\] prompt"):
        read(other)


def test_no_prompt_is_invented_where_other_rows_have_one():
    sure = {"chosen": "Sure, Lima.", "rejected": "Sure, Quito."}
    assert read(sure)[1] == [("u: Sure,", "a:  Lima.", "a:  Quito.")]  # the file has none: as TRL reads it
    with pytest.raises(InputError, match="line 2: prompt is empty, but other rows have one"):
        read({"prompt": "Capital of Peru?", **ANSWERS}, sure)


def test_columns_are_read_by_the_names_they_are_mapped_to():
    row = {"ask": "Capital of Peru?", "good": "Lima.", "bad": "Quito.", "rule": "Be brief."}
    columns = {"prompt": "ask", "chosen": "good", "rejected": "bad", "system": "rule"}
    found, pairs = read(row, columns=columns)
    assert pairs == [(f"s: Be brief. | {QUESTION}", *PAIR[1:])]
    assert found.unmapped == set()
    found, _ = read({"prompt": "Capital of Peru?", **ANSWERS}, columns={"prompt": "aks"})
    with pytest.raises(
        InputError, match=r"data\.columns: prompt is mapped to 'aks', a column that no row has"
    ):
        refuse_unmapped("data.columns", {"prompt": "aks"}, found.unmapped)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "preference"])
def test_a_row_that_is_not_of_the_format_named_is_refused_with_what_it_looks_like(name):
    row = {"text": "Capital of Peru?"} | ({"chosen": "Lima."} if name not in ("hh",) else {})
    with pytest.raises(InputError, match=rf"line 1: not in the format '{name}', .*looks like 'preference'"):
        read(row, format=name)


def test_a_prompt_beside_conversations_that_do_not_say_it_is_refused_not_lost():
    with pytest.raises(InputError, match="do not contain the prompt's text"):
        read({"prompt": "Answer in Spanish.", **WHOLE})


BAD = {
    "empty_answer": {"prompt": "a", "chosen": "b", "rejected": " "},
    "empty_turn": {"prompt": [{"role": "user", "content": ""}], "chosen": "b", "rejected": "c"},
    "no_user_turn": {"prompt": [{"role": "system", "content": "x"}], "chosen": "b", "rejected": "c"},
    "roles_out_of_order": {"prompt": [*ROLES, *ROLES], "chosen": "b", "rejected": "c"},
    "system_not_first": {
        "prompt": [*ROLES, {"role": "assistant", "content": "x"}, {"role": "system", "content": "y"}, *ROLES],
        "chosen": "b",
        "rejected": "c",
    },
    "diverges": {
        "chosen": [*WHOLE["chosen"], *ROLES, {"role": "assistant", "content": "x"}],
        "rejected": [*WHOLE["rejected"], *ROLES, {"role": "assistant", "content": "y"}],
    },
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_rows_are_counted_by_kind_and_dropped_on_request(kind):
    good = {"prompt": "Capital of Peru?", **ANSWERS}
    found, pairs = read(good, *[BAD[kind]] * 12, on_bad_row="drop")
    assert pairs == [PAIR]
    assert [drop.reason for drop in found.dropped] == [kind] * 12
    assert {(d.item.pair_id, len(d.item.prompt_id)) for d in found.dropped} == {(None, 16)}
    with pytest.raises(InputError) as caught:
        read(good, *[BAD[kind]] * 12)
    text = str(caught.value)
    assert text.startswith("pairs.jsonl: 12 rows cannot be used (read as 13 rows as preference)")
    assert f"  {kind}: " in text and "12 rows, the first 10" in text
    assert [f"line {number}:" in text for number in range(2, 14)] == [True] * 10 + [False] * 2
    assert 'data.on_bad_row = "drop" (--on-bad-row drop)' in text


def test_a_refusal_lists_every_kind_it_found():
    with pytest.raises(InputError) as caught:
        read(*BAD.values())
    assert all(f"  {kind}: " in str(caught.value) for kind in BAD)


def test_what_can_never_be_read_is_refused_even_where_bad_rows_are_dropped():
    with pytest.raises(InputError, match="tool calls are not supported"):
        read({"prompt": "a", **ANSWERS, "tools": [{"name": "f"}]}, on_bad_row="drop")


def test_answers_that_repeat_the_prompt_are_counted():
    row = {"prompt": "Capital of Peru?"} | {
        side: f"Capital of Peru? {answer}" for side, answer in ANSWERS.items()
    }
    assert read(row)[0].repeated_prompts == 1
    assert read({"prompt": "Capital of Peru?", **ANSWERS})[0].repeated_prompts == 0


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Capital of Peru?"},
        {"question": "Capital of Peru?", "answer": "x"},
        {"instruction": "Capital of Peru?", "output": "x"},
        {"conversations": said(("human", "Capital of Peru?"))},
        {"prompt": HH},
        {"prompt": json.dumps(ROLES)},
        {"ask": "Capital of Peru?"},
        WHOLE,
    ],
)
def test_prompts_of_every_format(row):
    columns = {"prompt": "ask"} if "ask" in row else {}
    found = read_prompts("prompts.jsonl", rows(row), Reading(columns=columns))
    assert [short(item.prompt) for item in found.items] == [QUESTION]


def test_prompts_that_cannot_be_used_are_dropped_on_request():
    bad = [{"prompt": ""}, {"prompt": [{"role": "system", "content": "x"}]}, {"prompt": WHOLE["chosen"]}]
    found = read_prompts("p.jsonl", rows({"prompt": "a"}, *bad), Reading(on_bad_row="drop"))
    assert [drop.reason for drop in found.dropped] == ["no_user_turn", "no_user_turn", "roles_out_of_order"]
    with pytest.raises(InputError, match="3 rows cannot be used"):
        read_prompts("p.jsonl", rows({"prompt": "a"}, *bad), AUTO)
