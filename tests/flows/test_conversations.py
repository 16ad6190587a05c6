"""A file of longer conversations with every degenerate row: it runs, and every row is accounted for."""

import json

import pytest
import tinyrun

import sera_core
from flows.cli import main
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store

pytestmark = pytest.mark.flow


def turns(*contents: str) -> list[dict]:
    roles = ["user", "assistant"] * 3
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]


def conversations() -> list[dict]:
    """Three-turn conversations with a system message, and rows that must be dropped."""
    rows = []
    for n, row in enumerate(tinyrun.pairs(24)):
        system = [{"role": "system", "content": "Answer."}]
        prompt = system + turns(f"Question {n}", "yes", "and then", "no", row["prompt"][0]["content"])
        rows.append({**row, "prompt": prompt})
    rows.append(rows[0])  # duplicate
    rows.append({**rows[1], "rejected": rows[1]["chosen"]})  # equal
    rows.append({**rows[2], "chosen": turns("", " ".join(tinyrun.WORDS * 12))[1:]})  # too long
    rows.append({**rows[3], "prompt": turns(" ".join(tinyrun.WORDS * 20))})  # prompt too long
    rows.append({**rows[4], "chosen": rows[4]["rejected"], "rejected": rows[4]["chosen"]})  # the other label
    return rows


@pytest.fixture(scope="module")
def records(prefect_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("turns")
    tinyrun.write_rows(folder / "pairs.jsonl", conversations())
    data = {"max_prompt_tokens": 200, "max_response_tokens": 60}
    experiment = tinyrun.experiment(folder, data=data, limits={"rounds": 2})
    assert main(["run", str(experiment), "--store", str(folder / "store")]) == 0
    return RunStore(open_store(str(folder / "store")), "tiny")


def test_the_rows_read_are_the_rows_kept_and_dropped_by_reason(records):
    round0 = records.rounds()[0]
    data = Artifact(records.store, round0.steps["data"]).record.counts
    assert data["read"] == 29 and data["equal"] == 1 and data["duplicate"] == 1
    sides = ("train", "heldout", "test", "prompts")
    assert data["read"] == sum(count for name, count in data.items() if name != "read")
    rendered = Artifact(records.store, round0.steps["pairs"]).record
    assert rendered.counts["too_long"] + rendered.counts["prompt_too_long"] == 2
    assert sum(rendered.counts.get(side, 0) for side in sides) + 2 == sum(data.get(side, 0) for side in sides)


def test_each_step_of_a_round_keeps_or_names_what_it_was_given(records):
    run = sera_core.open_run(records.store.url, "tiny")
    manifest = records.rounds()[1]
    rows = {name: file.rows for name, file in _record(records, manifest, "pairs").files.items()}
    assert len(run[1].scored()) == rows["train.parquet"]
    selected = _record(records, manifest, "human").counts
    assert sum(selected.values()) == rows["train.parquet"]
    paired = _record(records, manifest, "responses").counts
    by_reason = sum(count for name, count in paired.items() if name.startswith("prompts/"))
    assert by_reason == paired["prompts"] == 10
    generated = _record(records, manifest, "generated").counts
    assert sum(generated.values()) == paired["pairs"]
    ledger = run[1].ledger()
    train = ledger[(ledger["origin"] == "human") & ~ledger["stage"].str.endswith(("heldout", "test"))]
    heldout = rows["heldout.parquet"] + ledger["stage"].str.endswith("heldout").sum()
    assert len(train) + heldout == 29
    assert int(ledger["kept"].sum()) == len(run[1].pairs())
    assert manifest.metrics["pairs"] == len(run[1].pairs())  # every pair was trained on once


def test_the_prompt_is_every_message_before_the_last_turn(records):
    run = sera_core.open_run(records.store.url, "tiny")
    prompt = json.loads(json.dumps(run[0].pairs()["prompt"].map(list)[0], default=dict))
    assert [m["role"] for m in prompt] == ["system", "user", "assistant", "user", "assistant", "user"]


def _record(records, manifest, role):
    return Artifact(records.store, manifest.steps[role]).record
