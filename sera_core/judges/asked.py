"""A language model as a judge or a rater: asked in words, answers in JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sera_core.judges.comparison import Comparison, Verdict, as_text
from sera_core.judges.prompts import compared_text, rated_text
from sera_core.judges.rating import Question, Rating


@dataclass(frozen=True)
class Answer:
    """What a model said to one question, or why it said nothing usable; tokens are those of all attempts."""

    value: Any
    failure: str | None
    prompt_tokens: int | None
    answer_tokens: int | None


class Model(Protocol):
    """A model that is asked one form of question."""

    batch: int
    """Questions to hand over at once."""

    def answers(self, texts: Sequence[str]) -> list[Answer]:
        """One answer for each question.

        Raises:
            SeraError: no question can be answered, such as with a key that is not valid.
        """
        ...


class AskedJudge:
    """Asks which of two answers is better."""

    def __init__(self, model: Model, template: str) -> None:
        self.model, self.template, self.batch = model, template, model.batch

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison."""
        found = self.model.answers([compared_text(self.template, one) for one in comparisons])
        return [Verdict(a.value, a.failure, a.prompt_tokens, a.answer_tokens) for a in found]


class AskedRater:
    """Asks for a rating, 1 to 10, of a single answer."""

    def __init__(self, model: Model, template: str) -> None:
        self.model, self.template, self.batch = model, template, model.batch

    def rate(self, questions: Sequence[Question]) -> list[Rating]:
        """One rating for each answer."""
        texts = [rated_text(self.template, as_text(one.prompt), one.answer) for one in questions]
        found = self.model.answers(texts)
        return [Rating(a.value, a.failure, a.prompt_tokens, a.answer_tokens) for a in found]
