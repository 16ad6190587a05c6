"""The weights that training changes: a model's own in float32, or float32 copies of its bfloat16 ones.

With copies the model computes with their rounded values, as scorer and sampler do, while gradients are added
up over micro-batches, clipped and applied in float32, where small steps are not lost (mixed-precision
training, arXiv 1710.03740, section 3.1).
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class TrainedWeights:
    """The weights by the model's names.

    Attributes:
        named: float32 parameters, which the optimizer changes.
        embeddings: the names of those that are embeddings.
        sharded: whether this process has only its rows of them.
    """

    sharded = False

    def __init__(self, model: nn.Module, copies: Mapping[str, Tensor] | None = None) -> None:
        """`copies`: float32 values of the weights of a bfloat16 model; None: the model's own are trained."""
        own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        self.embeddings = {
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)
        }
        self._rounded = {} if copies is None else own
        self.named = own if copies is None else {name: nn.Parameter(copies[name].float()) for name in own}
        for name, parameter in self._rounded.items():
            weight = self.named[name]
            weight.grad = torch.zeros_like(weight)
            parameter.register_post_accumulate_grad_hook(_adding_to(weight))

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Round the copies into the model after each step of the optimizer."""
        if self._rounded:
            optimizer.register_step_post_hook(lambda *_: self._after_step())

    def clip(self, norm: float) -> Tensor:
        """Clip the gradient of all weights to a norm; returns its norm before."""
        return nn.utils.clip_grad_norm_(self.named.values(), norm)

    @torch.no_grad()
    def to_model(self) -> None:
        """Round the copies into the model."""
        for name, parameter in self._rounded.items():
            parameter.copy_(self.named[name])

    def finish(self, model: nn.Module) -> None:
        """Give the model the float32 weights, after the last step."""
        if self._rounded:
            model.float()
            self.to_model()

    def whole(self, model: nn.Module) -> dict[str, Tensor] | None:
        """Weights to write instead of the model's own; None: the model's."""
        return None

    def _after_step(self) -> None:
        self.to_model()
        for weight in self.named.values():
            assert weight.grad is not None
            weight.grad.zero_()


def _adding_to(weight: nn.Parameter) -> Any:
    """A hook that moves a micro-batch's gradient into the sum in float32."""

    def add(parameter: Tensor) -> None:
        assert weight.grad is not None and parameter.grad is not None
        weight.grad.add_(parameter.grad)
        parameter.grad = None

    return add
