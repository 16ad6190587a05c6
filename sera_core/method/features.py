"""The feature panel: what a response looks like, apart from whether it is good.

A *feature* is a function of a prompt's and a response's text to a number. The panel holds those that
preference data are known to be biased by: length (Singhal et al., arXiv 2310.03716), lists, headings and bold
(the style control of Arena-Hard-Auto), refusals, formulaic openings, and text taken over from the prompt.
Definitions are ours, made for English text; each is deterministic and needs the text alone.
"""

import re
from collections.abc import Sequence

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?…。！？]+(?=[\s\"'”’)\]]|$)|\n+")
_LIST_ITEM = re.compile(r"^[ \t]*(?:[-*+•]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_HEADING = re.compile(r"^[ ]{0,3}#{1,6}[ \t]+\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*(?=\S)[^*\n]+?(?<=\S)\*\*|__(?=\S)[^_\n]+?(?<=\S)__")
_FENCE = re.compile(r"^[ ]{0,3}(?:```|~~~)", re.MULTILINE)
_CANNOT = r"(?:can(?:['’]t|not| not)|could(?:n['’]t| not)|won['’]t|will not)"
_UNABLE = r"(?:unable|not able|not allowed)"
_DO = "(?:help|assist|provide|answer|discuss|comply|fulfill?|support|engage|create|write|give|do that)"
_REFUSALS = (
    rf"i(?:['’]m| am) (?:really |very |so )?(?:sorry|afraid)\b.{{0,40}}?\b(?:{_CANNOT}|{_UNABLE})",
    rf"i {_CANNOT} (?:\w+ ){{0,2}}?{_DO}",
    rf"i(?:['’]m| am) {_UNABLE} to",
    r"(?:against|violates?) (?:my|the|our) (?:\w+ )?(?:guidelines|policy|policies|programming)",
    rf"as an ai(?: language)?(?: model| assistant)?,? i (?:{_CANNOT}|don['’]t|do not|am not)",
)
_REFUSAL = re.compile(rf"\b(?:{'|'.join(_REFUSALS)})", re.IGNORECASE | re.DOTALL)
_OPENINGS = (
    "sure", "certainly", "of course", "absolutely", "definitely", "great question", "good question",
    "as an ai", "i(?:['’]m| am) sorry", "i apologi[sz]e", "thank you for", "thanks for",
    "i(?:['’]d| would) be happy to", "i(?:['’]m| am) happy to", "happy to help", "here (?:is|are)",
    "here['’]s", "no problem", "hello", "hi",
)  # fmt: skip
_OPENING = re.compile(rf"(?:{'|'.join(_OPENINGS)})\b", re.IGNORECASE)


def words_of(text: str) -> list[str]:
    """Words in lower case: runs of letters and digits, with inner apostrophes and hyphens.

    Text written without spaces, such as Chinese, is one word up to its next mark.
    """
    return _WORD.findall(text.lower())


def characters(prompt: str, response: str) -> float:
    """Length in characters (Unicode code points), outer white space left out."""
    return float(len(response.strip()))


def words(prompt: str, response: str) -> float:
    """Length in words (`words_of`)."""
    return float(len(words_of(response)))


def sentences(prompt: str, response: str) -> float:
    """Number of sentences: pieces with a word in them, ended by . ! ? or … before space, or by a new line."""
    return float(sum(bool(_WORD.search(piece)) for piece in _SENTENCE_END.split(response)))


def list_items(prompt: str, response: str) -> float:
    """Number of lines that begin with a bullet (- * + •) or a number (1. or 1)) and then text."""
    return float(len(_LIST_ITEM.findall(response)))


def headings(prompt: str, response: str) -> float:
    """Number of markdown headings: lines that begin with one to six # and a space."""
    return float(len(_HEADING.findall(response)))


def bold(prompt: str, response: str) -> float:
    """Number of bold spans (**text** or __text__) within a line."""
    return float(len(_BOLD.findall(response)))


def code_fences(prompt: str, response: str) -> float:
    """Number of fenced code blocks: lines that begin with ``` or ~~~, two a block, the last may be open."""
    return float((len(_FENCE.findall(response)) + 1) // 2)


def markdown(prompt: str, response: str) -> float:
    """Number of headings, list items, bold spans and code blocks together."""
    return float(sum(count(prompt, response) for count in (headings, list_items, bold, code_fences)))


def refusal(prompt: str, response: str) -> float:
    """1 where the response holds a phrase of refusal (such as "I can't help with"), else 0."""
    return float(_REFUSAL.search(response) is not None)


def opening(prompt: str, response: str) -> float:
    """1 where the first words are a formula (such as "Sure", "Certainly", "As an AI"), else 0."""
    return float(_OPENING.match(response.lstrip(" \t\r\n*_#\"'“")) is not None)


def word_overlap(prompt: str, response: str) -> float:
    """Share of the response's words that occur in the prompt, in [0, 1]; 0 without words."""
    return _share(words_of(response), words_of(prompt))


def trigram_overlap(prompt: str, response: str) -> float:
    """Share of the response's word trigrams that occur in the prompt, in [0, 1]; 0 without trigrams."""
    return _share(_trigrams(words_of(response)), _trigrams(words_of(prompt)))


def _trigrams(found: Sequence[str]) -> list[tuple[str, ...]]:
    return list(zip(found, found[1:], found[2:], strict=False))  # the shifted lists end one after another


def _share(parts: Sequence[object], whole: Sequence[object]) -> float:
    known = set(whole)
    return sum(part in known for part in parts) / len(parts) if parts else 0.0
