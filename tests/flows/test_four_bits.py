"""QLoRA: a run whose base has four-bit weights, from the experiment to the exported policy."""

import numpy as np
import pytest
import tinyrun

from sera_core import open_run
from sera_core.config import SeraConfig
from sera_core.errors import InputError
from sera_core.models import four_bits
from sera_core.models.logprobs import plain_sequence_logps
from sera_core.models.policies import load_policy
from tasks.engines.choose import engine_here

QLORA = {"model": {"dtype": "nf4"}, "train": {"method": "lora", "learning_rate": 1e-2, "epochs": 3}}
ITEMS = [([3, 4, 5, 6], [7, 8, 9, 10, 11]), ([12, 13], [14, 15, 16])]


@pytest.mark.flow
def test_a_run_on_four_bit_weights_exports_the_policy_that_it_scored(sera, tmp_path, prefect_server):
    experiment = tinyrun.experiment(tmp_path, **QLORA, limits={"rounds": 2})
    store = tmp_path / "store"
    sera("run", experiment, "--store", store)
    run = open_run(str(store), "tiny")
    assert len(run) == 2
    folder, base = run[1].policy_path(), tmp_path / "policy"
    scored = plain_sequence_logps(load_policy(folder, "nf4", base=base), ITEMS)
    sera("export", "tiny", "--round", 1, "--to", tmp_path / "out", "--store", store)
    exported = plain_sequence_logps(load_policy(tmp_path / "out"), ITEMS)
    other = plain_sequence_logps(load_policy(folder, base=base), ITEMS)  # merged into unrounded weights
    assert np.abs(exported - scored).max() < 0.2 < np.abs(other - scored).max()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"method": "full"}}, r'train\.method = "lora"'),
        ({"sampling": {"dtype": "bfloat16"}}, "same four-bit base"),
        ({"sampling": {"engine": "vllm"}}, r'sampling\.engine = "transformers"'),
    ],
)
def test_what_four_bit_weights_cannot_do_is_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        SeraConfig.model_validate(tinyrun.settings(tmp_path, **{**QLORA, **changes}))


def test_without_the_package_its_extra_is_named(sera, tmp_path, monkeypatch):
    monkeypatch.setattr(four_bits, "find_spec", lambda name: None)
    said = sera("run", tinyrun.experiment(tmp_path, **QLORA), "--store", tmp_path / "store", code=2).err
    assert "model.dtype" in said and "pip install 'sera-flow[qlora]'" in said
    eight = tinyrun.experiment(tmp_path, train={"optimizer": "adamw_8bit"})
    said = sera("run", eight, "--store", tmp_path / "store", code=2).err
    assert "train.optimizer" in said and "pip install 'sera-flow[qlora]'" in said
    with pytest.raises(InputError, match="qlora"):
        load_policy(tmp_path / "policy", "nf4")


def test_they_are_sampled_by_the_engine_that_scores_them():
    assert engine_here("auto", "nf4")[0] == "transformers"
