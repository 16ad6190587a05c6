"""Arms of one experiment: what they change, what is refused, and three of them on the tiny policy."""

import json
import subprocess
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tinyrun
from commandline import SERA, process
from scipy.stats import kendalltau

from flows.compare import arm_config, check_comparison, in_order, run_arms, trained_rounds, with_budget
from flows.display.compare_page import COLOURS, page_of
from flows.display.compare_words import difference as difference_words
from flows.display.compared import compared
from flows.display.compared_alarm import ArmAlarm, alarm_words
from flows.side_by_side import environment
from sera_core.arms import ARMS
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.errors import InputError, SeraError
from sera_core.method.alarm import RANDOM, PanelAlarm
from sera_core.method.comparison import Difference
from sera_core.method.diagnostics import Alarm
from sera_core.method.estimates import Estimate
from sera_core.method.features import words
from sera_core.method.rewards import ensemble_reward, ensemble_weights
from sera_core.method.selection import SELECTION_RULES
from sera_core.method.win_rates import NO_RATE
from sera_core.reporting.round_page import round_page

EVERY = list(ARMS)


@pytest.fixture
def config(tmp_path):
    """An experiment that every arm differs from."""
    return tinyrun.config(
        tmp_path, train={"epochs": 2}, select={"fraction": 0.5}, pairing={"by": "word-count"}
    )


# ------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("arm", EVERY)
def test_an_arm_differs_from_the_experiment_in_its_own_settings_alone(config, arm):
    base, found = (arm_config(config, name, 3).result_fields() for name in ("sera", arm))
    changed = {
        f"{section}.{name}"
        for section, part in base.items()
        if isinstance(part, dict)
        for name in part.keys() | found[section].keys()
        if part.get(name) != found[section].get(name)
    }
    named = {
        f"{section}.{name}"
        for section, part in ARMS[arm].settings.items()
        for name, value in part.items()
        if getattr(getattr(config, section), name) != value
    }
    robbed = changed - named  # settings of the file that have no effect in the arm
    assert named <= changed
    assert all(name.split(".")[0] in ("select", "sampling", "pairing", "review") for name in robbed)
    assert found["seed"] == 3 and arm_config(config, arm, 3).limits == config.limits


def test_each_arm_has_a_colour():
    assert len(set(COLOURS)) == len(ARMS)


def test_each_arm_says_what_it_shows_and_where_it_is_from():
    assert all(arm.shows.endswith(".") and arm.source for arm in ARMS.values())
    rules = [arm.settings["select"]["rule"] for arm in ARMS.values() if "select" in arm.settings]
    assert set(rules) <= set(SELECTION_RULES)


def test_the_fusion_of_bees_orders_pairs_by_the_sum_of_their_margins():
    """Πp/(Πp + Π(1−p)) with p = σ(margin), by its own formula against the margins that the arm selects by."""
    now, past = np.random.default_rng(0).normal(0, 2, (2, 200))
    p, q = (1 / (1 + np.exp(-margins)) for margins in (now, past))
    fused = p * q / (p * q + (1 - p) * (1 - q))
    weights = ensemble_weights("last-two", ARMS["bees"].settings["review"]["gamma"], 2)
    np.testing.assert_array_equal(np.argsort(fused), np.argsort(ensemble_reward([now, past], weights)))


def test_a_control_selects_generated_pairs_as_it_selects_human_ones(config):
    found = arm_config(config, "random", 0)
    assert (found.select.rule, found.select_generated.rule) == ("random", "random")
    human = config.model_copy(update={"mix": config.mix.model_copy(update={"shares": (0.0,)})})
    assert arm_config(human, "random", 0).select_generated.rule == "top-fraction"  # nothing to select


def test_another_arm_gets_the_rounds_and_tokens_of_the_first(config):
    found = with_budget(arm_config(config, "dpo", 0), "dpo", [500, 300, 200])
    assert found.train.tokens == (0, 300, 200) and found.train.epochs == 2  # round 0 is the first arm's
    assert found.limits.rounds == 3 and found.decide.max_ks == 0.0
    single = with_budget(arm_config(config, "dpo-single", 0), "dpo-single", [500, 300, 200])
    assert single.train.tokens == (1000,) and single.train.epochs == 1  # 2 epochs would say nothing
    assert single.limits.rounds == 1


def test_an_experiment_with_a_budget_of_its_own_keeps_it_in_round_0(tmp_path):
    config = tinyrun.config(tmp_path, train={"tokens": [450, 200]})
    assert with_budget(arm_config(config, "dpo", 0), "dpo", [480, 230]).train.tokens == (450, 230)


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arms", "sections", "said"),
    [
        (["sera", "rendom"], {}, "'rendom': no such arm; did you mean random"),
        (["sera", "x"], {}, "no such arm; choose from sera, dpo"),
        (["sera"], {}, "at least two different arms"),
        (["sera", "dpo", "sera"], {}, "at least two different arms"),
        (["dpo-single", "sera"], {}, "cannot be the first"),
        (["sera", "human-only"], {"mix": {"shares": [0.0]}}, "human-only has the same settings as sera"),
        (["random", "human-only"], {"mix": {"shares": [0.0]}}, "human-only has the same settings as sera"),
        (["sera", "dpo"], {"mix": {"shares": [0.0]}, "select": {"rule": "none"}}, "dpo has the same"),
        (["sera", "gamma-0"], {"review": {"gamma": 0.0}}, "gamma-0 has the same settings as sera"),
        (["sera", "gamma-0"], {"limits": {"rounds": 2}}, "gamma-0 differs from round 2 on"),
        (["sera", "iterative-dpo"], {}, "the arm iterative-dpo is about a rater"),
        (["sera", "bees"], {"review": {"gamma": 0.5}}, "bees has the same settings as sera"),
        (["sera", "dpo"], {"limits": {"rounds": 1}}, "set limits.rounds to 2 or more"),
        (["sera", "dpo"], {"limits": {"tokens": 10}}, "limits.tokens and limits.hours"),
        (["sera", "dpo"], {"limits": {"hours": 1.0}}, "limits.tokens and limits.hours"),
        (["sera", "dpo"], {"decide": {"review": "alarm"}}, "cannot wait for a review"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, arms, sections, said):
    with pytest.raises(InputError, match=said):
        check_comparison(tinyrun.config(tmp_path, **sections), arms, [0], "mine")


def test_every_arm_can_be_compared_with_a_plain_experiment(config):
    check_comparison(config, EVERY, [0, 1, 2], "mine")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arms", "sera,dpoo"], "did you mean dpo"),
        (["--seeds", "0,0"], "each once"),
        (["--seeds", "0,a"], "whole numbers"),
        (["--seeds", "-1"], "0 or more"),
        (["--seeds", ""], "whole numbers"),
        (["--jobs", "0"], "--jobs 0: must be a whole number above 0"),
        (["--set", "seed=3"], "given with --seeds"),
        (["--name", "a/b"], "a/b"),
    ],
)
def test_the_command_refuses_with_one_message_and_writes_nothing(tmp_path, sera, flags, said):
    store = tmp_path / "store"
    told = sera("compare", tinyrun.experiment(tmp_path), "--store", store, *flags, code=2)
    assert said in told.err and told.err.count("\n") == 1 and not store.exists()


def test_a_page_that_is_not_ours_is_not_replaced(tmp_path, sera):
    (tmp_path / "compare.html").write_text("mine")
    store = tmp_path / "store"
    told = sera("compare", tinyrun.experiment(tmp_path), "--store", store, "--out", tmp_path, code=2)
    assert "is not a sera-flow report" in told.err and not store.exists()


def test_an_arm_is_called_distinguishable_only_if_an_interval_leaves_0_out():
    same, apart = Estimate(0.01, -0.1, 0.12, 50, 40), Estimate(-0.2, -0.3, -0.1, 50, 40)
    assert difference_words(Difference(same, same), "sera").endswith("Not distinguishable from sera.")
    assert difference_words(Difference(same, apart), "sera").endswith("It differs in reliance.")
    unknown = Estimate(None, None, None, 0, 0)
    assert "not measurable" in difference_words(Difference(unknown, unknown), "sera")


# ------------------------------------------------------------------------------------------------- the runs


ARMS_HERE, SEEDS_HERE = ["sera", "dpo", "random"], [0, 1]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Three arms, two seeds, two rounds on the command line: (folder, experiment, store, what it printed)."""
    folder = tmp_path_factory.mktemp("compared")
    experiment = tinyrun.experiment(folder, limits={"rounds": 2}, train={"batch": 4})
    told = process(*command(experiment, folder), cwd=folder)
    assert told.returncode == 0, told.stderr
    return folder, experiment, folder / "store", json.loads(told.stdout)


def command(experiment, folder, arms=ARMS_HERE):
    return (
        *("compare", experiment, "--arms", ",".join(arms), "--seeds", "0,1"),
        *("--store", folder / "store", "--json"),
    )


def trains(store):
    return [json.loads(path.read_text()) for path in store.glob("steps/train/*/done.json")]


@pytest.mark.slow
@pytest.mark.flow
def test_round_0_and_the_data_are_computed_once(done):
    _, _, store, _ = done
    rounds = [(record["fields"]["seed"], record["fields"]["round"]) for record in trains(store)]
    assert sorted(rounds) == [(0, 0), (0, 1), (0, 1), (0, 1), (1, 0), (1, 1), (1, 1), (1, 1)]
    assert len(list(store.glob("steps/data/*/done.json"))) == 1
    assert max(tinyrun.attempts(store)) == 1


@pytest.mark.slow
@pytest.mark.flow
def test_arms_train_for_the_tokens_of_the_first_and_at_most_a_batch_more(done):
    _, _, store, found = done
    reached = [record for record in trains(store) if "token_budget" in record["fields"]]
    assert len(reached) == 4  # two arms, two seeds, round 1
    for record in reached:
        budget, log = record["fields"]["token_budget"], record["files"]["log.jsonl"]["attempt"]
        text = (store / "steps" / "train" / record["key"] / log / "log.jsonl").read_text()
        before, last = (json.loads(line)["tokens/trained"] for line in text.splitlines()[-2:])
        assert before < budget <= last == record["metrics"]["tokens/trained"]
    for seed in map(str, SEEDS_HERE):
        first = found["arms"]["sera"][seed]["tokens"]
        budgets = {r["fields"]["token_budget"] for r in reached if str(r["fields"]["seed"]) == seed}
        (round_0,) = (
            r["metrics"]["tokens/trained"]
            for r in trains(store)
            if str(r["fields"]["seed"]) == seed and r["fields"]["round"] == 0
        )
        assert budgets == {first - round_0}
        assert all(found["arms"][arm][seed]["tokens"] >= first for arm in ARMS_HERE)


@pytest.mark.slow
@pytest.mark.flow
def test_the_table_is_of_the_last_rounds_and_the_differences_are_paired(done):
    _, _, store, found = done
    assert list(found["arms"]) == ARMS_HERE and set(found["differences"]) == {"dpo", "random"}
    for arm, by_seed in found["arms"].items():
        for seed, run in by_seed.items():
            assert run["run"] == f"tiny-{arm}-{seed}" and run["round"] == 1
            assert set(run) >= {"accuracy", "balanced", "reliance", "counter", "aligned", "equal", "decision"}
            shown = json.loads(process("show", run["run"], "--store", store, "--json").stdout)["rounds"][-1]
            assert run["accuracy"] == pytest.approx(shown["metrics"]["heldout/rewards/accuracies"]["value"])
            assert run["decision"] == shown["decision"]
        assert found["means"][arm]["balanced"] == pytest.approx(
            sum(run["balanced"] for run in by_seed.values()) / 2
        )
    for arm, change in found["differences"].items():
        for name in ("balanced", "reliance"):
            apart = found["means"][arm][name] - found["means"]["sera"][name]
            assert change[name]["value"] == pytest.approx(apart)
            assert change[name]["low"] <= change[name]["value"] <= change[name]["high"]


@pytest.mark.slow
@pytest.mark.flow
def test_the_alarm_of_an_arm_that_drops_pairs_compares_it_with_the_random_arm(done):
    *_, found = done
    for seed in map(str, SEEDS_HERE):
        sera, dpo, random = (found["arms"][arm][seed] for arm in ARMS_HERE)
        assert dpo["alarm"] is None and random["alarm"] is None
        alarm = sera["alarm"]
        assert alarm["round"] == 1 and 0 < alarm["kept"] == alarm["kept_random"]
        assert alarm["state"] in ("amplified", "not_amplified", "not_enough_evidence")
        of_tokens = alarm["features"]["tokens"]
        assert of_tokens["counter_change"]["value"] == pytest.approx(sera["counter"] - random["counter"])
        assert of_tokens["aligned_change"]["value"] == pytest.approx(sera["aligned"] - random["aligned"])


@pytest.mark.slow
@pytest.mark.flow
def test_again_it_does_nothing_and_needs_no_prefect(done, sera):
    folder, experiment, store, found = done
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    again = sera(*command(experiment, folder))
    assert again.json == found and "estimated" not in again.err
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before
    table = sera(*command(experiment, folder)[:-1], "--out", folder / "page").out
    assert "sera" in (folder / "page" / "compare.html").read_text() and "compare.html" in table
    assert "random against sera: balanced accuracy" in table and "tiny-random-1" in table


@pytest.mark.slow
@pytest.mark.flow
def test_runs_side_by_side_are_interrupted_together_and_end_in_the_bytes_of_runs_in_order(done, tmp_path):
    folder, experiment, one_by_one, _ = done
    words = [*command(experiment, tmp_path, ARMS_HERE[:2]), "--jobs", "2"]
    with subprocess.Popen(
        [*SERA, *map(str, words)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder
    ) as started:
        store = tmp_path / "store"
        wait_for(lambda: len(list(store.glob("runs/tiny-sera-*/run-000.json"))) == 2)
        wait_for(lambda: any(store.glob("steps/render/*/done.json")))
        children = children_of(started.pid)
        started.terminate()
        said = started.communicate(timeout=120)[1]
    assert started.returncode == 130 and "run the same command again to resume" in said
    assert len(children) >= 3
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), 60)

    again = process(*words, cwd=folder)
    assert again.returncode == 0 and list(json.loads(again.stdout)["arms"]) == ARMS_HERE[:2]
    assert "tiny-dpo-1: run tiny-dpo-1: " in again.stderr  # each line says whose it is
    assert max(tinyrun.attempts(store, "train")) == 1
    for run in (f"tiny-{arm}-{seed}" for arm in ARMS_HERE[:2] for seed in SEEDS_HERE):
        beside, alone = (
            [made.steps["policy"].digest for made in RunStore(open_store(str(place)), run).rounds()]
            for place in (store, one_by_one)
        )
        assert beside == alone and len(alone) == 2


def wait_for(found, seconds=120):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


def children_of(parent):
    """Processes below a process."""
    told = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    found = {parent}
    for _ in range(4):
        found |= {int(pid) for pid, above in map(str.split, told.splitlines()) if int(above) in found}
    return found - {parent}


@pytest.mark.slow
@pytest.mark.flow
def test_a_run_that_fails_side_by_side_ends_the_others_with_its_message(tmp_path):
    experiment = tinyrun.experiment(tmp_path, limits={"rounds": 2})
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "?", "chosen": "a", "rejected": 3}\n')
    told = process(*command(experiment, tmp_path), "--jobs", 2, cwd=tmp_path)
    assert told.returncode == 2 and not told.stdout
    last = told.stderr.strip().splitlines()[-1]
    assert last.startswith("sera: run 'tiny-sera-") and "pairs.jsonl" in last


def test_each_run_side_by_side_gets_its_part_of_the_machine(config, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(9)))
    assert environment(config, 0, 2) == environment(config, 1, 2) == {"OMP_NUM_THREADS": "4"}
    assert environment(config, 0, 20) == {"OMP_NUM_THREADS": "1"}
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert environment(config, 0, 2) == {}
    monkeypatch.setattr("flows.side_by_side.device_of", lambda _: "cuda")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert [environment(config, slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["5", "7", "5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert environment(config, 0, 2) == {}


def alarm_of(raised=(), few=()):
    one = Alarm(False, NO_RATE, NO_RATE, NO_RATE, RANDOM, "counter_side_holds")
    panel = dict.fromkeys(("tokens", "sentences", "bold"), one)
    return ArmAlarm(1, 10, 10, PanelAlarm(panel, RANDOM, tuple(raised), tuple(few), ""))


@pytest.mark.parametrize(
    ("alarms", "said"),
    [
        (
            [alarm_of(["tokens"]), alarm_of(["tokens", "bold"])],
            "amplified tokens (in 2 of 2 seeds), bold (in 1",
        ),
        ([alarm_of(), alarm_of()], "none of 3 features amplified in 2 seeds."),
        ([alarm_of(few=["bold"])], "none of 2 features amplified in 1 seed; too few pairs to tell: bold."),
        (
            [ArmAlarm(1, 10, 14, None)],
            "not computed, its selection kept 10 human pairs and that of random 14",
        ),
    ],
)
def test_the_alarm_says_what_it_found_and_where_it_could_not_tell(alarms, said):
    (line,) = alarm_words({"sera": dict(enumerate(alarms))})
    assert line.startswith("sera, alarm") and said in line


@pytest.mark.slow
def test_a_judge_compares_all_arms_once_and_the_page_shows_it(done, sera):
    """By the word count, so that every verdict can be computed again from the answers."""
    folder, experiment, store, _ = done
    judge = ("--judge", "word-count", "--out", folder / "page")
    said = sera(*command(experiment, folder)[:-1], *judge)
    assert "answers by the judge" in said.out and "word-count (not calibrated)" in said.out
    found = sera(*command(experiment, folder), *judge[:2]).json["judged"]
    assert found["strengths"]["sera"]["value"] == 0.5 and set(found["strengths"]) == set(ARMS_HERE)
    pairs = {(pair["first"], pair["second"]): pair for pair in found["pairs"]}
    assert set(pairs) == {("sera", "dpo"), ("sera", "random"), ("dpo", "random")}
    for (one, other), pair in pairs.items():
        signs = []
        for seed in SEEDS_HERE:
            here, there = (last_answers(store, f"tiny-{arm}-{seed}") for arm in (one, other))
            assert here.keys() == there.keys()
            signs += [np.sign(words("", here[key]) - words("", there[key])) for key in here]
        assert pair["win_rate"]["value"] == pytest.approx(float(np.mean(signs)) / 2 + 0.5)
        assert pair["win_rate"]["n"] == len(signs) and pair["order_flips"]["value"] in (0, None)
    steps = set(store.glob("steps/judge/*/done.json"))
    assert len(steps) == 3 * len(SEEDS_HERE)
    page = (folder / "page" / "compare.html").read_text()
    assert "By a judge" in page and "<td>dpo</td><td>random</td>" in page
    sera("gc", "--store", store, "--delete", "--older-than", "0s")
    assert set(store.glob("steps/judge/*/done.json")) == steps
    refused = sera(*command(experiment, folder), "--limit", "3", code=2)
    assert "name one with --judge" in refused.err
    unsampled = ("--set", "evaluate.prompts=0", *judge[:2], "--name", "none")
    assert "set it above 0" in sera(*command(experiment, folder), *unsampled, code=2).err


def last_answers(store, run):
    """Held-out answers of a run's last round, by prompt and sample."""
    records = RunStore(open_store(str(store)), run)
    evidence = Artifact(records.store, records.rounds()[-1].steps["evidence"])
    path = Artifact(records.store, evidence.record.inputs["samples"]).path("responses.parquet")
    rows = pq.read_table(path, columns=["prompt_id", "sample", "response"]).to_pylist()
    return {(row["prompt_id"], row["sample"]): row["response"] for row in rows}


@pytest.mark.slow
def test_a_first_arm_that_stops_in_round_0_is_no_measure(tmp_path):
    config = tinyrun.config(tmp_path, limits={"rounds": 2}, select={"min_margin": 1e9})

    def finish(config, run):
        return bool(tinyrun.work(config, tmp_path / "store", run).rounds())

    with pytest.raises(SeraError, match="tiny-sera-0' stopped with `no_pairs` after 1 trained rounds"):
        run_arms(config, ["sera", "dpo"], [0], "tiny", str(tmp_path / "store"), in_order(finish))


@pytest.mark.slow
def test_one_round_of_all_tokens_shares_nothing_but_the_measure(tmp_path):
    """dpo-single: one round; its tokens are those of both rounds of the first arm, and a batch at most."""
    store = tmp_path / "store"

    def finish(config, run):
        return bool(tinyrun.work(config, store, run).rounds())

    config = tinyrun.config(tmp_path, limits={"rounds": 2}, mix={"shares": [0.0]})
    runs = run_arms(config, ["sera", "dpo-single"], [0], "tiny", str(store), in_order(finish))
    assert [len(trained_rounds(by_seed[0])) for by_seed in runs.values()] == [2, 1]
    found = compared(runs)
    tokens = [sum(r.metrics["tokens/trained"] for r in found.arms[arm][0].rounds) for arm in found.arms]
    assert tokens[0] <= tokens[1]
    page = page_of(found, "<b>tiny")
    assert "Arms of &lt;b&gt;tiny" in page and "dpo-single against sera" in page
    assert page.count("<circle") == 3 and ARMS["dpo-single"].shows in page  # two rounds and one
    assert asdict(found.differences["dpo-single"])["balanced"]["pairs"] > 0


@pytest.mark.slow
def test_the_peers_run_as_arms_for_equal_tokens(tmp_path):
    """Each does what its paper says it does, as far as the arm says so; read from the artifacts."""
    store = tmp_path / "store"

    def finish(config, run):
        return bool(tinyrun.work(config, store, run).rounds())

    config = tinyrun.config(tmp_path, pairing={"by": "word-count"}, mix={"shares": [0.5]})
    names = ["sera", "iterative-dpo", "implicit", "dice", "spa", "cream", "curry", "bees"]
    found = compared(run_arms(config, names, [0], "tiny", str(store), in_order(finish)))
    last = {arm: by_seed[0].rounds[-1] for arm, by_seed in found.arms.items()}
    assert {round.round for round in last.values()} == {2}
    first = last["sera"].metrics["tokens/trained"]
    assert all(round.metrics["tokens/trained"] >= first for round in last.values())
    opened = open_store(str(store))
    made = {arm: {role: Artifact(opened, ref) for role, ref in last[arm].steps.items()} for arm in names}
    assert {arm for arm in names if "ratings" in made[arm]} == {"sera", "iterative-dpo", "bees"}
    origins = {arm: set(column(made[arm]["mixture"], "mixture.parquet", "origin")) for arm in names}
    assert origins["iterative-dpo"] == origins["spa"] == origins["cream"] == {"generated"}
    assert origins["curry"] == {"human"}
    assert origins["dice"] == origins["bees"] == {"human", "generated"}
    assert made["dice"]["responses"].record.metrics["length_penalty/alpha"] is not None
    spa = made["spa"]
    assert set(column(spa["samples"], "responses.parquet", "sample")) == {0, 1}
    assert spa["policy"].record.fields["start_is_reference"]  # trained against the previous policy
    assert made["bees"]["scored"].record.fields["weights"] == [0.5, 0.5]
    margins = dict(
        zip(
            column(made["curry"]["scored"], "scored.parquet", "pair_id"),
            column(made["curry"]["scored"], "scored.parquet", "ensemble_margin"),
            strict=True,
        )
    )
    cream = made["cream"]
    smoothed = 1 - cream["policy"].record.metrics["consistency"]
    assert smoothed == pytest.approx(1 - consistency_of(cream["responses"])) and 0 < smoothed < 1
    assert f"smoothed by {smoothed:.2f}" in round_page(2, cream)
    first_round = Artifact(opened, found.arms["cream"][0].rounds[1].steps["policy"])
    assert first_round.record.metrics["consistency"] is None
    trained = [margins[pair] for pair in column(made["curry"]["mixture"], "mixture.parquet", "pair_id")]
    assert trained == sorted(trained, reverse=True) and len(set(trained)) > 5


def consistency_of(responses: Artifact) -> float:
    """CREAM's C by pandas and scipy; a prompt's equal responses are in it once."""
    table = pq.read_table(responses.path("responses.parquet")).to_pandas()
    table["newer"] = table["policy_logps"] - table["ref_logps"]
    table["older"] = table["past_logps"].str[0] - table["past_ref_logps"].str[0]
    distinct = table.drop_duplicates(["prompt_id", "newer", "older"])
    taus = distinct.groupby("prompt_id").apply(
        lambda rows: kendalltau(rows["newer"], rows["older"]).statistic
    )
    return float((taus.dropna().mean() + 1) / 2)


def column(artifact: Artifact, file: str, name: str) -> list:
    """A column of a step's file."""
    return pq.read_table(artifact.path(file), columns=[name])[name].to_pylist()
