"""A chat model as a judge, against a real server: retries, waits, forms of asking."""

import time
from email.utils import formatdate

import pytest
from judgeserver import Reply, always, failing, good, judge_server, slow, verdict

from sera_core.errors import SeraError
from sera_core.judges import chat
from sera_core.judges.asked import AskedJudge
from sera_core.judges.chat import ChatModel, Endpoint, asked_wait
from sera_core.judges.comparison import Comparison
from sera_core.judges.prompts import PAIRWISE, read_template

PROMPT = [{"role": "user", "content": "A question?"}]
PAIR = Comparison(PROMPT, "a good answer", "a bad answer")
TURNED = Comparison(PROMPT, "a bad answer", "a good answer")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge_at(server, **limits) -> AskedJudge:
    endpoint = Endpoint(server.url, "a-key", **limits)
    return AskedJudge(ChatModel("m", PAIRWISE, endpoint), read_template(None))


def test_a_judge_answers_each_comparison_in_order():
    with judge_server(good) as server:
        found = judge_at(server).judge([PAIR, TURNED, PAIR])
    assert [v.better for v in found] == ["A", "B", "A"]
    assert {(v.prompt_tokens, v.answer_tokens, v.failure) for v in found} == {(100, 7, None)}
    assert server.keys == {"a-key"}
    assert server.questions[0].body["response_format"]["json_schema"]["schema"]["required"] == ["better"]


@pytest.mark.parametrize(
    ("mode", "failure", "attempts"),
    [
        (failing(500), "server_error", 3),
        (failing(503), "server_error", 3),
        (failing(429), "rate_limited", 3),
        (slow(1.0), "timeout", 3),
        (lambda _: Reply("The first one, I think."), "nonsense", 3),
        (lambda _: Reply('{"winner": "A"}'), "nonsense", 3),
        (lambda _: Reply(raw=b"<html>"), "nonsense", 3),
        (lambda _: Reply(raw=b'{"choices": []}'), "nonsense", 3),
        (lambda _: Reply(raw=b'{"choices": [{"message": {"content": null}}]}'), "nonsense", 3),
        (failing(413), "server_error", 1),
    ],
)
def test_a_failure_is_tried_again_and_named(mode, failure, attempts):
    with judge_server(mode) as server:
        (found,) = judge_at(server, retries=2, timeout=0.3).judge([PAIR])
    assert (found.better, found.failure) == (None, failure)
    assert len(server.questions) == attempts


def test_a_server_that_is_down_is_a_failure():
    with judge_server(good) as server:
        judge = judge_at(server, retries=1)
    (found,) = judge.judge([PAIR])
    assert found.failure in ("connection", "timeout") and found.prompt_tokens is None


def test_what_a_server_asks_to_wait_is_waited():
    with judge_server(failing(429, times=1, retry_after="0.6")) as server:
        started = time.monotonic()
        (found,) = judge_at(server).judge([PAIR])
    assert found.better == "A" and time.monotonic() - started >= 0.6


def test_tokens_of_every_attempt_count():
    answers = iter([Reply("hm"), Reply("hm"), verdict("B")])
    with judge_server(lambda _: next(answers)) as server:
        (found,) = judge_at(server).judge([PAIR])
    assert (found.better, found.prompt_tokens, found.answer_tokens) == ("B", 300, 21)


@pytest.mark.parametrize("rejects", [("response_format",), ("response_format", "temperature")])
def test_a_server_without_structured_outputs_is_asked_without(rejects):
    def mode(question):
        return Reply(status=400) if set(rejects) & set(question.body) else good(question)

    with judge_server(mode) as server:
        judge = judge_at(server, concurrency=1, retries=0)
        assert [v.better for v in judge.judge([PAIR, TURNED])] == ["A", "B"]
        before = len(server.questions)
        judge.judge([PAIR])
    assert len(server.questions) == before + 1  # the form that works is kept


def test_a_request_that_is_refused_in_every_form_is_not_repeated():
    with judge_server(failing(400)) as server:
        (found,) = judge_at(server).judge([PAIR])
    assert found.failure == "refused" and len(server.questions) == 4


@pytest.mark.parametrize(
    ("status", "said"), [(401, "set OPENAI_API_KEY"), (403, "may not"), (404, "no such")]
)
def test_a_server_that_will_never_answer_stops_the_work(status, said):
    with judge_server(failing(status)) as server, pytest.raises(SeraError, match=said) as stopped:
        judge_at(server, concurrency=1).judge([PAIR] * 50)
    assert "a-key" not in str(stopped.value) and len(server.questions) < 10


def test_a_placement_bias_is_passed_on():
    with judge_server(always("A")) as server:
        assert [v.better for v in judge_at(server).judge([PAIR, TURNED])] == ["A", "A"]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("3", 3.0), ("0.5", 0.5), ("-1", 0.0), ("99999", 120.0), ("soon", None), ("nan", None)],
)
def test_retry_after_is_read_as_seconds(header, seconds):
    assert asked_wait(header) == seconds


def test_retry_after_is_read_as_a_date():
    wait = asked_wait(formatdate(time.time() + 20, usegmt=True))
    assert wait is not None and 17 < wait <= 20


def test_an_endpoint_does_not_show_its_key():
    assert "a-key" not in repr(Endpoint("http://x", "a-key"))
