"""The sampling engine protocol: token ids in, token ids and their log-probabilities out."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from sera_core.errors import InputError

FinishReason = Literal["stop", "length"]
Finished = Callable[[int], None]
"""finished(n): called with the number of complete responses."""


def no_progress(done: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Request:
    """A request for one response.

    Attributes:
        prompt_ids: the rendered prompt, generation prompt included.
        seed: seed of this response, which has its own random generator.
    """

    prompt_ids: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class Settings:
    """How to sample, the same for all requests of a call.

    Attributes:
        temperature: divides the logits, > 0.
        top_p: mass of the nucleus, in (0, 1].
        max_tokens: maximum tokens of a response, including its end-of-turn token.
        stop_ids: a response ends at the first of these tokens.
    """

    temperature: float
    top_p: float
    max_tokens: int
    stop_ids: tuple[int, ...]


@dataclass(frozen=True)
class Sampled:
    """One response.

    Attributes:
        ids: its tokens, up to and including the first end-of-turn token; without one if cut at the limit.
        logps: Σ log π(token | before) in nats, under the model itself: before temperature and top_p.
        finish_reason: `stop` after an end-of-turn token, `length` if cut at the limit.
    """

    ids: tuple[int, ...]
    logps: float
    finish_reason: FinishReason


class Sampler(Protocol):
    """An engine that holds one policy."""

    def sample(
        self, requests: Sequence[Request], settings: Settings, finished: Finished = no_progress
    ) -> list[Sampled]:
        """One response per request, in the order of the requests.

        A response depends on its prompt and seed; other requests change it by float noise at most.
        """
        ...

    def close(self) -> None:
        """Free the memory."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """An engine that begins with later requests before the earlier ones are complete."""

    def enqueue(self, requests: Sequence[Request], settings: Settings) -> None:
        """Begin with requests that later calls of `sample` will ask for, with the same settings."""
        ...


def position_limit(folder: Path) -> int | None:
    """Maximum positions of a policy folder's model; None if its config sets none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    return next((config[key] for key in ("max_position_embeddings", "n_positions") if config.get(key)), None)


def check_requests(requests: Sequence[Request], settings: Settings, positions: int | None) -> None:
    """Refuse invalid requests.

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
