"""What every fuzz test shares: how many cases, the command line as people meet it, damaged JSON and bytes.

    SERA_FUZZ_CASES=10000 python -m pytest tests/fuzzing      # make fuzz

Without the variable there are 250 cases of a kind, the same ones each time.
"""

import copy
import io
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from flows.cli import main

CASES = int(os.environ.get("SERA_FUZZ_CASES", "250"))
SECONDS = 10.0
"""A case that takes longer hangs."""
DEEP = 200_000
"""Levels of lists in the deepest JSON; no parser follows them."""
REFUSED = (1, 2)
"""Exit codes of a refusal: the store does not hold, or the input is bad."""
fuzzed = settings(
    max_examples=CASES,
    deadline=None,
    database=None,
    derandomize="SERA_FUZZ_CASES" not in os.environ,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)

# ------------------------------------------------------------------------------------------ the command line


@dataclass(frozen=True)
class Told:
    """What a command answered."""

    argv: tuple[str, ...]
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The line of a refusal."""
        return next((line for line in self.err.splitlines() if line.startswith("sera: ")), "")


class _HungError(BaseException):
    """No `except Exception` swallows it."""


@contextmanager
def at_most(seconds: float = SECONDS) -> Iterator[None]:
    """End what takes longer.

    Raises:
        AssertionError: it did.
    """

    def end(number: int, frame: object) -> None:
        raise _HungError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _HungError:
        raise AssertionError(f"a hang: it takes more than {seconds:g} s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sera(*argv: object) -> Told:
    """Run a command through the command line's own door, in this process."""
    given = tuple(map(str, argv))
    out, err = io.StringIO(), io.StringIO()
    with at_most(), redirect_stdout(out), redirect_stderr(err):
        code = main(given)
    return Told(given, code, out.getvalue(), err.getvalue())


def check_told(told: Told, lines: int | None = 1) -> None:
    """A command answers, or refuses with one message of ours: no traceback, no other library's words.

    Args:
        told: what the command said.
        lines: of a refusal, at most; None: any number.
    """
    said = f"sera {' '.join(told.argv)}: exit {told.code}\n{told.err}"
    assert told.code in (0, *REFUSED), said
    assert "--debug shows the traceback" not in told.err and "Traceback" not in told.err, said
    assert "errors.pydantic.dev" not in told.err + told.out, said
    if told.code:
        assert sum(line.startswith("sera: ") for line in told.err.splitlines()) == 1, said
        message = told.err[told.err.index("sera: ") :].rstrip("\n")
        assert lines is None or message.count("\n") < lines, said


# ----------------------------------------------------------------------------------------------- damaged JSON

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["", "inf", "NaN", "../../etc/passwd", "0" * 64, "{", "a\nb", "\u202e", "\ud800"]),
    st.sampled_from(["\x00", "\x1b[2J", 10**18, 2**63, -(2**63) - 1, 10**400, 1e308, 5e-324]),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
"""Any JSON, with the numbers and texts that readers trip over."""

Path = tuple[str | int, ...]


def paths(value: Any, under: Path = ()) -> list[Path]:
    """The place of every value inside a JSON value, itself first."""
    found: list[Path] = [under]
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        found += paths(item, (*under, key))
    return found


@st.composite
def places(draw: Callable[[Any], Any], value: Any) -> Path:
    """A place in a JSON value: any, or found by going down, so that no long list hides the rest."""
    if draw(st.booleans()):
        return draw(st.sampled_from(paths(value)))
    path: Path = ()
    while isinstance(value, dict | list) and value and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        path, value = (*path, key), value[key]
    return path


def at(value: Any, path: Path) -> Any:
    """The value at a place."""
    for key in path:
        value = value[key]
    return value


def changed(before: Any, after: Any, under: Path = ()) -> list[Path]:
    """The places at which two JSON values differ."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(before.keys() | after.keys())
        inner = [(key, before.get(key, changed), after.get(key, changed)) for key in keys]
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        inner = [(key, *both) for key, both in enumerate(zip(before, after, strict=True))]
    else:
        return [] if repr(before) == repr(after) else [under]
    return [place for key, *both in inner for place in changed(*both, (*under, key))]


def replaced(value: Any, path: Path, by: Any) -> Any:
    """A copy with another value at a place."""
    if not path:
        return by
    whole = copy.deepcopy(value)
    at(whole, path[:-1])[path[-1]] = by
    return whole


@dataclass(frozen=True, repr=False)
class Damage:
    """Bytes in place of a file's, and the place in its JSON that was touched (None: the bytes as such)."""

    data: bytes
    path: Path | None = None

    def __repr__(self) -> str:
        place = "bytes" if self.path is None else ".".join(map(str, self.path))
        return f"Damage({place}: {len(self.data)} bytes {self.data[:300]!r})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # hypothesis would write out all of the bytes
        printer.text(repr(self))


def _near(value: Any, draw: Callable[[Any], Any]) -> Any:
    """A value of the same kind that is another: what a reader may not notice."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + draw(st.sampled_from([1, -1, 7, -value, 10**6]))
    if isinstance(value, float):
        return value + draw(st.sampled_from([0.125, -1.0, 1e-6]))
    if isinstance(value, str) and value:
        place = draw(st.integers(0, len(value) - 1))
        return value[:place] + draw(st.sampled_from("0fax-/ ")) + value[place + 1 :]
    return draw(scalars)


@st.composite
def damaged_json(draw: Callable[[Any], Any], value: Any) -> Damage:
    """One change somewhere in a JSON value."""
    path = draw(places(value))
    old = at(value, path)
    how = draw(
        st.sampled_from(("near", "near", "any", "any", "taken", "lost", "more", "twice", "deep", "long"))
    )
    if how == "near" and not isinstance(old, dict | list):
        return Damage(_written(replaced(value, path, _near(old, draw))), path)
    if how == "taken":
        other = at(value, draw(st.sampled_from(paths(value))))
        return Damage(_written(replaced(value, path, copy.deepcopy(other))), path)
    if how == "lost" and path:
        whole = copy.deepcopy(value)
        del at(whole, path[:-1])[path[-1]]
        return Damage(_written(whole), path)
    if how == "more" and isinstance(old, dict):
        key = draw(st.text(max_size=8))
        return Damage(_written(replaced(value, (*path, key), draw(values))), (*path, key))
    if how in ("twice", "deep", "long"):
        return Damage(_spelt(draw, value, path, how), path)
    return Damage(_written(replaced(value, path, draw(values))), path)


def _spelt(draw: Callable[[Any], Any], value: Any, path: Path, how: str) -> bytes:
    """What `json.dumps` does not write: a key twice, lists without end, numbers beyond any."""
    mark = "here a value is put in"
    text = _written(replaced(value, path, mark)).decode("utf-8", "surrogatepass")
    if how == "twice" and path and isinstance(path[-1], str):
        both = f"{json.dumps(at(value, path))}, {json.dumps(path[-1])}: {json.dumps(draw(values))}"
        return text.replace(json.dumps(mark), both).encode("utf-8", "surrogatepass")
    depth = draw(st.sampled_from([5, 99, 200, 950, DEEP]))
    odd = ["[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth]
    numbers = ["1" + "0" * 5000, "1e400", "-1e999", "NaN", "-Infinity", "1" + "0" * 350, "0x10", "01", "1_0"]
    return text.replace(json.dumps(mark), draw(st.sampled_from(odd if how == "deep" else numbers))).encode()


def _written(value: Any) -> bytes:
    return json.dumps(value, indent=1, ensure_ascii=True).encode()


@st.composite
def damaged_bytes(draw: Callable[[Any], Any], data: bytes) -> Damage:
    """One change somewhere in bytes: cut off, flipped, put in, taken out, replaced."""
    place = draw(st.integers(0, max(len(data) - 1, 0)))
    how = draw(st.sampled_from(("cut", "flip", "in", "out", "new", "text", "twice", "marked")))
    if how == "cut":
        return Damage(data[:place])
    if how == "flip" and data:
        return Damage(
            data[:place] + bytes([data[place] ^ (1 << draw(st.integers(0, 7)))]) + data[place + 1 :]
        )
    if how == "in":
        return Damage(data[:place] + draw(st.binary(min_size=1, max_size=8)) + data[place:])
    if how == "out":
        return Damage(data[:place] + data[place + draw(st.integers(1, 40)) :])
    if how == "text":
        return Damage(draw(st.text(max_size=60)).encode("utf-8", "surrogatepass"))
    if how == "twice":
        return Damage(data + data)
    if how == "marked":
        return Damage(draw(st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"\x00", b"\x1f\x8b"])) + data)
    return Damage(draw(st.binary(max_size=60)))
