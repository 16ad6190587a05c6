"""Reasoning apart from the content (reasoning_content) goes through a whole run and stays in its files."""

import tiny
import tinyrun

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.store import open_store

READS = tiny.CHATML.replace(
    "message['content']",
    "('<think>' + message.reasoning_content + '</think>' if message.reasoning_content else '')"
    " + message['content']",
)


def test_a_run_learns_from_pairs_that_differ_only_in_their_reasoning(tmp_path):
    tiny.tiny_policy(tmp_path / "policy", template=READS)
    rows = tinyrun.pairs(32)
    for row in rows:
        better, worse = row["chosen"][0], row["rejected"][0]
        better["reasoning_content"], worse["reasoning_content"] = "a b", worse["content"]
        worse["content"] = better["content"]
    tinyrun.write_rows(tmp_path / "pairs.jsonl", rows)
    records = tinyrun.work(tinyrun.config(tmp_path), tmp_path / "store")
    store = open_store(str(tmp_path / "store"))
    for manifest in records.history().rounds:
        mixture = Artifact(store, manifest.steps["mixture"]).path("mixture.parquet")
        found = schema.read_table(mixture, schema.MIXTURE).to_pylist()
        human = [row for row in found if row["origin"] == "human"]
        assert human and all(row["chosen"][0]["reasoning_content"] == "a b" for row in human)
        generated = [row for row in found if row["origin"] == "generated"]
        assert all(row["chosen"][0]["reasoning_content"] is None for row in generated)
    assert generated
