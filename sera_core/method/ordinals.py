"""Ids as numbers that sort as the ids do: millions of numbers are sorted and looked up faster than texts."""

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8, UInt64

DIGITS = 16
"""Hex digits of the ids of pairs and prompts."""
_AT_ONCE = 1 << 16
_VALUES = np.full(256, 255, dtype=np.uint8)
_VALUES[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)


def ordinals(ids: Sequence[str] | np.ndarray) -> UInt64[np.ndarray, " id"]:
    """A number for each id: equal for equal ids, and in the ids' order (by code point).

    Ids of 16 hex digits are the number they write; others get their place among the distinct ids.

    Args:
        ids: texts, or numpy's texts (U) or UTF-8 bytes (S).
    """
    texts = _texts(ids)
    numbers, fits = hex_numbers(texts)
    if fits.all():
        return numbers
    return np.unique(texts, return_inverse=True)[1].astype(np.uint64)


def hex_numbers(ids: np.ndarray) -> tuple[UInt64[np.ndarray, " id"], Bool[np.ndarray, " id"]]:
    """(the number that each id writes, whether it is 16 lowercase hex digits); 0 where it is not.

    Args:
        ids: numpy's texts or bytes; an array of another kind has no such ids.
    """
    numbers, fits = np.zeros(ids.shape, dtype=np.uint64), np.zeros(ids.shape, dtype=bool)
    unit = {"S": np.uint8, "U": np.uint32}.get(ids.dtype.kind)
    if unit is None or not ids.size or ids.dtype.itemsize < DIGITS * unit().itemsize:
        return numbers, fits
    letters = np.ascontiguousarray(ids).view(unit).reshape(ids.size, -1)
    for start in range(0, ids.size, _AT_ONCE):
        rows = slice(start, start + _AT_ONCE)
        some = letters[rows]
        digits = _VALUES[np.minimum(some[:, :DIGITS], 255)]
        fits[rows] = (digits.max(axis=1) < 16) & ~some[:, DIGITS:].any(axis=1)
        pairs = digits[:, 0::2] << 4 | digits[:, 1::2]
        numbers[rows] = np.where(fits[rows], pairs.view(">u8")[:, 0], 0)
    return numbers, fits


def hashes(beginning: str, ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """Numbers that sort as the sha256 digests of `beginning` followed by each id."""
    begun, first = hashlib.sha256(beginning.encode()), 0
    found = np.empty((len(ids), begun.digest_size), dtype=np.uint8)
    for some in _encoded(ids):
        digests = list[bytes]()
        for id in some:
            digest = begun.copy()  # faster than to hash the beginning again
            digest.update(id)
            digests.append(digest.digest())
        rows = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(len(some), -1)
        found[first : first + len(some)] = rows
        first += len(some)
    return sortable(found)


def sortable(digests: UInt8[np.ndarray, "id byte"]) -> np.ndarray:
    """Numbers of the digests' first eight bytes; the whole digests, as bytes, if two begin alike."""
    first = np.ascontiguousarray(digests[:, :8]).view(">u8")[:, 0].astype(np.uint64)
    if has_repeats(first):
        return np.ascontiguousarray(digests).view(f"S{digests.shape[1]}")[:, 0]
    return first


def has_repeats(numbers: np.ndarray) -> bool:
    """Whether two are equal."""
    ascending = np.sort(numbers)
    return bool((ascending[1:] == ascending[:-1]).any())


def sorted_by(
    numbers: UInt64[np.ndarray, " id"], *keys: Float[np.ndarray, " id"] | Bool[np.ndarray, " id"]
) -> Int[np.ndarray, " id"]:
    """`np.lexsort((numbers, *keys))` of distinct numbers, without nan: by the last key first, ties by number.

    Faster, because the numbers are looked at only where all keys are equal.
    """
    if not keys:
        return np.argsort(numbers)
    order = np.argsort(keys[0])
    for key in keys[1:]:
        order = order[np.argsort(key[order], kind="stable")]
    ends = np.ones(order.size, dtype=bool)
    ends[:-1] = False
    for key in keys:
        ascending = key[order]
        ends[:-1] |= ascending[1:] != ascending[:-1]
    tied = ~ends
    tied[1:] |= ~ends[:-1]
    rows, runs = order[tied], (np.cumsum(ends) - ends)[tied]
    order[tied] = rows[np.lexsort((numbers[rows], runs))]
    return order


def _texts(ids: Sequence[str] | np.ndarray) -> np.ndarray:
    """The ids as numpy's texts or bytes."""
    held = isinstance(ids, np.ndarray) and ids.dtype.kind in "SU"
    return np.asarray(ids) if held else np.asarray(ids, dtype=np.str_)


def _encoded(ids: Sequence[str] | np.ndarray) -> Iterator[list[bytes]]:
    """The ids in UTF-8, some at a time."""
    texts = _texts(ids)
    for start in range(0, texts.size, _AT_ONCE):
        some = texts[start : start + _AT_ONCE].tolist()
        yield some if texts.dtype.kind == "S" else [id.encode() for id in some]
