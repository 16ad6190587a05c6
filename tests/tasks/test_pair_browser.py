"""The page with all pairs of a round: none lost, each with its own texts, and what a script may do there."""

import base64
import hashlib
import json
import re

import pytest
import tinyrun

from flows.display.run_report import write_run_report
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.guards.shown import shown
from sera_core.reporting import pair_browser
from sera_core.reporting.examples import said

COLUMNS = ("id", "origin", "stage", "reason", "kept", "margin", "chosen", "rejected", "prompt", "shard")


def call(path):
    """The arguments of the one call that a file makes."""
    name, arguments = re.fullmatch(r"(\w+)\((.*)\);\n", path.read_text("ascii"), re.DOTALL).groups()
    return name, json.loads(f"[{arguments}]")


def browser(folder):
    """The list's rows, and the texts of each pair that has some."""
    name, (columns, size, _) = call(folder / "rows.js")
    assert name == "seraRows" and size == pair_browser.SHARD_PAIRS
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*columns, strict=True)]
    shards = {}
    for path in sorted(folder.glob("texts-*.js")):
        name, (shard, texts) = call(path)
        assert name == "seraTexts" and path.name == f"texts-{shard:05d}.js"
        shards[shard] = texts
    return rows, {
        row["id"]: shards[row["shard"]][at % size] for at, row in enumerate(rows) if row["shard"] >= 0
    }


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browsed")
    rows = tinyrun.pairs(32)
    tinyrun.write_rows(folder / "pairs.jsonl", [*rows, *rows[:6]])  # six repeated rows
    return tinyrun.work(tinyrun.config(folder, data={"train_pairs": 20}), folder / "store")


@pytest.fixture(scope="module")
def report(records, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pair_browser, "SHARD_PAIRS", 7)
        write_run_report(records.store.url, records.run, out)
        yield out


@pytest.mark.parametrize("number", [0, 1, 2])
def test_every_pair_of_the_ledger_is_listed_once_with_its_own_texts(records, report, number):
    steps = records.rounds()[number].steps
    rows, texts = browser(report / f"round-{number:03d}")
    found = list(schema.iter_rows(Artifact(records.store, steps["mixture"]).path("ledger.parquet")))
    repeated = {row["pair_id"] for row in found if row["reason"] == "duplicate"}
    ledger = {row["pair_id"]: row for row in reversed(found) if row["pair_id"]}  # the first row of an id
    trained = {
        row["pair_id"]
        for row in schema.iter_rows(Artifact(records.store, steps["mixture"]).path("mixture.parquet"))
    }
    assert repeated & trained and trained == {row["id"] for row in rows if row["kept"]}
    assert sorted(row["id"] for row in rows) == sorted(ledger)
    assert {row["reason"] for row in rows} >= {"kept", "over_limit"}
    pairs = list(schema.iter_rows(Artifact(records.store, steps["pairs"]).path("train.parquet")))
    if "responses" in steps:
        pairs += schema.iter_rows(Artifact(records.store, steps["responses"]).path("pairs.parquet"))
    held = {pair["pair_id"]: pair for pair in pairs}
    assert set(texts) == set(held) & set(ledger) and len(texts) > 7
    for row in rows:
        source = ledger[row["id"]]
        assert (row["origin"], row["stage"], row["kept"]) == (
            source["origin"],
            source["stage"],
            source["kept"],
        )
        assert row["margin"] == source["ensemble_margin"]
        if row["id"] in texts:
            pair = held[row["id"]]
            assert texts[row["id"]][1:] == [shown(said(pair[side][0])) for side in ("chosen", "rejected")]
            assert texts[row["id"]][0] == f"user: {pair['prompt'][0]['content']}"
            assert row["prompt"] == pair["prompt"][0]["content"][:80]
            assert [row["chosen"], row["rejected"]] == [len(pair["chosen_ids"]), len(pair["rejected_ids"])]


class Relabelled:
    """A round of one relabelled pair."""

    def rows(self, role, file, columns):
        found = {"pair_id": "one", "origin": "human", "stage": "mix", "reason": "relabelled", "kept": True}
        if role == "mixture":
            yield found | {"ensemble_margin": -1.5}
        elif role == "scored":
            yield {"pair_id": "one", "chosen_tokens": 3, "rejected_tokens": 5}
        elif role == "pairs":
            turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why\x1b?"}]
            sides = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
            yield {"pair_id": "one", "prompt": turns, **sides}


def test_a_relabelled_pair_is_shown_as_it_was_trained_on(tmp_path):
    pair_browser.write_pair_browser(Relabelled(), 1, tmp_path)
    (row,), texts = browser(tmp_path)
    assert (row["margin"], row["chosen"], row["rejected"], row["prompt"]) == (1.5, 5, 3, "Why\\x1b?")
    assert texts["one"] == ["system: Be brief.\n\nuser: Why\\x1b?", "rejected", "chosen"]


def test_a_report_that_was_interrupted_is_written_again(records, tmp_path):
    (tmp_path / "round-000").mkdir()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pair_browser, "_write_script", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_run_report(records.store.url, records.run, tmp_path)
    write_run_report(records.store.url, records.run, tmp_path)
    assert (tmp_path / "round-000/rows.js").exists()


def _interrupt(*_):
    raise KeyboardInterrupt


def test_a_smaller_report_leaves_no_texts_of_a_larger_one(records, report, tmp_path):
    write_run_report(records.store.url, records.run, tmp_path)
    before = len(list((tmp_path / "round-001").glob("texts-*.js")))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pair_browser, "SHARD_PAIRS", 1000)
        write_run_report(records.store.url, records.run, tmp_path)
    assert before > 1 and [p.name for p in (tmp_path / "round-001").glob("texts-*")] == ["texts-00000.js"]


def test_only_the_pages_own_script_and_files_beside_it_may_run(report):
    page = (report / "round-001/pairs.html").read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'") and f"'sha256-{digest}'" in policy
    assert "'unsafe-inline'" not in policy.partition("script-src")[2]
    assert "innerHTML" not in script and re.findall(r'(?:src|href)="([^"]*)"', page) == [
        "../index.html",
        "../round-001.html",
        "rows.js",
    ]
