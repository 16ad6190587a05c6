"""Extension points: what a setting can name, and `module:function` for code of the user's own.

Selection rules, pairing rules, evidence features, sampling engines, judges and raters are each a `Registry`:
built-in entries by name, or a function of the user's own; losses are named likewise, and stores by the scheme
of their URL. A selection rule of one's own, in ten lines:

    # my_rules.py, on the Python path of whoever does the work
    import numpy as np

    def middle(margins, fraction, **_):
        '''Keep the middle of the margins (nats, finite): one bool per pair.'''
        low, high = np.quantile(margins, [0.5 - fraction / 2, 0.5 + fraction / 2])
        return (margins >= low) & (margins <= high)

    # experiment.toml     select.rule = "my_rules:middle"
    # shell               SERA_EXTENSIONS=my_rules sera run experiment.toml

A configuration may come from somebody else, so a module is imported only where the environment variable
SERA_EXTENSIONS names it. The hash of its source file enters the key of the steps it decides: changed code is
a new step. tests/extending has one of each kind.
"""

import difflib
import hashlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, TypeVar

from sera_core.errors import InputError

ALLOWED = "SERA_EXTENSIONS"
"""Environment variable: names of the modules that a configuration may name, separated by commas."""
_OWN = re.compile(r"(?P<module>[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<function>[^\W\d]\w*)")

SIGNATURES = {
    "selection rule": "rule(margins, *, fraction, seed) -> one bool per pair",
    "pairing rule": "rule(rewards) -> a list of (chosen, rejected), places in a prompt's rewards, best first",
    "loss": "loss(chosen, rejected, ref_chosen, ref_rejected, chosen_tokens, rejected_tokens, beta) "
    "-> one loss per pair",
    "sampling engine": "engine(policy, *, base, dtype, device, batch, max_length) -> a Sampler",
    "feature": "feature(prompt, response) -> a number",
    "judge": 'judge(prompt, first, second) -> "A", "B" or "tie"',
    "rater": "rater(prompt, response) -> a number, larger is better",
}
"""How a function of the user's own is called, by kind."""

T = TypeVar("T")


@dataclass(frozen=True)
class Registry(Generic[T]):
    """Entries of one kind by name.

    Attributes:
        kind: what an entry is: one of `SIGNATURES`.
        entries: the built-in ones.
    """

    kind: str
    entries: Mapping[str, T]

    def named(self, name: str) -> T | Callable[..., Any]:
        """The built-in entry of this name, or the function that `module:function` names.

        Raises:
            InputError: unknown (the nearest name is given), not allowed, or not importable.
        """
        if is_own(name):
            return own_function(name, self.kind)
        if name in self.entries:
            return self.entries[name]
        near = difflib.get_close_matches(name, self.entries, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise InputError(
            f"the {self.kind} {name!r} is unknown; {hint}choose one of {', '.join(self.entries)}, or "
            "module:function for one of your own"
        )


def is_own(name: str) -> bool:
    """Whether a name means code of the user's own."""
    return ":" in name


def own_function(name: str, kind: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        InputError: not of that form, a module that is not allowed or cannot be imported, or no function.
    """
    module, function = _parts(name, kind)
    try:
        found = getattr(import_module(module), function, None)
    except Exception as error:  # the module's own code may raise anything
        raise InputError(
            f"the {kind} {name!r}: importing {module} failed ({type(error).__name__}: {error}); it must be "
            "on the Python path of whoever does the work"
        ) from error
    if not callable(found):
        raise InputError(
            f"the {kind} {name!r}: {module} has no function {function}; it is called as {SIGNATURES[kind]}"
        )
    return found


def source_hash(name: str, kind: str) -> str:
    """sha256 of the source file that `module:function` stands in; part of a step's key.

    Raises:
        InputError: as `own_function`; or the module has no source file.
    """
    module, _ = _parts(name, kind)
    try:
        spec = find_spec(module)
    except (ImportError, ValueError) as error:
        raise InputError(f"the {kind} {name!r}: {module} cannot be found ({error})") from error
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise InputError(f"the {kind} {name!r}: {module} is no file on the Python path")
    return hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()


def sources(kind: str, *names: str) -> dict[str, dict[str, str]]:
    """What a step's key holds of the user's own code: nothing where all names are built-in ones."""
    own = {name: source_hash(name, kind) for name in names if is_own(name)}
    return {"sources": own} if own else {}


def provided(attribute: str) -> dict[str, Any]:
    """What the allowed modules hold in dictionaries of this name, together.

    Raises:
        InputError: an allowed module cannot be imported.
    """
    found: dict[str, Any] = {}
    for module in _allowed():
        try:
            found |= getattr(import_module(module), attribute, {})
        except Exception as error:
            raise InputError(f"{ALLOWED} names {module}: {type(error).__name__}: {error}") from error
    return found


def _allowed() -> list[str]:
    return [name.strip() for name in os.environ.get(ALLOWED, "").split(",") if name.strip()]


def _parts(name: str, kind: str) -> tuple[str, str]:
    if (found := _OWN.fullmatch(name)) is None:
        raise InputError(f"the {kind} {name!r}: code of your own is named as module:function")
    module = found["module"]
    if module not in _allowed():
        raise InputError(
            f"the {kind} {name!r}: a configuration runs no code unless whoever does the work allows it; set "
            f"{ALLOWED}={module} there (several: separated by commas)"
        )
    return module, found["function"]
