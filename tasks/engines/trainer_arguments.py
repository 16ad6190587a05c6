"""Arguments that all of TRL's trainers get here."""

from pathlib import Path
from typing import Any

from sera_core.config import ExecutionConfig, TrainConfig
from sera_core.models.devices import device_of
from tasks.engines.tracking import PROJECT, report_to


def trainer_arguments(
    scratch: Path, train: TrainConfig, seed: int, execution: ExecutionConfig, tracked_as: str
) -> dict[str, Any]:
    """Keyword arguments of DPOConfig and SFTConfig.

    One pass over the rows in the given order, one data loader batch and one log line for each optimizer step,
    nothing saved.

    Args:
        scratch: a folder for the trainer's own files.
        train: batch and gradient clipping.
        seed: of the trainer.
        execution: device, memory and tracking.
        tracked_as: name of the tracker's run.
    """
    return {
        "output_dir": str(scratch),
        "per_device_train_batch_size": train.batch,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "max_grad_norm": train.max_grad_norm,
        "seed": seed,
        "bf16": False,  # no autocast: the weights have the dtype to compute in
        "use_cpu": device_of(execution.device) == "cpu",
        "gradient_checkpointing": execution.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "router_aux_loss_coef": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": report_to(execution.tracking),
        "project": PROJECT,
        "run_name": tracked_as,
        "disable_tqdm": True,
        "log_level": "error",
    }
