"""`pairing.by`: a reward model, a chat model or a function orders the responses; margins stay implicit."""

import json
import tomllib
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest
import tiny
import tinyrun
from judgeserver import Reply, failing, judge_server

from sera_core import steps
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.config import SeraConfig
from sera_core.errors import InputError, SeraError
from sera_core.judges import chat
from sera_core.judges.rating import Question
from sera_core.judges.reward import RewardRater
from sera_core.method.features import words
from tasks.candidates import load_candidates

ALL_PAIRS = {"select_generated": {"rule": "none"}, "limits": {"rounds": 2}}


@pytest.fixture
def asking(monkeypatch):
    """Environment of an OpenAI-compatible rater."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)
    return lambda server: monkeypatch.setenv("OPENAI_BASE_URL", server.url)


def rated(records) -> tuple[Artifact, Artifact, dict[tuple[str, int], dict]]:
    """Round 1: its ratings, its pairs, and its samples by prompt and number."""
    steps = records.rounds()[1].steps
    made = {role: Artifact(records.store, steps[role]) for role in ("ratings", "responses", "samples")}
    path = made["samples"].path("responses.parquet")
    samples = {(row["prompt_id"], row["sample"]): row for row in schema.iter_rows(path)}
    return made["ratings"], made["responses"], samples


def best_and_worst(samples, value) -> dict[str, tuple[float, float]]:
    """Largest and smallest value of each prompt's responses that have text; without prompts that tie."""
    found = defaultdict(list)
    for (prompt, _), row in samples.items():
        if row["response"].strip():
            found[prompt].append(value(row["response"]))
    return {prompt: (max(v), min(v)) for prompt, v in found.items() if max(v) > min(v)}


def paired(responses: Artifact, value) -> dict[str, tuple[float, float]]:
    """The values of the chosen and the rejected response of each pair."""
    rows = schema.iter_rows(responses.path("pairs.parquet"))
    return {
        row["prompt_id"]: tuple(value(row[side][0]["content"]) for side in ("chosen", "rejected"))
        for row in rows
    }


def test_a_rater_orders_the_responses_and_the_margins_stay_implicit(tmp_path):
    """The word count is a second way to compute who is best; margins come from log-probabilities alone."""
    config = tinyrun.config(tmp_path, pairing={"by": "word-count"}, **ALL_PAIRS)
    records = tinyrun.work(config, tmp_path / "store")
    ratings, responses, samples = rated(records)

    def count(text):
        return words("", text)

    assert paired(responses, count) == best_and_worst(samples, count) != {}
    table = schema.read_table(ratings.path("ratings.parquet"), schema.RATINGS).to_pylist()
    assert [(row["prompt_id"], row["sample"]) for row in table] == list(samples)
    scored = schema.read_table(responses.path("scored.parquet"), schema.SCORED)
    policy, reference = (
        scored[f"{who}_chosen_logps"].to_numpy() - scored[f"{who}_rejected_logps"].to_numpy()
        for who in ("policy", "ref")
    )
    np.testing.assert_allclose(scored["margin"].to_numpy(), policy - reference, atol=2e-6)
    share = float(np.mean(scored["ensemble_margin"].to_numpy() > 0))
    assert responses.record.metrics["pairs/implicit_agrees"] == pytest.approx(share)
    assert ratings.record.counts["rated"] + ratings.record.counts["not_asked"] == len(samples)


def test_a_reward_model_orders_the_responses(tmp_path, sera):
    folder = tiny.tiny_reward_model(tmp_path / "reward")
    config = tinyrun.config(tmp_path, pairing={"by": f"reward:{folder}"}, **ALL_PAIRS)
    records = tinyrun.work(config, tmp_path / "store")
    ratings, responses, samples = rated(records)
    sera("verify", "tiny", "--store", tmp_path / "store")
    rater = RewardRater(folder, "cpu")
    path = Artifact(records.store, records.rounds()[1].steps["pairs"]).path("prompts.parquet")
    prompts = {row["prompt_id"]: row["prompt"] for row in schema.iter_rows(path)}
    for row in schema.iter_rows(ratings.path("ratings.parquet")):
        text = samples[row["prompt_id"], row["sample"]]["response"]
        if text.strip():
            (again,) = rater.rate([Question(prompts[row["prompt_id"]], text)])
            assert again.value == row["rating"]
    assert ratings.record.fields["rater"]["rater"] == "reward" and responses.record.counts["pairs"] > 0
    assert str(tmp_path) not in json.dumps(ratings.record.fields)
    settings = json.loads((folder / "config.json").read_text()) | {"pad_token_id": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="rater"):
        tinyrun.work(config, tmp_path / "store")


def test_a_chat_model_orders_the_responses_and_is_asked_once_for_each(tmp_path, asking):
    """A continued step asks only for what failed; a text is rated once for each prompt."""
    config = tinyrun.config(tmp_path, pairing={"by": "openai:m"}, **ALL_PAIRS)

    def by_length(question):
        return Reply(json.dumps({"rating": 1 + min(9, len(question.first) % 10)}))

    with judge_server(failing(503, times=10**6)) as server:
        asking(server)
        with pytest.raises(SeraError, match="the rater openai:m answered none of"):
            tinyrun.work(config.model_copy(), tmp_path / "store")
        before = len(server.questions)
        server.mode = by_length
        records = tinyrun.work(config, tmp_path / "store")
        texts = [q.body["messages"][0]["content"] for q in server.questions[before:]]
    ratings, responses, samples = rated(records)
    assert len(texts) == len(set(texts))
    value = {row["response"]: 1 + min(9, len(row["response"]) % 10) for row in samples.values()}
    assert paired(responses, value.__getitem__) == best_and_worst(samples, value.__getitem__)
    assert ratings.record.metrics["rater/prompt_tokens"] == 100 * len(texts)
    assert records.rounds()[1].metrics["tokens"] < 10**6  # a rater's tokens are not the run's


def rated_rows(path):
    """Three answers to each train and held-out prompt, as people might rate them; two rated one twice."""
    rows = [
        {"prompt": pair["prompt"], "response": f"{text} {n}", "rating": rating, "rater": who}
        for n, pair in enumerate(tinyrun.pairs(32))
        for text, rating, who in (("poor", 1, "ada"), ("fine", 4.5, "bob"), ("good", 5, "ada"))
    ]
    rows.append(rows[0] | {"rating": 9, "rater": "eve"})  # the mean, 5, ties with the best
    rows.append({"prompt": "Never asked?", "response": "So.", "rating": 3})
    return tinyrun.write_rows(path, rows)


def test_rated_candidates_of_a_file_take_the_place_of_samples(tmp_path, sera):
    file = rated_rows(tmp_path / "rated.jsonl")
    config = tinyrun.config(tmp_path, pairing={"by": f"file:{file}"}, **ALL_PAIRS)
    records = tinyrun.work(config, tmp_path / "store")
    ratings, responses, samples = rated(records)
    assert ratings.record.step == "candidates" and ratings.record.fields["rater"]["rater"] == "file"
    pairs = list(schema.iter_rows(responses.path("pairs.parquet")))
    assert len(pairs) == ratings.record.counts["prompts"] == 24  # the train side
    first = tinyrun.pairs(1)[0]["prompt"][0]["content"]
    for row in pairs:
        chosen, rejected = (row[side][0]["content"].split()[0] for side in ("chosen", "rejected"))
        of_first = row["prompt"][0]["content"] == first
        assert (chosen, rejected) == (("poor", "fine") if of_first else ("good", "poor"))
    table = {
        (row["prompt_id"], row["sample"]): row for row in schema.iter_rows(ratings.path("ratings.parquet"))
    }
    assert table.keys() == samples.keys()
    twice = [row["rater"] for row in table.values() if row["rater"] == "ada, eve"]
    on_train = any(row["prompt"][0]["content"] == first for row in pairs)
    assert (
        len(twice) == on_train and ratings.record.counts["other_prompts"] == 9
    )  # eight held out, one unknown
    scored = schema.read_table(responses.path("scored.parquet"), schema.SCORED)
    assert np.isfinite(scored["policy_chosen_logps"].to_numpy()).all()
    again = tinyrun.work(config, tmp_path / "store", "again")
    assert again.rounds()[1].steps["samples"] == records.rounds()[1].steps["samples"]
    sera("verify", "tiny", "--store", tmp_path / "store")
    told = sera("lineage", "tiny", "--round", 1, "--store", tmp_path / "store", "--json").json["rounds"][-1]
    assert told["sampled_by"] is None and len(told["generated_pairs_scored_by"]) == 1


@pytest.mark.slow
@pytest.mark.flow
def test_candidates_of_sera_sample_are_read_by_their_prompt_ids(tmp_path, sera, prefect_server):
    """`sera sample` writes them, a column `rating` joins, and a run trains on them."""
    prompts = tinyrun.write_rows(
        tmp_path / "prompts.jsonl", [{"prompt": p["prompt"]} for p in tinyrun.pairs(32)]
    )
    tinyrun.settings(tmp_path)
    out = tmp_path / "candidates.parquet"
    sera(
        "sample",
        "--policy",
        tmp_path / "policy",
        "--prompts",
        prompts,
        "--n",
        3,
        "--max-tokens",
        8,
        "--out",
        out,
    )
    table = pd.read_parquet(out)
    table["rating"] = table["response"].str.len().astype(float)
    table.to_parquet(out)
    experiment = tinyrun.experiment(tmp_path, pairing={"by": "file:candidates.parquet"}, **ALL_PAIRS)
    name = sera("run", experiment, "--store", tmp_path / "store", "--json").json["run"]
    records = RunStore(open_store(str(tmp_path / "store")), name)
    _, responses, samples = rated(records)
    assert paired(responses, len) == best_and_worst(samples, len)
    sera("report", name, "--store", tmp_path / "store", "--out", tmp_path / "report")
    pages = [page.read_text() for page in (tmp_path / "report").glob("*.html")]
    assert any("of a file to" in page and "ordered by the rater file" in page for page in pages)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Why?", "response": "So.", "rating": "high"}, "line 1: rating is 'high'"),
        ({"prompt": "Why?", "response": "So.", "rating": True}, "line 1: rating is True"),
        ({"prompt": "Why?", "response": " ", "rating": 1}, "line 1: response has no text"),
        ({"response": "So.", "rating": 1}, "line 1"),
        ({"prompt": "Why?", "response": "So.", "rating": 1, "rater": 3}, "rater is no text"),
        ({"prompt": "Why?", "response": "So.", "rating": None}, "no row has a rating"),
    ],
)
def test_a_malformed_file_of_candidates_is_refused_before_any_work(tmp_path, sera, row, said):
    file = tinyrun.write_rows(tmp_path / "rated.jsonl", [row])
    experiment = tinyrun.experiment(tmp_path, pairing={"by": f"file:{file}"})
    found = sera("run", experiment, "--store", tmp_path / "store", code=2)
    assert said in found.err and not (tmp_path / "store" / "runs").exists()


def test_a_file_of_candidates_that_changed_after_the_start_is_refused(tmp_path):
    file = rated_rows(tmp_path / "rated.jsonl")
    config = tinyrun.config(tmp_path, pairing={"by": f"file:{file}"}, **ALL_PAIRS)
    records = tinyrun.work(config, tmp_path / "store")
    made = records.rounds()[0].steps
    before = {"rater": "file", "sha256": "0" * 64}
    spec = steps.candidates(config, made["pairs"], made["model"], before)
    with pytest.raises(InputError, match=r"rated\.jsonl changed during the run"):
        run_step(records.store, spec, load_candidates, config.execution)


def test_candidates_to_other_prompts_are_refused(tmp_path):
    rows = [{"prompt": "Why?", "response": text, "rating": n} for n, text in enumerate("ab")]
    file = tinyrun.write_rows(tmp_path / "rated.jsonl", rows)
    config = tinyrun.config(tmp_path, pairing={"by": f"file:{file}"}, **ALL_PAIRS)
    with pytest.raises(InputError, match="none of its 1 prompts is a train prompt"):
        tinyrun.work(config, tmp_path / "store")


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ("implict", "did you mean implicit?"),
        ("rewards:folder", "did you mean reward:<folder>?"),
        ("reward:", "did you mean reward:<folder>?"),
        ("openai", "did you mean openai:<model>?"),
        ("file:", "did you mean file:<path>?"),
        ("judge", "choose one of implicit, word-count"),
        ("no_module:f", "SERA_EXTENSIONS=no_module"),
        ("reward:https://user:secret@host/x", "credentials"),
    ],
)
def test_a_rater_that_cannot_be_is_refused(tmp_path, by, said):
    settings = tinyrun.settings(tmp_path, pairing={"by": by})
    with pytest.raises(ValueError, match=said.replace("?", r"\?")) as refused:
        SeraConfig.model_validate(settings)
    assert "secret" not in str(refused.value)


def test_a_rater_that_is_not_there_is_refused_before_the_work(tmp_path, sera, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for by, said in (
        (f"reward:{tmp_path}/none", "no folder with a config.json"),
        ("openai:m", "needs a key"),
    ):
        experiment = tinyrun.experiment(tmp_path, pairing={"by": by})
        found = sera("run", experiment, "--store", tmp_path / "store", code=2)
        assert said in found.err
    assert tomllib.loads(experiment.read_text())["pairing"]["by"] == "openai:m"
    assert not list((tmp_path / "store").glob("steps/*")) if (tmp_path / "store").exists() else True
