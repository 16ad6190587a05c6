"""Training steps of our trainer beside the stock DPOTrainer's: same pairs, batches and reference values."""

import statistics
import tempfile
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from sera_core.config import TrainConfig
from sera_core.models.logprobs import sequence_logps
from sera_core.models.policies import load_tokenizer
from tasks.engines.dpo_trainer import ReviewedDPOTrainer
from tests.benchmarks.speed.data import Bench
from tests.benchmarks.speed.peers import Stock, arguments
from tests.benchmarks.speed.timing import now

MICRO_BATCH = 4


class Steps(TrainerCallback):
    """Seconds and loss of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(now() - self._start)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(logs["loss"])


def training(bench: Bench, steps: int) -> dict[str, Any]:
    """Full fine-tuning by dtype of the products (bfloat16: autocast), and LoRA in float32 as `lora`."""
    rows = _with_references(bench, steps * bench.batch)
    found = {dtype: _beside(bench, rows, dtype, "full") for dtype in bench.dtypes}
    return {**found, "lora": _beside(bench, rows, "float32", "lora")}


def _with_references(bench: Bench, count: int) -> list[dict[str, Any]]:
    rows = (bench.rows * -(-count // len(bench.rows)))[:count]
    items = [(row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    values = sequence_logps(bench.policy("float32"), items).reshape(-1, 2)
    return [
        {
            **row,
            "ref_chosen_logps": float(chosen),
            "ref_rejected_logps": float(rejected),
            "row": number,
            "label_smoothing": 0.0,
        }
        for number, (row, (chosen, rejected)) in enumerate(zip(rows, values, strict=True))
    ]


def _beside(bench: Bench, rows: list[dict[str, Any]], dtype: str, method: str) -> dict[str, Any]:
    ours, stock = (_train(bench, rows, dtype, method, who) for who in ("ours", "stock"))
    apart = [abs(a - b) for a, b in zip(ours.losses, stock.losses, strict=True)]
    # without the first step, which allocates
    seconds = [statistics.median(found.seconds[1:] or found.seconds) for found in (ours, stock)]
    return {
        "ratio_stock": round(seconds[1] / seconds[0], 3),
        "loss_max_diff": max(apart),
        "pairs_per_second": round(bench.batch / seconds[0], 3),
        "stock_pairs_per_second": round(bench.batch / seconds[1], 3),
        "steps": len(apart),
    }


def _train(bench: Bench, rows: list[dict[str, Any]], dtype: str, method: str, who: str) -> Steps:
    model, steps = bench.policy("float32"), Steps()
    if method == "lora":
        torch.manual_seed(0)
        config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    tokenizer, bf16 = load_tokenizer(bench.folder), dtype == "bfloat16"
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, weight_decay=0)
    optimizers = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))
    with tempfile.TemporaryDirectory() as scratch:
        if who == "stock":
            names = ("prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps")
            trainer = Stock(
                model=model,
                args=arguments(
                    scratch,
                    bench.device,
                    per_device_train_batch_size=MICRO_BATCH,
                    gradient_accumulation_steps=bench.batch // MICRO_BATCH,
                    bf16=bf16,
                ),
                train_dataset=Dataset.from_list([{name: row[name] for name in names} for row in rows]),
                processing_class=tokenizer,
                callbacks=[steps],
                optimizers=optimizers,
            )
        else:
            extra = {"remove_unused_columns": False, "router_aux_loss_coef": 0.0}
            trainer = ReviewedDPOTrainer(
                model,
                TrainConfig(method="lora" if method == "lora" else "full", batch=bench.batch),
                arguments(scratch, bench.device, per_device_train_batch_size=bench.batch, bf16=bf16, **extra),
                Dataset.from_list(rows),
                tokenizer,
                optimizers,
                [steps],
                MICRO_BATCH,
                True,
            )
        trainer.train()
    return steps
