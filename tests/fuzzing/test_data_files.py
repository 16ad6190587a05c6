"""A damaged data file: refused with its name, or read as the plain parsers of its format read it.

The rows are those that `json`, `csv` and `pyarrow` give, none lost and none changed, and every row becomes
one pair or is counted as dropped.
"""

import base64
import csv
import gzip
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from fuzzing.cases import at_most, damaged_bytes, damaged_json, fuzzed, values
from hypothesis import given
from hypothesis import strategies as st

from flows.commands import capability_inputs as inputs
from sera_core.artifacts.canonical import pair_id
from sera_core.data import loading as reading
from sera_core.data import sources
from sera_core.data.formats import FORMATS, Reading, rating_of
from sera_core.data.rendering import Renderer
from sera_core.errors import InputError

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
HH = "\n\nHuman: Why?\n\nAssistant:"
COMPLETIONS = [
    {"response": "good", "annotations": {"help": {"Rating": "5"}, "truth": {"Rating": 4}}},
    {"response": "bad", "overall_score": 2.0, "annotations": {"help": {"Rating": "1"}}},
]
OWN = {"pair_id": pair_id([USER], [ASSISTANT], [ASSISTANT | {"content": "No."}])}
ROWS: tuple[dict[str, Any], ...] = (
    {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
    {"prompt": "Why?", "chosen": "a, b\nc", "rejected": 'say "d"', "system": "Be brief."},
    {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT | {"content": "No."}]},
    {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT | {"content": "No.", "thinking": "hm"}]},
    {"chosen": "Why is it so? A", "rejected": "Why is it so? B"},
    {"chosen": f"{HH} So.", "rejected": f"{HH} No."},
    {"question": "Why?", "chosen": "So.", "rejected": "No.", "system_prompt": "Be brief."},
    {"instruction": "Why?", "input": "", "history": [["Who?", "I."]], "output": ["So.", "No."]},
    {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "So."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    {"instruction": "Why?", "completions": COMPLETIONS},
    {"prompt": [USER | {"content": [{"type": "text", "text": "Why?"}]}], "chosen": "So.", "rejected": "No."},
    {"prompt": json.dumps([USER]), "chosen": json.dumps([ASSISTANT]), "rejected": json.dumps([ASSISTANT])},
    {**OWN, "prompt": "Why?", "chosen": "So.", "rejected": "No.",
     "prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]},
)  # fmt: skip
"""One of every form that is read."""


# --------------------------------------------------------------------------------------------------- writing


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def csv_of(rows: list[dict[str, Any]]) -> bytes:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns)
    writer.writeheader()
    writer.writerows({key: _cell(value) for key, value in row.items()} for row in rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


def parquet_of(rows: list[dict[str, Any]]) -> bytes:
    """One type a column: where rows have several, all are written as text."""
    names = list(dict.fromkeys(key for row in rows for key in row))
    columns = []
    for name in names:
        column = [row.get(name) for row in rows]
        try:
            columns.append(pa.array(column))
        except (pa.ArrowException, OverflowError, UnicodeError):
            columns.append(pa.array([_cell(value).encode("utf-8", "replace").decode() for value in column]))
    out = io.BytesIO()
    try:
        pq.write_table(
            pa.table(columns, names=[name.encode("utf-8", "replace").decode() for name in names]), out
        )
    except pa.ArrowException:  # a structure without fields has no place in parquet
        pq.write_table(pa.table({"prompt": ["Why?"], "chosen": ["So."], "rejected": ["No."]}), out)
    return out.getvalue()


WRITERS = {
    ".jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    ".json": lambda rows: json.dumps(rows).encode(),
    ".csv": csv_of,
    ".parquet": parquet_of,
}


@st.composite
def files(draw) -> tuple[str, bytes]:
    """A file's ending and its bytes: good rows, of which some are damaged as values, some as bytes."""
    rows = draw(st.lists(st.sampled_from(ROWS), min_size=1, max_size=4))
    suffix = draw(st.sampled_from(list(WRITERS)))
    how = draw(st.sampled_from(("good", "good", "row", "row", "column", "bytes")))
    if how == "row":
        number = draw(st.integers(0, len(rows) - 1))
        damage = draw(damaged_json(rows[number]))
        if suffix == ".jsonl":
            lines = [json.dumps(row).encode() for row in rows]
            lines[number] = damage.data.replace(b"\n", b"")
            return suffix, b"\n".join(lines)
        try:
            row = json.loads(damage.data)
        except (ValueError, RecursionError):
            return ".json", b"[" + damage.data + b"]"
        rows = [*rows[:number], row if isinstance(row, dict) else {"prompt": row}, *rows[number + 1 :]]
    elif how == "column":
        name = draw(st.text(max_size=5) | st.sampled_from(["prompt", "chosen", "system", "tools", "history"]))
        rows = [row | {name: draw(values)} for row in rows]
    data = WRITERS[suffix](rows)
    if how == "bytes":
        data = draw(damaged_bytes(data)).data
    if suffix != ".parquet" and draw(st.integers(0, 9)) == 0:
        zipped = gzip.compress(data, mtime=0)
        return f"{suffix}.gz", draw(st.just(zipped) | damaged_bytes(zipped).map(lambda one: one.data))
    return suffix, data


readings = st.builds(
    Reading,
    format=st.sampled_from((*["auto"] * 20, *FORMATS)),
    columns=st.sampled_from(
        ({}, {}, {}, {}, {"prompt": "question"}, {"chosen": "rejected", "rejected": "chosen"})
    ),
    completions=st.sampled_from(("worst", "random")),
    on_diverge=st.sampled_from(("refuse", "split")),
    on_bad_row=st.sampled_from(("refuse", "drop")),
)


# ------------------------------------------------------------------------------------------ the plain parsers


def plainly(suffix: str, data: bytes) -> list[Any]:
    """The rows as the format's own parser gives them."""
    if suffix.endswith(".gz"):
        return plainly(suffix.removesuffix(".gz"), gzip.decompress(data))
    if suffix == ".parquet":
        return pq.ParquetFile(io.BytesIO(data)).read().to_pylist()
    text = data.decode("utf-8-sig")
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if suffix == ".csv":
        csv.field_size_limit(2**31 - 1)
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    found = json.loads(text)
    return found["data"] if isinstance(found, dict) else found


def same(read: Any, plain: Any) -> bool:
    """Whether a value was read as it stands; a cell of CSV that holds messages may be read as these."""
    if repr(read) == repr(plain):
        return True
    return isinstance(plain, str) and not isinstance(read, str) and repr(json.loads(plain)) == repr(read)


def check_rows(suffix: str, data: bytes, rows: list[sources.Row]) -> None:
    """No row is lost, added or changed."""
    plain = plainly(suffix, data)
    assert len(rows) == len(plain)
    for row, own in zip(rows, plain, strict=True):
        assert row.data.keys() == own.keys()
        assert all(same(row.data[name], value) for name, value in own.items()), (row.data, own)


def check_pairs(rows: list[sources.Row], read: reading.Read) -> None:
    """Every row is a pair or dropped, in order; plain texts are taken as they are."""
    places = [pair.where for pair in read.items]
    dropped = [drop.item.row.where for drop in read.dropped]
    inputs.dropped_table({"data": read.dropped})
    assert sorted([*places, *dropped]) == sorted(row.where for row in rows)
    assert places == [row.where for row in rows if row.where in set(places)]
    by_place = {row.where: row.data for row in rows}
    for pair in read.items:
        data = by_place[pair.where]
        texts = [data.get(name) for name in ("prompt", "chosen", "rejected")]
        if data.keys() == {"prompt", "chosen", "rejected"} and all(map(is_plain, texts)):
            assert [part[-1]["content"] for part in (pair.prompt, pair.chosen, pair.rejected)] == texts


def is_plain(text: Any) -> bool:
    """Whether text can be nothing but itself: no messages as JSON, no transcript, not nothing."""
    return isinstance(text, str) and text.strip()[:1] not in ("", "[", "{", "H")


# ----------------------------------------------------------------------------------------------- the property


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


class Refused(Exception):
    """The file was refused as it should be."""


@contextmanager
def refused(path: Path, flags: Sequence[str] = ()) -> Iterator[None]:
    """Within ten seconds the body ends, or is refused with the file's name (or that of a flag)."""
    try:
        with at_most():
            yield
    except InputError as error:
        said = str(error)
        if not any(name in said for name in (path.name, *flags)):
            raise AssertionError(f"no file is named: {said}") from error
        raise Refused from error


def check_file(path: Path, data: bytes, how: Reading) -> None:
    """Read a file through the door of `sera score`, and hold what it gives against the plain parser."""
    path.write_bytes(data)
    with refused(path):
        rows = sources.read_rows(str(path))
    check_rows(path.name.removeprefix("pairs"), data, rows)
    with refused(path, ["--columns"] if how.columns else []):
        read = reading.read_pairs(str(path), rows, how)
        inputs.read_pairs(str(path), how)
    if not how.columns:
        check_pairs(rows, read)


@fuzzed
@given(file=files(), how=readings)
def test_a_damaged_file_is_refused_by_name_or_read_as_it_stands(folder, file, how):
    suffix, data = file
    with suppress(Refused):
        check_file(folder / f"pairs{suffix}", data, how)


# --------------------------------------------------------------------------------------------- what was found


@pytest.mark.parametrize("ids", ["[1, 2]", "7", {"a": 1}, [1.5], ["1"], [-1], [2**40], [None], [True]])
def test_what_stands_for_token_ids_and_is_none_is_refused_with_its_row(tmp_path, ids):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n" + json.dumps(ROWS[-1] | {"chosen_ids": ids}))
    with pytest.raises(InputError, match=r"pairs\.jsonl line 2: chosen_ids is not a list of token ids"):
        inputs.read_pairs(str(path), Reading())


def test_token_ids_that_the_model_does_not_have_are_refused_with_their_row(tmp_path):
    tiny.tiny_policy(tmp_path / "policy", layers=1, hidden=32)
    renderer = Renderer(tmp_path / "policy")
    prompt = renderer.prompt_ids([USER])
    row = ROWS[-1] | {"prompt_ids": prompt, "chosen_ids": [3, 70_000]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    pairs, _ = inputs.read_pairs(str(tmp_path / "pairs.jsonl"), Reading())
    with pytest.raises(InputError, match=r"line 1: .*id 70000"):
        inputs.render_pairs(renderer, pairs, inputs.Limits(64, 64, "drop", None))


@pytest.mark.parametrize("annotations", [5e-324, "good", [1], True, {"help": 3}, {"help": {"Rating": {}}}])
def test_annotations_that_are_none_leave_a_completion_with_its_score(annotations):
    assert rating_of({"annotations": annotations, "score": "2.5"}) == 2.5


@pytest.mark.parametrize("score", ["nan", float("nan"), float("inf"), "-inf", 10**400])
def test_a_score_that_is_not_finite_is_none(score):
    """Nothing is larger than NaN and nothing smaller, so the best of the answers would be chance."""
    assert rating_of({"score": score}) is None


def test_a_parquet_file_over_which_pyarrow_ends_its_process_is_refused(tmp_path):
    """A column's histogram of repetition levels is longer than its type allows."""
    path = tmp_path / "pairs.parquet"
    path.write_bytes(gzip.decompress(base64.b64decode(ENDS_PYARROW)))
    with pytest.raises(InputError, match=r"pairs\.parquet: .*metadata is damaged"):
        sources.read_rows(str(path))


ENDS_PYARROW = """
H4sIAAAAAAACA42TwU7bQBCGx5vINVKEQtRdeSUfcmHVA6QEFQQoEhqnAaqmJknVWs0tGCtppGDjBCI4VD1UPfXYQ9VTH6BP0ROP
1d11iAtEqCtrvP535pvfI7uFnSrN0yJ92qSEQgnAcvIA4A+u9inQEmVrUi9Sk5rONjzLK93WcWVFpi2ViYzEMAhIyjIt3VKe2Dl5
8DaqLIDkpGyr8D8IbzHCUwhvEYI3t8A2x8EgHPWoCbSwSmwzTqJRPFmFpiMTUykYROPw7F/JSsJhGEzC05nICHd4TYBDC3wLzCK/
5VDCCPtisG+G2BHWw7nwNfkmQKUbkJYJ1JjFBRegXN7BpR407hP7aog/hvhu3B/RQ5rJzQW0uf2Md0PET3J/Xo/x2OccI8JiP3LA
HbuAnc6xv5fO0v5Fnqu1i2q1MV2vEafo9vEAsY/1vtZcF/GN2tQRX2khu2N65E7Vzpuj6mOF1rUdLQZZvl66Phi9P+/63kbXT9tH
LeVnKMOOfGocNHSRNtHISj8ocdg73L3u+i9ke53fRret/B2qVi9nzeZF7Xe6wdGdV52hj9yrk83q9HRekp2DXY57yflFOFkP4ni9
lyTRtHwZJuOP0Vl5c7uyUanymvyy0gt+y4m35P/3FznEe3qEAwAA
"""
