"""Pairs that were dropped: train pairs of a round, pairs of other sides, and whether the mix dropped most."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.store import Store
from sera_core.artifacts.streaming import row_groups
from sera_core.method.mixing import drops_most
from sera_core.reporting import words

KEPT = ("kept", "relabelled")


def dropped_on_other_sides(store: Store, manifest: RoundManifest) -> dict[str, Counter[str]]:
    """Rows dropped on the sides that no round trains on, by side (`heldout`, `test`, `prompts`) and reason.

    They are the same in every round.
    """
    found: dict[str, Counter[str]] = {}
    path = Artifact(store, manifest.steps["pairs"]).path("dropped.parquet")
    for table in row_groups(path, schema.LEDGER, ["stage", "reason"]):
        for row in table.to_pylist():
            _, _, side = row["stage"].partition("_")
            if side:
                found.setdefault(side, Counter())[row["reason"]] += 1
    return found


def dropped_human(metrics: dict[str, Any], elsewhere: Iterable[Counter[str]]) -> Counter[str]:
    """Human pairs of the train side that a round dropped, by reason.

    Args:
        metrics: the round's metrics; `human/<reason>` counts the rows of all sides.
        elsewhere: the rows dropped on the other sides, by reason.
    """
    counts = {name.removeprefix("human/"): n for name, n in metrics.items() if name.startswith("human/")}
    every = Counter({reason: n for reason, n in counts.items() if isinstance(n, int) and reason not in KEPT})
    return every - sum(elsewhere, Counter[str]())


def reasons(counts: Counter[str]) -> str:
    """Counts by reason, by name."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def over_share_words(manifest: RoundManifest) -> str | None:
    """A warning if the mix dropped more than half of the human pairs selected; None at a share of 1."""
    mixed = manifest.pairs["human"]
    over = int(manifest.metrics.get("human/over_share", 0))
    if manifest.target_share == 1 or not drops_most(mixed + over, mixed):
        return None
    generated = words.plural(manifest.pairs["generated"], "generated pair")
    return (
        f"the mix dropped {over} of the {words.plural(mixed + over, 'human pair')} selected, for a share of "
        f"{manifest.target_share:.2f} with {generated}; see "
        'sampling.prompts = "auto", mix.size, mix.shares and mix.on_short = "fill"'
    )
