"""Policies that stay loaded for the next step of this process that only reads them."""

import gc
from pathlib import Path
from typing import TYPE_CHECKING

from sera_core.models.policies import Precision, load_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KEPT_ON_CPU = 2
KEPT_ON_ACCELERATOR = 1
_Key = tuple[Path, Precision, str, Path | None]
_kept: "dict[_Key, PreTrainedModel]" = {}
"""The last one used is at the end."""


def shared_policy(folder: Path, dtype: Precision, device: str, base: Path | None = None) -> "PreTrainedModel":
    """`load_policy` for read-only use; the last two are kept on a CPU, one on an accelerator.

    A round scores several files under each policy and samples from it. A step's folder never changes, so its
    path is a valid key.
    """
    key = (folder, dtype, device, base)
    model = _kept.pop(key, None)
    if model is None:
        _keep_at_most(KEPT_ON_CPU - 1 if device == "cpu" else KEPT_ON_ACCELERATOR - 1)
        model = load_policy(folder, dtype, device, base)
    _kept[key] = model
    return model


def release_policies() -> None:
    """Give their memory back, for a step that needs it."""
    _keep_at_most(0)


def _keep_at_most(count: int) -> None:
    oldest = list(_kept)[: max(0, len(_kept) - count)]
    for key in oldest:
        _kept.pop(key, None)
    if any(device != "cpu" for _, _, device, _ in oldest):
        import torch

        gc.collect()
        torch.cuda.empty_cache()
