"""`evaluate.harness`: scores on tasks of lm-evaluation-harness; a round that lost a capability is held."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import tinyrun
import yaml

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.data.harness_tasks import read_tasks
from sera_core.errors import InputError, SeraError
from sera_core.method.capabilities import capability_changes, lost
from sera_core.models.logprobs import plain_sequence_logps
from sera_core.models.policies import load_policy, load_tokenizer
from tasks.engines import harness

HARNESS = Path(__file__).parents[1] / "fixtures" / "harness"


@pytest.fixture
def sums(tmp_path) -> Path:
    """A task of 25 sums with two choices each; the file can be changed."""
    shutil.copytree(HARNESS, tmp_path / "harness")
    return tmp_path / "harness" / "sums.yaml"


def rewrite(file: Path, **settings) -> Path:
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **settings}))
    return file


def items_of(task: Path) -> list[dict]:
    return [json.loads(line) for line in (task.parent / "sums.jsonl").read_text().splitlines()]


def scores(records, number: int, role: str = "capabilities") -> list[float]:
    path = Artifact(records.store, records.rounds()[number].steps[role]).path("harness.parquet")
    return [row["score"] for row in schema.iter_rows(path)]


def chosen(policy: Path, items: list[dict]) -> list[int]:
    """The choice with the largest log-probability after the question, by the plain scorer."""
    model, tokenizer = load_policy(policy, "float32", "cpu"), load_tokenizer(policy)
    found = []
    for item in items:
        question = tokenizer(item["question"])["input_ids"]
        texts = [tokenizer(f"{item['question']} {choice}")["input_ids"] for choice in item["choices"]]
        pairs = [(ids[: len(question)], ids[len(question) :]) for ids in texts]
        found.append(int(np.argmax(plain_sequence_logps(model, pairs))))
    return found


def test_scores_are_those_of_the_plain_scorer(tmp_path, sera, sums):
    config = tinyrun.config(tmp_path, evaluate={"harness": [str(sums)]}, limits={"rounds": 2})
    records = tinyrun.work(config, tmp_path / "store")
    items = items_of(sums)
    known = zip(chosen(tmp_path / "policy", items), items, strict=True)
    expected = [float(choice == item["answer"]) for choice, item in known]
    assert scores(records, 1, "start_capabilities") == expected and len(set(expected)) == 2
    metrics = records.rounds()[1].metrics
    assert metrics["harness/sums"]["value"] == pytest.approx(np.mean(scores(records, 1)), abs=1e-6)
    sera("verify", "tiny", "--store", tmp_path / "store")
    page = Artifact(records.store, records.rounds()[1].steps["report"]).path("report.html").read_text()
    assert "score on sums, less the start policy" in page


def test_a_round_that_lost_a_capability_is_held(tmp_path, sums):
    """The right answers are the start policy's own, so that it knows them all."""
    tiny.tiny_policy(tmp_path / "policy")
    items = items_of(sums)
    known = zip(chosen(tmp_path / "policy", items), items, strict=True)
    tinyrun.write_rows(sums.parent / "sums.jsonl", [item | {"answer": own} for own, item in known])
    config = tinyrun.config(
        tmp_path,
        evaluate={"harness": [str(sums)]},
        train={"learning_rate": 0.3, "batch": 8},
        limits={"rounds": 2},
    )
    records = tinyrun.work(config, tmp_path / "store")
    assert np.mean(scores(records, 1, "start_capabilities")) == 1 > np.mean(scores(records, 1)) + 0.1
    assert [m.decision for m in records.rounds()] == ["promote", "hold"]
    assert "lost capabilities against the start policy: sums by -" in records.rounds()[1].reason
    path = Artifact(records.store, records.rounds()[1].steps["decision"]).path("decision.json")
    change = json.loads(path.read_text())["capabilities"]["sums"]
    assert change["value"] == pytest.approx(np.mean(scores(records, 1)) - 1) and change["high"] < 0


def test_a_task_that_changed_is_refused(tmp_path, sums):
    config = tinyrun.config(tmp_path, evaluate={"harness": [str(sums)]}, limits={"rounds": 1})
    tinyrun.work(config, tmp_path / "store")
    tinyrun.write_rows(sums.parent / "sums.jsonl", items_of(sums)[:-1])
    again = tinyrun.config(tmp_path, evaluate={"harness": [str(sums)]}, limits={"rounds": 2})
    with pytest.raises((InputError, SeraError), match="harness"):
        tinyrun.work(again, tmp_path / "store")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"doc_to_text": None}, "doc_to_text is missing"),
        ({"test_split": None}, "names no test_split"),
        ({"dataset_path": "allenai/ai2_arc"}, "its data must lie beside it"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "'gone.jsonl' does not lie beside it"),
        ({"dataset_kwargs": {"data_files": {"test": "http://a/b"}}}, "'http://a/b' does not lie beside it"),
        ({"include": "other.yaml"}, "`include` and `group` are not followed"),
        ({"task": "../sums"}, "give it a name of letters"),
        ({"metric_list": [{"metric": "rouge"}]}, "metric_list has {'metric': 'rouge'}"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "'hf_evaluate': True"),
        ({"metric_list": ["acc"]}, "(metric: acc)"),
    ],
)
def test_a_task_that_cannot_be_used_is_refused_before_a_model_is_loaded(tmp_path, sums, settings, message):
    rewrite(sums, **settings)
    config = tinyrun.config(tmp_path, evaluate={"harness": [str(sums)]})
    with pytest.raises(InputError) as refused:
        tinyrun.work(config, tmp_path / "store")
    assert message in str(refused.value) and not (tmp_path / "store" / "steps").exists()


def test_code_and_damage_in_a_task_are_refused(sums, tmp_path):
    sums.write_text(sums.read_text() + "process_docs: !function utils.run\n")
    with pytest.raises(InputError, match="a task that runs code"):
        read_tasks([str(sums)])
    sums.write_text("task: [")
    with pytest.raises(InputError, match="is not YAML"):
        read_tasks([str(sums)])
    with pytest.raises(InputError, match="is no file"):
        read_tasks([str(tmp_path / "gone.yaml")])
    twice = [shutil.copy(HARNESS / "sums.yaml", sums.parent / name) for name in ("a.yaml", "b.yaml")]
    with pytest.raises(InputError, match="two tasks are called 'sums'"):
        read_tasks([str(path) for path in twice])


def test_a_template_that_fails_or_leaves_the_sandbox_names_the_task(tmp_path, sums):
    policy = tiny.tiny_policy(tmp_path / "policy")
    given = load_policy(policy, "float32", "cpu"), load_tokenizer(policy)
    ran = tmp_path / "ran"
    escape = "{{ cycler.__init__.__globals__.os.mkdir('" + str(ran) + "') }}"
    for template, message in (("{{gone.gone}}", "is undefined"), (escape, "unsafe")):
        tasks = read_tasks([str(rewrite(sums, doc_to_text=template))])
        with pytest.raises(InputError, match=f"the task sums cannot be run: .*{message}"):
            harness.harness_scores(*given, tasks, 2, tmp_path / "scratch")
    assert not ran.exists()


def test_the_missing_extra_is_named(tmp_path, sums, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"sera-flow\[harness\]"):
        tinyrun.work(tinyrun.config(tmp_path, evaluate={"harness": [str(sums)]}), tmp_path / "store")


def test_changes_are_paired_means_and_only_sure_large_ones_count():
    rng = np.random.default_rng(0)
    start = {"a": (rng.random(400) < 0.7).astype(float), "b": np.ones(300)}
    now = {"a": start["a"].copy(), "b": np.where(np.arange(300) < 30, 0.0, 1.0)}
    found = capability_changes(now, start, seed=0)
    assert found["a"].value == 0 and found["b"].value == pytest.approx(-0.1)
    assert found["b"].low < -0.1 < found["b"].high < 0 and found["b"].pairs == 300
    assert lost(found, 0.02).endswith(f"b by {found['b'].in_words(signed=True, of='items')}")
    assert lost(found, 0.2) == "" == lost(capability_changes(start, start, seed=0), 0.02)
    with pytest.raises(ValueError, match="are not the start policy's"):
        capability_changes({"a": now["a"]}, start, seed=0)
