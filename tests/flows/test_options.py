"""Every rule, loss, reference and form of the method, from the command line to a finished run's ledger."""

import json

import numpy as np
import pytest
import tinyrun

import sera_core
from flows.cli import main

pytestmark = pytest.mark.flow

COMBINATIONS = {
    "ipo": {
        "train": {"losses": ["ipo"]},
        "select": {"rule": "top-k", "k": 9},
        "pairing": {"rule": "best-random"},
        "review": {"ensemble": "mean"},
        "mix": {"on_short": "fill", "size": 12},
    },
    "hinge": {
        "train": {"losses": ["hinge"], "start": "reference"},
        "select": {"rule": "threshold", "threshold": 0.5},
        "select_generated": {"rule": "middle", "fraction": 0.8},
        "pairing": {"rule": "best-mu-2sigma"},
        "review": {"ensemble": "ema", "gamma": 0.5},
    },
    "robust": {
        "train": {"losses": ["robust"], "label_smoothing": 0.1, "reference": "previous"},
        "select": {"rule": "random"},
        "pairing": {"rule": "all"},
        "mix": {"shares": [], "ramp_start": 0.2, "ramp_end": 0.6, "ramp_rounds": 2},
    },
    "sigmoid_norm": {
        "train": {"losses": ["sigmoid_norm"]},
        "select": {"rule": "bottom"},
        "select_generated": {"rule": "none"},
        "review": {"reference": "previous"},
    },
    "simpo": {
        "train": {"losses": ["simpo"], "target_margin": 0.3, "beta": 2.0},
        "select": {"direction": "small"},
        "review": {"length_penalty": "dice"},
    },
    "sum": {
        "train": {
            "losses": ["sigmoid", "ipo", "sft"],
            "loss_weights": [1.0, 0.5, 0.1],
            "method": "lora",
            "epochs": 2,
        },
        "select": {"rule": "relabel", "min_margin": 0.0},
        "model": {"dtype": "bfloat16"},
        "review": {"crossfit": 2},
    },
    "plain": {
        "train": {"label_smoothing": 0.1},
        "select": {"rule": "none"},
        "mix": {"shares": [0.0, 1.0]},
        "sampling": {"dtype": "bfloat16", "top_p": 0.9},
        "data": {"flip_fraction": 0.4},
    },
}

FLAGS = {"hinge": ["--set", "execution.processes=2"]}
"""Added on the command line."""


@pytest.fixture(scope="module", params=COMBINATIONS)
def option_run(request, prefect_server, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    settings = COMBINATIONS[request.param]
    experiment = tinyrun.experiment(folder, **settings)
    flags = FLAGS.get(request.param, [])
    assert main(["run", str(experiment), "--store", str(folder / "store"), "--json", *flags]) == 0
    return request.param, settings, sera_core.open_run(str(folder / "store"), "tiny"), folder


def test_the_run_ends_and_its_ledger_follows_the_rule(option_run):
    _, settings, run, _ = option_run
    assert run.stop_reason == "max_rounds" and len(run) == 3
    rule = settings["select"].get("rule", "top-fraction")
    scored, ledger = run[1].scored(), run[1].ledger()
    human = ledger[(ledger["origin"] == "human") & ledger["stage"].isin(["select", "mix"])]
    assert len(human) == len(scored) == 24
    selected = human[human["kept"] | (human["reason"] == "over_share")]
    dropped = human[~human["pair_id"].isin(selected["pair_id"])]
    if rule in ("top-k", "threshold") and len(dropped):
        assert selected["ensemble_margin"].min() >= dropped["ensemble_margin"].max()
    if rule == "top-k":
        assert len(selected) <= 9
    if rule == "threshold":
        assert (selected["ensemble_margin"] >= 0.5).all()
    if rule in ("relabel", "none"):
        assert len(selected) == 24
    if rule in ("random", "bottom"):
        preferred = int((scored["ensemble_margin"] > 0).sum())
        assert len(selected) == min(preferred, 17)  # 70 % of 24, half up
    if rule == "bottom" and len(dropped):
        assert selected["ensemble_margin"].max() <= dropped["ensemble_margin"].min()
    if settings["select"].get("direction") == "small" and len(dropped):
        above = dropped[dropped["reason"] == "below_cut"]
        assert above.empty or selected["ensemble_margin"].max() <= above["ensemble_margin"].min()


def test_relabelled_pairs_are_trained_on_turned_round(option_run):
    _, settings, run, _ = option_run
    ledger = run[1].ledger()
    turned = set(ledger.loc[ledger["reason"] == "relabelled", "pair_id"])
    if settings["select"].get("rule") != "relabel":
        assert not turned
        return
    trained = run[1].pairs()
    original = run[0].pairs().set_index("pair_id")
    for row in trained[trained["origin"] == "human"].itertuples():
        same = list(row.chosen_ids) == list(original.loc[row.pair_id, "chosen_ids"])
        assert same != (row.pair_id in turned)
        reference = original.loc[row.pair_id, "ref_chosen_logps" if same else "ref_rejected_logps"]
        assert row.ref_chosen_logps == reference


def test_ensemble_margins_are_the_weighted_margins_of_the_heads(option_run):
    name, settings, run, _ = option_run
    if name in ("simpo",):  # the length penalty is fitted on the ensemble itself
        return
    gamma = settings.get("review", {}).get("gamma", 0.3)
    now, before = run[2].scored(), run[1].scored()
    assert list(now["pair_id"]) == list(before["pair_id"])
    expected = (1 - gamma) * now["margin"] + gamma * before["margin"]
    assert np.allclose(now["ensemble_margin"], expected, atol=1e-5)


def test_margins_use_the_judging_reference_that_was_asked_for(option_run):
    name, settings, run, _ = option_run
    start, first, second = (run[n].scored() for n in range(3))
    if name == "simpo":
        assert second["ref_chosen_logps"].isna().all()
        return
    previous = settings.get("review", {}).get("reference") == "previous"
    expected = first["policy_chosen_logps"] if previous else start["policy_chosen_logps"]
    assert np.array_equal(second["ref_chosen_logps"], expected)


def test_the_loss_compared_with_the_training_reference_that_was_asked_for(option_run):
    name, settings, run, _ = option_run
    trained = run[2].pairs()
    human = trained[trained["origin"] == "human"].set_index("pair_id")
    if name == "simpo":
        assert trained["ref_chosen_logps"].isna().all()
        return
    assert trained["ref_chosen_logps"].notna().all()
    source = run[2] if settings["train"].get("reference") == "previous" else run[0]
    expected = source.scored().set_index("pair_id")["policy_chosen_logps"]
    turned = set(run[2].ledger().query("reason == 'relabelled'")["pair_id"])
    for pair, row in human[~human.index.isin(turned)].iterrows():
        assert row["ref_chosen_logps"] == expected[pair]


def test_the_share_asked_for_is_the_share_trained_on(option_run):
    _, settings, run, _ = option_run
    shares = settings.get("mix", {}).get("shares", [0.25, 0.5])
    for number in (1, 2):
        row = run.rounds.loc[number]
        target = shares[number - 1] if shares else {1: 0.2, 2: 0.6}[number]
        assert row["target_share"] == pytest.approx(target)
        total = row["human"] + row["generated"]
        if settings.get("mix", {}).get("on_short") != "fill":
            assert abs(row["generated"] - target * total) <= 0.5 + 1e-9
        else:
            assert total <= 12


def test_generated_pairs_follow_the_pairing_rule(option_run):
    _, settings, run, _ = option_run
    responses = run[2].responses()
    if responses.empty:
        return
    rule = settings.get("pairing", {}).get("rule", "best-worst")
    ledger = run[2].ledger()
    generated = ledger[(ledger["origin"] == "generated") & ledger["pair_id"].notna()]
    per_prompt = generated.groupby("prompt_id").size()
    assert rule == "all" or (per_prompt == 1).all()
    trained = run[2].pairs()
    texts = responses.groupby("prompt_id")
    for row in trained[trained["origin"] == "generated"].itertuples():
        answers = texts.get_group(row.prompt_id).set_index("response")["ensemble_reward"]
        chosen, rejected = (answers[m[0]["content"]] for m in (row.chosen, row.rejected))
        chosen, rejected = np.max(chosen), np.min(rejected)
        assert chosen > rejected
        if rule != "all":
            assert chosen == answers.max()
        if rule == "best-worst":
            assert rejected == answers.min()


def test_flipped_labels_are_counted_against_chance(option_run):
    name, _, run, _ = option_run
    if name == "plain":
        assert run.rounds.loc[1, "flipped"] == round(0.4 * 24)
        assert "flipped/dropped_by_chance" in run.rounds
    else:
        assert "flipped" not in run.rounds


def test_the_lora_policy_of_each_round_grows_out_of_the_one_before(option_run, tmp_path, sera):
    name, _, run, folder = option_run
    if name != "sum":
        return
    path = run[2].policy_path()
    assert (path / "adapter_config.json").exists()
    from transformers import AutoModelForCausalLM

    adapted = AutoModelForCausalLM.from_pretrained(path)
    assert adapted.num_parameters() > 0
    sera("export", "tiny", "--round", "2", "--to", tmp_path / "p", "--store", folder / "store")
    assert not (tmp_path / "p" / "adapter_config.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "p")
    assert merged.num_parameters() > 0


def test_every_round_was_trained_by_the_processes_asked_for(option_run):
    name, _, _, folder = option_run
    records = (
        json.loads(path.read_text()) for path in (folder / "store" / "steps" / "train").glob("*/done.json")
    )
    found = {record["environment"].get("processes", 1) for record in records}
    assert found == {2 if name in FLAGS else 1}
