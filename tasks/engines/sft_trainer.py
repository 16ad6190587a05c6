"""TRL's SFTTrainer on token ids and labels from the store; loss and loop are TRL's.

Differences from the stock trainer:

- no data preparation, packing or truncation: ids and labels come from the store;
- a data loader batch is a whole global batch, processed in micro-batches of similar length, so that the loss
  is the mean over the answer tokens of the batch for any `micro_batch`, also in a shorter last batch;
- only the loss is logged, and TRL's telemetry is off.
"""

import tasks.engines.early_imports  # noqa: F401

# isort: split

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from sera_core.artifacts.schema import IGNORED

Row = dict[str, list[int]]


@dataclass(frozen=True)
class ExampleCollator:
    """A global batch -> micro-batches of at most `micro_batch` examples, longest first."""

    micro_batch: int

    def __call__(self, rows: Sequence[Row]) -> list[dict[str, Tensor]]:
        ordered = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
        collate = DataCollatorForLanguageModeling(pad_token_id=0)  # masked, so any id will do
        starts = range(0, len(ordered), self.micro_batch)
        return [collate.torch_call(ordered[start : start + self.micro_batch]) for start in starts]


class AnswerTrainer(SFTTrainer):
    """SFTTrainer on examples (`input_ids`, `labels`), in the data set's order.

    Attributes:
        batch_loss: mean negative log-likelihood of the answer tokens of the last global batch, in nats.
    """

    def __init__(
        self,
        model: Any,
        args: SFTConfig,
        rows: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        optimizers: tuple[Any, Any],
        callbacks: list[TrainerCallback],
        collator: ExampleCollator,
        clip: Callable[[float], Tensor],
    ) -> None:
        """`clip`: clips the gradient to a norm and returns its norm before."""
        self.clip, self.batch_loss = clip, float("nan")
        super().__init__(
            model=model,
            args=args,
            data_collator=cast(Any, collator),  # a list of batches, see training_step
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        assert self.accelerator.num_processes == 1, "several processes would need sharded checkpoints"
        assert len(cast(Dataset, self.train_dataset)) == len(rows), "TRL dropped rows"
        self.remove_callback(PrinterCallback)

    def _send_telemetry(self) -> None:
        """Send no telemetry."""

    def floating_point_ops(self, inputs: Any) -> int:
        """Not estimated: batches are lists here."""
        return 0

    def _clip_grad_norm(self, model: torch.nn.Module) -> Any:
        return self.clip(self.args.max_grad_norm)

    def training_step(
        self, model: torch.nn.Module, inputs: list[dict[str, Tensor]], num_items_in_batch: Any = None
    ) -> Tensor:
        """One global batch: gradients of the mean loss over its answer tokens, summed over micro-batches."""
        answers = torch.stack([(micro["labels"][:, 1:] != IGNORED).sum() for micro in inputs]).sum()
        answers = answers.to(self.args.device)
        loss = torch.zeros((), device=self.args.device)
        for micro in inputs:
            loss += super().training_step(model, micro, answers)
        self.batch_loss = loss.item()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log the exact loss, without TRL's means over micro-batches."""
        self._metrics["train"].clear()
        super().log({**logs, "loss": self.batch_loss} if "loss" in logs else logs, start_time)
