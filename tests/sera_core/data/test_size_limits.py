"""Small files that hold far more than their size are refused early, with what was found and the limit."""

import gzip
import http.server
import json
import resource
import threading
import tracemalloc
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sera_core.data import size_limits
from sera_core.data.size_limits import EXPANDED_VARIABLE, LEAST_EXPANDED, ROW_VARIABLE, Limits
from sera_core.data.sources import read_rows, source_digest
from sera_core.errors import InputError

ROWS = [{"prompt": f"question {n}", "chosen": "a" * 1000, "rejected": "b"} for n in range(100)]
WRITTEN = {
    ".jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    ".json": lambda rows: json.dumps(rows).encode(),
    ".csv": lambda rows: ("a,b\n" + "".join(f"{r['chosen']},{r['rejected']}\n" for r in rows)).encode(),
}


def written(path, rows):
    """A file of the rows, in the format of its name."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        data = WRITTEN["".join(path.suffixes).removesuffix(".gz")](rows)
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.json.gz", "p.csv.gz", "p.parquet"])
def test_what_a_compressed_file_holds_is_limited(tmp_path, monkeypatch, name):
    path = written(tmp_path / name, ROWS)
    assert len(read_rows(path)) == len(ROWS)
    monkeypatch.setenv(EXPANDED_VARIABLE, "50000")
    with pytest.raises(
        InputError, match=rf"{name}: its [\d,]+ bytes expand to [\d,]+ or more, .* 50,000;"
    ) as e:
        read_rows(path)
    assert EXPANDED_VARIABLE in str(e.value)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet", "p.jsonl.gz"])
def test_a_row_is_limited_and_named(tmp_path, monkeypatch, name):
    monkeypatch.setenv(ROW_VARIABLE, "5000")
    path = written(tmp_path / name, ROWS)
    assert len(read_rows(path)) == len(ROWS)
    path = written(tmp_path / name, [*ROWS[:7], {**ROWS[7], "chosen": "é" * 4000}])
    if name == "p.json":
        monkeypatch.setenv(ROW_VARIABLE, "6000")
    if name == "p.csv":
        monkeypatch.setenv(ROW_VARIABLE, "3000")
    with pytest.raises(InputError, match=rf"{name} (line|row) 8: a row of [\d,]+ bytes, .* {ROW_VARIABLE}"):
        read_rows(path)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_rows_may_be_nested_so_deep_and_no_deeper(tmp_path, name):
    for depth, fits in ((90, True), (150, False)):
        text = '{"a": ' + "[" * depth + "]" * depth + "}"
        (tmp_path / name).write_text(text if name == "p.jsonl" else f"[{text}]")
        if fits:
            assert len(read_rows(str(tmp_path / name))) == 1
        else:
            with pytest.raises(
                InputError, match=rf"{name} (line|row) 1: .* nested more than 100 levels deep"
            ):
                read_rows(str(tmp_path / name))


def test_a_gzip_bomb_is_refused_without_being_held_whole(tmp_path):
    with gzip.open(tmp_path / "p.jsonl.gz", "wb") as stream:
        for _ in range(2):
            stream.write(b" " * 2**28)
    assert (tmp_path / "p.jsonl.gz").stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(InputError, match="expand to"):
        read_rows(str(tmp_path / "p.jsonl.gz"))
    assert tracemalloc.get_traced_memory()[1] < LEAST_EXPANDED + 2**25
    tracemalloc.stop()


@pytest.mark.parametrize("kept_as_dictionary", [False, True])
def test_a_parquet_bomb_is_refused_before_it_is_held(tmp_path, kept_as_dictionary):
    values = pa.array(["a" * 1000])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 1_000_000, pa.int32()), values)
    schema = pa.table({"chosen": column})
    path = tmp_path / "p.parquet"
    pq.write_table(schema, path, store_schema=kept_as_dictionary)
    assert path.stat().st_size < 200_000
    before = pa.total_allocated_bytes()
    with pytest.raises(InputError, match="expand to"):
        read_rows(str(path))
    assert pa.total_allocated_bytes() - before < LEAST_EXPANDED


def test_a_parquet_row_of_many_values_is_refused_by_what_the_file_says_of_itself(tmp_path, monkeypatch):
    lists = pa.array([[0] * 1_000_000], pa.list_(pa.int8()))
    pq.write_table(pa.table({"a": lists}), tmp_path / "p.parquet")
    monkeypatch.setenv(EXPANDED_VARIABLE, "2000000")
    with pytest.raises(InputError, match="expand to 4,000,000 or more"):
        read_rows(str(tmp_path / "p.parquet"))


def test_a_large_compressed_file_may_hold_many_times_its_size():
    assert Limits("p", 10).expanded == LEAST_EXPANDED
    assert Limits("p", LEAST_EXPANDED).expanded == 200 * LEAST_EXPANDED


def test_a_limit_that_is_no_number_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(ROW_VARIABLE, "64 MB")
    with pytest.raises(InputError, match=rf"{ROW_VARIABLE}='64 MB': not a positive number of bytes"):
        read_rows(written(tmp_path / "p.jsonl", ROWS))


def refused(path, match):
    """Reading and hashing a source are refused alike."""
    for read in (read_rows, source_digest):
        with pytest.raises(InputError, match=match):
            read(path)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet"])
def test_a_plain_file_is_limited_by_the_same_variable(tmp_path, monkeypatch, name):
    path = written(tmp_path / name, ROWS)
    monkeypatch.setenv(EXPANDED_VARIABLE, "1000")
    refused(path, rf"{name}: [\d,]+ bytes or more, above the limit of 1,000; .* {EXPANDED_VARIABLE}")
    refused(f"file://{path}", "above the limit of 1,000")
    refused(f"local://{path}", "above the limit of 1,000")


def test_a_file_larger_than_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    with (tmp_path / "p.jsonl").open("wb") as file:
        file.truncate(2**32 - 1)  # takes no room on disk
    monkeypatch.setattr(size_limits, "main_memory", lambda: (2.0**34, 2.0**31))
    tracemalloc.start()
    refused(
        str(tmp_path / "p.jsonl"),
        r"p\.jsonl: reading its 4,294,967,295 bytes needs 3 times .* 2,147,483,648 bytes are",
    )
    with (tmp_path / "p.jsonl").open("wb") as file:
        file.truncate(2**40)
    refused(str(tmp_path / "p.jsonl"), "1,099,511,627,776 bytes or more, above the limit of 4,294,967,296")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_small_file_that_expands_beyond_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(size_limits, "main_memory", lambda: (2.0**34, 2.0**25))
    monkeypatch.setenv(EXPANDED_VARIABLE, str(2**40))
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(b" " * 2**26))
    with pytest.raises(InputError, match=r"p\.jsonl\.gz: reading its [\d,]+ bytes needs 3 times"):
        read_rows(str(tmp_path / "p.jsonl.gz"))


class Endless(http.server.BaseHTTPRequestHandler):
    """Answers /lying with less than it sends, /packed with gzip, and everything without an end."""

    sent = 0

    def do_HEAD(self, status=200):
        self.send_response(status)
        self.send_header("Accept-Ranges", "bytes")
        if "lying" in self.path:
            self.send_header("Content-Length" if self.command == "HEAD" else "X", "1000")
        if "packed" in self.path:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()

    def do_GET(self):
        self.do_HEAD(206 if "lying" in self.path and self.headers.get("Range") else 200)
        piece = b'{"prompt": "a"}\n' * 2**14
        packed = gzip.compress(b" " * 2**24)
        with suppress(OSError):
            while True:
                type(self).sent += len(piece)
                self.wfile.write(packed if "packed" in self.path else piece)

    def log_message(self, format, *args):
        """Nothing."""


@pytest.fixture(scope="module")
def endless():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize("name", ["p.jsonl", "lying.jsonl", "packed.jsonl"])
def test_a_download_that_never_ends_is_stopped_at_the_limit(endless, monkeypatch, name):
    monkeypatch.setenv(EXPANDED_VARIABLE, str(2**25))
    Endless.sent = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(f"{endless}/{name}", rf"{name}: 3[34],[\d,]+ bytes or more, above the limit of 33,554,432")
    assert Endless.sent < 2**28
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


def test_a_download_stops_where_memory_does(endless, monkeypatch):
    monkeypatch.setattr(size_limits, "main_memory", lambda: (2.0**34, 2.0**25))
    refused(f"{endless}/p.jsonl", "times as much memory, but 33,554,432 bytes are available")


def test_a_hubs_data_set_has_the_same_limits(monkeypatch):
    import datasets

    def hub(rows):
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
        return read_rows(f"hub:owner/pairs@{'c' * 40}")

    told = datasets.Dataset.from_list(ROWS)
    assert [row.data for row in hub(told)] == ROWS
    monkeypatch.setenv(ROW_VARIABLE, "1000")
    with pytest.raises(
        InputError, match=rf"hub:owner/pairs@c+ train row 1: a row of 1,\d+ .* {ROW_VARIABLE}"
    ):
        hub(told)
    monkeypatch.delenv(ROW_VARIABLE)
    deep: dict = {"prompt": "a"}
    for _ in range(150):
        deep = {"a": [deep]}
    with pytest.raises(InputError, match=r"train row 2: .* nested more than 100 levels deep"):
        hub([ROWS[0], deep])
    monkeypatch.setenv(EXPANDED_VARIABLE, "50000")
    for rows in (told, ROWS):
        with pytest.raises(
            InputError, match=r"hub:owner/pairs@c+: [\d,]+ bytes or more, above the limit of 50,000"
        ):
            hub(rows)
