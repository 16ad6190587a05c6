"""Characters that act on a terminal or hide in a text, listed apart from the code that escapes them."""

HIDDEN = [
    *map(chr, [*range(0x00, 0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0)]),  # controls less \t and \n
    *map(chr, [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]),  # reading direction
    *map(chr, [0x2028, 0x2029, 0xFEFF]),  # further line ends, and the byte order mark
]
ACTING = (
    "\x1b]0;owned\x07 \x1b[2J \x1b[31mred \x9b31m \x7f \x08 \x0b\x0c \x85 \r bar "
    "\u202etxet\u202c \u2066x\u2069 \u200e\u200f\u061c \u2028\u2029 \ufeff end"
)
"""A text with some of each."""


def hidden_in(text: str) -> list[str]:
    """Those of them that a text holds."""
    return sorted(set(text) & set(HIDDEN))
