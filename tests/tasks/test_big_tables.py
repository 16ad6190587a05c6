"""A round of synthetic pairs through the steps that must not grow with them, against plain Python."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import sera_core
from flows.store_tools.verify import verify
from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.artifacts.manifest import Artifact, StepRecord
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.errors import InputError, SeraError
from tasks.engines.training_data import Mixture
from tasks.mixing import mix_pairs
from tests.scale import big_tables

PAIRS = 6000
WORK = ("review", "select", "pair", "select_generated", "mix")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("big") / "store"


@pytest.fixture(scope="module")
def measured(folder) -> dict[str, dict]:
    store = open_store(str(folder))
    folder.mkdir()
    big_tables.make(store, PAIRS)
    return {step: big_tables.measured(store, step) for step in (*WORK, "verify")}


@pytest.fixture(scope="module")
def records(folder, measured) -> dict[str, StepRecord]:
    return {step: big_tables.do(open_store(str(folder)), step) for step in WORK}


@pytest.fixture
def files(folder, records):
    """The rows of a file of a step."""

    def read(step: str, name: str) -> list[dict]:
        return list(schema.iter_rows(Artifact(open_store(str(folder)), records[step].ref).path(name)))

    return read


def test_rows_seconds_and_memory_of_every_step_are_told(measured, records):
    for step in WORK:
        assert measured[step]["digest"] == records[step].digest
        assert measured[step]["peak_mib"] > 50 and measured[step]["seconds"] >= 0
    assert measured["mix"]["rows"] == sum(
        records["mix"].metrics[f"pairs/{o}"] for o in ("human", "generated")
    )
    assert measured["verify"]["bytes"] > 10**6


def hashed(kind: str, id: str) -> bytes:
    return hashlib.sha256(f"{kind}:{id}".encode()).digest()


def test_the_mixture_is_the_best_pairs_of_both_sides_in_the_order_of_their_hashes(files, records):
    human, generated = files("select", "ledger.parquet"), files("select_generated", "ledger.parquet")
    kept = {
        origin: sorted((row for row in rows if row["kept"]), key=lambda row: row["rank"])
        for origin, rows in (("human", human), ("generated", generated))
    }
    total = min(len(kept["human"]), int(len(kept["generated"]) / big_tables.SHARE))
    made = round(total * big_tables.SHARE)
    expected = [row["pair_id"] for row in kept["human"][: total - made] + kept["generated"][:made]]
    seed = derived_seed(0, big_tables.ROUND, "order")
    mixture = files("mix", "mixture.parquet")
    assert [row["pair_id"] for row in mixture] == sorted(expected, key=lambda id: hashed(f"order:{seed}", id))
    assert records["mix"].metrics["generated_share"] == made / total


def test_a_pair_of_the_mixture_has_its_own_texts_and_reference_values(files, folder, records):
    store = open_store(str(folder))
    inputs = records["mix"].inputs
    pairs = {row["pair_id"]: row for row in files("pair", "pairs.parquet")}
    path = Artifact(store, inputs["rendered"]).path("train.parquet")
    pairs |= {row["pair_id"]: row for row in schema.iter_rows(path)}
    human = schema.iter_rows(Artifact(store, inputs["human_reference"]).path("logps.parquet"))
    logps = {row["id"]: row["logps"] for row in human}
    made = {(row["prompt_id"], row["sample"]): row["ref_logps"] for row in files("pair", "responses.parquet")}
    samples = {row["pair_id"]: row for row in files("pair", "pair_samples.parquet")}
    for row in files("mix", "mixture.parquet"):
        values = [row.pop(f"ref_{side}_logps") for side in ("chosen", "rejected")]
        assert row == pairs[row["pair_id"]]
        if row["origin"] == "human":
            assert values == [logps[f"{row['pair_id']}/{side}"] for side in ("chosen", "rejected")]
        else:
            of = samples[row["pair_id"]]
            assert values == [made[row["prompt_id"], of[f"{side}_sample"]] for side in ("chosen", "rejected")]


def test_the_ledger_has_every_pair_once_with_the_reason_of_its_last_stage(files, records):
    ledger = files("mix", "ledger.parquet")
    assert len({row["pair_id"] for row in ledger}) == len(ledger) == PAIRS
    mixed = {row["pair_id"] for row in files("mix", "mixture.parquet")}
    selected = files("select", "ledger.parquet") + files("select_generated", "ledger.parquet")
    for row, before in zip(ledger, selected, strict=True):
        over = before["kept"] and row["pair_id"] not in mixed
        change = {"kept": False, "reason": "over_share", "stage": "mix"} if over else {}
        assert row == before | change
    counted = pd.Series([f"{row['origin']}/{row['reason']}" for row in ledger]).value_counts()
    assert records["mix"].counts == counted.to_dict()


def test_files_whose_pairs_stand_in_another_order_are_refused(folder, records, tmp_path):
    store = open_store(str(shutil.copytree(folder, tmp_path / "store")))
    for name, file in (("human_reference", "logps.parquet"), ("rendered", "train.parquet")):
        attempt = Attempt(store, records["mix"].spec, ExecutionConfig())
        path = attempt.input(name).path(file)
        table = pq.read_table(path)
        turned = np.roll(np.arange(table.num_rows), 2)
        schema.write_table(table.take(turned), path)
        attempt.input = lambda name, given=attempt.input, store=store: Unchecked(store, given(name))
        with pytest.raises(SeraError, match=f"{file}: its pairs are not those of the selection"):
            mix_pairs(attempt)
        schema.write_table(table.slice(0, table.num_rows - 2), path)
        with pytest.raises(SeraError, match=f"{file}: its pairs are not those of the selection"):
            mix_pairs(attempt)
        schema.write_table(table, path)


class Unchecked:
    """An input whose files are not hashed, so that a test can change them."""

    def __init__(self, store, artifact) -> None:
        self._store, self._artifact = store, artifact

    def path(self, name: str) -> Path:
        file, ref = self._artifact.record.files[name], self._artifact.ref
        return Path(self._store.url) / "steps" / ref.step / ref.key / file.attempt / name


def test_the_round_is_verified_and_its_pairs_come_in_batches(folder, records):
    assert verify(RunStore(open_store(str(folder)), big_tables.RUN)).steps > len(WORK)
    round = sera_core.open_run(str(folder), big_tables.RUN)[0]
    batches = list(round.pair_batches())
    assert [len(batch) for batch in batches[:-1]] == [schema.ROW_GROUP] * (len(batches) - 1)
    pd.testing.assert_frame_equal(pd.concat(batches), round.pairs())
    assert batches[0]["ensemble_margin"].notna().all()


def test_the_trainer_s_rows_are_the_file_s_and_their_token_ids_stay_out_of_memory(folder, records, tmp_path):
    path = Artifact(open_store(str(folder)), records["mix"].ref).path("mixture.parquet")
    mixture = Mixture.read(path, True, {"human": 0.1, "generated": 0.2})
    rows = list(schema.iter_rows(path))
    ids = ("prompt_ids", "chosen_ids", "rejected_ids")
    assert mixture.lengths.tolist() == [[len(row[name]) for name in ids] for row in rows]
    assert mixture.tokens[:3] == [2 * 5 + len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows[:3]]
    held = pa.total_allocated_bytes()
    data = mixture.dataset(tmp_path)
    assert pa.total_allocated_bytes() - held < 2000  # the ids alone are 48 bytes a pair
    names = (*ids, "ref_chosen_logps", "ref_rejected_logps")
    for number in (0, 1500, len(rows) - 1):
        told = {name: rows[number][name] for name in names}
        smoothing = 0.1 if rows[number]["origin"] == "human" else 0.2
        assert data[number] == {**told, "label_smoothing": smoothing, "row": number}
    assert mixture.take([7]) == [{name: rows[7][name] for name in ids}]
    assert mixture.pair_id(7) == rows[7]["pair_id"]


@pytest.mark.parametrize(("value", "said"), [(None, "None"), (float("nan"), "nan")])
def test_a_pair_without_a_reference_is_refused_by_name(folder, records, tmp_path, value, said):
    path = Artifact(open_store(str(folder)), records["mix"].ref).path("mixture.parquet")
    table = pq.read_table(path).slice(0, 5)
    at = table.schema.get_field_index("ref_rejected_logps")
    table = table.set_column(at, table.schema.field(at), pa.array([-1.0, -2.0, value, -3.0, None]))
    schema.write_table(table, tmp_path / "mixture.parquet")
    pair = table["pair_id"][2].as_py()
    with pytest.raises(InputError, match=f"pair {pair}: ref_rejected_logps is {said}; score"):
        Mixture.read(tmp_path / "mixture.parquet", True, {})
    assert Mixture.read(tmp_path / "mixture.parquet", False, {}).pair_ids.size == 5
