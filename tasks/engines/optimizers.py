"""The optimizers of `train.optimizer`, without weight decay."""

import torch

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
