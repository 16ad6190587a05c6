"""Differences of the panel's features between the answers of each pair: a file of columns, one a feature.

`d = feature(chosen) − feature(rejected)`, in the feature's own unit. A feature sees the last user turn as the
prompt and the content of the last assistant turn as the response. Separate reasoning is not part of the
content, but counts in `tokens`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from sera_core.artifacts import schema
from sera_core.data.preferences import Message
from sera_core.errors import InputError, StoreError
from sera_core.method.panel import TOKENS, Feature, feature_differences

_COLUMNS = ("pair_id", "prompt", "chosen", "rejected", "chosen_ids", "rejected_ids")
COLUMNS = "columns.parquet"
"""File of the data step with the user's columns that the panel names."""
Differences = dict[str, Float[np.ndarray, " pair"]]
"""By feature."""


def measure_differences(pairs: Path, features: Mapping[str, Feature]) -> pa.Table:
    """`pair_id`, `tokens` and a column for each feature, of every pair of a rendered file, in its order.

    Args:
        pairs: with the columns of `schema.PAIRS`.
        features: functions of the text by name.

    Raises:
        InputError: a feature raises, or gives something that is no finite number; names the pair.
    """
    rows = list(schema.iter_rows(pairs, _COLUMNS))
    tokens = [len(row["chosen_ids"]) - len(row["rejected_ids"]) for row in rows]
    texts = (
        [last_text(row["prompt"], "user") for row in rows],
        [last_text(row["chosen"], "assistant") for row in rows],
        [last_text(row["rejected"], "assistant") for row in rows],
    )
    try:
        columns = feature_differences(dict(features), *texts)
    except InputError as error:
        raise InputError(f"decide.panel, on the pairs of {pairs.stem}: {error}") from error
    arrays = [pa.array(column, pa.float64()) for column in ([float(n) for n in tokens], *columns.values())]
    ids = pa.array([row["pair_id"] for row in rows], pa.string())
    return pa.table([ids, *arrays], names=["pair_id", TOKENS, *columns])


def last_text(messages: Sequence[Message], role: str) -> str:
    """Content of a role's last message; empty if there is none."""
    return next((m["content"] or "" for m in reversed(messages) if m["role"] == role), "")


def read_differences(path: Path, pair_ids: Sequence[str]) -> Differences:
    """d of each feature, for the given pairs, in their order.

    Args:
        path: a file of `measure_differences`.
        pair_ids: pairs of it.

    Raises:
        StoreError: a pair is not in the file.
    """
    table = pq.read_table(path)
    place = {id: row for row, id in enumerate(table["pair_id"].to_pylist())}
    missing = next((id for id in pair_ids if id not in place), None)
    if missing is not None:
        raise StoreError(f"{path.name}: the features of pair {missing} were not measured")
    rows = np.array([place[id] for id in pair_ids], dtype=np.int64)
    names = [name for name in table.column_names if name != "pair_id"]
    return {name: table[name].to_numpy()[rows] for name in names}
