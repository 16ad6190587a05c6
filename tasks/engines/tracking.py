"""Send training curves to an experiment tracker, with a separate tracker run for every round."""

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
    """Whether a package is installed; a local folder `wandb` from earlier runs does not count."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def report_to(tracking: str) -> list[str]:
    """The value of transformers' `report_to`."""
    return [] if tracking in ("none", "tensorboard") else [tracking]


def trackers(tracking: str, logs: str) -> list[Any]:
    """Extra callbacks: TensorBoard's, because its folder can only be set through a writer."""
    if tracking != "tensorboard":
        return []
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations.integration_utils import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(logs))]


@contextmanager
def ended(tracking: str) -> Iterator[None]:
    """End the tracker run that the block starts, even if the block fails.

    Otherwise wandb would log the next round to the same run, and mlflow's run would stay open after a
    failure. trackio ends its runs itself. A tracker run that was open before is left open.
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
