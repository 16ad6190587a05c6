"""TRL's DPOTrainer on precomputed token ids and reference log-probabilities; losses and loop are TRL's.

Differences from the stock trainer:

- no data preparation, no truncation, no reference model: token ids and log π_ref(y|x) come from the store;
- a data loader batch is a whole global batch, processed in micro-batches of similar length, so that the loss
  is the mean over the batch's pairs for any `micro_batch`, also in a shorter last batch;
- a prompt is computed once for both responses of its pair, and hidden states are projected only where a
  response token is predicted (`pair_forward`);
- SimPO, conservative DPO and the hinge with weights, which TRL 1.16 does not have, and metrics averaged over
  pairs;
- TRL's telemetry is off.
"""

import tasks.engines.early_imports  # noqa: F401

# isort: split

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from sera_core.config import TrainConfig
from sera_core.errors import InputError
from sera_core.extensions import is_own, own_function
from sera_core.models.losses import cdpo_loss, sft_loss, simpo_loss, slic_hinge_loss
from tasks.engines.pair_forward import PairCollator, add_pair_forward
from tasks.engines.ranks import ALONE, Ranks
from tasks.engines.trained_weights import TrainedWeights

VALUES = ("row", "chosen", "rejected", "chosen_score", "rejected_score", "loss")
"""What is kept of each pair; WPO's weight beside them."""


class Pairs(NamedTuple):
    """What a loss reads of a micro-batch, each [pair].

    Log-probabilities in nats, as LD-DPO weighs them and of all tokens (`whole_…`); lengths in tokens; label
    smoothing ε; and WPO's weight.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    label_smoothing: Tensor
    whole_chosen: Tensor
    whole_rejected: Tensor
    weight: Tensor


class ReviewedDPOTrainer(DPOTrainer):
    """DPOTrainer on a mixture's rows (ids, reference log-probabilities, `row`), in the data set's order.

    Attributes:
        batch_pairs: values of the last global batch, one per pair: `row`; `chosen`, `rejected`
            (log π_θ in nats, float64); `chosen_score`, `rejected_score` (times β: the rewards); `loss`.
    """

    def __init__(
        self,
        model: Any,
        train: TrainConfig,
        args: DPOConfig,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        optimizers: tuple[Any, Any],
        callbacks: list[TrainerCallback],
        micro_batch: int,
        share: bool,
        weights: TrainedWeights | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Build the trainer.

        Args:
            weights: the weights that the optimizer changes; None: the model's own.
            ranks: the processes that train together; None: this one alone.
        """
        self.train_config, self.weights = train, weights or TrainedWeights(model)
        self.ranks = ranks or ALONE
        self.own_losses = _own_losses(train)
        self.batch_pairs: dict[str, Tensor] = {}
        super().__init__(
            model=model,
            args=args,
            data_collator=cast(Any, PairCollator(micro_batch, share, self.ranks.count)),  # a list of batches
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        assert self.ref_model is None, "a second model was loaded"
        assert self.accelerator.num_processes == 1, "processes are added up here, not by TRL (`Ranks`)"
        assert len(self.train_dataset) == len(rows), "TRL dropped rows"
        if is_adapter := hasattr(model, "peft_config"):
            model.delete_adapter("ref")  # TRL's frozen copy of the adapter, never read here
        add_pair_forward(model.get_base_model() if is_adapter else model, args.use_weighting)
        self.remove_callback(PrinterCallback)

    def change(self, weights: TrainedWeights, optimizer: Any, schedule: Any) -> None:
        """Train these weights, with their optimizer and the schedule of its learning rate."""
        self.weights, self.optimizer, self.lr_scheduler = weights, optimizer, schedule

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        return dataset

    def _send_telemetry(self) -> None:
        """Send no telemetry."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: batches are lists here."""
        return 0

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        return self.weights.clip(self.args.max_grad_norm)

    def _sync_replicated_trainable_parameters(self, model: torch.nn.Module) -> None:
        """Nothing: gradients are added up once for each batch, in `training_step`."""

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Tensor]], num_items_in_batch: Any = None
    ) -> Tensor:
        """One global batch: gradients of the mean loss over its pairs, added up over all micro-batches.

        Returns this process's part of the loss.
        """
        pairs, self._parts = sum(len(micro["row"]) for micro in inputs), []
        loss = torch.zeros((), device=self.args.device)
        for micro in self.ranks.share(inputs):
            self._share = len(micro["row"]) / pairs
            loss += super().training_step(model, micro)
        if self.weights.sharded:
            self._keep_step(model, inputs)
        if self.ranks.count == 1:
            self.batch_pairs = {
                name: torch.cat([part[name] for part in self._parts]).cpu() for name in self._parts[0]
            }
            return loss
        if not self.weights.sharded:
            self.ranks.add_gradients(list(self.weights.named.values()))
        names = VALUES + ("weight",) * self.use_weighting
        self.batch_pairs = self.ranks.whole([len(micro["row"]) for micro in inputs], names, self._parts)
        return loss

    def _keep_step(self, model: torch.nn.Module, inputs: list[dict[str, Tensor]]) -> None:
        """Passes without effect, up to the most of any process: all of them gather a layer together."""
        self._share = 0.0
        for _ in range(self.ranks.passes(inputs) - len(self._parts)):
            super().training_step(model, inputs[-1])
            self._parts.pop()

    def _compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], return_outputs: bool
    ) -> Tensor:
        """TRL's and our losses of one micro-batch, weighted by its share of the global batch."""
        computed: list[Any] = []
        hook = model.register_forward_hook(lambda *call: computed.append(call[-1]))
        row, smoothing = inputs.pop("row"), inputs.pop("label_smoothing")
        loss = super()._compute_loss(model, inputs, False)
        hook.remove()
        pairs = self._pairs(computed[0], inputs, smoothing)
        for weight, own in self.own_losses:
            loss = loss + weight * (pairs.weight * own(pairs)).mean()
        chosen, rejected = pairs.chosen.detach(), pairs.rejected.detach()
        if not self.train_config.needs_reference:
            scores = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
        else:
            scores = chosen - pairs.ref_chosen, rejected - pairs.ref_rejected
        self._parts.append(
            {
                "row": row,
                "chosen": pairs.whole_chosen.detach(),
                "rejected": pairs.whole_rejected.detach(),
                "chosen_score": scores[0],
                "rejected_score": scores[1],
                "loss": loss.detach().expand(len(row)),
                **({"weight": pairs.weight} if self.use_weighting else {}),
            }
        )
        return (loss * self._share).float()

    def _pairs(self, output: Any, inputs: dict[str, Tensor], smoothing: Tensor) -> Pairs:
        tokens, logps = inputs["completion_mask"].sum(1), output.log_probs
        chosen_tokens, rejected_tokens = tokens.chunk(2)
        shared = torch.minimum(chosen_tokens, rejected_tokens).repeat(2)
        beyond = torch.arange(logps.shape[1], device=logps.device) >= shared[:, None]
        chosen, rejected = torch.where(beyond, self.train_config.ld_alpha * logps, logps).sum(1).chunk(2)
        weight = torch.ones_like(smoothing)
        if self.use_weighting:
            aligned = (logps - output.log_sum_sq_probs).detach().sum(1) / tokens
            weight = torch.stack(aligned.exp().chunk(2)).prod(0)
        whole_chosen, whole_rejected = logps.sum(1).chunk(2)
        return Pairs(
            chosen,
            rejected,
            inputs["ref_chosen_logps"],
            inputs["ref_rejected_logps"],
            chosen_tokens,
            rejected_tokens,
            smoothing,
            whole_chosen,
            whole_rejected,
            weight,
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log our metrics: TRL's names, averaged over the batch's pairs."""
        self._metrics["train"].clear()
        super().log({**logs, **self.pair_metrics()} if "loss" in logs else logs, start_time)

    def pairs(self) -> list[dict[str, Any]]:
        """`batch_pairs` as one dictionary per pair."""
        columns = {name: values.tolist() for name, values in self.batch_pairs.items()}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    def pair_metrics(self) -> dict[str, float]:
        """Means over the last global batch, by TRL's names."""
        pairs, beta = self.batch_pairs, self.train_config.beta
        margins = pairs["chosen_score"] - pairs["rejected_score"]
        return {
            "loss": pairs["loss"].mean().item(),
            "rewards/chosen": beta * pairs["chosen_score"].mean().item(),
            "rewards/rejected": beta * pairs["rejected_score"].mean().item(),
            "rewards/margins": beta * margins.mean().item(),
            "rewards/accuracies": (margins > 0).double().mean().item(),
            "logps/chosen": pairs["chosen"].mean().item(),
            "logps/rejected": pairs["rejected"].mean().item(),
            **({"pair_weight": pairs["weight"].mean().item()} if "weight" in pairs else {}),
        }


def trl_losses(train: TrainConfig) -> tuple[list[str], list[float]]:
    """The losses TRL computes, and their weights."""
    weighted = [(name, weight) for name, weight in _weighted(train) if not _is_ours(name, train)]
    return [name for name, _ in weighted], [weight for _, weight in weighted]


def _weighted(train: TrainConfig) -> list[tuple[str, float]]:
    return list(zip(train.losses, train.loss_weights or (1.0,) * len(train.losses), strict=True))


def _is_ours(name: str, train: TrainConfig) -> bool:
    """A loss TRL does not compute: a user's own, SimPO, sigmoid with smoothing, sft as a mean over pairs.

    Nor hinge with WPO's weights: TRL 1.16 multiplies them in place, which a ReLU's gradient does not allow.
    """
    smoothed, weighted = bool(train.label_smoothing), train.pair_weights == "wpo"
    if name in ("sigmoid", "hinge"):
        return smoothed if name == "sigmoid" else weighted
    return is_own(name) or name in ("simpo", "sft")


def _own_losses(train: TrainConfig) -> list[tuple[float, Callable[[Pairs], Tensor]]]:
    """(weight, loss) of the losses implemented here."""
    beta = train.beta
    ours: dict[str, Callable[[Pairs], Tensor]] = {
        "simpo": lambda p: simpo_loss(
            p.chosen, p.rejected, p.chosen_tokens, p.rejected_tokens, beta, train.target_margin
        ),
        "sigmoid": lambda p: cdpo_loss(*p[:4], beta, p.label_smoothing),
        "hinge": lambda p: slic_hinge_loss(*p[:4], beta),
        "sft": lambda p: sft_loss(p.whole_chosen, p.chosen_tokens),
    }
    return [
        (weight, _users(name, beta) if is_own(name) else ours[name])
        for name, weight in _weighted(train)
        if _is_ours(name, train)
    ]


def _users(name: str, beta: float) -> Callable[[Pairs], Tensor]:
    """A loss of the user's own: checked to be one number a pair."""
    function = own_function(name, "loss")

    def loss(pairs: Pairs) -> Tensor:
        told = function(*pairs[:6], beta)
        if not isinstance(told, Tensor) or told.shape != pairs.chosen.shape:
            shape = tuple(told.shape) if isinstance(told, Tensor) else type(told).__name__
            raise InputError(
                f"the loss {name!r} gave {shape} for {pairs.chosen.shape[0]} pairs; give one each"
            )
        return told

    return loss
