"""A round of training as a step: what it reads, what it leaves, what it refuses, and that it resumes."""

import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainable import CPU, Bench, logps, shas
from transformers import modeling_utils

from sera_core.artifacts.manifest import Artifact, StepRecord
from sera_core.config import TrainConfig
from sera_core.errors import InputError, SeraError
from sera_core.models.policies import Precision, load_policy, weights_digest
from sera_core.models.shared_policies import shared_policy
from tasks.engines.optimizers import warmup_factor
from tasks.engines.training_data import training_order
from tasks.training import TrainingRun

slow = pytest.mark.slow
FULL = TrainConfig(batch=4, epochs=2, beta=0.2)
LORA = FULL.model_copy(update={"method": "lora", "lora_rank": 4, "lora_alpha": 8})
CHECKPOINTS = CPU.model_copy(update={"checkpoint_steps": 2})


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


def counted(function: Any, calls: list[Any]) -> Any:
    """The function, which also notes its calls."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    return noted


# ------------------------------------------------------------------------------------------------- the order


@given(
    tokens=st.lists(st.integers(3, 50), min_size=1, max_size=30),
    batch=st.integers(1, 9),
    epochs=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_every_pair_is_seen_exactly_once_in_each_pass(
    tokens: list[int], batch: int, epochs: int, seed: int
) -> None:
    order = training_order(tokens, batch, epochs, (seed, 0))
    count = len(tokens)
    passes = [order[start : start + count] for start in range(0, len(order), count)]
    assert passes[0] == list(range(count))
    assert len(passes) == epochs
    assert all(sorted(rows) == passes[0] for rows in passes)


def test_later_passes_are_shuffled_by_the_seed() -> None:
    tokens = [10] * 40
    first, again, other = (training_order(tokens, 4, 3, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert first == again != other
    assert first[40:80] != list(range(40))
    assert first[40:80] != first[80:]


@given(
    tokens=st.lists(st.integers(3, 50), min_size=1, max_size=30),
    batch=st.integers(1, 9),
    budget=st.integers(1, 3000),
)
def test_a_budget_ends_with_the_first_batch_that_reaches_it(
    tokens: list[int], batch: int, budget: int
) -> None:
    order = training_order(tokens, batch, 1, (0, 0), budget)
    last = len(order) - (len(order) % batch or batch)
    assert sum(tokens[row] for row in order) >= budget
    assert sum(tokens[row] for row in order[:last]) < budget


def test_no_pairs_are_no_steps_whatever_the_budget() -> None:
    assert training_order([], 4, 2, (0, 0)) == training_order([], 4, 2, (0, 0), budget=10) == []


def test_the_learning_rate_rises_over_the_warmup_and_stays() -> None:
    assert [warmup_factor(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup_factor(0, 0) == 1.0


# ------------------------------------------------------------------------------------------------ the result


@pytest.fixture(scope="module")
def trained(bench: Bench) -> StepRecord:
    return bench.run(bench.spec(bench.mixture(), FULL))


@slow
def test_two_runs_leave_the_same_bytes(bench: Bench, trained: StepRecord) -> None:
    again = bench.again(bench.spec(bench.mixture(), FULL), name="two-runs")
    assert shas(again) == shas(trained)
    assert again.digest == trained.digest


@slow
def test_a_trained_policy_is_a_plain_folder_that_opens_with_the_new_weights(
    bench: Bench, trained: StepRecord
) -> None:
    names = {Path(name).name for name in trained.files if name.startswith("policy/")}
    start = {path.name for path in (bench.folder / "tiny").iterdir()}
    assert names == start
    folder = Artifact(bench.store, trained.ref).folder("policy")
    assert weights_digest(folder) == trained.metrics["weights/result"] != trained.metrics["weights/start"]
    assert trained.metrics["weights/start"] == weights_digest(bench.folder / "tiny")
    config = json.loads((folder / "config.json").read_text())
    before = json.loads((bench.folder / "tiny" / "config.json").read_text())
    assert config.get("use_cache") == before.get("use_cache")
    assert str(bench.folder) not in (folder / "config.json").read_text()
    load_policy(folder)


@slow
def test_training_widens_the_margins_it_trains_on(trained: StepRecord, bench: Bench) -> None:
    """Round of 10 pairs, 2 epochs: the last batch's margin is far above the first's, which is 0."""
    lines = bench.log(trained)
    assert abs(lines[0]["rewards/margins"]) < 1e-5
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert lines[-1]["rewards/margins"] > 0.1
    assert trained.metrics["step0/largest_margin"] <= 1e-3


@slow
def test_the_log_counts_pairs_and_tokens(bench: Bench, trained: StepRecord) -> None:
    """20 pairs seen in batches of 4; tokens are 2|x| + |y_w| + |y_l| of each pair, twice over."""
    lines = bench.log(trained)
    tokens = [
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in bench.rows
    ]
    assert [line["pairs"] for line in lines] == [4, 4, 4, 4, 4]
    assert lines[0]["tokens/trained"] == sum(tokens[:4])
    assert lines[-1]["tokens/trained"] == trained.metrics["tokens/trained"] == 2 * sum(tokens)
    assert trained.counts == {"pairs": 10}
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert not any("runtime" in key or "time" in key for line in lines for key in line)


@slow
def test_micro_batches_change_the_weights_by_no_more_than_rounding(bench: Bench) -> None:
    """A batch of 8 at once, and as 3 + 3 + 2, with a last batch of 2."""
    train = FULL.model_copy(update={"batch": 8, "epochs": 1, "max_grad_norm": 0.5})
    spec = bench.spec(bench.mixture(), train, rate=1e-4)
    whole = bench.run(spec, CPU.model_copy(update={"micro_batch": 8}))
    pieces = bench.again(spec, CPU.model_copy(update={"micro_batch": 3}), name="pieces")
    stores = (bench.folder / "store", bench.folder / "pieces")
    one, two = (
        load_policy(store / "steps" / "train" / record.key / record.files["log.jsonl"].attempt / "policy")
        for store, record in zip(stores, (whole, pieces), strict=True)
    )
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert (a - b).abs().max().item() <= 2e-6


@slow
def test_nothing_is_said_on_the_terminal(bench: Bench, capfd: pytest.CaptureFixture[str]) -> None:
    bench.run(bench.spec(bench.mixture(), FULL, rate=2e-3))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# ------------------------------------------------------------------------------------------------- resuming


class Killed(Exception):
    """Stands for SIGKILL between two steps."""


def kill_at(pairs: int) -> Any:
    def progress(done: int, total: int, unit: str) -> None:
        if done >= pairs:
            raise Killed

    return progress


@slow
@pytest.mark.parametrize(
    ("train", "dtype", "pairs"),
    [
        *((FULL, "float32", pairs) for pairs in (4, 12, 16)),
        *((LORA, "float32", pairs) for pairs in (4, 12, 16)),
        (FULL, "bfloat16", 12),
    ],
)
def test_a_killed_round_resumes_to_the_same_bytes(
    bench: Bench, train: TrainConfig, dtype: Precision, pairs: int
) -> None:
    """Killed in step 0 (no checkpoint yet), in step 2 (one after step 1) and in step 3 (before its own)."""
    spec = bench.spec(bench.mixture(dtype=dtype), train, dtype=dtype, rate=1e-3 + pairs * 1e-9)
    with pytest.raises(Killed):
        bench.run(spec, CHECKPOINTS, kill_at(pairs))
    parts = list((bench.folder / "store" / spec.path).glob("part-*.json"))
    assert len(parts) == (0 if pairs == 4 else 1)
    resumed = bench.run(spec, CHECKPOINTS)
    whole = bench.again(spec, name=f"whole-{train.method}-{dtype}-{pairs}")
    assert shas(resumed) == shas(whole)
    assert resumed.metrics == whole.metrics


def tokens_of(bench: Bench) -> list[int]:
    return [
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in bench.rows
    ]


@slow
@pytest.mark.parametrize("passes", [0.3, 2.5], ids=["less-than-a-pass", "more-than-two-passes"])
def test_a_budget_of_tokens_ends_training_and_the_schedule_has_as_many_steps(
    bench: Bench, passes: float
) -> None:
    """Of 10 pairs in batches of 4; warmup is 0.5 of the steps, so the last step's rate is the peak."""
    tokens = tokens_of(bench)
    budget = int(passes * sum(tokens))
    train = FULL.model_copy(update={"epochs": 1, "warmup": 0.5})
    record = bench.run(bench.spec(bench.mixture(), train, token_budget=budget))
    lines = bench.log(record)
    assert budget <= record.metrics["tokens/trained"] == lines[-1]["tokens/trained"]
    assert len(lines) == 1 or lines[-2]["tokens/trained"] < budget
    order = training_order(tokens, 4, 1, (0, 0), budget)
    assert record.metrics["pairs"] == len(order) == sum(line["pairs"] for line in lines)
    assert (len(order) > 10) == (passes > 1)
    rates = [line["learning_rate"] for line in lines]
    warmup = math.ceil(0.5 * len(lines))
    assert rates == pytest.approx([1e-3 * warmup_factor(step, warmup) for step in range(len(lines))])


@slow
def test_a_round_with_a_budget_resumes_to_the_same_bytes(bench: Bench) -> None:
    """Killed in the second pass; the rows after the checkpoint are those of the whole run."""
    spec = bench.spec(bench.mixture(), FULL, rate=1.5e-3, token_budget=int(1.8 * sum(tokens_of(bench))))
    with pytest.raises(Killed):
        bench.run(spec, CHECKPOINTS, kill_at(12))
    resumed = bench.run(spec, CHECKPOINTS)
    assert shas(resumed) == shas(bench.again(spec, name="whole-budget"))


@slow
def test_no_pickle_reaches_the_store(bench: Bench) -> None:
    spec = bench.spec(bench.mixture(), FULL, rate=3e-3)
    with pytest.raises(Killed):
        bench.run(spec, CHECKPOINTS, kill_at(16))
    files = [path for path in (bench.folder / "store" / spec.path).rglob("*") if path.is_file()]
    assert any("checkpoint" in str(path) for path in files)
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".jinja"}


# ------------------------------------------------------------------------------------------------ refusing


@slow
def test_a_wrong_reference_is_refused_at_step_0_and_the_pair_named(bench: Bench) -> None:
    third = bench.rows[2]["pair_id"]
    wrong = bench.mixture(**{third: {"ref_chosen_logps": -20.0}})
    with pytest.raises(SeraError, match=rf"pair {third}: margin .* nats at step 0 \(.* in the first try\)"):
        bench.run(bench.spec(wrong, FULL))


@slow
def test_a_margin_at_step_0_that_does_not_come_again_is_said_and_changes_nothing(
    bench: Bench, trained: StepRecord, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, asked = TrainingRun._check_start, []

    def off_at_first(run: TrainingRun, pairs: list[dict[str, Any]]) -> None:
        asked.append(run.start_check.first_margin)
        shifted = [pair | {"chosen_score": pair["chosen_score"] + 0.2} for pair in pairs]
        real(run, shifted if len(asked) == 1 else pairs)

    monkeypatch.setattr(TrainingRun, "_check_start", off_at_first)
    again = bench.again(bench.spec(bench.mixture(), FULL), name="off-at-first")
    assert asked == [None, pytest.approx(0.2, abs=1e-4)]
    assert "retrying once" in caplog.text
    assert again.digest == trained.digest


@slow
def test_a_tenth_of_a_nat_is_too_much_in_float32_but_said_nothing_about_when_the_start_differs(
    bench: Bench,
) -> None:
    right = {row["pair_id"]: row for row in pairs_of(bench, bench.mixture())}
    second = bench.rows[1]["pair_id"]
    wrong = bench.mixture(**{second: {"ref_rejected_logps": right[second]["ref_rejected_logps"] + 0.1}})
    with pytest.raises(SeraError, match=rf"pair {second}: margin 0\.1"):
        bench.run(bench.spec(wrong, FULL))
    assert bench.run(bench.spec(wrong, FULL, same=False)).metrics["step0/largest_margin"] > 0.09


@slow
@pytest.mark.parametrize("train", [FULL, LORA], ids=["full", "lora"])
def test_weights_that_the_last_update_made_infinite_are_not_committed(
    bench: Bench, train: TrainConfig
) -> None:
    """One step at a rate that float32 cannot hold: its loss, computed before the update, is fine."""
    one_step = train.model_copy(update={"batch": 10, "epochs": 1})
    spec = bench.spec(bench.mixture(), one_step, rate=1e39)
    tensors = r"step 0, weights are not finite in \d+ of \d+ tensors \([\w.]+, .*…\)"
    with pytest.raises(SeraError, match=rf"{tensors}; they are not written, .*: lower train\.learning_rate"):
        bench.run(spec)
    assert not list((bench.folder / "store" / spec.path).rglob("*.*"))


@slow
def test_weights_that_are_not_finite_reach_no_checkpoint(bench: Bench) -> None:
    spec = bench.spec(bench.mixture(), FULL, rate=1e39)
    with pytest.raises(SeraError, match="step 0, weights are not finite"):
        bench.run(spec, CPU.model_copy(update={"checkpoint_steps": 1}))
    assert not list((bench.folder / "store" / spec.path).glob("part-*.json"))


@slow
def test_in_bfloat16_the_scorers_own_noise_is_allowed_and_no_more(bench: Bench) -> None:
    """The reference as the scorer computes it in bfloat16; then one pair 50 nats away."""
    scored = bench.mixture(dtype="bfloat16")
    record = bench.run(bench.spec(scored, FULL, dtype="bfloat16"))
    assert (
        0 < record.metrics["step0/probe"] < 0.15
    )  # the model of the scorer, not float32 weights rounded late
    assert bench.log(record)[0]["loss"] == pytest.approx(math.log(2), abs=2e-3)
    assert record.metrics["step0/largest_margin"] <= record.metrics["step0/bound"]
    exact = [row["ref_chosen_logps"] for row in pairs_of(bench, bench.mixture())[:4]]
    assert abs(bench.log(record)[0]["logps/chosen"] - sum(exact) / 4) > 1e-3, "the arithmetic was float32"
    third = bench.rows[2]["pair_id"]
    wrong = bench.mixture(dtype="bfloat16", **{third: {"ref_chosen_logps": -100.0}})
    with pytest.raises(SeraError, match=rf"pair {third}: margin"):
        bench.run(bench.spec(wrong, FULL, dtype="bfloat16"))


@slow
def test_training_begins_without_the_policies_that_were_scored(bench: Bench) -> None:
    spec, held = bench.spec(bench.mixture(), FULL, rate=3e-3), []

    def progress(*_: Any) -> None:
        held.append(scored())

    scored = weakref.ref(shared_policy(bench.folder / "tiny", "float32", "cpu"))
    bench.run(spec, progress=progress)
    assert held and held[0] is None


@slow
@pytest.mark.parametrize("dtype", ["bfloat16", "nf4"])
def test_an_adapter_is_scored_beside_the_base_that_it_was_trained_on(bench: Bench, dtype: Precision) -> None:
    """A rate of 1e-5 moves a weight by less than bfloat16 can hold, so rounding would change a merged one."""
    spec = bench.spec(bench.mixture(dtype=dtype), LORA, dtype=dtype, rate=1e-5)
    record = bench.run(spec)
    assert record.metrics["step0/largest_margin"] <= record.metrics["step0/probe"] * 4 + 1e-3
    folder, base = Artifact(bench.store, record.ref).folder("policy"), bench.folder / "tiny"
    policy, start = load_policy(folder, dtype, base=base), load_policy(base, dtype)
    kinds = {name: value.dtype for name, value in policy.named_parameters()}
    assert {kind for name, kind in kinds.items() if "lora_" in name} == {torch.float32}
    base_kinds = {"bfloat16": {torch.bfloat16}, "nf4": {torch.bfloat16, torch.uint8}}
    assert {kind for name, kind in kinds.items() if "lora_" not in name} == base_kinds[dtype]
    weight = "model.layers.0.mlp.up_proj.base_layer.weight"
    torch.testing.assert_close(
        dict(policy.named_parameters())[weight],
        start.get_parameter(weight.replace("base_layer.", "")),
        rtol=0,
        atol=0,
    )
    layer = policy.get_submodule("model.layers.0.mlp.up_proj")
    assert layer.get_delta_weight("default").abs().max() > 0
    row = bench.rows[0]
    given = (row["prompt_ids"], row["chosen_ids"])
    assert logps(policy, *given) == pytest.approx(logps(start, *given), abs=0.5)


@slow
@pytest.mark.parametrize("train", [FULL, LORA], ids=["full", "lora"])
def test_gradient_checkpointing_gives_the_same_bytes(bench: Bench, train: TrainConfig) -> None:
    spec = bench.spec(bench.mixture(), train, rate=2e-3)
    kept, calls = bench.run(spec), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_utils, "checkpoint", counted(modeling_utils.checkpoint, calls))
        again = bench.again(
            spec, CPU.model_copy(update={"gradient_checkpointing": True}), name=f"recomputed-{train.method}"
        )
    assert calls and shas(again) == shas(kept)


@slow
def test_moments_in_8_bits_resume_to_the_same_bytes_and_step_as_those_in_32(bench: Bench) -> None:
    train = FULL.model_copy(update={"optimizer": "adamw_8bit"})
    mixture = bench.mixture()
    spec = bench.spec(mixture, train, rate=1e-3)
    with pytest.raises(Killed):
        bench.run(spec, CHECKPOINTS, kill_at(12))
    resumed = bench.run(spec, CHECKPOINTS)
    assert shas(resumed) == shas(bench.again(spec, name="8-bit"))
    changes = [bench.change(record) for record in (resumed, bench.run(bench.spec(mixture, FULL, rate=1e-3)))]
    assert 0.9 < torch.cosine_similarity(*changes, dim=0) < 1.0


@slow
@pytest.mark.parametrize(
    "change", [{"use_rslora": True}, {"use_dora": True}, {"lora_targets": ("q_proj",)}], ids=str
)
def test_an_adapters_kind_reaches_its_policy(bench: Bench, change: dict[str, Any]) -> None:
    record = bench.run(bench.spec(bench.mixture(), LORA.model_copy(update=change), rate=1e-3))
    assert bench.log(record)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    folder = Artifact(bench.store, record.ref).folder("policy")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert {name: written[name] for name in ("use_rslora", "use_dora")} == {
        name: change.get(name, False) for name in ("use_rslora", "use_dora")
    }
    assert (written["target_modules"] == ["q_proj"]) == ("lora_targets" in change)
    row = bench.rows[0]
    given = (row["prompt_ids"], row["chosen_ids"])
    policies = [load_policy(folder, dtype, base=bench.folder / "tiny") for dtype in ("float32", "bfloat16")]
    values = [logps(policy, *given) for policy in policies]
    assert values[0] != pytest.approx(logps(load_policy(bench.folder / "tiny"), *given), abs=1e-4)
    assert values[1] == pytest.approx(values[0], abs=0.5)


@slow
def test_layers_that_the_model_does_not_have_are_named(bench: Bench) -> None:
    train = LORA.model_copy(update={"lora_targets": ("query",)})
    with pytest.raises(InputError, match=r"train\.lora_targets = \['query'\]: .*not found"):
        bench.run(bench.spec(bench.mixture(), train))


@slow
def test_weights_stay_in_float32_when_the_arithmetic_is_bfloat16(bench: Bench) -> None:
    """Steps of 1e-6 are lost in bfloat16 numbers; the policy a round leaves must still have them."""
    from safetensors.torch import load_file

    record = bench.run(bench.spec(bench.mixture(dtype="bfloat16"), FULL, dtype="bfloat16", rate=1e-6))
    weights = load_file(Artifact(bench.store, record.ref).path("policy/model.safetensors"))
    start = load_file(bench.folder / "tiny" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (weights[name] - start[name]).abs()
    assert str(weights[name].dtype) == "torch.float32"
    assert 5e-7 < moved.max().item() < 2e-5
    assert (moved > 0).float().mean().item() > 0.9


def pairs_of(bench: Bench, mixture: Any) -> list[dict[str, Any]]:
    from sera_core.artifacts.schema import iter_rows

    return list(iter_rows(Artifact(bench.store, mixture).path("mixture.parquet")))


def test_a_missing_reference_is_refused_unless_the_loss_has_none(bench: Bench) -> None:
    nulls = bench.mixture(every={"ref_chosen_logps": None, "ref_rejected_logps": None})
    with pytest.raises(InputError, match=r"pair 0000000000000000: ref_chosen_logps is None"):
        bench.run(bench.spec(nulls, FULL))


@slow
def test_simpo_trains_without_a_reference(bench: Bench) -> None:
    nulls = bench.mixture(every={"ref_chosen_logps": None, "ref_rejected_logps": None})
    simpo = FULL.model_copy(update={"losses": ("simpo",), "target_margin": 0.5, "beta": 2.0})
    record = bench.run(bench.spec(nulls, simpo))
    lines = bench.log(record)
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]


def test_a_sequence_longer_than_the_model_is_refused(bench: Bench) -> None:
    long = [{**bench.rows[0], "chosen_ids": [5] * 600}]
    longer = Bench.__new__(Bench)
    longer.__dict__ |= {**bench.__dict__, "rows": long}
    mixture = longer.mixture(every={"chosen_ids": [5] * 600, "ref_chosen_logps": -1.0})
    with pytest.raises(InputError, match=r"600 response tokens exceed the model's 512 positions"):
        bench.run(bench.spec(mixture, FULL))


def test_a_missing_tracking_package_is_named_with_its_command(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    wandb = CPU.model_copy(update={"tracking": "wandb"})
    with pytest.raises(InputError, match="pip install wandb"):
        bench.run(bench.spec(bench.mixture(), FULL, rate=5e-3), wandb)


# --------------------------------------------------------------------------------------------------- rounds


@slow
@pytest.mark.parametrize("train", [FULL, LORA], ids=["full", "lora"])
def test_a_second_round_starts_from_the_first_rounds_weights(bench: Bench, train: TrainConfig) -> None:
    mixture = bench.mixture()
    first = bench.run(bench.spec(mixture, train, rate=4e-3))
    second = bench.run(bench.spec(mixture, train, rate=4e-3, start=first.ref, same=False, round=1))
    assert second.metrics["weights/start"] == first.metrics["weights/result"]
    assert second.metrics["weights/result"] != first.metrics["weights/result"]
    # Round 2's first batch is round 1's: had it started from the base, its margins would be 0.
    assert bench.log(second)[0]["rewards/margins"] > bench.log(first)[-1]["rewards/margins"] / 4


@slow
def test_an_adapter_is_written_with_its_base_and_scores_as_it_was_trained(bench: Bench) -> None:
    from trainable import logps

    mixture = bench.mixture()
    first = bench.run(bench.spec(mixture, LORA, rate=6e-3))
    names = {name for name in first.files if name.startswith("policy/")}
    assert {"policy/adapter_config.json", "policy/adapter_model.safetensors", "policy/base.json"} <= names
    assert "policy/tokenizer.json" in names
    assert not {"policy/model.safetensors", "policy/config.json"} & names
    folder = Artifact(bench.store, first.ref).folder("policy")
    assert json.loads((folder / "base.json").read_text()) == bench.model.model_dump()
    assert not json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]

    # The next round's step 0 is computed from the adapter: it must be what the merged policy gives.
    second = bench.run(bench.spec(mixture, LORA, rate=6e-3, start=first.ref, same=False, round=1))
    policy = load_policy(folder, base=bench.folder / "tiny")
    chosen = [logps(policy, row["prompt_ids"], row["chosen_ids"]) for row in bench.rows[:4]]
    assert bench.log(second)[0]["logps/chosen"] == pytest.approx(sum(chosen) / 4, abs=1e-3)


@slow
def test_an_adapter_cannot_be_trained_in_full_or_on_another_base(bench: Bench, tmp_path: Path) -> None:
    from tiny import tiny_policy

    mixture = bench.mixture()
    adapter = bench.run(bench.spec(mixture, LORA, rate=7e-3)).ref
    with pytest.raises(SeraError, match=r"train\.method is"):
        bench.run(bench.spec(mixture, FULL, start=adapter))
    spec = bench.spec(mixture, LORA, start=adapter)
    other = bench.commit("model", {"policy": tiny_policy(tmp_path / "other", seed=1)}, seed=1)
    with pytest.raises(SeraError, match="an adapter works only with its base"):
        bench.run(spec.model_copy(update={"inputs": {**spec.inputs, "model": other}}))


# ------------------------------------------------------------------------------------------------- tracking


@slow
def test_tensorboard_is_told_every_step(bench: Bench, tmp_path: Path) -> None:
    tracked = CPU.model_copy(update={"tracking": "tensorboard"})
    where = {"run": "tiny", "logs": str(tmp_path / "logs")}
    bench.run(bench.spec(bench.mixture(), FULL, rate=8e-3, where=where), tracked)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/rewards/margins")] == [1, 2, 3, 4, 5]
