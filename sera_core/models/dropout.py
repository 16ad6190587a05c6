"""Disable dropout in a model in training mode.

DPO compares log-probabilities of the policy with those of the reference, which were computed without dropout.
Disabling `nn.Dropout` modules is not enough: many architectures call functions with a rate from an attribute
(`F.dropout(x, p=self.dropout, training=self.training)`, attention kernels, layerdrop) or from the
configuration.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

_RATE = re.compile(r"dropout|pdrop|layerdrop|(^|_)drop(_out)?(_rate|_prob|_path|_p)?(_|$)")
"""Names of dropout rates: attention_dropout, attn_pdrop, decoder_layerdrop, drop_path_rate, attn_drop, …"""


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate in a model's modules and configurations to 0, in place.

    Other noise, such as router jitter, is unchanged, as are flags such as `token_dropout`. The configuration
    in memory changes, so config.json must be copied from the source folder.

    Args:
        model: a model, or an adapter around one.
    """
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        _zero_rates(module)
        if isinstance(config := vars(module).get("config"), PreTrainedConfig):
            for part in _parts(config):
                _zero_rates(part)


def _zero_rates(holder: Any) -> None:
    for name, value in list(vars(holder).items()):
        if _is_rate(name, value):
            setattr(holder, name, type(value)(0))


def _is_rate(name: str, value: Any) -> bool:
    """Whether an attribute is a dropout rate above 0."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= 1 and _RATE.search(name) is not None


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and its nested configurations."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)
