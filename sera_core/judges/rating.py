"""The protocol of a rater: single answers in, ratings out; and a judge that compares two ratings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sera_core.artifacts.canonical import sha256_json
from sera_core.judges.comparison import Comparison, Verdict


@dataclass(frozen=True)
class Question:
    """One answer to one conversation."""

    prompt: Sequence[Mapping[str, str]]
    answer: str

    @property
    def key(self) -> str:
        """Equal for the same conversation and answer."""
        return sha256_json([[dict(message) for message in self.prompt], self.answer])


@dataclass(frozen=True)
class Rating:
    """A rater's number for one answer (larger is better), or why there is none."""

    value: float | None
    failure: str | None = None
    """One of `comparison.FAILURES`; None if there is a rating."""
    prompt_tokens: int | None = None
    answer_tokens: int | None = None
    """Tokens of all attempts; None if the rater does not say."""


class Rater(Protocol):
    """Rates answers one by one. Ratings of answers to the same conversation are comparable."""

    batch: int
    """Answers to hand over at once; what is rated is stored after each batch."""

    def rate(self, questions: Sequence[Question]) -> list[Rating]:
        """One rating for each answer, in their order.

        Raises:
            SeraError: no answer can be rated, such as with a key that is not valid.
        """
        ...


class RatedJudge:
    """Rates each answer once, by itself, and compares the ratings: both orders agree, and none is paid twice.

    A failed rating is not kept: the next comparison that needs it asks again.
    """

    def __init__(self, rater: Rater) -> None:
        self.rater, self.batch = rater, rater.batch
        self._known: dict[str, Rating] = {}

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison; the tokens of a rating count where it was asked for."""
        answers = [Question(c.prompt, text) for c in comparisons for text in (c.first, c.second)]
        wanted = {question.key: question for question in answers if question.key not in self._known}
        asked = dict(zip(wanted, self.rater.rate(list(wanted.values())), strict=True))
        known, unpaid = self._known | asked, dict(asked)
        self._known |= {key: rating for key, rating in asked.items() if rating.failure is None}
        both = zip(answers[0::2], answers[1::2], strict=True)
        return [_verdict(known, unpaid, first.key, second.key) for first, second in both]


def _verdict(known: Mapping[str, Rating], unpaid: dict[str, Rating], first: str, second: str) -> Verdict:
    paid = [rating for key in (first, second) if (rating := unpaid.pop(key, None)) is not None]
    tokens = (_sum([r.prompt_tokens for r in paid]), _sum([r.answer_tokens for r in paid]))
    one, other = known[first], known[second]
    if (failure := one.failure or other.failure) is not None:
        return Verdict(None, failure, *tokens)
    assert one.value is not None and other.value is not None
    better = "tie" if one.value == other.value else "A" if one.value > other.value else "B"
    return Verdict(better, None, *tokens)


def _sum(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None
