"""TRL's own trainer on our token ids, as the peer of scoring and of training."""

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import DPOConfig, DPOTrainer

from tests.benchmarks.speed.data import Item

BATCH = 8
"""Pairs a batch of `compute_ref_log_probs`."""


class Stock(DPOTrainer):
    """DPOTrainer that takes token ids and reference log-probabilities as they are, and sends no telemetry."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _send_telemetry(self) -> None:
        """Send none."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.remove_callback(PrinterCallback)


def arguments(folder: str, device: str = "cpu", **changes: Any) -> DPOConfig:
    """Settings that trainer and peer share."""
    return DPOConfig(
        output_dir=folder,
        num_train_epochs=1,
        use_cpu=device == "cpu",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        train_sampling_strategy="sequential",
        **{"bf16": False, **changes},
    )


def trl_scorer(model: Any, tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Item]], np.ndarray]:
    """`DPOTrainer.compute_ref_log_probs` over padded batches of pairs, in the order of the items."""
    with tempfile.TemporaryDirectory() as scratch:
        blank = {"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [1]}
        trainer = Stock(
            model=model,
            args=arguments(scratch, model.device.type),
            train_dataset=Dataset.from_list([{**blank, "ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}]),
            processing_class=tokenizer,
        )

    def score(items: Sequence[Item]) -> np.ndarray:
        values: list[float] = []
        for start in range(0, len(items), 2 * BATCH):
            some = items[start : start + 2 * BATCH]
            pairs = [
                {"prompt_ids": chosen[0], "chosen_ids": chosen[1], "rejected_ids": rejected[1]}
                for chosen, rejected in zip(some[0::2], some[1::2], strict=True)
            ]
            inputs = {
                name: value.to(model.device) if isinstance(value, torch.Tensor) else value
                for name, value in trainer.data_collator(pairs).items()
            }
            with torch.inference_mode():
                sides = trainer.compute_ref_log_probs(trainer.model, inputs)
            values += torch.stack([side.double() for side in sides], 1).flatten().tolist()
        return np.array(values)

    return score
