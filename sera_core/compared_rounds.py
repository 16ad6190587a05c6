"""What a decision compares: the held-out pairs under this round's policy and under every promoted one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Float, Int

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.step import Attempt
from sera_core.data.differences import Differences, read_differences
from sera_core.errors import StoreError
from sera_core.method.best import choosing_half
from sera_core.method.convergence import Heldout
from sera_core.method.diagnostics import correctness, correctness_of_all, jaccard, ks_distance, sign_changes
from sera_core.reviewers import numbered_groups, prompt_groups, prompt_keys

PROMOTED = "promoted-"
"""Beginning of an input's name: the evidence of a promoted round; its number follows."""


@dataclass(frozen=True)
class Scores:
    """What a decision compares: a value in [0, 1] of each held-out pair or answer, the same in all rounds."""

    now: Float[np.ndarray, " pair"]
    """Under this round's policy: 1 right or won, ½ a tie, 0."""
    before: dict[int, Float[np.ndarray, " pair"]]
    """Under each promoted round's, by number."""
    heldout: Heldout
    left_out: int
    """Held-out pairs or answers that a round has no value of."""


@dataclass(frozen=True)
class ComparedRounds:
    """The held-out pairs that every promoted round could score."""

    margins: Float[np.ndarray, " pair"]
    """Margins in nats under this round's policy; nan if it gives none (the pair counts as ranked wrongly)."""
    promoted: dict[int, Float[np.ndarray, " pair"]]
    """Margins under the policy of each promoted round, by number; finite."""
    heldout: Heldout
    differences: Differences
    """Differences of the panel's features between chosen and rejected."""
    left_out: int
    """Held-out pairs that a promoted round could not score."""

    @property
    def scores(self) -> Scores:
        """How each round ranks the pairs."""
        return Scores(self.now, self.before, self.heldout, self.left_out)

    @property
    def now(self) -> Float[np.ndarray, " pair"]:
        """Whether this round's policy ranks each pair correctly: 1, ½ for a tie, 0."""
        return correctness_of_all(self.margins)

    @property
    def before(self) -> dict[int, Float[np.ndarray, " pair"]]:
        """The same under each promoted round."""
        return {number: correctness(margins) for number, margins in self.promoted.items()}


@dataclass(frozen=True)
class TrainPairs:
    """The human pairs that this round selected from."""

    margins: Float[np.ndarray, " pair"]
    """In nats; nan if there is none."""
    kept: Bool[np.ndarray, " pair"]
    differences: Differences
    groups: Int[np.ndarray, " pair"]
    """Number of each pair's prompt."""


def compared_rounds(attempt: Attempt) -> ComparedRounds:
    """Read the held-out margins of this round and of every promoted one.

    Raises:
        StoreError: a promoted round has other held-out pairs.
    """
    fields, table = attempt.fields, _heldout(attempt, "evidence")
    ids: list[str] = table["pair_id"].to_pylist()
    promoted = {
        int(name.removeprefix(PROMOTED)): _margins_of(attempt, name, ids)
        for name in sorted(attempt.spec.inputs)
        if name.startswith(PROMOTED)
    }
    usable = np.ones(len(ids), dtype=bool)
    for margins in promoted.values():
        usable &= np.isfinite(margins)
    features = attempt.input("features").path("heldout.parquet")
    differences = {name: d[usable] for name, d in read_differences(features, ids).items()}
    keys = prompt_keys(attempt.input("rendered").path("heldout.parquet"), ids)
    difference = differences.get(fields["feature"], np.zeros(int(usable.sum())))
    chooses = choosing_half(keys, fields["split_seed"])
    return ComparedRounds(
        table["margin"].to_numpy()[usable],
        {number: margins[usable] for number, margins in promoted.items()},
        Heldout(difference, numbered_groups(keys)[usable], chooses[usable]),
        differences,
        int((~usable).sum()),
    )


def train_pairs(input: Callable[[str], Artifact]) -> TrainPairs:
    """Read the human pairs that a round selected from.

    Args:
        input: gives the step of each role: `scored`, `human`, `features`, `rendered`.
    """
    scored = _scored(input, "scored")
    ids: list[str] = scored["pair_id"].to_pylist()
    kept = set(_kept(input, "human"))
    return TrainPairs(
        scored["ensemble_margin"].to_numpy(),
        np.array([id in kept for id in ids], dtype=bool),
        read_differences(input("features").path("train.parquet"), ids),
        prompt_groups(input("rendered").path("train.parquet"), ids),
    )


def changes_since_head(attempt: Attempt) -> dict[str, float | None]:
    """Overlap of the human pairs kept with the last head's, and how the margins moved since then."""
    if "head_scored" not in attempt.spec.inputs:
        return {"overlap": None, "ks": None, "sign_changes": None}
    now, before = (
        _scored(attempt.input, name)["ensemble_margin"].to_numpy() for name in ("scored", "head_scored")
    )
    now, before = now[np.isfinite(now)], before[np.isfinite(before)]
    return {
        "overlap": jaccard(_kept(attempt.input, "human"), _kept(attempt.input, "head_human")),
        "ks": ks_distance(now, before) if len(now) and len(before) else None,
        "sign_changes": sign_changes(before, now) if len(now) == len(before) else None,
    }


def _margins_of(attempt: Attempt, name: str, ids: Sequence[str]) -> Float[np.ndarray, " pair"]:
    table = _heldout(attempt, name)
    if table["pair_id"].to_pylist() != ids:
        raise StoreError(
            f"{name}: its held-out pairs are not those of round {attempt.fields['round']}, so the rounds "
            "cannot be compared"
        )
    return table["margin"].to_numpy()


def _heldout(attempt: Attempt, name: str) -> pa.Table:
    return schema.read_table(attempt.input(name).path("heldout.parquet"), schema.SCORED)


def _scored(input: Callable[[str], Artifact], name: str) -> pa.Table:
    return schema.read_table(input(name).path("scored.parquet"), schema.SCORED)


def _kept(input: Callable[[str], Artifact], name: str) -> list[str]:
    rows = schema.iter_rows(input(name).path("ledger.parquet"), ["pair_id", "kept"])
    return [row["pair_id"] for row in rows if row["kept"]]
