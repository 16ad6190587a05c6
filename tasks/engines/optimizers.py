"""The optimizers of `train.optimizer`, without weight decay, and the schedule of their learning rate."""

import math

import torch
from torch.optim.lr_scheduler import LambdaLR

from sera_core.models.four_bits import ADAMW_8BIT
from tasks.engines.trained_weights import TrainedWeights


def adamw(weights: TrainedWeights, rate: float) -> torch.optim.Optimizer:
    """torch's fused AdamW, moments in float32."""
    return torch.optim.AdamW(weights.named.values(), lr=rate, weight_decay=0.0, fused=True)


def adamw_8bit(weights: TrainedWeights, rate: float) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits, scaled in blocks of 256 (arXiv 2110.02861).

    Moments of embeddings stay in float32 (section 2.3: their gradients are uneven), and those of tensors of
    fewer than 4,096 weights (bitsandbytes).
    """
    from bitsandbytes.optim.adamw import AdamW8bit

    optimizer = AdamW8bit(weights.named.values(), lr=rate, weight_decay=0.0)
    for name in weights.embeddings & weights.named.keys():
        zeros = torch.zeros_like(weights.named[name])  # set here: the library's registry is the process's
        optimizer.state[weights.named[name]] = {"step": 0, "state1": zeros, "state2": zeros.clone()}
    return optimizer


def optimizer_of(name: str, weights: TrainedWeights, rate: float) -> torch.optim.Optimizer:
    """The optimizer that `train.optimizer` names; the weights follow its steps."""
    optimizer = (adamw_8bit if name == ADAMW_8BIT else adamw)(weights, rate)
    weights.follow(optimizer)
    return optimizer


def warmup_factor(step: int, warmup_steps: int) -> float:
    """Fraction of the peak learning rate at a step (from 0): rises linearly to 1 during warm-up, never 0."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def warmup_schedule(optimizer: torch.optim.Optimizer, warmup: float, first: int) -> LambdaLR:
    """The learning rate by step: `warmup_factor` times the optimizer's.

    Args:
        optimizer: with its peak learning rate.
        warmup: steps of warm-up, rounded up.
        first: the step to begin with, above 0 after a checkpoint.
    """
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    steps = math.ceil(warmup)
    return LambdaLR(optimizer, lambda step: warmup_factor(step, steps), last_epoch=first - 1)
