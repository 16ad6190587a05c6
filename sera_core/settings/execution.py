"""How the work is done."""

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from sera_core.settings.kinds import AUTO, Part, Positive, Size


def _ray_address(address: str) -> str:
    if address not in ("", "auto", "local") and not re.fullmatch(
        r"[^\s:/@]+:[0-9]{1,5}|\[[0-9a-fA-F:]+\]:[0-9]{1,5}", address
    ):
        raise ValueError('give host:port of a Ray cluster\'s head (without "ray://"), "auto" or "local"')
    return address


class ExecutionConfig(Part):
    """How the work is done. These settings change no result, so changing them recomputes nothing."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to compute on."""
    child: Literal["auto", "always", "never"] = "auto"
    """Run scoring, sampling, training and evaluation in process groups of their own, which free all memory at
    the end and stop when the run is cancelled. Steps that only read a policy share one. auto: only on an
    accelerator."""
    processes: Size = 1
    """Processes of this machine that train a round together, each on a GPU of its own (on a CPU: with its
    part of the threads). `train.batch` is shared by all of them. auto: one for each visible GPU."""
    shard_weights: bool = False
    """Share weights, gradients and optimizer moments by rows among the `processes`, so that each holds its
    part of them and not all (torch's FSDP2). They then exchange the weights in every forward and backward
    pass."""
    distribute: Literal["none", "processes", "ray"] = "none"
    """Who samples and scores: this process (none); several processes of this machine, each on a GPU of its
    own (on a CPU: with its part of the threads); or workers on a Ray cluster, with the extra `ray`. Each
    loads the policy and takes shards of 64 prompts or 128 rows; a lost worker's shards are done by others.
    Only vLLM's responses and, on a CPU, the number of threads change what is written, by float noise."""
    replicas: Size = 1
    """Workers that sample and score. auto: one for each visible GPU, or as many as the Ray cluster holds."""
    gpus_per_replica: Annotated[float, Field(ge=0)] | None = None
    """GPUs, or a part of one, that Ray keeps for each worker, which computes on one of them. Empty: 1 if the
    cluster has any and `execution.device` is not cpu. 0: compute on the CPU, with a part of its cores."""
    address: Annotated[str, AfterValidator(_ray_address)] = ""
    """Ray cluster: `host:port`; auto: the one that this machine belongs to; local: one on this machine that
    ends with the run. Empty: RAY_ADDRESS, else like auto, else like local. All its machines must reach the
    store, and have the same packages."""
    micro_batch: Size = AUTO
    """Pairs per forward pass in training; gradients accumulate to `train.batch`. auto: 1 on a CPU, where more
    are no faster; on an accelerator what its free memory holds."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: training takes less memory and
    about a third more time."""
    tokens_per_batch: Size = AUTO
    """Maximum tokens per scoring batch. auto: 2048 on a CPU; on an accelerator what its free memory holds."""
    sampling_batch: Size = AUTO
    """Responses that the transformers engine samples at once. auto: 32 on a CPU; on an accelerator what its
    free memory holds, at most 256."""
    limit: str | None = None
    """Prefect concurrency limit. A deployed run holds one of its slots while a step uses the device; empty:
    `sera-device` on an accelerator, none on CPU."""
    accept_racy_store: bool = False
    """Accept an object store in which two racing writers can both succeed (a test before first use detects
    this; `sera doctor` repeats it). Safe only with a single process: a second one may silently replace
    records."""
    checkpoint_steps: Annotated[int, Field(ge=0)] = 50
    """Optimizer steps between training checkpoints (0: none)."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept in the store during training, each three times the size of the trained weights. All
    are deleted when training is done."""
    tracking: Literal["none", "tensorboard", "wandb", "mlflow", "trackio"] = "none"
    """Where TRL logs training curves, as one tracker run `<run>-round-<n>` per round (`…-fold-<i>` for a fold
    policy). tensorboard writes to `./sera-logs/<run>/round-<n>`; the others follow their own settings
    (WANDB_PROJECT, MLFLOW_TRACKING_URI, TRACKIO_DIR). With none, nothing is sent anywhere."""
