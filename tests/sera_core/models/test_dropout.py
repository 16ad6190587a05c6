"""Dropout is off in training, in whatever way an architecture applies it."""

from types import SimpleNamespace

import pytest
import torch
from benchmarks.architectures import tiny_model
from torch import nn

from sera_core.errors import InputError
from sera_core.models.dropout import disable_dropout

MODULES = ["gpt2", "ctrl"]
FUNCTIONS = [
    "opt", "biogpt", "xglm", "bart",  # dropout, activation_dropout and layerdrop as attributes
    "gpt_neox", "phi", "phi3", "persimmon", "falcon", "bloom", "gpt_bigcode",  # modules and functions
    "llama", "gemma2", "mixtral", "phimoe",  # a rate for the attention kernel
    "seed_oss", "starcoder2", "modernbert-decoder",  # residual_dropout, embedding_dropout
    "llama4", "phi4_multimodal", "fuyu",  # configurations inside the configuration
    "prophetnet",
]  # fmt: skip
IDS = torch.arange(40, 80)[None]


def difference(model: nn.Module) -> float:
    """Largest difference of a logit between a pass in training mode and one in evaluation."""
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
        torch.manual_seed(0)
        return (model.train()(input_ids=IDS).logits - expected).abs().max().item()


@pytest.mark.parametrize("name", MODULES + FUNCTIONS)
def test_training_mode_computes_what_evaluation_computes(name: str) -> None:
    model = tiny_model(name, dropout=0.3)
    assert difference(model) > 0.1
    disable_dropout(model)
    assert difference(model) == 0


@pytest.mark.parametrize("name", FUNCTIONS[:4])
def test_switching_the_modules_off_would_not_be_enough(name: str) -> None:
    model = tiny_model(name, dropout=0.3)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert difference(model) > 0.1


def test_only_rates_of_dropout_become_zero() -> None:
    model = tiny_model("phimoe", dropout=0.3)
    model.config.router_jitter_noise = 0.01
    named = {"attn_drop": 0.1, "drop_path_rate": 0.2, "token_dropout": True, "dropout": None, "drop": 3}
    vars(model).update(named | {"dropped_tokens": 0.5, "attn_dropout_p": 0.1})
    disable_dropout(model)
    assert model.config.router_jitter_noise == 0.01
    assert model.config.attention_dropout == 0.0
    found = SimpleNamespace(**vars(model))
    assert (found.attn_drop, found.drop_path_rate, found.attn_dropout_p) == (0.0, 0.0, 0.0)
    assert (found.token_dropout, found.dropout, found.drop, found.dropped_tokens) == (True, None, 3, 0.5)


def test_a_routers_jitter_stays_and_such_a_model_is_refused_by_name() -> None:
    from tasks.engines.pair_forward import add_pair_forward

    model = tiny_model("phimoe", dropout=0.3)
    for module in model.modules():
        if hasattr(module, "router_jitter_noise"):
            module.router_jitter_noise = 0.3
    disable_dropout(model)
    with pytest.raises(InputError, match=r"PhimoeForCausalLM \(phimoe\) is not supported: .* jitter"):
        add_pair_forward(model)


def test_an_adapter_is_reached_and_the_model_below_it() -> None:
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=2, lora_dropout=0.3, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny_model("opt", dropout=0.3), lora)  # pyright: ignore[reportArgumentType]
    assert difference(model) > 0.1
    disable_dropout(model)
    assert difference(model) == 0
