"""`decide.metric = "win-rate"`: rounds are promoted, held and stopped by an independent judge's verdicts."""

import importlib
import json

import numpy as np
import pytest
import tinyrun
from judgeserver import Reply, judge_server, verdict

from flows.display.run_report import write_run_report
from flows.evaluation import CALIBRATED, calibration_of
from flows.planning.plan import plan
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.config import SeraConfig
from sera_core.errors import InputError, SeraError
from sera_core.judges import chat
from sera_core.judges.named import Asking, find_judge
from sera_core.method.features import words

JUDGE = '''
START = set()

def by_label(prompt, first, second):
    """Agrees with every label: rejected answers begin with "not"."""
    bad = [text.startswith("not") for text in (first, second)]
    return "tie" if bad[0] == bad[1] else "B" if bad[0] else "A"

def by_start(prompt, first, second):
    """Prefers the start policy's answers as soon as it knows them, and others before."""
    if not START:
        return "tie"
    return "A" if first in START else "B"
'''
PROMPTS = {"evaluate": {"prompts": 12, "responses": 2, "max_tokens": 8, "resamples": 200}}
SIDES = {"heldout_fraction": 0.5}


@pytest.fixture
def judges(tmp_path, monkeypatch):
    """A module with judges of the user's own."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "my_judges.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setenv("SERA_EXTENSIONS", "my_judges")
    importlib.invalidate_caches()
    module = importlib.import_module("my_judges")
    yield importlib.reload(module)
    module.START.clear()


def by_win_rate(tmp_path, judge: str, uncalibrated: str = "allow", rounds: int = 2, **sections) -> SeraConfig:
    decide = {"min_pairs": 4, "metric": "win-rate", "judge": judge, "uncalibrated": uncalibrated}
    given = {"decide": decide, "limits": {"rounds": rounds}, **PROMPTS, **sections}
    return tinyrun.config(tmp_path, **given, data={**tinyrun.settings(tmp_path)["data"], **SIDES})


def outcomes(records: RunStore, number: int) -> dict[tuple[str, int], float]:
    """Each answer of a round: 1 where it has more words than the start policy's, computed from the texts."""
    verdicts = Artifact(records.store, records.rounds()[number].steps["verdicts"]).record.inputs
    texts = []
    for name in ("samples", "against"):
        path = Artifact(records.store, verdicts[name]).path("responses.parquet")
        texts.append({(r["prompt_id"], r["sample"]): r["response"] for r in schema.iter_rows(path)})
    new, old = ({key: words("", text) for key, text in side.items()} for side in texts)
    return {key: 0.5 + 0.5 * np.sign(new[key] - old[key]) for key in new.keys() & old.keys()}


def decision(records: RunStore, number: int) -> dict:
    path = Artifact(records.store, records.rounds()[number].steps["decision"]).path("decision.json")
    return json.loads(path.read_text())


def test_rounds_are_compared_by_their_win_rate_over_the_start_policy(tmp_path, sera):
    records = tinyrun.work(by_win_rate(tmp_path, "word-count"), tmp_path / "store")
    before, now = outcomes(records, 0), outcomes(records, 1)
    assert len(now) == 24 and len(set(now.values())) > 1
    told = decision(records, 1)
    assert told["metric"] == "win-rate" and told["quantity"] == "win_rate"
    assert told["score"]["value"] == pytest.approx(np.mean(list(now.values())))
    changes = [now[key] - before[key] for key in now]
    assert told["against"]["0"]["value"] == pytest.approx(np.mean(changes))
    assert told["score"]["prompts"] == 12 and told["pairs"] == {"compared": 24, "left_out": 0}
    assert "win rate over the start policy" in records.rounds()[1].reason
    assert told["judge"]["judge"] == "word-count" and told["judge"]["calibration"]["calibrated"] is False
    sera("verify", "tiny", "--store", tmp_path / "store")
    shown, _ = sera("show", "tiny", "--store", tmp_path / "store")
    assert "win rate over the start policy" in shown and "on 24 held-out answers" in shown
    page = Artifact(records.store, records.rounds()[1].steps["report"]).path("report.html").read_text()
    assert "agreement of the judge word-count with the labels (uncalibrated)" in page
    write_run_report(records.store.url, "tiny", tmp_path / "site")
    assert "Win rate of the policy" in (tmp_path / "site" / "index.html").read_text()


def test_a_round_whose_answers_lose_is_held(tmp_path, judges):
    """Round 0 ties; then the judge prefers the start policy's answers, whichever place they stand in."""
    records = tinyrun.work(by_win_rate(tmp_path, "my_judges:by_start", rounds=1), tmp_path / "store")
    inputs = Artifact(records.store, records.rounds()[0].steps["verdicts"]).record.inputs
    path = Artifact(records.store, inputs["against"]).path("responses.parquet")
    judges.START.update(row["response"] for row in schema.iter_rows(path))
    records = tinyrun.work(by_win_rate(tmp_path, "my_judges:by_start", rounds=3), tmp_path / "store")
    assert [m.decision for m in records.rounds()[:2]] == ["promote", "hold"]
    assert "degrading" in decision(records, 1)["verdict"]["name"]
    assert records.history().best.round == 0


def test_a_judge_no_better_than_a_word_count_decides_nothing(tmp_path, judges):
    config = by_win_rate(tmp_path, "constant", "refuse")
    with pytest.raises(InputError, match=r"the judge constant agrees .* 0\.500 .* a word count in 0\.") as no:
        tinyrun.work(config, tmp_path / "store")
    assert 'decide.uncalibrated = "allow"' in str(no.value)
    assert not list(tmp_path.glob("store/steps/train/*"))
    asked = list(tmp_path.glob("store/steps/calibrate/*/*/verdicts.parquet"))
    assert len(asked) == 1
    tinyrun.work(by_win_rate(tmp_path, "constant", "allow", rounds=1), tmp_path / "store", "allowed")
    assert asked == list(tmp_path.glob("store/steps/calibrate/*/*/verdicts.parquet"))


def test_a_calibrated_judge_decides(tmp_path, judges):
    config = by_win_rate(tmp_path, "my_judges:by_label", "refuse", rounds=1)
    records = tinyrun.work(config, tmp_path / "store")
    named = find_judge("my_judges:by_label", Asking())
    assert calibration_of(records.store, named)["status"] == CALIBRATED  # as `sera evaluate` shows it
    planned = plan(config, "again", str(tmp_path / "store"))
    assert {row["status"] for row in planned["steps"]} == {"reuse"}
    calibration = decision(records, 0)["judge"]["calibration"]
    assert calibration["calibrated"] and calibration["agreement"]["value"] == 1


def test_a_judge_that_changed_is_refused(tmp_path, judges):
    config = by_win_rate(tmp_path, "my_judges:by_label", rounds=1)
    tinyrun.work(config, tmp_path / "store")
    path = tmp_path / "modules" / "my_judges.py"
    path.write_text(path.read_text() + "\n")
    again = by_win_rate(tmp_path, "my_judges:by_label", rounds=2)
    with pytest.raises((InputError, SeraError), match="judge"):
        tinyrun.work(again, tmp_path / "store")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"decide": {"metric": "win-rate"}}, 'decide.metric = "win-rate" needs a judge'),
        ({"decide": {"judge": "word-count"}}, 'only with decide.metric = "win-rate"'),
        ({"decide": {"uncalibrated": "allow"}}, 'only with decide.metric = "win-rate"'),
        ({"decide": {"metric": "win-rate", "judge": "openia:gpt"}}, "did you mean openai:<model>"),
        ({"decide": {"metric": "win-rate", "judge": "implicit"}}, "the judge 'implicit' is unknown"),
        (
            {"decide": {"metric": "win-rate", "judge": "word-count"}, "evaluate": {"prompts": 0}},
            "evaluate.prompts = 0 samples none",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, sections, message):
    with pytest.raises((InputError, ValueError)) as refused:
        SeraConfig.model_validate({**tinyrun.settings(tmp_path), **sections})
    assert message in str(refused.value)


def test_a_run_is_opened_again_by_what_its_judge_is(tmp_path):
    """The judge's name is a path for some judges; what it is, not where it lies, makes the configuration."""
    records = tinyrun.work(by_win_rate(tmp_path, "word-count", rounds=1), tmp_path / "store")
    resolved = records.configs()[-1].resolved
    assert resolved["digests"]["judge"] == {"judge": "word-count"} and "judge" not in resolved["decide"]
    assert RunStore(open_store(str(tmp_path / "store")), "tiny").state() == "max_rounds"


def test_what_a_chat_judge_fails_on_is_left_out_and_its_tokens_are_not_the_run_s(tmp_path, monkeypatch):
    """It answers nonsense about prompt pairs of some answers, in every round the same."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(chat, "FIRST_WAIT", 0.01)

    def mode(question):
        if len(question.first + question.second) % 4 == 0:
            return Reply("I would rather not say.")
        return verdict("A" if question.first > question.second else "B")

    with judge_server(mode) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        records = tinyrun.work(by_win_rate(tmp_path, "openai:m"), tmp_path / "store")
        asked = len(server.questions)
    told = decision(records, 1)
    answered = [answered_in(records, number) for number in (0, 1)]
    both = len(answered[0] & answered[1])
    assert 0 < both < 24
    assert told["pairs"] == {"compared": both, "left_out": 24 - both}
    assert asked > 0 and all("tokens/judge" not in name for m in records.rounds() for name in m.metrics)
    verdicts = Artifact(records.store, records.rounds()[1].steps["verdicts"]).record
    assert verdicts.metrics["judge/prompt_tokens"] > 0 and records.rounds()[1].metrics["tokens"] < 10**5


def answered_in(records: RunStore, number: int) -> set[tuple[str, int]]:
    """Answers of a round with a verdict in both orders."""
    path = Artifact(records.store, records.rounds()[number].steps["verdicts"]).path("verdicts.parquet")
    rows = list(schema.iter_rows(path))
    failed = {(row["prompt_id"], row["sample"]) for row in rows if row["failure"]}
    return {(row["prompt_id"], row["sample"]) for row in rows} - failed
