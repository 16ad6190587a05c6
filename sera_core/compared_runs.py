"""Two policies on the held-out pairs that both were evaluated on, of one run or of two."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.store import Store
from sera_core.data.differences import read_differences
from sera_core.method.comparison import changes_from, values_of
from sera_core.method.diagnostics import correctness_of_all
from sera_core.method.estimates import Estimate
from sera_core.reviewers import prompt_groups

SEED = 0
"""Seed of the bootstrap; seeds of the runs have no part in it."""
COMPARED = ("balanced", "accuracy", "reliance")
"""What two policies are compared by."""


@dataclass(frozen=True)
class HeldoutPairs:
    """Held-out pairs, in the order of `ids`."""

    ids: list[str]
    difference: Float[np.ndarray, " pair"]
    """Of a feature, chosen answer less rejected one; 0 where the round did not measure the feature."""
    groups: Int[np.ndarray, " pair"]
    """Number of each pair's prompt."""


@dataclass(frozen=True)
class Change:
    """What a policy gained on another one, on the same held-out pairs."""

    first: dict[str, float | None]
    """COMPARED under the first policy."""
    other: dict[str, float | None]
    """The same under the other."""
    changes: dict[str, Estimate]
    """Other less first, with intervals that resample prompts."""
    left_out: int
    """Held-out pairs that only one of both was evaluated on."""


def evidence_of(store: Store, manifest: RoundManifest) -> Artifact:
    """The evidence of a round that trained a policy."""
    return Artifact(store, manifest.steps["evidence"])


def heldout_pairs(store: Store, manifest: RoundManifest, feature: str) -> HeldoutPairs:
    """The held-out pairs of a round, with their differences of a feature."""
    ids, _ = ranked(store, manifest)
    return _described(store, manifest, feature, ids)


def ranked(store: Store, manifest: RoundManifest) -> tuple[list[str], Float[np.ndarray, " pair"]]:
    """Ids of a round's held-out pairs, and how its policy ranks each: 1 correct, ½ a tie, 0 wrong or not
    scored."""
    table = _heldout(evidence_of(store, manifest))
    return table["pair_id"].to_pylist(), correctness_of_all(table["margin"].to_numpy())


def change(
    first: tuple[Store, RoundManifest],
    other: tuple[Store, RoundManifest],
    feature: str,
    resamples: int = 2000,
) -> Change | None:
    """The other round's policy less the first one's, on the held-out pairs that both have; None without any.

    Args:
        first, other: rounds that trained a policy.
        feature: divides the pairs into the sides of balanced accuracy and reliance.
        resamples: of the intervals.
    """
    now, then = (dict(zip(*ranked(*side), strict=True)) for side in (other, first))
    common = [id for id in then if id in now]
    if not common:
        return None
    pairs = _described(*first, feature, common)
    a, b = (np.array([[ranks[id] for id in common]]) for ranks in (then, now))
    values = [values_of(correct, pairs.difference) for correct in (a, b)]
    return Change(
        {name: values[0][name] for name in COMPARED},
        {name: values[1][name] for name in COMPARED},
        changes_from(a, b, pairs.difference, pairs.groups, COMPARED, seed=SEED, resamples=resamples),
        len(then.keys() | now.keys()) - len(common),
    )


def _described(store: Store, manifest: RoundManifest, feature: str, ids: Sequence[str]) -> HeldoutPairs:
    inputs = evidence_of(store, manifest).record.inputs
    rendered = Artifact(store, inputs["rendered"]).path("heldout.parquet")
    differences = {}
    if "features" in inputs:  # older records lack it
        differences = read_differences(Artifact(store, inputs["features"]).path("heldout.parquet"), ids)
    difference = differences.get(feature, np.zeros(len(ids)))
    return HeldoutPairs(list(ids), difference, prompt_groups(rendered, ids))


def _heldout(evidence: Artifact) -> Any:
    return schema.read_table(evidence.path("heldout.parquet"), schema.SCORED)
