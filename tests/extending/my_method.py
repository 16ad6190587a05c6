"""Code of a user's own: one of each kind that the loop can be extended with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import logsigmoid

from sera_core.artifacts.local_store import LocalStore
from sera_core.artifacts.upkeep import LocalUpkeep, Upkeep
from tasks.engines.hf_sampler import HFSampler


def middle(margins: np.ndarray, *, fraction: float, seed: int) -> np.ndarray:
    """Selection rule: the middle of the margins."""
    low, high = np.quantile(margins, [0.5 - fraction / 2, 0.5 + fraction / 2])
    return (margins >= low) & (margins <= high)


def neighbours(rewards: np.ndarray) -> Sequence[tuple[int, int]]:
    """Pairing rule: each response with the next worse one."""
    places = range(len(rewards) - 1)
    return [(place, place + 1) for place in places if rewards[place] > rewards[place + 1]]


def dpo_by_hand(
    chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *rest: Any
) -> Tensor:
    """Loss: DPO's (eq. 7), in nats; `rest` is the tokens of both and beta."""
    return -logsigmoid(rest[-1] * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def engine(policy: Path, **settings: Any) -> HFSampler:
    """Sampling engine: transformers, two responses at once."""
    settings.pop("max_length")
    return HFSampler(policy, **{**settings, "batch": 2})


def vowels(prompt: str, response: str) -> float:
    """Feature: vowels in the response."""
    return sum(letter in "aeiou" for letter in response.lower())


def fewer_vowels(prompt: str, first: str, second: str) -> str:
    """Judge: the answer with fewer vowels."""
    one, other = vowels(prompt, first), vowels(prompt, second)
    return "tie" if one == other else "A" if one < other else "B"


def undecided(*_: str) -> str:
    """A judge that is none."""
    return "both"


class Wrapped:
    """A store class of its own; what it does not define is done by a local store."""

    def __init__(self, url: str) -> None:
        self.local = LocalStore(Path("/" + url.partition("://")[2]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.local, name)

    def upkeep(self) -> Upkeep:
        """Overwrites, ages and listings."""
        return LocalUpkeep(self.local)


SERA_STORES = {"elsewhere": lambda url, _: Wrapped(url)}
"""Stores by the scheme of their URL."""


def not_a_bool(margins: np.ndarray, **_: Any) -> np.ndarray:
    """A selection rule that is none."""
    return margins


def backwards(rewards: np.ndarray) -> Sequence[tuple[int, int]]:
    """A pairing rule that prefers the worse response."""
    return [(1, 0)]


def mean_of_all(chosen: Tensor, *_: Any) -> Tensor:
    """A loss that is one number for all pairs."""
    return chosen.mean()
