"""What is read and written in pieces is what would be read and written whole."""

import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sera_core.artifacts import schema, streaming
from sera_core.artifacts.streaming import Lookup, Rows, Scatter, Writer, keys, numbers, row_groups, strings

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


def ledger(rows: int) -> pa.Table:
    numbers = np.arange(rows)
    columns = {
        "pair_id": [f"{n:016x}" for n in numbers],
        "reason": ["kept"] * rows,
        "ensemble_margin": -numbers,
    }
    return schema.table(schema.LEDGER, columns)


@pytest.mark.parametrize("rows", [1, schema.ROW_GROUP, schema.ROW_GROUP + 1, 3 * 16 * schema.ROW_GROUP + 5])
@pytest.mark.parametrize("piece", [1000, 20_000])
def test_a_ledger_in_pieces_has_the_bytes_of_the_whole_and_large_row_groups(tmp_path, rows, piece):
    whole = ledger(rows)
    schema.write_table(whole, tmp_path / "whole.parquet")
    chunked = pa.concat_tables([whole.slice(start, 700) for start in range(0, rows, 700)])
    schema.write_table(chunked, tmp_path / "chunked.parquet")
    with Writer(tmp_path / "pieces.parquet", schema.LEDGER) as out:
        for start in range(0, rows, piece):
            out.write(whole.slice(start, piece))
    found = {(tmp_path / f"{name}.parquet").read_bytes() for name in ("whole", "chunked", "pieces")}
    assert len(found) == 1
    assert pq.read_metadata(tmp_path / "whole.parquet").num_row_groups == -(-rows // (16 * schema.ROW_GROUP))
    assert schema.read_table(tmp_path / "whole.parquet", schema.LEDGER).equals(whole)


@pytest.mark.parametrize("rows", [schema.ROW_GROUP, 3 * schema.ROW_GROUP])
def test_short_tables_keep_the_older_layout_which_is_read_in_any_case(tmp_path, rows):
    whole, older, now = ledger(rows), tmp_path / "older.parquet", tmp_path / "now.parquet"
    pq.write_table(whole, older, compression="zstd", store_schema=False, row_group_size=schema.ROW_GROUP)
    schema.write_table(whole, now)
    assert (older.read_bytes() == now.read_bytes()) == (rows == schema.ROW_GROUP)
    assert pa.concat_tables(row_groups(older, schema.LEDGER)).equals(whole)


def test_columns_and_row_groups_are_those_of_the_file(logps, path):
    assert pa.concat_tables(row_groups(path, schema.LOGPS)).equals(logps)
    assert strings(path, schema.LOGPS, "id").tolist() == logps["id"].to_pylist()
    found = numbers(path, schema.LOGPS, "logps")
    expected = [np.nan if value is None else value for value in logps["logps"].to_pylist()]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("size", "pieces"), [(0, 3), (10**6, 1)])
def test_as_many_row_groups_are_joined_as_the_bytes_allow(logps, path, size, pieces):
    found = list(row_groups(path, schema.LOGPS, ["tokens"], size))
    assert len(found) == pieces
    assert pa.concat_tables(found).equals(logps.select(["tokens"]))


def test_a_reader_that_stops_early_leaves_no_thread(path):
    tables = row_groups(path, schema.LOGPS)
    assert next(tables).num_rows == schema.ROW_GROUP
    tables.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sera-ahead")]


def test_what_fails_in_the_writing_thread_is_raised(logps, tmp_path):
    wrong = pa.table({"id": ["a"] * 2000, "logps": ["no number"] * 2000, "tokens": [1] * 2000})
    with pytest.raises(pa.ArrowInvalid, match="no number"), Writer(tmp_path / "a", schema.LOGPS) as out:
        out.write(wrong)


@pytest.mark.parametrize("ids", [["aa", "bb"], ["a", "bbb"], ["é", "日本", "a"], [], ["", ""]])
def test_ids_are_the_same_as_bytes_and_as_text(ids):
    column = pa.chunked_array([pa.array(["zz", *ids], pa.string()).slice(1), pa.array(ids, pa.string())])
    assert [key.decode() for key in keys(column).tolist()] == ids * 2
    assert streaming.texts(column).tolist() == ids * 2


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


def test_ids_that_are_numbers_are_found_beside_other_ones():
    ids = np.array([f"{number:016x}" for number in (7, 3, 2**64 - 1)])
    wanted = np.array([*ids, "short", f"{4:016x}", f"{3:016x}0"])
    assert Lookup(ids).places(wanted).tolist() == [0, 1, 2, -1, -1, -1]
    assert Lookup(np.array([b"b", b"a", b"b"])).places(np.array([b"b", b"a"])).tolist() == [0, 1]
    assert Lookup(np.array([30, 10, 20])).places(np.array([10, 11, 30])).tolist() == [1, -1, 0]
