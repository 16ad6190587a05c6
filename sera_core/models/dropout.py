"""Dropout off in a model that stays in training mode, however its code applies it.

DPO compares log-probabilities of the policy with those of the reference, which were computed without dropout.
Switching `nn.Dropout` modules off is not enough: many architectures drop in functions, at a rate that they
keep in an attribute (`F.dropout(x, p=self.dropout, training=self.training)`, a rate handed to the attention
kernel, layerdrop) or read from the configuration in each pass.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

_RATE = re.compile(r"dropout|pdrop|layerdrop|(^|_)drop(_out)?(_rate|_prob|_path|_p)?(_|$)")
"""Names of a rate: attention_dropout, attn_pdrop, decoder_layerdrop, drop_path_rate, attn_drop, …"""


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of a model to 0, in place: in its modules and in its configurations.

    Other noise, such as a router's jitter, is left alone; so are names like `token_dropout` that hold a flag.
    The configuration in memory changes, so write config.json from where the model came from.

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
    """Whether it is a probability above 0 with a name of dropout."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= 1 and _RATE.search(name) is not None


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """A configuration and those inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)
