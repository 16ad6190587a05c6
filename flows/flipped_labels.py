"""Flipped labels (`data.flip_fraction`) among the pairs that an arm's selection dropped."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from flows.compare import Runs, trained_rounds
from sera_core.artifacts.manifest import Artifact


@dataclass(frozen=True)
class Flips:
    """Pairs of a run's last trained round."""

    flipped: int
    """Pairs with a flipped label that the round selected from."""
    dropped: int
    """Those of them that it dropped."""
    dropped_by_chance: float
    """The same if as many pairs were dropped at random."""
    dropped_in_all: int


Found = dict[str, dict[int, Flips]]
"""Arm -> seed -> counts; empty without flipped labels."""


def flipped_found(runs: Runs) -> Found:
    """The counts of each run, where labels were flipped."""
    found: Found = {}
    for arm, by_seed in runs.items():
        for seed, records in by_seed.items():
            mixture = trained_rounds(records)[-1].steps["mixture"]
            assert mixture is not None
            metrics = Artifact(records.store, mixture).record.metrics
            if metrics.get("flipped"):
                names = ("flipped", "flipped/dropped", "flipped/dropped_by_chance", "dropped")
                found.setdefault(arm, {})[seed] = Flips(*(metrics[name] for name in names))
    return found


def flips_in_words(found: Found) -> Iterator[str]:
    """A line for each arm that dropped pairs."""
    for arm, by_seed in found.items():
        if any(flips.dropped_in_all for flips in by_seed.values()):
            yield f"{arm}, flipped labels: {_words(by_seed)}."


def _words(by_seed: Mapping[int, Flips]) -> str:
    flips = by_seed.values()
    flipped, dropped = sum(one.flipped for one in flips), sum(one.dropped for one in flips)
    chance, in_all = sum(one.dropped_by_chance for one in flips), sum(one.dropped_in_all for one in flips)
    return (
        f"{dropped / flipped:.1%} of them are dropped ({chance / flipped:.1%} by chance); of the dropped "
        f"pairs {dropped / in_all:.1%} are flipped"
    )
