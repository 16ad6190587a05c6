"""Supervised fine-tuning as a step: what its loss is, what it leaves, and that it resumes."""

import json
from typing import Any

import pytest
from trainable import CPU, Bench, logps, shas

from sera_core.artifacts.manifest import Artifact, StepRecord
from sera_core.errors import SeraError
from sera_core.models.policies import load_policy, weights_digest
from tasks.fine_tuning import FineTuning, answer_spans, fine_tune, shuffled_passes

slow = pytest.mark.slow
LORA = {"method": "lora", "lora_rank": 4, "lora_alpha": 8}
CHECKPOINTS = CPU.model_copy(update={"checkpoint_steps": 2})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module", params=["full", "lora"])
def tuned(bench: Bench, request: pytest.FixtureRequest) -> StepRecord:
    train = LORA if request.param == "lora" else {}
    return bench.run(bench.tuning(rate=5e-3, **train), work=fine_tune)


def test_every_example_is_seen_once_in_each_pass_in_the_order_of_the_seed() -> None:
    first, again, other = (shuffled_passes(30, 2, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first[:30]) == sorted(first[30:]) == list(range(30))
    assert first[:30] != first[30:] != list(range(30))


def test_each_answer_is_one_span() -> None:
    assert answer_spans([-100, 5, 6, -100, -100, 7]) == [(1, 3), (5, 6)]
    assert answer_spans([-100]) == []


def mean_nll(policy: Any, rows: list[dict[str, Any]]) -> float:
    """By the definition: nats per answer token, each answer in a forward pass of its own."""
    total = sum(logps(policy, row["prompt_ids"], row["chosen_ids"]) for row in rows)
    return -total / sum(len(row["chosen_ids"]) for row in rows)


@slow
def test_the_loss_is_the_mean_negative_log_likelihood_and_training_lowers_it(
    bench: Bench, tuned: StepRecord
) -> None:
    """Of all answer tokens of the first batch at step 0; afterwards of all answers."""
    start, lines = load_policy(bench.folder / "tiny"), bench.log(tuned)
    batch = [bench.rows[row] for row in shuffled_passes(10, 2, 0)[:4]]
    assert lines[0]["loss"] == pytest.approx(mean_nll(start, batch), abs=1e-5)
    after = load_policy(Artifact(bench.store, tuned.ref).folder("policy"))
    assert mean_nll(after, bench.rows) < mean_nll(start, bench.rows) - 0.2
    assert [line["examples"] for line in lines] == [4] * 5
    assert lines[-1]["tokens/fine_tuned"] == 2 * sum(
        len(row["prompt_ids"]) + len(row["chosen_ids"]) for row in bench.rows
    )


@slow
def test_the_result_is_a_complete_policy_folder(bench: Bench, tuned: StepRecord) -> None:
    names = {name.removeprefix("policy/") for name in tuned.files if name.startswith("policy/")}
    assert names == {path.name for path in (bench.folder / "tiny").iterdir()}
    folder = Artifact(bench.store, tuned.ref).folder("policy")
    assert weights_digest(folder) == tuned.metrics["weights/result"] != tuned.metrics["weights/start"]


@slow
@pytest.mark.parametrize("train", [{}, LORA], ids=["full", "lora"])
def test_in_bfloat16_the_result_is_rounded(bench: Bench, train: dict[str, Any]) -> None:
    record = bench.run(bench.tuning(dtype="bfloat16", **train), work=fine_tune)
    folder = Artifact(bench.store, record.ref).folder("policy")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    weights = load_policy(folder, "float32").state_dict()
    assert all((weight.bfloat16().float() == weight).all() for weight in weights.values())


class Killed(Exception):
    """Stands for SIGKILL between two steps."""


def kill_at(examples: int) -> Any:
    def progress(done: int, total: int, unit: str) -> None:
        if done >= examples:
            raise Killed

    return progress


@slow
@pytest.mark.parametrize(
    ("train", "dtype"), [({}, "float32"), (LORA, "float32"), ({}, "bfloat16")], ids=["full", "lora", "bf16"]
)
def test_a_killed_fine_tuning_resumes_to_the_same_bytes(
    bench: Bench, train: dict[str, Any], dtype: str
) -> None:
    """Killed in step 2, with a checkpoint after step 1; the whole one is made in another store."""
    spec = bench.tuning(dtype=dtype, rate=2e-3, **train)
    with pytest.raises(Killed):
        bench.run(spec, CHECKPOINTS, kill_at(12), work=fine_tune)
    assert len(list((bench.folder / "store" / spec.path).glob("part-*.json"))) == 1
    resumed = bench.run(spec, CHECKPOINTS, work=fine_tune)
    whole = bench.again(spec, name=f"whole-{dtype}-{len(train)}", work=fine_tune)
    assert shas(resumed) == shas(whole)
    assert resumed.metrics == whole.metrics


@slow
def test_micro_batches_change_the_weights_by_no_more_than_rounding(bench: Bench) -> None:
    """A batch of 8 at once, and as 3 + 3 + 2, with a last batch of 4."""
    spec = bench.tuning(batch=8, rate=1e-4)
    whole = bench.run(spec, CPU.model_copy(update={"micro_batch": 8}), work=fine_tune)
    pieces = bench.again(spec, CPU.model_copy(update={"micro_batch": 3}), name="pieces", work=fine_tune)
    one, two = (
        load_policy(place / "steps" / "sft" / record.key / record.files["log.jsonl"].attempt / "policy")
        for place, record in ((bench.folder / "store", whole), (bench.folder / "pieces", pieces))
    )
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert (a - b).abs().max().item() <= 2e-6


@slow
def test_weights_that_are_not_finite_are_not_committed_and_the_setting_is_named(bench: Bench) -> None:
    spec = bench.tuning(batch=10, rate=1e39)
    with pytest.raises(SeraError, match=r"start\.sft_learning_rate"):
        bench.run(spec, work=fine_tune)
    assert not list((bench.folder / "store" / spec.path).rglob("*.*"))


@slow
def test_a_trainer_that_computes_another_model_than_the_scorer_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = FineTuning._scored_loss
    monkeypatch.setattr(FineTuning, "_scored_loss", lambda run, model: real(run, model) + 2e-3)
    with pytest.raises(SeraError, match="trainer and scorer do not compute the same model"):
        bench.run(bench.tuning(rate=3e-3), work=fine_tune)


@slow
def test_nothing_is_said_on_the_terminal(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.run(bench.tuning(rate=4e-3, **LORA), work=fine_tune)
    assert capfd.readouterr() == ("", "")
