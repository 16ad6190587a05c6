"""The decide step: what counts as evidence."""

import tinyrun
from golden.table import numbers_from_hashes

from sera_core.artifacts.manifest import Artifact


def test_held_out_pairs_of_one_prompt_count_as_one(tmp_path):
    asked = [{"role": "user", "content": f"Question {n}?"} for n in range(2)]
    heldout = [pair | {"prompt": [asked[n % 2]]} for n, pair in enumerate(tinyrun.pairs(12, seed=7))]
    path = tinyrun.write_rows(tmp_path / "heldout.jsonl", heldout)
    for least, refused in ((3, True), (2, False)):
        config = tinyrun.config(
            tmp_path,
            data={"heldout": [{"path": str(path)}], "on_overlap": "drop"},
            decide={"min_pairs": least},
            limits={"rounds": 2},
        )
        with numbers_from_hashes():
            records = tinyrun.work(config, tmp_path / f"store-{least}")
        decided = (
            Artifact(records.store, records.rounds()[1].steps["decision"]).path("decision.json").read_text()
        )
        assert ("held-out pairs of 2 prompts, fewer than decide.min_pairs = 3" in decided) is refused
        assert ('"not_enough_evidence"' in decided) >= refused
