"""Escape untrusted text (from data, models and errors) before a terminal, log or page shows it.

Control characters can drive a terminal (clear it, write the clipboard), bidi controls reorder text, and some
characters are invisible. All of these are escaped; text in any script stays unchanged.
"""

import json
import re
from typing import Any

_HIDDEN = re.compile(
    "\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{3,6}\U000e007f"  # a region's flag
    "|["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 less \t and \n, DEL, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # reading direction
    "\u2028\u2029"  # further line ends
    "\u180e\u2060-\u2065\u206a-\u206f\ufeff\ufff9-\ufffb"  # invisible
    "\ud800-\udfff"  # lone surrogates, which cannot be encoded
    "\U000e0000-\U000e007f"  # tags
    "]"
)
"""The joiners U+200C and U+200D are not escaped: scripts and emoji need them."""


def shown(text: str) -> str:
    r"""Text with control and invisible characters escaped: `\x1b`, `\u202e`.

    Line feeds and tabs stay; Windows line ends become line feeds.
    """
    return _HIDDEN.sub(_escaped, text.replace("\r\n", "\n"))


def shown_line(text: str) -> str:
    r"""As `shown`, on one line: a line feed is shown as `\n`, a tab as `\t`."""
    return shown(text).replace("\n", r"\n").replace("\t", r"\t")


def one_line(error: Exception) -> str:
    """What a library's error says, as part of a sentence of ours."""
    said = " ".join(shown_line(" ".join(str(error).split())).split())
    return f"{said:.300}" if said else type(error).__name__


def shown_json(value: Any, **layout: Any) -> str:
    """JSON that is safe to print: the same value, with JSON's escapes where needed.

    On one line, unless `layout` has other arguments of json.dumps (`indent`, `sort_keys`).
    """
    return _HIDDEN.sub(_json_escaped, json.dumps(value, ensure_ascii=False, **layout))


def _escaped(found: re.Match[str]) -> str:
    if _is_flag(found):
        return found[0]
    code = ord(found[0])
    if code == 0x0D:
        return r"\r"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _json_escaped(found: re.Match[str]) -> str:
    return found[0] if _is_flag(found) else json.dumps(found[0])[1:-1]


def _is_flag(found: re.Match[str]) -> bool:
    return len(found[0]) > 1
