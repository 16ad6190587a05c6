"""Names of judges and raters, for the configuration: importing them loads nothing."""

import difflib

from sera_core.errors import InputError
from sera_core.extensions import is_own

CHAT, LOCAL, REWARD = "openai", "local", "reward"
"""Kinds that take a model after the colon."""
WORD_COUNT, CONSTANT = "word-count", "constant"
REVIEWS = "reviews"
"""The classifier of the laboratory's review sentences."""
IMPLICIT = "implicit"
"""`pairing.by`: the implicit reward of the policies, no rater."""
FILE = "file"
"""`pairing.by`: rated candidates in a file instead of samples."""
BY = (
    IMPLICIT,
    WORD_COUNT,
    REVIEWS,
    f"{REWARD}:<folder>",
    f"{LOCAL}:<folder>",
    f"{CHAT}:<model>",
    f"{FILE}:<path>",
)


JUDGE_NAMES = (WORD_COUNT, CONSTANT, REVIEWS, f"{REWARD}:<folder>", f"{LOCAL}:<folder>", f"{CHAT}:<model>")


def is_model(name: str) -> bool:
    """Whether a name means a model: `reward:<folder>`, `local:<folder>` or `openai:<model>`."""
    kind, _, rest = name.partition(":")
    return kind in (CHAT, LOCAL, REWARD) and bool(rest)


def candidates_file(name: str) -> str | None:
    """The path in `file:<path>`; None for other names."""
    kind, _, rest = name.partition(":")
    return rest if kind == FILE and rest else None


def refuse_unknown_rater(name: str) -> None:
    """Refuse a name that no rater can have.

    Raises:
        InputError: gives the nearest name.
    """
    if not candidates_file(name):
        _refuse_unknown("rater", name, BY)


def refuse_unknown_judge(name: str) -> None:
    """Refuse a name that no judge can have.

    Raises:
        InputError: gives the nearest name.
    """
    _refuse_unknown("judge", name, JUDGE_NAMES)


def _refuse_unknown(what: str, name: str, known: tuple[str, ...]) -> None:
    kinds = [one.partition(":")[0] for one in known]
    if (name in known and ":" not in name) or is_model(name):
        return
    kind = name.partition(":")[0]
    near = difflib.get_close_matches(kind, kinds, n=1, cutoff=0.6)
    if is_own(name) and kind not in kinds and not near:
        return
    hint = f"did you mean {next(one for one in known if one.startswith(near[0]))}? " if near else ""
    raise InputError(
        f"the {what} {name!r} is unknown; {hint}choose one of {', '.join(known)}, or module:function for one "
        "of your own"
    )
