"""Code of the user's own in a run: allowed by name, found by its source, refused where it does not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tinyrun
import torch

from flows.cli import main
from sera_core.artifacts.manifest import find_record
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.artifacts.upkeep import upkeep
from sera_core.config import SeraConfig
from sera_core.errors import InputError
from sera_core.extensions import source_hash
from sera_core.method.pairing import pair_responses
from sera_core.method.selection import SELECTION, select
from sera_core.models.losses import cdpo_loss
from tasks.engines.dpo_trainer import Pairs, _own_losses

HERE = Path(__file__).parent
OWN = {
    "select": {"rule": "my_method:middle", "fraction": 0.5},
    "pairing": {"rule": "my_method:neighbours", "by": "my_method:vowels"},
    "train": {"losses": ["my_method:dpo_by_hand"]},
    "sampling": {"engine": "my_method:engine"},
    "decide": {"panel": ["tokens", "my_method:vowels"], "feature": "my_method:vowels"},
}


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    """The module is on the Python path and allowed, here and in child processes."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=":")
    monkeypatch.setenv("SERA_EXTENSIONS", "my_method")


@pytest.mark.slow
@pytest.mark.flow
def test_a_run_with_code_of_ones_own_in_every_place(tmp_path, capfd):
    experiment = tinyrun.experiment(tmp_path, **OWN)
    assert main(["run", str(experiment), "--store", f"elsewhere:/{tmp_path}/store", "--json"]) == 0
    run = json.loads(capfd.readouterr().out)["run"]
    assert main(["verify", run, "--store", f"elsewhere:/{tmp_path}/store"]) == 0
    records = RunStore(open_store(str(tmp_path / "store")), run)
    manifest = records.rounds()[1]
    steps = [find_record(records.store, ref.step, ref.key) for ref in manifest.used]
    own = {record.step: record.fields["sources"] for record in steps if record and "sources" in record.fields}
    code = source_hash("my_method:middle", "selection rule")
    assert own == {
        "select": {"my_method:middle": code},
        "pair": {"my_method:neighbours": code},
        "train": {"my_method:dpo_by_hand": code},
        "sample": {"my_method:engine": code},
        "features": {"my_method:vowels": code},
    }


def test_a_store_without_upkeep_is_refused_by_its_class(tmp_path):
    class Bare:
        url = "bare://here"

    with pytest.raises(InputError, match=r"bare://here: its class Bare has no method upkeep\(\)"):
        upkeep(Bare())


def test_a_rule_decides_by_its_margins_and_the_floor_stays(tmp_path):
    margins = np.array([3.0, 1.0, np.nan, 2.0, -1.0, 0.5])
    names = [f"pair-{n}" for n in range(6)]
    found = select(margins, names, rule="my_method:middle", fraction=0.5, min_margin=0.7)
    assert found.kept.tolist() == [False, True, False, True, False, False]
    assert found.reason.tolist() == [
        "below_cut", "kept", "non_finite", "kept", "not_preferred", "not_preferred",
    ]  # fmt: skip


def test_a_pairing_rule_sees_one_prompt_at_a_time(tmp_path):
    rewards = np.array([1.0, 3.0, 2.0, 5.0, 5.0])
    found = pair_responses(
        rewards,
        np.array([0, 0, 0, 1, 1]),
        np.array([0, 1, 2, 0, 1]),
        np.array([0, 1, 2, 0, 1]),
        np.ones(5, dtype=bool),
        rule="my_method:neighbours",
    )
    assert list(zip(found.chosen.tolist(), found.rejected.tolist(), strict=True)) == [(1, 2), (2, 0)]


def test_a_loss_is_the_one_it_says():
    train = tinyrun.SeraConfig.model_validate(
        {"model": {"source": "m"}, "data": {"train": [{"path": "p"}]}, "train": OWN["train"]}
    ).train
    ((weight, loss),) = _own_losses(train)
    logps = [torch.randn(4, dtype=torch.float64) - 20 for _ in range(4)]
    pairs = Pairs(*logps, *[torch.full((4,), 7)] * 2, torch.zeros(4), *logps[:2], torch.ones(4))
    assert weight == 1.0
    torch.testing.assert_close(loss(pairs), cdpo_loss(*logps, train.beta, 0.0))


def test_changed_code_is_another_step(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("SERA_EXTENSIONS", "changing")
    code = tmp_path / "changing.py"
    code.write_text("def rule(margins, **_): return margins > 1\n")
    before = source_hash("changing:rule", "selection rule")
    code.write_text("def rule(margins, **_): return margins > 2\n")
    assert source_hash("changing:rule", "selection rule") != before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("os:system", "SERA_EXTENSIONS=os"),
        ("my_method", "choose one of top-fraction"),
        ("top-fractoin", "did you mean 'top-fraction'?"),
        ("my_method:", "is named as module:function"),
        ("my_method:nothing", "has no function nothing; it is called as rule(margins"),
        ("another:rule", "importing another failed (ModuleNotFoundError"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(name, said, monkeypatch):
    monkeypatch.setenv("SERA_EXTENSIONS", "another, my_method")
    with pytest.raises(InputError) as refused:
        SELECTION.named(name)
    assert said in str(refused.value)


def test_a_module_is_allowed_by_name_alone_and_never_imported_before(tmp_path, monkeypatch, capfd):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    experiment = tinyrun.experiment(tmp_path, select={"rule": "planted:rule"})
    assert main(["run", str(experiment), "--store", str(tmp_path / "store")]) == 2
    assert "select.rule" in (said := capfd.readouterr().err) or "planted:rule" in said
    assert "SERA_EXTENSIONS=planted" in said and not (tmp_path / "ran").exists()
    assert not (tmp_path / "store").exists()


def test_what_a_rule_gives_is_checked():
    with pytest.raises(InputError, match="it must give one bool per pair"):
        select(np.array([1.0]), ["a"], rule="my_method:not_a_bool")
    ones = np.ones(2, dtype=int)
    with pytest.raises(InputError, match="the first has the larger reward"):
        pair_responses(
            np.array([2.0, 1.0]), 0 * ones, np.arange(2), np.arange(2), ones == 1, rule="my_method:backwards"
        )
    train = SeraConfig.model_validate(
        {"model": {"source": "m"}, "data": {"train": [{"path": "p"}]},
         "train": {"losses": ["my_method:mean_of_all"]}}
    ).train  # fmt: skip
    ((_, loss),) = _own_losses(train)
    with pytest.raises(InputError, match=r"gave \(\) for 3 pairs"):
        loss(Pairs(*[torch.zeros(3)] * 10))


def test_a_store_of_another_scheme_needs_its_module(tmp_path, monkeypatch, capfd):
    folder = Path(shutil.copytree(HERE.parent / "fixtures/store-format-1", tmp_path / "store"))
    assert main(["list", "--store", f"elsewhere:/{folder}", "--json"]) == 0
    assert {run["run"] for run in json.loads(capfd.readouterr().out)["runs"]} == {"first", "second"}
    monkeypatch.setenv("SERA_EXTENSIONS", "")
    assert main(["list", "--store", f"elsewhere:/{folder}"]) == 2
    assert "only a local folder or s3://bucket/prefix" in capfd.readouterr().err


def test_a_judge_of_ones_own(tmp_path, capfd):
    rows = [
        {"prompt": "?", "chosen": "rhythm", "rejected": "aeiou"},
        {"prompt": "!", "chosen": "area", "rejected": "sky"},
    ]
    pairs = tinyrun.write_rows(tmp_path / "pairs.jsonl", rows)
    command = ["evaluate", "--calibrate", str(pairs), "--store", str(tmp_path / "store"), "--judge"]
    assert main([*command, "my_method:fewer_vowels", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["measures"]["agreement"]["value"] == 0.5
    (record,) = (tmp_path / "store").glob("steps/calibrate/*/done.json")
    code = source_hash("my_method:fewer_vowels", "judge")
    assert json.loads(record.read_text())["fields"]["judge"] == {
        "judge": "my_method:fewer_vowels", "source": code,
    }  # fmt: skip
    assert main([*command, "my_method:undecided"]) == 2
    assert "it must return" in capfd.readouterr().err


def test_select_alone_takes_a_rule_of_ones_own(tmp_path, capfd):
    scored = tmp_path / "scored.parquet"
    margins = [3.0, 1.0, 2.0, -1.0]
    pq.write_table(pa.table({"pair_id": list("abcd"), "ensemble_margin": margins}), scored)
    command = ["select", "--scored", str(scored), "--out", str(tmp_path / "ledger.parquet"), "--rule"]
    assert main([*command, "my_method:middle", "--fraction", "0.5", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["kept"] == 2
    assert main([*command, "middel", "--force"]) == 2
    assert "the selection rule 'middel' is unknown" in capfd.readouterr().err
