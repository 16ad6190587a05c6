"""The panel by name: the built-in features, functions of the user's own, and columns given as numbers."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float

from sera_core.errors import InputError
from sera_core.extensions import Registry, is_own
from sera_core.method import features

Feature = Callable[[str, str], float]
"""(prompt, response) -> value."""

FEATURES: Registry[Feature] = Registry(
    "feature",
    {
        function.__name__: function
        for function in (
            features.characters,
            features.words,
            features.sentences,
            features.list_items,
            features.headings,
            features.bold,
            features.code_fences,
            features.markdown,
            features.refusal,
            features.opening,
            features.word_overlap,
            features.trigram_overlap,
        )
    },
)
"""The built-in features by name; a feature of the user's own is `module:function`."""

COLUMN = "column:"
"""Before the name of a user's column: `column:score` is the data's `score_chosen` less `score_rejected`."""
TOKENS = "tokens"
"""Length in response tokens: built in too, but counted from the token ids instead of the text."""
NAMES = (TOKENS, *FEATURES.entries)
"""The names of all built-in features."""


def refuse_unknown(name: str) -> None:
    """Refuse a name that is no built-in feature's, no `column:<name>` and not of the form `module:function`.

    Raises:
        InputError: gives the nearest name.
    """
    if name != TOKENS and not is_own(name):
        FEATURES.named(name)


def column_of(name: str) -> str | None:
    """The column's name in `column:<name>`; None for other features."""
    return name.removeprefix(COLUMN) if name.startswith(COLUMN) else None


def columns_of(panel: Sequence[str]) -> list[str]:
    """The columns that a panel names."""
    return [column for name in panel if (column := column_of(name)) is not None]


def feature_values(
    name: str, feature: Feature, prompts: Sequence[str], responses: Sequence[str]
) -> Float[np.ndarray, " response"]:
    """A feature of each response, in the feature's own unit.

    Raises:
        InputError: the feature raises, or gives something that is no finite number; says where.
    """
    if len(prompts) != len(responses):
        raise InputError(f"{len(prompts)} prompts for {len(responses)} responses; give one each")
    found = np.empty(len(responses), dtype=np.float64)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        try:
            found[row] = float(feature(prompt, response))
        except Exception as error:  # the user's own code may raise anything
            raise InputError(f"feature {name!r}, row {row}: {type(error).__name__}: {error}") from error
        if not np.isfinite(found[row]):
            raise InputError(f"feature {name!r}, row {row}: {found[row]} is no finite number")
    return found


def feature_differences(
    named: dict[str, Feature], prompts: Sequence[str], chosen: Sequence[str], rejected: Sequence[str]
) -> dict[str, Float[np.ndarray, " pair"]]:
    """feature(chosen) − feature(rejected) of every pair, by feature.

    Args:
        named: features by name.
        prompts, chosen, rejected: the texts of the pairs, in one order.

    Raises:
        InputError: as `feature_values`.
    """
    return {
        name: feature_values(name, feature, prompts, chosen)
        - feature_values(name, feature, prompts, rejected)
        for name, feature in named.items()
    }


def column_difference(
    name: str, chosen: Sequence[object], rejected: Sequence[object]
) -> Float[np.ndarray, " pair"]:
    """chosen − rejected of a user's column, in its own unit.

    Args:
        chosen, rejected: the column's values for both answers of each pair, in one order.

    Raises:
        InputError: a value is missing or no finite number, or the answers of every pair have the same
            value, so that the column can tell nothing.
    """
    if len(chosen) != len(rejected):
        raise InputError(f"column {name!r}: {len(chosen)} chosen and {len(rejected)} rejected values")
    sides = [_numbers(name, "chosen", chosen), _numbers(name, "rejected", rejected)]
    difference = sides[0] - sides[1]
    if difference.size and not difference.any():
        raise InputError(
            f"column {name!r}: both answers have the same value in all {difference.size} pairs, so nothing "
            "can be said of it; leave it out"
        )
    return difference


def _numbers(name: str, side: str, values: Sequence[object]) -> Float[np.ndarray, " pair"]:
    found = np.full(len(values), np.nan)
    for row, value in enumerate(values):
        if isinstance(value, bool | int | float | np.number):
            found[row] = float(value)
    bad = np.flatnonzero(~np.isfinite(found))
    if bad.size:
        raise InputError(
            f"column {name!r}: {bad.size} of {len(values)} {side} values are missing or no finite number "
            f"(first: row {bad[0]}: {values[bad[0]]!r}); fill them, or leave the column out"
        )
    return found
