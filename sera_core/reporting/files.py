"""The files of a round by role, as the pages read them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow.parquet as pq

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact

Row = dict[str, Any]


class RoundFiles:
    """A round's finished steps by role (`pairs`, `scored`, `mixture`, …; see flows.round)."""

    def __init__(self, artifacts: Mapping[str, Artifact]) -> None:
        self.artifacts = artifacts

    def __contains__(self, role: str) -> bool:
        return role in self.artifacts

    def rows(self, role: str, file: str, columns: Sequence[str] | None = None) -> Iterator[Row]:
        """Rows of a parquet file; none when the round has no such role."""
        if role in self.artifacts:
            yield from schema.iter_rows(self.artifacts[role].path(file), columns)

    def row(self, role: str, file: str, pair_id: str, columns: Sequence[str]) -> Row:
        """The row of one pair: the texts of the others are not decoded."""
        table = pq.ParquetFile(self.artifacts[role].path(file))
        for group in range(table.num_row_groups):
            ids = table.read_row_group(group, columns=["pair_id"])["pair_id"].to_pylist()
            if pair_id in ids:
                found = table.read_row_group(group, columns=list(columns))
                return found.slice(ids.index(pair_id), 1).to_pylist()[0]
        raise KeyError(f"{file}: no pair {pair_id}")

    def size(self, role: str, file: str) -> int:
        """Number of rows of a parquet file."""
        return self.artifacts[role].record.files[file].rows or 0 if role in self.artifacts else 0

    def json(self, role: str, file: str) -> Any:
        """A JSON file, or None when the round has no such role."""
        if role not in self.artifacts:
            return None
        return json.loads(self.artifacts[role].path(file).read_text(encoding="utf-8"))

    def lines(self, role: str, file: str) -> list[Row]:
        """A file with a JSON object a line; empty when the round has no such role."""
        if role not in self.artifacts:
            return []
        text = self.artifacts[role].path(file).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]
