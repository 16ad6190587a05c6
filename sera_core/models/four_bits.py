"""Policies whose base has four-bit weights (NF4, arXiv 2305.14314, section 3)."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sera_core.errors import InputError

ADAMW_8BIT = "adamw_8bit"


def refuse_missing_bitsandbytes(dtype: str, optimizer: str = "adamw") -> None:
    """Refuse four-bit weights, and moments in 8 bits, without the package.

    Args:
        dtype: `model.dtype`.
        optimizer: `train.optimizer`.

    Raises:
        InputError: names the setting and the extra.
    """
    if find_spec("bitsandbytes") is not None:
        return
    for setting, value, needs in (("model.dtype", dtype, "nf4"), ("train.optimizer", optimizer, ADAMW_8BIT)):
        if value == needs:
            raise InputError(
                f"{setting} = \"{value}\" needs the extra `qlora`: pip install 'sera-flow[qlora]'"
            )


def four_bits() -> Any:
    """transformers' settings for it: blocks of 64 weights with a float32 scale, multiplied in bfloat16.

    The scales are not rounded again, so that they show whether the weights are finite.
    """
    import torch
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )


def write_rounded(base: Path, folder: Path) -> Path:
    """Write a policy folder with the weights that nf4 multiplies with: rounded, and in float32 again.

    An adapter that was trained on four-bit weights belongs to these, not to the base's own.
    """
    import torch
    from bitsandbytes.functional import dequantize_4bit

    from sera_core.models.policies import load_policy, save_policy

    policy, rounded = load_policy(base), load_policy(base, "nf4")
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            state = getattr(parameter, "quant_state", None)
            value = parameter if state is None else dequantize_4bit(parameter.data, state)
            policy.get_parameter(name).copy_(value)
    return save_policy(policy, base, folder)
