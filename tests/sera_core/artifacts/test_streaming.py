"""What is read and written in pieces is what would be read and written whole."""

import numpy as np
import pyarrow as pa
import pytest

from sera_core.artifacts import schema
from sera_core.artifacts.streaming import Lookup, Rows, Scatter, Writer, numbers, row_groups, strings

COUNT = 2 * schema.ROW_GROUP + 451


@pytest.fixture(scope="module")
def logps() -> pa.Table:
    draw = np.random.default_rng(5)
    ids = [f"{number:016x}/0" for number in draw.permutation(COUNT)]
    values = [None if number % 97 == 0 else -float(number) for number in range(COUNT)]
    return schema.table(schema.LOGPS, {"id": ids, "logps": values, "tokens": draw.integers(1, 9, COUNT)})


@pytest.fixture(scope="module")
def path(logps, tmp_path_factory):
    file = tmp_path_factory.mktemp("streaming") / "whole.parquet"
    schema.write_table(logps, file)
    return file


@pytest.mark.parametrize("piece", [1, 300, schema.ROW_GROUP, 1500, COUNT])
def test_tables_written_as_they_come_leave_the_bytes_of_the_whole(logps, path, tmp_path, piece):
    with Writer(tmp_path / "pieces.parquet", schema.LOGPS) as out:
        for start in range(0, COUNT if piece > 1 else 5, piece):
            out.write(logps.slice(start, piece))
    expected = tmp_path / "expected.parquet"
    schema.write_table(logps.slice(0, out.rows), expected)
    assert (tmp_path / "pieces.parquet").read_bytes() == expected.read_bytes()


def test_a_file_without_rows_is_the_same_too(logps, tmp_path):
    with Writer(tmp_path / "none.parquet", schema.LOGPS):
        pass
    schema.write_table(logps.slice(0, 0), tmp_path / "expected.parquet")
    assert (tmp_path / "none.parquet").read_bytes() == (tmp_path / "expected.parquet").read_bytes()
    assert strings(tmp_path / "none.parquet", schema.LOGPS, "id").size == 0


def test_columns_and_row_groups_are_those_of_the_file(logps, path):
    assert pa.concat_tables(row_groups(path, schema.LOGPS)).equals(logps)
    assert strings(path, schema.LOGPS, "id").tolist() == logps["id"].to_pylist()
    found = numbers(path, schema.LOGPS, "logps")
    expected = [np.nan if value is None else value for value in logps["logps"].to_pylist()]
    np.testing.assert_array_equal(found, expected)


def test_rows_come_in_the_order_asked_for_from_any_row_group(logps, path):
    wanted = np.random.default_rng(6).integers(0, COUNT, 700)
    rows = Rows(path, ["id", "logps"])
    assert len(rows) == COUNT
    assert rows.take(wanted) == logps.select(["id", "logps"]).take(wanted).to_pylist()


def test_scattered_rows_leave_in_the_order_of_their_places(logps, tmp_path):
    places = np.random.default_rng(7).permutation(COUNT)
    scatter = Scatter(tmp_path, schema.LOGPS, COUNT)
    for start in range(0, COUNT, 333):
        scatter.add(places[start : start + 333], logps.slice(start, 333))
    assert pa.concat_tables(scatter.tables()).equals(logps.take(np.argsort(places)).combine_chunks())


def test_an_id_is_found_where_it_stands_and_an_unknown_one_is_minus_one():
    lookup = Lookup(np.array(["c", "a", "b"]))
    assert lookup.places(np.array(["a", "z", "c", "0"])).tolist() == [1, -1, 0, -1]
    assert Lookup(np.array([], dtype=np.str_)).places(np.array(["a"])).tolist() == [-1]
