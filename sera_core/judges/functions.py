"""Judges and raters that are a function: the controls, and one of the user's own."""

from collections.abc import Callable, Sequence
from math import isfinite

from sera_core.errors import InputError
from sera_core.guards.shown import one_line
from sera_core.judges.comparison import Better, Comparison, Verdict, as_text
from sera_core.judges.rating import Question, Rating
from sera_core.method.features import words

Compare = Callable[[str, str, str], str]
"""compare(prompt, first, second) -> "A", "B" or "tie"."""
Rate = Callable[[str, str], float]
"""rate(prompt, response) -> a number, larger is better."""


def word_count(prompt: str, first: str, second: str) -> str:
    """More words win; equal numbers are a tie. What a judge must beat to be believed."""
    one, other = words(prompt, first), words(prompt, second)
    return "tie" if one == other else "A" if one > other else "B"


def constant(prompt: str, first: str, second: str) -> str:
    """The first answer wins, whatever it is: the control for the order-flip rate."""
    return "A"


class FunctionJudge:
    """A function as a judge."""

    batch = 4096

    def __init__(self, name: str, compare: Compare) -> None:
        self.name, self.compare = name, compare

    def judge(self, comparisons: Sequence[Comparison]) -> list[Verdict]:
        """One verdict for each comparison."""
        return [Verdict(self._better(item)) for item in comparisons]

    def _better(self, item: Comparison) -> Better:
        try:
            better = self.compare(as_text(item.prompt), item.first, item.second)
        except Exception as error:  # the user's own code may raise anything
            raise InputError(f"the judge {self.name!r} failed: {one_line(error)}") from error
        if better in ("A", "B", "tie"):
            return better
        raise InputError(
            f'the judge {self.name!r} returned {str(better)!r:.60}; it must return "A", "B" or "tie"'
        )


class FunctionRater:
    """A function as a rater."""

    batch = 4096

    def __init__(self, name: str, function: Rate) -> None:
        self.name, self.function = name, function

    def rate(self, questions: Sequence[Question]) -> list[Rating]:
        """One rating for each answer."""
        return [self._rating(question) for question in questions]

    def _rating(self, question: Question) -> Rating:
        try:
            value = float(self.function(as_text(question.prompt), question.answer))
        except Exception as error:  # the user's own code may raise anything
            raise InputError(f"the rater {self.name!r} failed: {one_line(error)}") from error
        return Rating(value) if isfinite(value) else Rating(None, "non_finite")
