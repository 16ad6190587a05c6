"""Features of the pairs of every side, measured once from their texts, for evidence and decisions."""

from sera_core.artifacts import schema
from sera_core.artifacts.step import Attempt
from sera_core.data.differences import measure_differences
from sera_core.method.panel import FEATURES, TOKENS

SIDES = ("train", "heldout", "test")


def measure_features(attempt: Attempt) -> list[str]:
    """Write train.parquet, heldout.parquet and test.parquet: `pair_id` and a column for each feature.

    Raises:
        InputError: a feature cannot be imported, or fails on a text.
    """
    features = {name: FEATURES.named(name) for name in attempt.fields["panel"] if name != TOKENS}
    for side in SIDES:
        table = measure_differences(attempt.input("rendered").path(f"{side}.parquet"), features)
        schema.write_table(table, attempt.write(f"{side}.parquet"))
        attempt.counts[side] = table.num_rows
    return [f"{side}.parquet" for side in SIDES]
