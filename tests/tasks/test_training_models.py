"""Training of models whose configuration asks for what DPO must not have: dropout, a balancing loss."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tiny import VOCAB_SIZE, write_tokenizer
from trainable import Bench

from sera_core.artifacts.manifest import Artifact, StepRecord
from sera_core.config import TrainConfig

pytestmark = pytest.mark.slow
FULL = TrainConfig(batch=4, epochs=1, beta=0.2)
LORA = FULL.model_copy(update={"method": "lora", "lora_rank": 4, "lora_alpha": 8})
RATES: dict[str, Any] = {
    "dropout": 0.3,
    "activation_dropout": 0.3,
    "attention_dropout": 0.3,
    "layerdrop": 0.3,
}


def opt_with_dropout(folder: Path) -> Path:
    """A tiny OPT, which applies all its dropout in functions."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_hidden_layers": 2}
    return written(OPTForCausalLM(OPTConfig(**sized(sizes), init_std=0.2, **RATES)), folder)


def mixtral_with_balancing(folder: Path) -> Path:
    """A tiny Mixtral whose configuration asks for its balancing loss, and weighs it heavily."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 1.0}
    return written(
        MixtralForCausalLM(MixtralConfig(**sized(sizes), initializer_range=0.2, **experts)), folder
    )


def sized(sizes: dict[str, int]) -> dict[str, Any]:
    tokens = {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    return (
        {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 128, "num_attention_heads": 2} | sizes | tokens
    )


def written(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def settings(bench: Bench, record: StepRecord) -> dict[str, Any]:
    """config.json of the policy that training left."""
    return json.loads((Artifact(bench.store, record.ref).folder("policy") / "config.json").read_text())


@pytest.mark.parametrize("train", [FULL, LORA], ids=["full", "lora"])
def test_functional_dropout_is_off_in_training_and_stays_in_the_configuration(
    tmp_path: Path, train: TrainConfig
) -> None:
    bench = Bench(tmp_path, policy=opt_with_dropout)
    record = bench.run(bench.spec(bench.mixture(), train))
    assert record.metrics["step0/largest_margin"] < 1e-3
    assert bench.log(record)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert record.metrics["weights/result"] != record.metrics["weights/start"]
    if train is FULL:
        assert {name: settings(bench, record)[name] for name in RATES} == RATES


def test_the_loss_of_experts_holds_no_balancing_loss(tmp_path: Path) -> None:
    """With it, at a weight of 1, the loss at step 0 would be ln 2 and about 2 more."""
    bench = Bench(tmp_path, policy=mixtral_with_balancing)
    record = bench.run(bench.spec(bench.mixture(), FULL))
    assert bench.log(record)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert settings(bench, record)["output_router_logits"] is True
