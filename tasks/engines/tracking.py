"""Training curves for the tracker that was asked for: a run of its own for every round, ended here."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sera_core.errors import InputError

PROJECT = "sera-flow"
"""Where trackio puts runs; wandb and mlflow take theirs from WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME."""


def refuse_missing(tracking: str) -> None:
    """Raises InputError if the package is not installed."""
    if tracking != "none" and not _is_installed(tracking):
        raise InputError(
            f"execution.tracking = {tracking!r}: the package is missing; run `pip install {tracking}`"
        )


def _is_installed(package: str) -> bool:
    """A folder `wandb` of earlier runs, where the command was given, is found too and is no package."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def report_to(tracking: str) -> list[str]:
    """What transformers' trainer is to load by itself."""
    return [] if tracking in ("none", "tensorboard") else [tracking]


def trackers(tracking: str, logs: str) -> list[Any]:
    """Callbacks that transformers' trainer cannot make: TensorBoard's takes its folder from a writer only."""
    if tracking != "tensorboard":
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(logs))]


@contextmanager
def ended(tracking: str) -> Iterator[None]:
    """Ends the tracker's run that the block begins, though it fails.

    Left open, wandb's would be told the next round too, and mlflow's would stay open for ever when training
    fails. trackio ends its own. A run that was open before is its owner's.
    """
    if _is_open(tracking):
        yield
        return
    failed = True
    try:
        yield
        failed = False
    finally:
        if _is_open(tracking):
            _end(tracking, failed)


def _is_open(tracking: str) -> bool:
    package: Any = sys.modules.get(tracking)  # imported by the trainer, if it got that far
    if package is None or tracking not in ("wandb", "mlflow"):
        return False
    return (package.run if tracking == "wandb" else package.active_run()) is not None


def _end(tracking: str, failed: bool) -> None:
    package: Any = sys.modules[tracking]
    if tracking == "wandb":
        package.finish(exit_code=int(failed))
    else:
        package.end_run("FAILED" if failed else "FINISHED")
