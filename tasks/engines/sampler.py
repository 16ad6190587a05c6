"""What a sampling engine is: token ids in, token ids and their log-probabilities out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from sera_core.config import Dtype
from sera_core.errors import InputError
from sera_core.extensions import Registry

FinishReason = Literal["stop", "length"]
Finished = Callable[[int], None]
"""finished(n): so many responses of the call are complete by now."""


def no_progress(done: int) -> None:
    """Nobody listens to the progress of a call."""


@dataclass(frozen=True)
class Request:
    """One response asked for.

    Attributes:
        prompt_ids: the rendered prompt, generation prompt included.
        seed: of this response alone; it draws from a generator of its own.
    """

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Settings:
    """How to sample, the same for all requests of a call.

    Attributes:
        temperature: divides the logits, > 0.
        top_p: mass of the nucleus, in (0, 1].
        max_tokens: most tokens of a response, its end-of-turn token included.
        stop_ids: a response ends with the first of these tokens.
    """

    temperature: float
    top_p: float
    max_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sampled:
    """One response.

    Attributes:
        ids: its tokens, up to and including the first end-of-turn token; without one when cut by the limit.
        logps: Σ log π(token | before) in nats, of the model itself: before temperature and top_p.
        finish_reason: `stop` when an end-of-turn token came, `length` when the limit cut it.
    """

    ids: tuple[int, ...]
    logps: float
    finish_reason: FinishReason


class Sampler(Protocol):
    """An engine that holds one policy."""

    def sample(
        self, requests: Sequence[Request], settings: Settings, finished: Finished = no_progress
    ) -> list[Sampled]:
        """One response for each request, in the order of the requests.

        A response depends on its own prompt and seed; the rest of the call changes it by float noise at most.
        """
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def position_limit(folder: Path) -> int | None:
    """The largest number of positions of a policy folder's model, None when its config names none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    return next((config[key] for key in ("max_position_embeddings", "n_positions") if config.get(key)), None)


def check_requests(requests: Sequence[Request], settings: Settings, positions: int | None) -> None:
    """Refuse a request that no engine could answer.

    Raises:
        InputError: an empty prompt, or one that leaves no room for `max_tokens`.
    """
    for number, request in enumerate(requests):
        length = len(request.prompt_ids)
        if not length:
            raise InputError(
                f"request {number}: the prompt has no tokens; render it with its generation prompt"
            )
        if positions is not None and length + settings.max_tokens > positions:
            raise InputError(
                f"request {number}: {length} prompt and {settings.max_tokens} response tokens exceed the "
                f"model's {positions} positions; drop the prompt or lower sampling.max_tokens"
            )


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
    """Load a policy into an engine; what the engine needs is imported here.

    Args:
        engine: `transformers`, `vllm`, or `module:function` that is called as this function is.
        policy: policy or adapter folder.
        base: the policy folder an adapter belongs to.
        dtype: arithmetic.
        device: where the model lives.
        batch: responses that the transformers engine has under way at once.
        max_length: longest prompt and response together, in tokens; None: all of the model's positions.
    """
    return ENGINES.named(engine)(
        policy, base=base, dtype=dtype, device=device, batch=batch, max_length=max_length
    )


def check_engine(engine: str) -> None:
    """Refuse an engine that does not exist, before anything is loaded.

    Raises:
        InputError: unknown, not allowed, or not importable.
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
