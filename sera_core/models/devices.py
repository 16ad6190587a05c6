"""Choose the torch device, and how many processes train."""

from sera_core.config import AUTO, ExecutionConfig
from sera_core.errors import InputError
from sera_core.guards.memory import accelerator_here


def device_of(wanted: str) -> str:
    """The torch device for `execution.device`; auto selects an accelerator if there is one."""
    import torch

    if wanted != "auto":
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def training_processes(execution: ExecutionConfig, batch: int) -> int:
    """Processes that train a round (`execution.processes`).

    Args:
        execution: execution settings.
        batch: `train.batch`; no more processes than that, for one without a pair would only wait.

    Raises:
        InputError: there are fewer GPUs than processes.
    """
    wanted, here = execution.processes, accelerator_here(execution.device)
    if wanted == 1 or (wanted == AUTO and not here):
        return 1
    import torch

    if wanted == AUTO:
        return max(1, min(torch.cuda.device_count(), batch))
    if here and int(wanted) > (visible := torch.cuda.device_count()):
        raise InputError(
            f"execution.processes = {wanted}, but {visible} GPUs are visible, and each process trains on one "
            'of its own; lower it, set it to "auto", or see CUDA_VISIBLE_DEVICES'
        )
    return int(wanted)
