"""sampling.prompts = "auto" samples what the share needs; a plan says what to expect, and warns."""

import json
import re

import pytest
import tinyrun
from commandline import process

from flows.commands.summary import closing_lines
from flows.planning.plan import plan
from flows.store_tools.verify import verify
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.counts import expected_yield

ONE = {"limits": {"rounds": 2}}
"""One reviewed round."""
AUTO = {"sampling": {"prompts": "auto"}}
NAMES = ("human_kept", "prompts", "generated_kept", "human", "generated")


def expected(folder, **sections):
    """The counts of each round of a plan, and its warnings."""
    found = plan(tinyrun.config(folder, **sections), "planned", str(folder / "empty"))
    assert not any(row["recorded"] for row in found["rounds"])
    return [tuple(row[name] for name in NAMES) for row in found["rounds"]], found["warnings"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("enough")


# ---------------------------------------------------------------------------------------------------- a plan


def test_a_plan_expects_the_counts_of_each_round(folder):
    """24 train pairs: 0.7 of them is 17. 10 prompts give 7 pairs.

    Share 0.25: n = min(17, 22, 28) = 17, of them 4.25 generated. Share 0.5: n = 7/0.5 = 14.
    """
    rounds, warnings = expected(folder)
    assert rounds == [(24, 0, 0, 24, 0), (17, 10, 7, 13, 4), (17, 10, 7, 7, 7)]
    (warning,) = warnings
    assert warning.startswith("round 2: the mix is expected to drop 10 of the 17 human pairs selected")
    assert "7 human and 7 generated pairs from 10 of 24 prompts, at a share of 0.50" in warning
    for setting in ('sampling.prompts = "auto" or a number above 10', 'mix.on_short = "fill"', "mix.shares"):
        assert setting in warning
    assert "mix.size" not in warning  # with more generated pairs 9 of 17 would be enough


def test_with_auto_a_plan_expects_as_many_prompts_as_the_share_needs(folder):
    """⌈0.25 · 17⌉ = 5 pairs need ⌈1.25 · 5/0.7⌉ = 9 prompts, ⌈0.5 · 17⌉ = 9 pairs need 17."""
    rounds, warnings = expected(folder, **AUTO)
    assert rounds == [(24, 0, 0, 24, 0), (17, 9, 6, 13, 4), (17, 17, 12, 8, 9)]
    assert not warnings
    larger, quiet = expected(folder, **AUTO, mix={"size": 100, "shares": [0.25, 0.4]})
    assert larger[2] == (17, 22, 15, 17, 11) and not quiet  # n = 17/0.6 = 28, ⌈11.2⌉ = 12


def test_a_size_that_leaves_no_room_is_named_and_more_samples_are_not(folder):
    """Share 0.7 of a mix of 17 is 12 generated pairs, so 5 of 17 human pairs, however many are sampled."""
    rounds, (warning,) = expected(folder, **AUTO, **ONE, mix={"shares": [0.7]})
    assert rounds[1] == (17, 22, 15, 5, 12)
    assert warning.endswith("To keep more, set mix.size above 17, or lower mix.shares")
    ramp = {"shares": [], "ramp_start": 0.7, "ramp_end": 0.5}
    _, (warning,) = expected(folder, **AUTO, **ONE, mix=ramp)
    assert warning.startswith("round 1:") and warning.endswith("or lower mix.ramp_start and mix.ramp_end")


def test_all_prompts_that_are_too_few_are_said(folder):
    """A share of 0.6 leaves n = ⌊17/0.4⌋ = 42 pairs, ⌈25.2⌉ = 26 of them generated; 24 prompts give 17."""
    few = {"mix": {"size": 100, "shares": [0.25, 0.6]}}
    rounds, warnings = expected(folder, **AUTO, **few)
    assert rounds[2] == (17, 24, 17, 11, 17)
    assert warnings == [
        "round 2: all 24 train prompts are expected to give 17 generated pairs, but the share of 0.60 needs "
        "26: the round trains on fewer pairs"
    ]


def test_a_share_of_one_asks_for_no_human_pair_and_warns_of_none(folder):
    rounds, warnings = expected(folder, **AUTO, mix={"shares": [1.0]})
    assert rounds[1] == (17, 24, 17, 0, 17) and not warnings


@pytest.mark.parametrize(
    ("sections", "pairs_a_prompt"),
    [
        ({"select_generated": {"fraction": 0.5}}, 0.5),
        ({"select_generated": {"rule": "random", "fraction": 0.5}}, 0.5),
        ({"select_generated": {"rule": "none"}}, 1.0),
        ({"select_generated": {"rule": "threshold"}}, 1.0),
        ({"pairing": {"rule": "all"}, "select_generated": {"fraction": 0.5}}, 1.5),  # half of three pairs
    ],
)
def test_the_yield_before_the_first_reviewed_round_is_that_of_the_settings(folder, sections, pairs_a_prompt):
    assert expected_yield(tinyrun.config(folder, **sections)) == pytest.approx(pairs_a_prompt)


def test_the_command_prints_counts_and_warnings_and_json_holds_both(folder, sera):
    command = ("plan", tinyrun.experiment(folder), "--store", folder / "empty")
    out, err = sera(*command)
    assert "sera: warning: round 2: the mix is expected to drop 10 of the 17 human pairs selected" in err
    assert "pairs of each round" in out and "expected" in out
    found = sera(*command, "--json").json
    assert [row["human"] for row in found["rounds"]] == [24, 13, 7] and len(found["warnings"]) == 1


def test_a_plan_says_what_the_run_costs_at_a_price_per_hour(folder, sera):
    command = ("plan", tinyrun.experiment(folder), "--store", folder / "empty")
    found = sera(*command, "--price-per-hour", 7200, "--json").json
    assert found["seconds"] > 0 and found["cost"] == pytest.approx(2 * found["seconds"])
    cost = re.search(r"a cost of ([\d,.]+) at 7200 an hour", sera(*command, "--price-per-hour", 7200).out)
    assert cost  # the machine's speed is measured for each plan, so its cost is not the same to the cent
    assert float(cost[1].replace(",", "")) == pytest.approx(found["cost"], rel=0.1)
    assert "cost" not in sera(*command, "--json").json
    for price in ("-1", "0", "nan", "inf"):
        said = sera(*command, f"--price-per-hour={price}", code=2).err
        assert f"--price-per-hour: give a number above 0 (found {float(price)})" in said


def test_a_word_that_is_no_number_is_refused_with_one_message(folder, sera):
    command = ("plan", tinyrun.experiment(folder), "--store", folder / "empty")
    said = sera(*command, "--set", "sampling.prompts=lots", code=2).err
    (line,) = [line for line in said.splitlines() if "sampling.prompts" in line]
    assert line.endswith("sampling.prompts: give a whole number above 0, or \"auto\" (found 'lots')")


# ---------------------------------------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def automatic(folder):
    """Three rounds with prompts as needed."""
    return tinyrun.work(tinyrun.config(folder, **AUTO), folder / "auto", "auto")


def counted(records, manifest):
    """(human pairs kept, prompts sampled, generated pairs kept) of a round, from its steps' records."""
    found = {role: Artifact(records.store, ref).record.counts for role, ref in manifest.steps.items()}
    return found["human"]["kept"], found["samples"]["prompts"], found["generated"]["kept"]


@pytest.mark.slow
def test_a_run_samples_enough_by_the_settings_first_and_then_by_the_measured_yield(automatic):
    first, second = automatic.rounds()[1:]
    human, prompts, generated = counted(automatic, first)
    needed = -(-human // 4)  # a quarter, rounded up
    assert prompts == min(24, -(-1250 * needed // 700))
    human, then, _ = counted(automatic, second)
    needed = -(-human // 2)
    assert first.decision == "promote" and then == min(24, -(-5 * needed * prompts // (4 * generated)))
    for manifest, share in ((first, 0.25), (second, 0.5)):
        human, _, generated = counted(automatic, manifest)
        assert generated >= share * human - 1e-9, "the yield was worse than a quarter below the expected one"
        # No human pair is dropped but those that the share leaves no room for.
        assert manifest.pairs["human"] == human - int(share * human + 0.5)


@pytest.mark.slow
def test_a_run_that_is_continued_has_the_keys_of_one_that_was_not(folder, automatic):
    for rounds in (1, 2, 3):
        config = tinyrun.config(folder, **AUTO, limits={"rounds": rounds})
        continued = tinyrun.work(config, folder / "continued", "auto")
    assert [m.steps for m in continued.rounds()] == [m.steps for m in automatic.rounds()]
    assert verify(continued).rounds == 3
    found = plan(tinyrun.config(folder, **AUTO), "auto", automatic.store.url)
    assert {row["status"] for row in found["steps"]} == {"reuse"} and not found["warnings"]
    assert [row["recorded"] for row in found["rounds"]] == [True] * 3
    shown = [(row["human"], row["generated"]) for row in found["rounds"]]
    assert shown == [(m.pairs["human"], m.pairs["generated"]) for m in automatic.rounds()]


@pytest.mark.slow
def test_a_plan_after_a_reviewed_round_expects_its_yield(folder, automatic):
    config = tinyrun.config(folder, **AUTO, limits={"rounds": 4})
    found = plan(config, "auto", automatic.store.url)
    _, prompts, generated = counted(automatic, automatic.history().lineage[-1])
    last = found["rounds"][3]
    assert not last["recorded"] and last["human_kept"] == 17
    assert last["prompts"] == min(24, -(-5 * 9 * prompts // (4 * generated)))
    why = [row["why"] for row in found["steps"] if row["round"] == 3 and row["step"] == "sample"]
    assert "on the number of prompts to sample" in why


@pytest.mark.slow
def test_a_number_that_is_what_auto_finds_is_the_same_step(folder, automatic):
    _, prompts, _ = counted(automatic, automatic.rounds()[1])
    config = tinyrun.config(folder, sampling={"prompts": prompts}, limits={"rounds": 2})
    found = plan(config, "other", automatic.store.url)
    assert {row["status"] for row in found["steps"]} == {"reuse"}


# ------------------------------------------------------------------------------------------------ a summary


@pytest.fixture(scope="module")
def starved(folder):
    """Two rounds with few prompts, a test side, and pairs over the limits of train and held-out."""
    data = {"train_pairs": 16, "heldout_pairs": 6, "test_fraction": 0.1}
    config = tinyrun.config(folder, data=data, sampling={"prompts": 2}, limits={"rounds": 2})
    return tinyrun.work(config, folder / "starved", "starved")


@pytest.mark.slow
def test_the_summary_says_that_the_mix_dropped_most_human_pairs(starved, automatic):
    first = starved.rounds()[1]
    over = first.metrics["human/over_share"]
    assert over > first.pairs["human"]
    (line,) = [line for line in closing_lines(starved) if "the mix dropped" in line]
    assert f"dropped {over} of the {over + first.pairs['human']} human pairs selected" in line
    assert not [line for line in closing_lines(automatic) if "the mix dropped" in line]


@pytest.mark.slow
def test_held_out_pairs_are_not_counted_among_the_human_pairs_dropped(starved):
    manifest = starved.rounds()[0]
    dropped = Artifact(starved.store, manifest.steps["pairs"]).path("dropped.parquet")
    stages = [row["stage"] for row in schema.iter_rows(dropped) if row["reason"] == "over_limit"]
    train, heldout = stages.count("data"), stages.count("data_heldout")
    assert train and heldout and manifest.metrics["human/over_limit"] == train + heldout
    lines = list(closing_lines(starved))
    assert f"  human pairs dropped: {train} over_limit." in lines
    assert f"Dropped on the held-out side, in every round: {heldout} over_limit." in lines


@pytest.mark.flow
def test_a_run_warns_before_the_work_and_says_it_after(tmp_path):
    experiment = tinyrun.experiment(tmp_path, sampling={"prompts": 2}, limits={"rounds": 2})
    done = process("run", experiment, "--store", tmp_path / "store", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sera: warning: round 1: the mix is expected to drop" in done.stderr
    assert "the mix dropped" in done.stdout
    again = process("plan", experiment, "--store", tmp_path / "store", "--json", cwd=tmp_path)
    assert json.loads(again.stdout)["warnings"] == [] and "warning" not in again.stderr
