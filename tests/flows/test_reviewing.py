"""What a person may answer: nothing that leaves a run without a policy to go on from."""

import pytest
import tinyrun

from flows.orchestration.reviews import FirstReview, Review
from sera_core.artifacts.canonical import sha256_json
from sera_core.artifacts.records import FORMAT
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import create_json, open_store
from sera_core.config import SeraConfig
from sera_core.errors import InputError

EVIDENCE = {"decision": "promote", "reason": "the first round", "verdict": "improving", "alarm": None}


@pytest.fixture
def records(tmp_path):
    """A run of which nothing is finished, as if round 0 were in work."""
    config = tinyrun.config(tmp_path, decide={"review": "always"})
    records = RunStore(open_store(str(tmp_path / "store")), "asked")
    records.open(config, {"seed": 0})
    return records


@pytest.mark.parametrize("decision", ["hold", "roll_back"])
def test_without_a_head_the_record_refuses_an_answer_that_leaves_none(records, decision):
    records.ask(0, EVIDENCE, 24.0, "promote")
    with pytest.raises(
        InputError, match=f"'{decision}' is not allowed.*without a head; answer promote or stop"
    ):
        records.answer(0, decision, "", "ada")
    assert records.given_answer(0) is None and records.state() == "waiting"
    assert records.answer(0, "stop", "enough", "ada")["decision"] == "stop"


def test_without_a_head_a_default_that_leaves_none_is_not_recorded(records):
    with pytest.raises(InputError, match="without a head"):
        records.ask(0, EVIDENCE, 24.0, "hold")
    assert records.question(0) is None


def test_the_default_of_an_older_question_promotes_where_it_would_leave_no_head(records):
    asked = {
        "format": FORMAT,
        "round": 0,
        "evidence": EVIDENCE,
        "until": "2020-01-01T00:00:00+00:00",
        "default": "hold",
    }
    create_json(records.store, "runs/asked/review-000.json", asked)
    answer = records.answer_of(0)
    assert answer is not None and answer["decision"] == "promote"
    assert "the default hold would leave the run without a head" in answer["note"]


def test_the_first_form_offers_promote_and_stop_only():
    first, later = (form.model_json_schema()["properties"]["decision"] for form in (FirstReview, Review))
    assert first["enum"] == ["promote", "stop"]
    assert set(later["enum"]) == {"promote", "hold", "roll_back", "stop"}


@pytest.mark.parametrize("default", ["hold", "roll_back"])
def test_a_default_that_cannot_answer_for_round_0_is_refused_where_it_is_asked_about(tmp_path, sera, default):
    experiment = tinyrun.experiment(tmp_path, decide={"review": "always", "review_default": default})
    assert (
        f'decide.review_default = "{default}" cannot answer for round 0'
        in sera("run", experiment, "--store", tmp_path / "store", code=2).err
    )
    assert not (tmp_path / "store").exists()
    # An alarm is never raised in round 0, so there it can stand.
    tinyrun.config(tmp_path, decide={"review": "alarm", "review_default": default})


def test_a_stored_run_with_such_a_default_can_still_be_read(tmp_path):
    settings = tinyrun.config(tmp_path).model_dump(mode="json")
    settings["decide"] |= {"review": "always", "review_default": "hold"}
    store = open_store(str(tmp_path / "store"))
    record = {"format": FORMAT, "run": "old", "config": settings, "config_sha256": sha256_json({}),
              "resolved": {}, "created": "2026-01-01T00:00:00+00:00"}  # fmt: skip
    create_json(store, "runs/old/run-000.json", record)
    assert RunStore(store, "old").state() == "open"
    assert SeraConfig.stored(settings).decide.review_default == "hold"
