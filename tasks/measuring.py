"""Features of the pairs of every side, measured once from their texts, for evidence and decisions."""

import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.step import Attempt
from sera_core.data.differences import COLUMNS, measure_differences, read_differences
from sera_core.method.panel import COLUMN, FEATURES, TOKENS, column_of, columns_of

SIDES = ("train", "heldout", "test")


def measure_features(attempt: Attempt) -> list[str]:
    """Write train.parquet, heldout.parquet and test.parquet: `pair_id` and a column for each feature.

    Raises:
        InputError: a feature cannot be imported, or fails on a text.
    """
    panel = attempt.fields["panel"]
    texts = [name for name in panel if name != TOKENS and column_of(name) is None]
    features = {name: FEATURES.named(name) for name in texts}
    columns = columns_of(panel)
    for side in SIDES:
        table = measure_differences(attempt.input("rendered").path(f"{side}.parquet"), features)
        if columns:
            values = read_differences(attempt.input("data").path(COLUMNS), table["pair_id"].to_pylist())
            for name in columns:
                table = table.append_column(f"{COLUMN}{name}", pa.array(values[name], pa.float64()))
        schema.write_table(table, attempt.write(f"{side}.parquet"))
        attempt.counts[side] = table.num_rows
    return [f"{side}.parquet" for side in SIDES]
