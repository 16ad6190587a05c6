"""A new LoRA adapter on a base model."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from sera_core.config import TrainConfig
from sera_core.errors import InputError


def new_adapter(base: Any, train: TrainConfig, seed: int) -> Any:
    """The base with an adapter to train, which changes nothing yet; its random half follows from the seed.

    Raises:
        InputError: `train.lora_targets` names no linear layer of the model.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        r=train.lora_rank,
        lora_alpha=train.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(train.lora_targets) or "all-linear",
        use_rslora=train.use_rslora,
        use_dora=train.use_dora,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(base, config)
    except ValueError as error:
        raise InputError(f"train.lora_targets = {list(train.lora_targets)}: {error}") from error
