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
    count = _processes(execution, execution.processes, "execution.processes")
    return min(count, batch) if execution.processes == AUTO else count


def replica_processes(execution: ExecutionConfig) -> int:
    """Processes of this machine that sample and score (`execution.replicas`).

    Raises:
        InputError: there are fewer GPUs than processes.
    """
    return _processes(execution, execution.replicas, "execution.replicas")


def _processes(execution: ExecutionConfig, wanted: int | str, setting: str) -> int:
    here = accelerator_here(execution.device)
    if wanted == 1 or (wanted == AUTO and not here):
        return 1
    import torch

    visible = torch.cuda.device_count() if here else 0
    if wanted == AUTO:
        return max(1, visible)
    if here and int(wanted) > visible:
        raise InputError(
            f"{setting} = {wanted}, but {visible} GPUs are visible, and each process computes on one "
            'of its own; lower it, set it to "auto", or see CUDA_VISIBLE_DEVICES'
        )
    return int(wanted)
