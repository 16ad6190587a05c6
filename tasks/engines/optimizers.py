"""The optimizers of `train.optimizer`, over a model's trainable parameters, without weight decay."""

import torch
from torch import nn

from tasks.engines.checkpoints import trainable


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """torch's fused AdamW, moments in float32."""
    return torch.optim.AdamW(trainable(model).values(), lr=rate, weight_decay=0.0, fused=True)


def adamw_8bit(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """AdamW with moments in 8 bits, scaled in blocks of 256 (arXiv 2110.02861).

    Moments of embeddings stay in float32 (section 2.3: their gradients are uneven), and those of tensors of
    fewer than 4,096 weights (bitsandbytes).
    """
    from bitsandbytes.optim.adamw import AdamW8bit

    optimizer = AdamW8bit(trainable(model).values(), lr=rate, weight_decay=0.0)
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            zeros = torch.zeros_like(
                module.weight
            )  # set for this optimizer alone; its own registry is the process's
            optimizer.state[module.weight] = {"step": 0, "state1": zeros, "state2": zeros.clone()}
    return optimizer
