"""Choose a sampling engine by name and load a policy into it."""

from pathlib import Path

from sera_core.config import Dtype
from tasks.engines.sampler import Sampler


def open_sampler(
    engine: str,
    policy: Path,
    *,
    base: Path | None = None,
    dtype: Dtype = "float32",
    device: str = "cpu",
    batch: int = 32,
    max_length: int | None = None,
) -> Sampler:
    """Load a policy into an engine; only that engine's libraries are imported.

    Args:
        engine: `transformers` or `vllm`.
        policy: policy or adapter folder.
        base: the adapter's base policy folder.
        dtype: dtype of the computation.
        device: device of the model.
        batch: maximum responses in a batch of the transformers engine.
        max_length: maximum tokens of prompt and response together; None: all of the model's positions.
    """
    if engine == "vllm":
        from tasks.engines.vllm_sampler import VLLMSampler

        return VLLMSampler(policy, base=base, dtype=dtype, device=device, max_length=max_length)
    from tasks.engines.hf_sampler import HFSampler

    return HFSampler(policy, base=base, dtype=dtype, device=device, batch=batch)
