"""`sera evaluate`: win rates between rounds by a judge, and what a judge's calibration finds out."""

import json
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import objectstores
import pyarrow.parquet as pq
import pytest
import tiny
import tinyrun
from commandline import SERA
from judgeserver import Reply, always, failing, good, good_rating, judge_server, labelled, slow

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact, StepSpec
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.judges import chat
from sera_core.judges.comparison import Comparison
from sera_core.judges.named import Asking, find_judge
from sera_core.judges.rating import RatedJudge
from sera_core.judges.reward import RewardRater
from sera_core.judges.verdicts import Item, newest_calibration, recorded, told
from sera_core.method.features import words
from tasks.judging import judge_answers

KEY = "sk-planted-0123456789"
MODEL = "openai:judge-of-tests"


@pytest.fixture
def pairs(tmp_path):
    """60 human-labelled pairs that a good judge gets right; the chosen one is longer in half of them."""
    return tinyrun.write_rows(tmp_path / "labelled.jsonl", labelled(60))


@pytest.fixture
def asking(monkeypatch):
    """Environment of an OpenAI-compatible judge: `asking(server)`."""

    def use(server):
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        return server

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    return use


def answers(store: Path, round: int) -> dict[tuple[str, int], str]:
    """A round's held-out answers of the run `first`."""
    records = RunStore(open_store(str(store)), "first")
    evidence = Artifact(records.store, records.rounds()[round].steps["evidence"])
    path = Artifact(records.store, evidence.record.inputs["samples"]).path("responses.parquet")
    return {(r["prompt_id"], r["sample"]): r["response"] for r in schema.iter_rows(path)}


def verdicts(store: Path, step: str) -> list[dict]:
    """Rows of the only step of this name."""
    (file,) = store.glob(f"steps/{step}/*/*/verdicts.parquet")
    return pq.read_table(file).to_pylist()


# ----------------------------------------------------------------------------------------------------- rounds


def test_a_round_is_compared_with_another_by_word_count(sera, present_store):
    found = sera(
        "evaluate", "first", "--judge", "word-count", "--round", 1, "--store", present_store, "--json"
    )
    new, old = answers(present_store, 1), answers(present_store, 0)
    assert new.keys() == old.keys() and len(new) == 4
    signs = [np.sign(words("", new[key]) - words("", old[key])) for key in new]
    result = found.json
    assert result["win_rate"]["value"] == pytest.approx(float(np.mean(signs)) / 2 + 0.5)
    assert (result["wins"], result["losses"]) == (signs.count(1), signs.count(-1))
    assert result["ties"]["value"] == pytest.approx(signs.count(0) / 4)
    assert (result["comparisons"], result["prompts"], result["win_rate"]["groups"]) == (4, 2, 2)
    assert (result["round"], result["against"], result["unpaired"]) == (1, 0, 0)
    assert result["answered"] + result["equal"] == 4 and result["failed"] == {} and result["tokens"] is None
    assert result["disagreed"] == 0 and result["calibration"] == {"status": "not calibrated"}
    assert (
        pq.read_schema(next(present_store.glob("steps/judge/*/*/*.parquet"))).names == schema.VERDICTS.names
    )


def test_each_answer_in_json_has_these_names(sera, present_store, pairs):
    store = ("--judge", "constant", "--store", present_store, "--json")
    counts = {"comparisons", "equal", "asked", "answered", "failed", "tokens"}
    run = sera("evaluate", "first", "--round", 1, *store).json
    assert set(run) == counts | {
        "run", "round", "against", "answers", "judge", "prompts", "unpaired", "wins", "losses", "disagreed",
        "win_rate", "length_controlled", "ties", "order_flips", "calibration", "step",
    }  # fmt: skip
    assert set(run["win_rate"]) == {"value", "low", "high", "n", "groups"}
    found = sera("evaluate", "--calibrate", pairs, *store).json
    assert set(found) == counts | {
        "judge", "pairs", "prompts", "status", "calibrated", "measures", "controls", "better_than_word_count",
        "dropped", "step",
    }  # fmt: skip
    assert set(found["measures"]) == {"agreement", "kappa", "order_flips", "longer_preferred"}


def test_the_output_says_what_was_measured(sera, present_store):
    command = ("evaluate", "first", "--judge", "constant", "--round", 1, "--store", present_store)
    said = sera(*command).out
    assert "judge constant (not calibrated)" in said and "win rate " in said and "0.5 is a draw" in said
    assert "each counts as a tie" in said
    assert sera(*command, "--json").json["win_rate"]["value"] == 0.5


def test_a_chat_model_is_asked_in_both_orders_once(sera, present_store, asking):
    command = ("evaluate", "first", "--judge", MODEL, "--round", 1, "--store", present_store, "--json")
    with judge_server(always("B")) as server:
        asking(server)
        found = sera(*command).json
        asked = [(question.first, question.second) for question in server.questions]
        assert len(asked) == 2 * found["asked"]
        assert {(b, a) for a, b in asked} == set(asked)
        assert sera(*command).json == found and len(server.questions) == len(asked)
        assert sera(*command, "--limit", 1).json["prompts"] == 1
    assert found["order_flips"]["value"] == 1.0 and found["win_rate"]["value"] == 0.5
    assert found["disagreed"] == found["asked"]
    assert found["tokens"] == {"answer": 7 * len(asked), "prompt": 100 * len(asked)}


def test_answers_to_a_file_of_prompts_are_sampled_once_and_judged(sera, present_store, tmp_path):
    """The head against the start policy, which no round has sampled; by the word count, computed again."""
    questions = [{"prompt": f"What about {word}?"} for word in ("tea", "rain", "maps", "tea")]
    prompts = tinyrun.write_rows(tmp_path / "set.jsonl", questions)
    command = ("evaluate", "first", "--judge", "word-count", "--prompts", prompts, "--store", present_store)
    found = sera(*command, "--against", "start", "--json").json
    assert (found["prompts"], found["comparisons"], found["unpaired"]) == (3, 3, 0)
    assert (found["against"], found["answers"]) == ("start", "set.jsonl")
    store = open_store(str(present_store))
    (judged,) = recorded(store, "judge")
    texts = []
    for name in ("samples", "against"):
        path = Artifact(store, judged.inputs[name]).path("responses.parquet")
        texts.append([row["response"] for row in schema.iter_rows(path)])
    signs = [np.sign(words("", one) - words("", other)) for one, other in zip(*texts, strict=True)]
    assert found["win_rate"]["value"] == pytest.approx(float(np.mean(signs)) / 2 + 0.5)
    policies = [
        Artifact(store, judged.inputs[name]).record.inputs["policy"] for name in ("samples", "against")
    ]
    rounds = RunStore(store, "first").rounds()
    assert policies == [rounds[found["round"]].steps["policy"], rounds[0].steps["model"]]
    before = {path: path.stat().st_mtime_ns for path in present_store.glob("steps/*/*/done.json")}
    said = sera(*command, "--against", "start").out
    assert "against the start policy of first" in said and "answers to 3 prompts of set.jsonl" in said
    sera("gc", "--store", present_store, "--delete", "--older-than", "0s")
    assert {path: path.stat().st_mtime_ns for path in present_store.glob("steps/*/*/done.json")} == before
    sera("verify", "first", "--store", present_store)


def test_prompts_that_cannot_be_judged_on_are_refused(sera, present_store, tmp_path):
    command = ("evaluate", "first", "--judge", "word-count", "--store", present_store)
    trained = RunStore(open_store(str(present_store)), "first").rounds()[0].steps["pairs"]
    rows = list(schema.iter_rows(Artifact(open_store(str(present_store)), trained).path("train.parquet")))
    shared = tinyrun.write_rows(
        tmp_path / "shared.jsonl", [{"prompt": rows[0]["prompt"]}, {"prompt": "New?"}]
    )
    before = {path: path.stat().st_mtime_ns for path in present_store.glob("steps/*/*/done.json")}
    for flags, said in (
        (("--prompts", shared), "1 of its 2 prompts are train prompts"),
        (("--prompts", tmp_path / "none.jsonl"), "none.jsonl"),
        (("--prompts", tinyrun.write_rows(tmp_path / "bad.jsonl", [{"prompt": ""}])), "bad.jsonl line 1"),
        (("--against", "start"), "--against start: the start policy answered no held-out prompts"),
        (("--against", "first"), "give the number of a round, or start"),
        (("--prompts", shared, "--round", "9"), "has no policy of that round"),
    ):
        assert said in sera(*command, *flags, code=2).err
    assert {path: path.stat().st_mtime_ns for path in present_store.glob("steps/*/*/done.json")} == before


def test_equal_answers_are_ties_without_asking(tmp_path):
    question = [{"role": "user", "content": "And?"}]
    items = [Item("p", question, "the same", "the same", 0), Item("q", question, "one", "two words", 0)]
    store = open_store(str(tmp_path))
    spec = StepSpec(step="judge", version=1, fields={}, inputs={})
    work = judge_answers(items, find_judge("word-count", Asking()))
    record = run_step(store, spec, work, ExecutionConfig())
    rows = verdicts(tmp_path, "judge")
    assert [(row["asked"], row["better"]) for row in rows] == [
        (False, "tie"), (False, "tie"), (True, "B"), (True, "A"),
    ]  # fmt: skip
    assert record.counts == {"comparisons": 2, "equal": 1, "asked": 1, "answered": 1}
    assert told(rows).judged.outcomes.tolist() == [0.5, 0.0]


def test_verify_checks_verdicts_and_gc_keeps_them(sera, present_store, pairs):
    store = ("--store", present_store)
    before = sera("verify", "first", *store, "--json").json["steps"]
    sera("evaluate", "first", "--judge", "word-count", "--round", 1, *store)
    sera("evaluate", "--judge", "constant", "--calibrate", pairs, *store)
    assert sera("verify", "first", *store, "--json").json["steps"] == before + 1
    sera("gc", "--delete", "--older-than", "0", *store)
    assert len(list(present_store.glob("steps/judge/*/done.json"))) == 1
    assert len(list(present_store.glob("steps/calibrate/*/done.json"))) == 1
    (file,) = present_store.glob("steps/judge/*/*/verdicts.parquet")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert "it was changed" in sera("verify", "first", *store, code=1).err
    for record in (present_store / "runs" / "first").glob("*.json"):
        record.unlink()
    found = sera("gc", "--older-than", "0", *store, "--json").json["items"]
    assert any("steps/judge/" in item["path"] for item in found)
    assert not any("steps/calibrate/" in item["path"] for item in found)


# ------------------------------------------------------------------------------------------------ calibration


def test_a_judge_that_agrees_with_people_is_calibrated(sera, tmp_path, pairs, asking, present_store):
    store = ("--store", present_store)
    with judge_server(good) as server:
        asking(server)
        found = sera("evaluate", "--judge", MODEL, "--calibrate", pairs, *store, "--json").json
        said = sera("evaluate", "first", "--judge", MODEL, "--round", 1, *store).out
    assert found["status"] == "calibrated" and found["pairs"] == found["answered"] == 60
    values = {name: rate["value"] for name, rate in found["measures"].items()}
    assert values == {"agreement": 1.0, "kappa": 1.0, "order_flips": 0.0, "longer_preferred": 0.5}
    beside = {name: rate["value"] for name, rate in found["controls"]["word-count"].items()}
    assert beside == {"agreement": 0.5, "kappa": 0.0, "order_flips": 0.0, "longer_preferred": 1.0}
    assert found["controls"]["constant"]["order_flips"]["value"] == 1.0
    assert found["better_than_word_count"]["low"] > 0
    assert "(calibrated: agrees with people on 100.0% of labelled pairs)" in said


def test_a_judge_of_single_answers_is_asked_once_for_each(sera, tmp_path, pairs, asking):
    """Ratings cannot depend on the order; the other mode is another judge."""
    command = ("evaluate", "--judge", MODEL, "--calibrate", pairs, "--store", tmp_path / "s", "--json")
    with judge_server(good_rating) as server:
        asking(server)
        single = sera(*command, "--mode", "single").json
        distinct = {question.first for question in server.questions}
        assert len(server.questions) == len({q.body["messages"][0]["content"] for q in server.questions})
        assert all("<answer>" in q.body["messages"][0]["content"] for q in server.questions) and distinct
        assert single["tokens"] == {
            "answer": 7 * len(server.questions),
            "prompt": 100 * len(server.questions),
        }
    assert single["status"] == "calibrated" and single["measures"]["order_flips"]["value"] == 0
    with judge_server(good) as server:
        asking(server)
        assert sera(*command).json["status"] == "calibrated" and server.questions
    refused = sera("evaluate", "--judge", "word-count", *command[3:], "--mode", "single", code=2)
    assert "are asked in words, not the judge" in refused.err


@pytest.mark.parametrize(("place", "flips"), [("A", 1.0), ("B", 1.0), ("tie", 0.0)])
def test_a_judge_that_sees_the_place_alone_is_found_out(sera, tmp_path, pairs, asking, place, flips):
    with judge_server(always(place)) as server:
        asking(server)
        command = ("evaluate", "--judge", MODEL, "--calibrate", pairs, "--store", tmp_path / "s", "--json")
        found = sera(*command).json
    assert found["status"] == "uncalibrated"
    values = {name: rate["value"] for name, rate in found["measures"].items()}
    longer = None if place == "tie" else 0.5
    assert values == {"agreement": 0.5, "kappa": 0.0, "order_flips": flips, "longer_preferred": longer}


@pytest.mark.s3
def test_a_calibration_lives_in_object_storage(sera, pairs):
    with objectstores.moto() as server, server.in_environment():
        store = ("--store", server.bucket(), "--json")
        command = ("evaluate", "--judge", "word-count", "--calibrate", pairs, *store)
        found = sera(*command).json
        assert sera(*command).json == found and found["status"] == "uncalibrated"
        identity = find_judge("word-count", Asking()).identity
        artifact = newest_calibration(open_store(store[1]), identity)
        assert artifact is not None and artifact.ref.key == found["step"]
        assert sera("gc", "--older-than", "0", *store).json["steps_kept"] == 1


def test_the_controls_are_never_calibrated(sera, tmp_path, pairs, present_store):
    store = ("--store", present_store)
    for judge in ("word-count", "constant"):
        found = sera("evaluate", "--judge", judge, "--calibrate", pairs, "--limit", 40, *store, "--json").json
        assert found["status"] == "uncalibrated" and found["comparisons"] == 40
    said = sera("evaluate", "first", "--judge", "constant", "--round", 1, *store).out
    assert "judge constant (uncalibrated: agrees with people on 50.0%" in said
    said = sera("evaluate", "--judge", "constant", "--calibrate", pairs, *store).out
    assert "Cohen's kappa" in said and "word-count" in said and "not shown to agree" in said


def test_a_judge_no_better_than_chance_is_not_calibrated(sera, tmp_path):
    """People prefer the shorter answer: the word count is always wrong, and a coin is better than that."""
    rows = [
        {"prompt": f"question {n}", "chosen": f"short {n}", "rejected": f"a much longer answer {n}"}
        for n in range(40)
    ]
    pairs = tinyrun.write_rows(tmp_path / "short.jsonl", rows)
    store = ("--store", tmp_path / "s")
    found = sera("evaluate", "--judge", "constant", "--calibrate", pairs, *store, "--json").json
    assert found["better_than_word_count"]["low"] > 0 and found["status"] == "uncalibrated"


def test_a_continued_evaluation_may_begin_with_what_failed_before(sera, tmp_path, asking):
    """Forty questions that the server refuses for good; then it fails altogether, and is back."""
    pairs = tinyrun.write_rows(tmp_path / "many.jsonl", labelled(200))
    refused = {f"answer {n}" for n in range(20)}

    def mode(question):
        number = " ".join(question.first.split()[2:4])
        return Reply("No idea.") if number in refused else good(question)

    down = failing(500)
    command = ("evaluate", "--judge", MODEL, "--calibrate", pairs, "--store", tmp_path / "s", "--retries", 0)
    with judge_server(mode) as server:
        asking(server)
        server.mode = lambda q: mode(q) if len(server.questions) < 300 else down(q)
        assert "server_error" in sera(*command, code=1).err
        server.mode = mode
        found = sera(*command, "--json").json
    assert found["failed"] == {"nonsense": 20} and found["answered"] == 180


def test_failures_that_pass_do_not_become_final(sera, tmp_path, pairs, asking):
    """A tenth of the questions meets a rate limit: no result, and the next command asks for them."""
    limited = failing(429, retry_after="0")

    def mode(question):
        number = " ".join(question.first.split()[2:4])
        return limited(question) if number in {f"answer {n}" for n in range(6)} else good(question)

    command = ("evaluate", "--judge", MODEL, "--calibrate", pairs, "--store", tmp_path / "s", "--retries", 0)
    with judge_server(mode) as server:
        asking(server)
        said = sera(*command, code=1).err
        assert "could not answer all questions for now; of 60 comparisons 6 have no verdict" in said
        asked, server.mode = len(server.questions), good
        assert sera(*command, "--json").json["answered"] == 60
    assert len(server.questions) - asked == 12


def test_another_template_is_another_judge(sera, tmp_path, pairs, asking, present_store):
    other = tmp_path / "other.txt"
    other.write_text("<answer_a>\n{answer_a}\n</answer_a> <answer_b>\n{answer_b}\n</answer_b> {prompt}")
    command = ("evaluate", "--judge", MODEL, "--calibrate", pairs, "--limit", 5, "--store", present_store)
    with judge_server(good) as server:
        asking(server)
        sera(*command)
        assert len(server.questions) == 10
        sera(*command, "--template", other)
        assert len(server.questions) == 20
        assert server.questions[-1].body["messages"][0]["content"].startswith("<answer_a>")
        run = ("evaluate", "first", "--judge", MODEL, "--round", 1, "--store", present_store, "--json")
        assert sera(*run).json["calibration"]["status"] != "not calibrated"
        third = tmp_path / "third.txt"
        third.write_text("Other words. " + other.read_text())
        assert sera(*run, "--template", third).json["calibration"]["status"] == "not calibrated"


# ------------------------------------------------------------------------------------------------- in trouble


def test_a_few_failures_are_left_out_and_counted(sera, tmp_path, pairs, asking):
    """A quarter of the comparisons never gets a verdict: neither win nor loss nor tie."""
    broken = {f"answer {n}" for n in range(0, 60, 4)}

    def mode(question):
        number = " ".join(question.first.split()[2:4])
        return Reply("No idea.") if number in broken else good(question)

    with judge_server(mode) as server:
        asking(server)
        command = (
            "evaluate",
            "--judge",
            MODEL,
            "--calibrate",
            pairs,
            "--store",
            tmp_path / "s",
            "--retries",
            1,
        )
        found = sera(*command, "--json").json
        said = sera(*command).out
    assert found["failed"] == {"nonsense": 15} and found["answered"] == 45
    assert found["measures"]["agreement"] | {"low": 0, "high": 0} == {
        "value": 1.0, "low": 0, "high": 0, "n": 45, "groups": None,
    }  # fmt: skip
    assert "15 failed and left out" in said and "nonsense (the answer was not in" in said
    assert len(server.questions) == 2 * 45 + 4 * 15
    rows = verdicts(tmp_path / "s", "calibrate")
    assert Counter((row["better"] is None, row["failure"]) for row in rows)[True, "nonsense"] == 30


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        (failing(500), "server_error"),
        (failing(429, retry_after="0"), "rate_limited"),
        (slow(1.0), "timeout"),
        (lambda _: Reply("Both are fine."), "nonsense"),
        (lambda _: Reply('{"winner": "A"}'), "nonsense"),
    ],
)
def test_a_judge_that_mostly_fails_reports_nothing(sera, tmp_path, pairs, asking, mode, reason):
    store = tmp_path / "s"
    command = ("evaluate", "--judge", MODEL, "--calibrate", pairs, "--store", store, "--retries", 1)
    with judge_server(mode) as server:
        asking(server)
        seconds = 0.2 if reason == "timeout" else 30
        said = sera(*command, "--timeout", seconds, "--concurrency", 8, code=1)
        assert reason in said.err and "no verdict" in said.err and said.out == ""
        assert len(server.questions) <= 2 * 32  # one batch, then it stops
        assert not list(store.glob("steps/calibrate/*/done.json"))
        server.mode = good
        assert sera(*command, "--json").json["answered"] == 60


def test_more_than_half_without_verdict_is_a_failure(sera, tmp_path, pairs, asking):
    """Every second question is nonsense, so nearly no comparison is whole; what is answered is kept."""

    def mode(question):
        return good(question) if "good" in question.first else Reply("No idea.")

    command = ("evaluate", "--judge", MODEL, "--calibrate", pairs, "--store", tmp_path / "s", "--retries", 0)
    with judge_server(mode) as server:
        asking(server)
        said = sera(*command, code=1).err
        assert "failed more often than it answered" in said and "of 60 comparisons" in said
        asked, answered = len(server.questions), sum("good" in q.first for q in server.questions)
        server.mode = good
        assert sera(*command, "--json").json["answered"] == 60
    assert len(server.questions) - asked == 120 - answered


def test_a_server_that_asks_to_wait_is_asked_again(sera, tmp_path, pairs, asking):
    with judge_server(failing(429, times=1, retry_after="0.05")) as server:
        asking(server)
        command = ("evaluate", "--judge", MODEL, "--calibrate", pairs, "--limit", 6)
        found = sera(*command, "--store", tmp_path / "s", "--json").json
    assert found["answered"] == 6 and found["failed"] == {} and len(server.questions) == 24


def test_a_killed_evaluation_does_not_ask_again(sera, tmp_path, pairs, asking):
    store = tmp_path / "s"
    command = ("evaluate", "--judge", MODEL, "--calibrate", pairs, "--store", store, "--concurrency", 2)
    with judge_server(lambda q: good(q) if len(server.questions) <= 40 else slow(30)(q)) as server:
        asking(server)
        killed = subprocess.Popen([*SERA, *map(str, command)], stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while len(server.questions) < 41 and time.monotonic() < until:
            time.sleep(0.05)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        stored = [
            row
            for file in store.glob("steps/calibrate/*/*/part-*.parquet")
            for row in pq.read_table(file).to_pylist()
        ]
        assert len(stored) == 32 and len(list(store.glob("steps/calibrate/*/part-*.json"))) == 2
        server.mode = good
        first = len(server.questions)
        assert sera(*command, "--json").json["answered"] == 60
        assert len(server.questions) - first == 120 - 32
        times = Counter((question.first, question.second) for question in server.questions)
    assert len(times) == 120 and sum(count > 1 for count in times.values()) <= 16


@pytest.mark.parametrize("status", [401, 500])
def test_no_secret_is_stored_or_said(sera, tmp_path, pairs, asking, status):
    """A server that repeats the key in its errors; the key is in no record, message or traceback."""
    store = tmp_path / "s"
    with judge_server(failing(status, times=1 if status == 500 else 99)) as server:
        asking(server)
        command = (
            "evaluate",
            "--judge",
            MODEL,
            "--calibrate",
            pairs,
            "--store",
            store,
            "--limit",
            3,
            "--debug",
        )
        said = sera(*command, code=1 if status == 401 else 0)
    assert server.keys == {KEY} and KEY not in said.out + said.err
    files = [file for file in store.rglob("*") if file.is_file()]
    assert not [file for file in files if KEY.encode() in file.read_bytes()] and (files or status == 401)


# --------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--judge", "word-cuont", "first"], "did you mean 'word-count'?"),
        (["--judge", "opnai:gpt", "first"], "did you mean openai:gpt?"),
        (["--judge", "openai:", "first"], "did you mean 'openai:<model>'?"),
        (["--judge", "openai:m", "first"], "needs a key in OPENAI_API_KEY"),
        (["--judge", "reward", "first"], "did you mean 'reward:<folder>'?"),
        (["--judge", "reward:/nowhere", "first"], "no folder with a config.json"),
        (["--judge", "os:system", "first"], "SERA_EXTENSIONS=os"),
        (
            ["--judge", "constant", "first", "--template", "x"],
            "--template: only openai:<model> and local:<folder> are asked in words",
        ),
        (["--judge", "constant", "first", "--judge-url", "http://x"], "--judge-url: only openai:<model>"),
        (["--judge", "constant"], "name a run to evaluate"),
        (["--judge", "constant", "first", "--calibrate", "p"], "one of the two"),
        (["--judge", "constant", "--calibrate", "p", "--round", "0"], "leave them out"),
        (["--judge", "constant", "--calibrate", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--judge", "constant", "first", "--limit", "0"], "--limit 0"),
        (["--judge", "constant", "first", "--retries", "-1"], "--retries -1"),
        (["--judge", "constant", "first", "--timeout", "nan"], "--timeout nan"),
        (["--judge", "constant", "first", "--concurrency", "0"], "--concurrency 0"),
        (["--judge", "constant", "nobody"], "not in the store"),
        (["--judge", "constant", "first", "--round", "9"], "has rounds 0 to 1"),
        (["--judge", "constant", "first", "--round", "0"], "are the same round, 0"),
        (["--judge", "constant", "first", "--round", "1"], "no held-out prompt in common"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(sera, kept_store, monkeypatch, words, said):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    found = sera("evaluate", *words, "--store", kept_store, code=2)
    assert said in found.err and found.out == "" and len(found.err.splitlines()) <= 2
    assert not (kept_store / "steps" / "judge").exists()


@pytest.mark.parametrize(
    "url",
    [
        "http://user:sk-url-secret@host/v1",
        "http://sk-url-secret@host/v1",
        "http://host/v1?api-key=sk-url-secret",
        "http://host/v1#sk-url-secret",
        "ftp://host/sk-url-secret",
        "http://[sk-url-secret",
        "http://a b/sk-url-secret",
        "http://host:port/sk-url-secret",
        "sk-url-secret",
    ],
)
def test_an_address_with_a_secret_is_refused_and_not_repeated(sera, kept_store, asking, monkeypatch, url):
    for given in (["--judge-url", url], []):
        monkeypatch.setenv("OPENAI_BASE_URL", url)
        found = sera("evaluate", "first", "--judge", MODEL, *given, "--store", kept_store, code=2)
        assert "sk-url-secret" not in found.err + found.out


def test_a_missing_extra_is_said(sera, kept_store, asking, monkeypatch):
    monkeypatch.setattr("sera_core.judges.named.find_spec", lambda _: None)
    found = sera("evaluate", "first", "--judge", MODEL, "--store", kept_store, code=2)
    assert "pip install 'sera-flow[judge]'" in found.err


def test_a_template_without_a_placeholder_is_refused(sera, kept_store, asking, tmp_path):
    file = tmp_path / "t.txt"
    file.write_text("{prompt} {answer_a}")
    found = sera("evaluate", "first", "--judge", MODEL, "--template", file, "--store", kept_store, code=2)
    assert "lacks {answer_b}" in found.err


# ----------------------------------------------------------------------------------------------- reward model


@pytest.fixture
def reward_model(tmp_path):
    return tiny.tiny_reward_model(tmp_path / "reward")


def test_a_reward_model_prefers_the_larger_score(sera, tmp_path, reward_model):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    rows = labelled(6)
    pairs = tinyrun.write_rows(tmp_path / "p.jsonl", rows)
    store = tmp_path / "s"
    command = (
        "evaluate",
        "--judge",
        f"reward:{reward_model}",
        "--calibrate",
        pairs,
        "--store",
        store,
        "--json",
    )
    found = sera(*command).json
    model = AutoModelForSequenceClassification.from_pretrained(reward_model)
    tokenizer = AutoTokenizer.from_pretrained(reward_model)

    def score(row, side):
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")  # up to the end of the turn
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return float(model(input_ids=ids).logits[0, 0])

    right = [score(row, "chosen") > score(row, "rejected") for row in rows]
    assert found["measures"]["agreement"]["value"] == pytest.approx(np.mean(right))
    assert found["measures"]["order_flips"]["value"] == 0.0
    assert str(tmp_path) not in "".join(file.read_text() for file in store.glob("steps/*/*/done.json"))


def test_a_blank_answer_loses_and_a_refused_conversation_is_a_failure(sera, tmp_path, reward_model):
    rows = labelled(8)
    rows[2]["prompt"] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    for side in ("chosen", "rejected"):
        rows[2][side] = [{"role": "assistant", "content": rows[2][side]}]
    template = (reward_model / "chat_template.jinja").read_text()
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    (reward_model / "chat_template.jinja").write_text(refuse + template)
    pairs = tinyrun.write_rows(tmp_path / "p.jsonl", rows)
    command = (
        "evaluate",
        "--judge",
        f"reward:{reward_model}",
        "--calibrate",
        pairs,
        "--store",
        tmp_path / "s",
    )
    found = sera(*command, "--json").json
    assert found["failed"] == {"template": 1} and found["answered"] == 7
    turns = [{"role": "user", "content": "Why?"}]
    comparisons = [Comparison(turns, first, second) for first, second in (("So.", ""), (" ", "So."))]
    assert [verdict.better for verdict in RatedJudge(RewardRater(reward_model)).judge(comparisons)] == [
        "A",
        "B",
    ]


def test_a_reward_model_with_more_labels_or_a_pickle_is_refused(sera, tmp_path, reward_model, pairs):
    settings = json.loads((reward_model / "config.json").read_text())
    command = (
        "evaluate",
        "--judge",
        f"reward:{reward_model}",
        "--calibrate",
        pairs,
        "--store",
        tmp_path / "s",
    )
    (reward_model / "config.json").write_text(json.dumps(settings | {"id2label": {"0": "a", "1": "b"}}))
    assert "has 2 labels" in sera(*command, code=2).err
    (reward_model / "config.json").write_text(json.dumps(settings | {"auto_map": {"AutoModel": "x.Y"}}))
    assert "needs code from its own repository" in sera(*command, code=2).err
    (reward_model / "config.json").write_text(json.dumps(settings))
    (reward_model / "model.safetensors").rename(reward_model / "pytorch_model.bin")
    assert "never read from a pickle" in sera(*command, code=2).err
