"""`start.sft`: a run whose start policy is the fine-tuned model, and what every command says about it."""

import json
from pathlib import Path

import pytest
import tiny
import tinyrun
from pydantic import ValidationError

from flows.commands.summary import closing_lines
from flows.display.run_report import write_run_report
from flows.display.run_view import show
from flows.experiments import load_experiment
from flows.exports.lineage import lineage
from flows.exports.model_card import model_card
from flows.orchestration.form import config_from_form
from flows.planning.plan import plan
from flows.running.open_run import resolved, source_digests
from flows.store_tools.verify import verify
from sera_core import steps
from sera_core.artifacts.manifest import Artifact, StepRef
from sera_core.artifacts.runs import RunStore
from sera_core.config import SeraConfig
from sera_core.errors import InputError, StoreError
from sera_core.models.policies import weights_digest

SMALL = {
    "mix": {"shares": [0.0]},
    "evaluate": {"prompts": 0},
    "limits": {"rounds": 1},
}
REF = StepRef(step="model", key="a", digest="b")


def chats(folder: Path) -> Path:
    """Conversations of a few words, the last without an answer."""
    rows = [
        {"prompt": f"Tell {n}: {word}", "completion": f"the {word}"} for n, word in enumerate(tinyrun.WORDS)
    ]
    return tinyrun.write_rows(folder / "chats.jsonl", [*rows, {"messages": []}])


def tuned(folder: Path, sft: str, **sections) -> SeraConfig:
    start = {"sft": sft, "sft_learning_rate": 5e-3, "sft_epochs": 3, "sft_batch": 8}
    return tinyrun.config(folder, start=start, data={"on_bad_row": "drop"}, **SMALL, **sections)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tuned")
    tiny.tiny_policy(folder / "policy", layers=1, hidden=32)
    return folder


@pytest.fixture(scope="module")
def chosen(place) -> RunStore:
    return tinyrun.work(tuned(place, "chosen"), place / "store", "chosen")


@pytest.fixture(scope="module")
def from_file(place) -> RunStore:
    """A run on a file of conversations, with an adapter: it trains beside the fine-tuned model."""
    config = tuned(place, str(chats(place)), train={"method": "lora"})
    return tinyrun.work(config, place / "store", "file")


def test_without_it_steps_and_configuration_are_those_of_older_versions(place):
    plain = tinyrun.config(place)
    digests = source_digests(plain)
    assert "start" not in resolved(plain, digests) and "sft" not in digests
    spelled = tinyrun.config(place, start={"sft": "none"})
    assert resolved(spelled, digests) == resolved(plain, digests)


def test_a_file_is_known_by_its_content(place, tmp_path):
    one, other = chats(place), tmp_path / "renamed.jsonl"
    other.write_bytes(one.read_bytes())
    both = [tuned(place, str(file)) for file in (one, other)]
    first, second = (resolved(config, source_digests(config)) for config in both)
    assert first == second and first["digests"]["sft"]
    other.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    assert resolved(both[1], source_digests(both[1])) != first


def test_only_what_the_method_reads_is_in_the_step(place):
    def key(**train):
        return steps.sft(tuned(place, "chosen", train=train), REF, REF).key

    assert key() == key(losses=["ipo"], beta=0.3, epochs=2, batch=4)
    assert len({key(), key(warmup=0.5), key(method="lora"), key(method="lora", lora_rank=4)}) == 4


def test_a_relative_path_is_beside_the_experiment(place, tmp_path):
    file = tinyrun.experiment(tmp_path, start={"sft": "chats.jsonl"})
    assert load_experiment(str(file)).start.sft == str(tmp_path / "chats.jsonl")
    assert load_experiment(str(file), ["start.sft=chosen"]).start.sft == "chosen"


def test_a_worker_gets_no_relative_path(place):
    form = tinyrun.form(place, start={"sft": "chosen"})
    assert config_from_form(form).start.sft == "chosen"
    form["overrides"]["start"]["sft"] = "chats.jsonl"
    with pytest.raises(InputError, match=r"start\.sft: 'chats\.jsonl' is a relative path"):
        config_from_form(form)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"model": {"dtype": "nf4"}, "train": {"method": "lora"}}, "start.sft makes whole weights"),
        ({"start": {"sft": "https://user:secret@host/chats.jsonl"}}, "password"),
    ],
)
def test_what_cannot_be_is_refused(place, sections, said):
    settings = tinyrun.settings(place, **({"start": {"sft": "chosen"}} | sections))
    with pytest.raises(ValidationError, match=said):
        SeraConfig.model_validate(settings)


def test_bad_conversations_are_refused_before_the_run_begins(place, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": "no"} for row in tinyrun.pairs(32)]
    config = tuned(place, str(tinyrun.write_rows(tmp_path / "same.jsonl", rows)))
    with pytest.raises(
        InputError, match=r"data\.heldout shares 8 of its 8 different prompts with start\.sft"
    ):
        tinyrun.work(config, tmp_path / "store")
    with pytest.raises(InputError, match="shares 8 of its 8"):
        plan(config, "new", str(tmp_path / "store"))


def test_the_plan_has_its_steps_and_their_costs(place, tmp_path):
    found = plan(tuned(place, str(chats(place))), "new", str(tmp_path / "store"))
    rows = {row["step"]: row for row in found["steps"] if row["round"] is None}
    assert list(rows) == ["data", "model", "render", "messages", "examples", "sft", "features"]
    assert rows["sft"]["memory"] > 2**29 and rows["sft"]["seconds"] > 0
    assert 16 * 3 * 10 < rows["sft"]["tokens"] < 16 * 3 * 30


@pytest.mark.slow
def test_the_fine_tuned_model_is_start_policy_and_reference(chosen):
    (manifest,) = chosen.rounds()
    start = manifest.steps["model"]
    assert start.step == "sft"
    policy = Artifact(chosen.store, manifest.steps["policy"]).record
    assert policy.inputs["start"] == policy.inputs["model"] == start
    assert policy.fields["start_is_reference"] and policy.metrics["step0/largest_margin"] < 1e-3
    reference = Artifact(chosen.store, manifest.steps["scored"]).record.inputs["reference-000"]
    assert Artifact(chosen.store, reference).record.inputs["policy"] == start
    folder = Artifact(chosen.store, start).folder("policy")
    assert policy.metrics["weights/start"] == weights_digest(folder)


@pytest.mark.slow
def test_an_adapter_is_trained_beside_it(from_file):
    (manifest,) = from_file.rounds()
    folder = Artifact(from_file.store, manifest.steps["policy"]).folder("policy")
    assert json.loads((folder / "base.json").read_text())["step"] == "sft"


@pytest.mark.slow
def test_it_is_shown_where_the_run_is_shown(chosen, from_file, tmp_path):
    said = next(line for line in closing_lines(from_file) if line.startswith("Before round 0"))
    assert "chats.jsonl: 16 sequences, 6 steps; the loss went from" in said and "1 no_answer" in said
    told = show(chosen)["fine_tuning"]
    assert told["source"] == "chosen" and told["examples"] == 24 and told["last_loss"] < told["first_loss"]
    assert Path(told["log"]).is_file()
    index = write_run_report(chosen.store.url, "chosen", tmp_path / "report")[0].read_text()
    assert "fine-tuned on the chosen answers of the train pairs" in index
    assert "Loss of the fine-tuning before round 0" in index


@pytest.mark.slow
def test_lineage_and_model_card_name_what_it_was_trained_on(place, chosen, from_file):
    chain = lineage(from_file, from_file.rounds()[0])
    assert {"messages", "examples", "sft"} <= {step.step for step in chain.steps}
    assert chain.fine_tuned_on.name == "chats.jsonl"
    assert chain.fine_tuned_on.digest == from_file.configs()[0].resolved["digests"]["sft"]
    assert "fine-tuned before round 0 on `chats.jsonl`" in model_card(from_file, from_file.rounds()[0], chain)
    card = model_card(chosen, chosen.rounds()[0], lineage(chosen, chosen.rounds()[0]))
    assert "fine-tuned before round 0 on the chosen answers of the train data" in card


@pytest.mark.slow
def test_verify_follows_it_to_the_conversations(chosen, from_file):
    for records in (chosen, from_file):
        assert verify(records).rounds == 1
    start = from_file.rounds()[0].steps["model"]
    done = Path(from_file.store.url) / "steps" / "sft" / start.key / "done.json"
    kept = done.read_text()
    wrong = json.loads(kept)
    wrong["metrics"]["weights/result"] = "0" * 64
    done.write_text(json.dumps(wrong))
    try:
        with pytest.raises(StoreError, match="weights/result differs from its files"):
            verify(RunStore(from_file.store, "file"))
    finally:
        done.write_text(kept)


@pytest.mark.slow
def test_a_second_run_reuses_it(place, chosen):
    found = plan(tuned(place, "chosen", train={"beta": 0.3}), "again", str(place / "store"))
    assert {row["status"] for row in found["steps"] if row["step"] in ("examples", "sft")} == {"reuse"}
