"""Rows come out of every format alike, and every file that cannot be read says which and what to do."""

import csv
import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sera_core.data import sources
from sera_core.data.parsing import parse_pair
from sera_core.data.sources import bundled_file, read_rows, read_source, source_digest
from sera_core.errors import InputError

ROWS = [
    {
        "prompt": [{"role": "user", "content": "Name a colour,\nor two."}],
        "chosen": [{"role": "assistant", "content": 'Blue, and "green".\r\nBoth\u2028are fine.'}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    {
        "prompt": [{"role": "user", "content": "Größe?"}],
        "chosen": [{"role": "assistant", "content": "[1, 2]"}],
        "rejected": [{"role": "assistant", "content": "日本"}],
    },
]


def _write(path: Path, rows: list[dict]) -> Path:
    suffix = "".join(path.suffixes)
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows({key: json.dumps(value) for key, value in row.items()} for row in rows)
    elif suffix == ".json":
        path.write_text(json.dumps({"data": rows}), encoding="utf-8")
    else:
        data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
        path.write_bytes(gzip.compress(data) if suffix.endswith(".gz") else data)
    return path


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "p.jsonl.gz", "p.json", "p.csv", "p.parquet"])
def test_every_format_gives_the_same_pairs(tmp_path, name):
    read = [parse_pair(row) for row in read_rows(str(_write(tmp_path / name, ROWS)))]
    expected = [parse_pair(sources.Row("", row)) for row in ROWS]
    assert read == expected
    assert [pair.pair_id for pair in read] == [pair.pair_id for pair in expected]


def test_a_json_file_may_be_a_plain_list(tmp_path):
    path = tmp_path / "p.json"
    path.write_text(json.dumps(ROWS))
    assert [row.data for row in read_rows(str(path))] == ROWS


def test_rows_know_their_line_even_after_blank_lines(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [row.where for row in read_rows(str(path))] == ["p.jsonl line 1", "p.jsonl line 3"]


def test_a_url_is_read_through_fsspec_and_has_the_digest_of_its_bytes(tmp_path):
    import fsspec

    data = b'{"a": 1}\n'
    with fsspec.open("memory://bucket/p.jsonl", "wb") as stream:
        stream.write(data)
    digest, rows = read_source("memory://bucket/p.jsonl")
    assert digest == hashlib.sha256(data).hexdigest() == source_digest("memory://bucket/p.jsonl")
    assert rows[0].data == {"a": 1}
    local = tmp_path / "p.jsonl"
    local.write_bytes(data)
    assert source_digest(str(local)) == source_digest(f"file://{local}") == digest


def test_a_csv_cell_that_only_looks_like_a_list_stays_text(tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('prompt,chosen,rejected\nlist three,"[1, 2, 3]","[""a""]"\n')
    assert read_rows(str(path))[0].data == {
        "prompt": "list three",
        "chosen": "[1, 2, 3]",
        "rejected": '["a"]',
    }


def test_the_shipped_sample_is_found_and_read():
    rows = read_rows("bundled:ultrafeedback_short.jsonl")
    assert bundled_file("data", "ultrafeedback_short.jsonl").parent.name == "data"
    assert len({parse_pair(row).pair_id for row in rows}) == len(rows) > 100


def test_a_hub_data_set_is_read_at_the_commit_that_is_its_digest(monkeypatch):
    import datasets
    from huggingface_hub import HfApi

    commit, asked = "c" * 40, {}

    class Info:
        sha = commit

    def load(name, split, revision):
        asked.update(name=name, split=split, revision=revision)
        return datasets.Dataset.from_list([{"prompt": "a"}])

    monkeypatch.setattr(HfApi, "dataset_info", lambda self, name, revision: Info())
    monkeypatch.setattr(datasets, "load_dataset", load)
    digest, rows = read_source("hub:owner/pairs", "test")
    assert digest == commit == source_digest("hub:owner/pairs", "test")
    assert asked == {"name": "owner/pairs", "split": "test", "revision": commit}
    assert rows == [sources.Row("hub:owner/pairs test row 1", {"prompt": "a"})]


def test_an_unreachable_hub_says_what_to_do(monkeypatch):
    from huggingface_hub import HfApi

    def refuse(self, name, revision):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    with pytest.raises(InputError, match=r"hub:owner/pairs: cannot reach the hub .* use a local file"):
        source_digest("hub:owner/pairs")


def test_a_missing_file_names_the_nearest_one(tmp_path):
    _write(tmp_path / "preferences.jsonl", ROWS)
    with pytest.raises(
        InputError, match=r"preference\.jsonl: no such file; did you mean .*preferences\.jsonl\?"
    ):
        read_rows(str(tmp_path / "preference.jsonl"))


def test_a_missing_folder_is_named_with_the_nearest_one(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match=r"there is no .*dta, so no such file; did you mean .*data\?"):
        source_digest(str(tmp_path / "dta" / "x" / "p.jsonl"))


def test_a_missing_shipped_file_names_the_nearest_one():
    with pytest.raises(InputError, match=r"did you mean ultrafeedback_short\.jsonl\?"):
        read_rows("bundled:ultrafeedback_shrt.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"a": 1}\n{"a": \n', r"p\.jsonl line 2: not valid JSON"),
        ("p.jsonl", b'{"a": 1}\n{"a": 1, "b": {"c": 1, "c": 2}}', r"line 2: an object has the key 'c' twice"),
        ("p.json", b'[{"a": 1, "a": 2}]', r"p\.json: an object has the key 'a' twice"),
        (
            "p.csv",
            b'a\n"[{""role"": ""x"", ""role"": ""y""}]"\n',
            r"p\.csv row 1: in the cell 'a' .*'role' twice",
        ),
        ("p.csv", b"prompt,chosen,chosen\na,b,c\n", r"p\.csv: two columns are named 'chosen'"),
        ("p.json", b'[{"a": ' + b"9" * 5000 + b"}]", r"p\.json: cannot be read as JSON .*5000 digits"),
        ("p.jsonl", b'{"a": ' + b"9" * 5000 + b"}", r"p\.jsonl line 1: not valid JSON .*5000 digits"),
        *(
            (name, start, what)
            for name in ("p.jsonl", "p.json", "p.csv", "p.parquet")
            for start, what in (
                (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer"),
                (b"\n<!DOCTYPE html>\n<html><body>404</body></html>", "this is a web page"),
            )
        ),
        ("p.jsonl", b'{"a": 1}\n[1]\n', r"p\.jsonl line 2: .*a list of rows; name the file \.json"),
        ("p.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"p\.jsonl line 2: not UTF-8"),
        ("p.jsonl", b"", r"p\.jsonl: the file has no rows"),
        ("p.json", b"\n", r"p\.json: the file has no rows"),
        ("p.parquet", b"", r"p\.parquet: not a readable parquet file"),
        ("p.json", b'[{"a": 1},\n oops]', r"p\.json line 2: not valid JSON"),
        ("p.json", b'{"a": 1}\n{"a": 2}\n', r"p\.json line 2: not valid JSON .* name it \.jsonl"),
        ("p.json", b'{"rows": []}', r"p\.json: contains an object without rows"),
        ("p.json", b"[" * 100_000, r"p\.json"),
        ("p.csv", b"a,b\n1,2\n3\n", r"p\.csv row 2: the number of cells differs"),
        ("p.csv", b"a,b\n1,2,3\n", r"p\.csv row 1: the number of cells differs"),
        ("p.csv", b"a\n\"[{'role': 'user'}]\"\n", r"p\.csv row 1: the cell 'a' looks like messages"),
        ("p.jsonl.gz", b"not gzip", r"p\.jsonl\.gz: not a complete gzip file"),
        (
            "p.xlsx",
            b"x",
            r"p\.xlsx: \.xlsx files are not read; give one of \.jsonl, \.json, \.csv, \.parquet",
        ),
        ("p", b"x", r"p: a name without extension is not read"),
    ],
)
def test_a_file_that_cannot_be_read_says_where_and_why(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_rows(str(path))
    assert caught.value.exit_code == 2


def test_a_folder_is_refused_with_the_files_it_holds(tmp_path):
    _write(tmp_path / "p.jsonl", ROWS)
    with pytest.raises(InputError, match=r"this is a folder; name one file in it \(it contains p\.jsonl\)"):
        read_rows(str(tmp_path))


def test_an_unreachable_url_does_not_show_its_query():
    with pytest.raises(InputError) as caught:
        read_rows("nowhere://bucket/p.jsonl?some=thing")
    assert "nowhere://bucket/p.jsonl: cannot be read" in str(caught.value)
    assert "thing" not in str(caught.value)


def test_a_parquet_file_with_a_column_twice_is_refused(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["chosen", "chosen"])
    pq.write_table(table, tmp_path / "p.parquet")
    with pytest.raises(InputError, match="two columns are named 'chosen'"):
        read_rows(str(tmp_path / "p.parquet"))


def test_a_hub_id_without_hub_is_recognised(tmp_path):
    with pytest.raises(InputError, match="did you mean the hub's data set, hub:owner/some_pairs"):
        read_rows(str(tmp_path / "owner/some_pairs"))


@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
@pytest.mark.parametrize("linked", [False, True])
def test_what_is_no_plain_file_is_refused_at_once(tmp_path, special, kind, linked):
    path = special(kind, tmp_path / "p.jsonl")
    if linked:
        (tmp_path / "link.jsonl").symlink_to(path)
        path = tmp_path / "link.jsonl"
    for name in (path, f"file://{path}", f"local://{path}"):
        for read in (read_rows, source_digest):
            with pytest.raises(InputError, match=rf"{path.name}: this is a {kind}, not a file"):
                read(str(name))
