"""Tokenise rendered text: special tokens of the template become control tokens, those in the data plain text.

A tokenizer recognises special tokens anywhere in a text. If the data contains one, the rendered text is split
at the template's own special tokens, and each piece is tokenised as plain text, to its ids in the whole text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PRIVATE_USE = range(0xE000, 0xF900)


class Rendered(NamedTuple):
    """A template's output, and the spans where special tokens come from the data (plain text)."""

    text: str
    plain: tuple[tuple[int, int], ...] = ()

    def after(self, start: int) -> Rendered:
        """The text from this character on."""
        spans = tuple((begin - start, end - start) for begin, end in self.plain if begin >= start)
        return Rendered(self.text[start:], spans)

    def followed_by(self, other: Rendered) -> Rendered:
        """The concatenation of both."""
        shift = len(self.text)
        spans = ((begin + shift, end + shift) for begin, end in other.plain)
        return Rendered(self.text + other.text, (*self.plain, *spans))


def unmarked(text: str, mark: str) -> Rendered:
    """A template's output with the marks removed; text between two marks is plain text."""
    pieces = text.split(mark)
    spans, length = [], 0
    for number, piece in enumerate(pieces):
        if number % 2 == 1:
            spans.append((length, length + len(piece)))
        length += len(piece)
    return Rendered("".join(pieces), tuple(spans))


class Encoder:
    """Token ids of rendered text under one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def specials(self) -> dict[str, int]:
        """Text and id of every special token."""
        added = {index for index, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        ids = sorted(added | set(self._tokenizer.all_special_ids))
        return {
            str(token): index
            for token, index in zip(self._tokenizer.convert_ids_to_tokens(ids), ids, strict=True)
        }

    @cached_property
    def marks_starts(self) -> bool:
        """Whether the tokenizer encodes the start of a text differently (sentencepiece's leading space)."""
        alone, behind = self.encode(Rendered("x")), self.encode(Rendered("\nx"))
        return behind[-len(alone) :] != alone

    # ------------------------------------------------------------------------------------------- marks

    def spell_special_tokens(self, texts: Iterable[str]) -> bool:
        """Whether any text contains a special token."""
        return any(self._pattern.search(text) for text in texts)

    def mark_for(self, texts: Sequence[str]) -> str | None:
        """A character that occurs in none of the texts; None if no text contains a special token."""
        if not self.spell_special_tokens(texts):
            return None
        used = set("".join(texts))
        return next(chr(code) for code in _PRIVATE_USE if chr(code) not in used)

    def marked(self, text: str, mark: str) -> str:
        """The text with a mark before and after every special token."""
        return self._pattern.sub(lambda match: mark + match[0] + mark, text)

    # ------------------------------------------------------------------------------------------- encoding

    def encode(self, rendered: Rendered) -> list[int]:
        """Token ids of rendered text."""
        if not rendered.plain:
            return self._tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
        ids: list[int] = []
        start = 0
        for match in self._pattern.finditer(rendered.text):
            if any(match.start() < end and begin < match.end() for begin, end in rendered.plain):
                continue
            before = rendered.text[start : match.start()]
            takes_left, takes_right = self._strips.get(match[0], (False, False))
            ids += self._piece(before.rstrip() if takes_left else before, start == 0)
            ids.append(self.specials[match[0]])
            start = match.end()
            if takes_right:
                start += len(rendered.text) - start - len(rendered.text[start:].lstrip())
        return ids + self._piece(rendered.text[start:], start == 0)

    def encode_many(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        """`encode` of each text, with the tokenizer's parallel batch method."""
        texts = sorted({entry.text for entry in rendered if not entry.plain})
        ids = self._tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        known = dict(zip(texts, ids, strict=True))
        return [self.encode(entry) if entry.plain else list(known[entry.text]) for entry in rendered]

    def encode_behind(self, prompt: Rendered, response: Rendered) -> list[int]:
        """Ids of the response after its prompt; if a token crosses the boundary, its ids alone."""
        whole, before = self.encode(prompt.followed_by(response)), self.encode(prompt)
        return whole[len(before) :] if whole[: len(before)] == before else self.encode(response)

    # ------------------------------------------------------------------------------------------- pieces

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.specials, key=lambda text: (-len(text), text))
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    @cached_property
    def _strips(self) -> dict[str, tuple[bool, bool]]:
        """Whether a special token strips the white space on its left, and on its right.

        Phi-3's do: `<|end|>` and the line break after it are one token.
        """
        added = self._tokenizer.added_tokens_decoder.values()
        return {str(token): (token.lstrip, token.rstrip) for token in added if token.special}

    @cached_property
    def _marks_whole_texts_only(self) -> bool:
        """Whether the tokenizer encodes a piece after a special token differently from the piece alone."""
        if not self.specials:
            return False
        special, index = next(iter(self.specials.items()))
        return self.encode(Rendered(special + "x")) != [index, *self.encode(Rendered("x"))]

    def _piece(self, text: str, first: bool) -> list[int]:
        """Ids of a piece without special tokens: the start of the text, or the text after a special token."""
        ids = self._plain(text)
        if first or not text or not self._marks_whole_texts_only:
            return ids
        before, both = self._plain("\n"), self._plain("\n" + text)
        return both[len(before) :] if both[: len(before)] == before else ids

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
