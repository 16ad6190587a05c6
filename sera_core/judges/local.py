"""A chat model in a local folder as a judge or a rater, without a server: it generates its answers itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sera_core.judges.asked import Answer
from sera_core.judges.prompts import Form


@dataclass(frozen=True)
class Generated:
    """What the model generated to one text, and how many tokens both have."""

    text: str
    prompt_tokens: int
    answer_tokens: int


Generate = Callable[[Sequence[str]], list[Generated | None]]
"""The most likely answer to each text; None where the text does not fit into the model's context."""
OpenGenerate = Callable[[Path, str], Generate]
"""Opens the model of a folder on a device."""


class LocalModel:
    """Asks each question once: the same answer would come again."""

    batch = 64

    def __init__(self, generate: Generate, form: Form) -> None:
        self.generate, self.form = generate, form

    def answers(self, texts: Sequence[str]) -> list[Answer]:
        """One answer for each question."""
        return [self._answer(found) for found in self.generate(texts)]

    def _answer(self, found: Generated | None) -> Answer:
        if found is None:
            return Answer(None, "too_long", None, None)
        value = self.form.read(found.text)
        failure = "nonsense" if value is None else None
        return Answer(value, failure, found.prompt_tokens, found.answer_tokens)
