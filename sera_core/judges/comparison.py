"""The protocol of a judge: comparisons in, verdicts out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Better = Literal["A", "B", "tie"]
"""Which place holds the better answer: A the first one shown, B the second."""
FAILURES = {
    "timeout": "the judge did not answer in time",
    "connection": "the judge could not be reached",
    "rate_limited": "the judge asked to wait, too often",
    "server_error": "the judge's server failed",
    "refused": "the judge refused the request",
    "nonsense": "the answer was not in the form asked for",
    "too_long": "the conversation is longer than the model's context",
    "non_finite": "a score was not finite",
    "template": "the reward model's chat template refused the conversation",
}
"""Why a comparison has no verdict."""


@dataclass(frozen=True)
class Comparison:
    """Two answers to one conversation, in the order in which the judge sees them."""

    prompt: Sequence[Mapping[str, str]]
    first: str
    second: str


@dataclass(frozen=True)
class Verdict:
    """A judge's answer to one comparison, or why there is none; tokens are those of all its attempts."""

    better: Better | None
    failure: str | None = None
    """One of FAILURES; None if there is a verdict."""
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    """None if the judge does not say."""


class Judge(Protocol):
    """Compares pairs of answers."""

    batch: int
    """Comparisons to hand over at once; what is answered is stored after each batch."""

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison, in their order.

        Raises:
            SeraError: no comparison can be answered, such as with a key that is not valid.
        """
        ...


def as_text(prompt: Sequence[Mapping[str, str]]) -> str:
    """A conversation as text: a single user message alone, else each message under its role."""
    if [message["role"] for message in prompt] == ["user"]:
        return prompt[0]["content"]
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in prompt)
