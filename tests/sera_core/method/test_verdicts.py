from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.method.best import best_of, choosing_half
from sera_core.method.convergence import METRICS, VERDICTS, Heldout, Rule, compare_round
from sera_core.method.decisions import decide_round, run_state
from sera_core.method.sides import design_effect, sides_of

light = settings(max_examples=40, deadline=None, derandomize=True)
RULE = Rule(resamples=300)
SIZE = 1000


def heldout_of(size=SIZE, aligned=0.5, prompts=None):
    """The first share of the pairs is aligned, the rest counter; pairs of one prompt stand far apart."""
    groups = np.arange(size) % (prompts or size)
    difference = np.where(np.arange(size) < aligned * size, 1.0, -1.0)
    return Heldout(difference, groups, choosing_half([str(g) for g in groups], 0))


def right(aligned, counter, size=SIZE, share=0.5):
    """Correctness with the given number of right pairs at the beginning of each side."""
    split = int(share * size)
    values = np.zeros(size)
    values[:aligned], values[split : split + counter] = 1, 1
    return values


def judged(now, promoted, line=None, heldout=None, rule=RULE, **how):
    line = sorted(promoted) if line is None else line
    return compare_round(now, promoted, line, heldout or heldout_of(), rule, seed=0, **how)


def test_a_fall_is_found_by_hand():
    """Each side loses 50 of 400 right pairs of 500: −0.1, standard error √(.1 · .9/1000) = .0095."""
    got = judged(right(350, 350), {0: right(400, 400)})
    assert got.verdict.name == "degrading"
    assert got.score.value == pytest.approx(0.7)
    change = got.against[0]
    assert change.value == pytest.approx(-0.1)
    assert (change.low, change.high) == (pytest.approx(-0.1186, abs=0.003), pytest.approx(-0.0814, abs=0.003))
    assert "fell against round 0 by -0.100 [" in got.verdict.reason and "1000 pairs" in got.verdict.reason
    assert judged(right(400, 400), {0: right(350, 350)}).verdict.name == "improving"


def test_a_round_that_relies_less_on_the_feature_is_no_fall_by_balanced_but_one_by_accuracy():
    """80 % aligned: 700 → 600 of 800 right there, 100 → 140 of 200 on the counter side.

    Accuracy falls from .8 to .74, balanced rises from .6875 to .725.
    """
    heldout, how = heldout_of(aligned=0.8), {"share": 0.8}
    now, then = right(600, 140, **how), right(700, 100, **how)
    by = {m: judged(now, {0: then}, heldout=heldout, rule=replace(RULE, metric=m)).verdict for m in METRICS}
    assert by["balanced"].name == "improving"
    assert by["worst-side"].name == "improving"
    assert by["accuracy"].name == by["win-rate"].name == "degrading"
    assert by["accuracy"].reason.startswith("held-out accuracy fell")
    assert by["win-rate"].reason.startswith("held-out win rate over the start policy fell")


def test_a_decline_too_slow_for_the_last_head_is_seen_against_round_0():
    levels = {0: right(400, 400), 1: right(392, 394), 2: right(385, 387)}
    now = right(378, 379)
    alone = judged(now, {2: levels[2]})
    assert alone.verdict.name == "not_enough_evidence"
    drifted = judged(now, levels)
    assert drifted.verdict.name == "degrading"
    assert "against round 0 by -0.043" in drifted.verdict.reason


def test_a_fall_smaller_than_the_tolerance_is_none():
    now, then = right(390, 390), right(400, 400)
    assert judged(now, {0: then}, rule=replace(RULE, tolerance=0.01)).verdict.name == "degrading"
    assert judged(now, {0: then}, rule=replace(RULE, tolerance=0.03)).verdict.name == "not_enough_evidence"


def still(size=SIZE, **how):
    same = right(int(0.4 * size), int(0.3 * size), size)
    return judged(same, {0: same, 1: same}, heldout=heldout_of(size), **how)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ({}, "converged"),
        ({"overlap": 0.9, "ks": 0.05}, "converged"),
        ({"overlap": 0.7}, "still_moving"),
        ({"ks": 0.2}, "still_moving"),
        ({"rule": replace(RULE, window=3)}, "not_enough_evidence"),
        ({"rule": replace(RULE, min_prompts=1001)}, "not_enough_evidence"),
        ({"rule": replace(RULE, min_effect=0.002)}, "not_enough_evidence"),
    ],
)
def test_a_round_that_stands_still(how, name):
    assert still(**how).verdict.name == name


@light
@given(st.integers(30, 148), st.sampled_from(METRICS))
def test_pairs_too_few_to_see_a_change_never_converge_though_nothing_moved(size, metric):
    """Balanced: 1.5 of the smaller side of at most 74 is above 0.02. Accuracy: 3 of 148 is too."""
    got = still(size, rule=replace(RULE, metric=metric))
    assert got.verdict.name == "not_enough_evidence"
    assert "cannot be ruled out; that would take about" in got.verdict.reason


def test_pairs_of_one_prompt_are_no_evidence_of_their_own():
    same = right(400, 300)
    few = judged(same, {0: same, 1: same}, heldout=heldout_of(prompts=20))
    assert few.verdict.name == "not_enough_evidence" and "of 20 prompts" in few.verdict.reason
    more = judged(same, {0: same, 1: same}, heldout=heldout_of(prompts=60))
    assert more.verdict.name == "not_enough_evidence"


def test_one_side_with_too_few_pairs_gives_way_to_accuracy_and_says_so():
    heldout = heldout_of(aligned=0.995)
    got = judged(right(700, 0, share=0.995), {0: right(800, 5, share=0.995)}, heldout=heldout)
    assert got.quantity == "accuracy"
    assert got.verdict.reason.startswith("held-out accuracy (a side has too few pairs for balanced) fell")


@light
@given(st.integers(0, 2**31), st.sampled_from(METRICS), st.integers(20, 200))
def test_every_verdict_rests_on_what_it_says_and_on_nothing_else(seed, metric, size):
    rng = np.random.default_rng(seed)
    heldout = Heldout(
        rng.integers(-1, 2, size).astype(np.float64), rng.integers(0, size, size), rng.random(size) < 0.5
    )
    rounds = {number: rng.integers(0, 2, size).astype(np.float64) for number in range(3)}
    now, rule = rng.integers(0, 2, size).astype(np.float64), replace(RULE, metric=metric, resamples=100)
    got = judged(now, rounds, heldout=heldout, rule=rule)
    assert got.verdict.name in VERDICTS and got.verdict.reason
    assert got.verdict.converged == (got.verdict.name == "converged")
    fallen = [c for c in got.against.values() if c.high is not None and c.high < 0 and c.value <= -0.02]
    enough = got.score.prompts >= 30
    assert (got.verdict.name == "degrading") == (enough and bool(fallen))
    if got.verdict.converged:
        assert -0.02 <= got.trend.low <= got.trend.high <= 0.02
    order = rng.permutation(size)
    turned = Heldout(heldout.difference[order], heldout.groups[order], heldout.chooses[order])
    again = judged(now[order], {n: v[order] for n, v in rounds.items()}, heldout=turned, rule=rule)
    assert again.verdict.name == got.verdict.name and again.best.round == got.best.round
    assert judged(now, rounds, heldout=heldout, rule=rule) == got


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match="'balance' is unknown; choose one of balanced, accuracy"):
        Rule(metric="balance")
    for how in ({"min_effect": 0.0}, {"window": 0}, {"min_side": 0}, {"tolerance": -0.1}):
        with pytest.raises(ValueError, match="must be positive"):
            Rule(**how)
    for line in ([], [1]):
        with pytest.raises(ValueError, match="must name at least one of the promoted rounds"):
            judged(right(1, 1), {0: right(1, 1)}, line=line)
    with pytest.raises(ValueError, match="round 0 are not finite"):
        judged(right(1, 1), {0: np.full(SIZE, np.nan)})


def test_the_trend_is_the_least_squares_slope():
    rng = np.random.default_rng(0)
    rounds = [rng.integers(0, 2, 200).astype(np.float64) for _ in range(4)]
    difference = rng.integers(-1, 2, 200).astype(np.float64)
    sides = sides_of(rounds, difference, None, seed=0, resamples=500)
    for quantity in ("balanced", "accuracy", "worst_side"):
        scores = [sides.score(quantity, at).value for at in range(4)]
        got = sides.trend(quantity, range(4))
        assert got.value == pytest.approx(np.polyfit(range(4), scores, 1)[0])
        assert got.low < got.value < got.high


def test_the_design_effect_is_the_number_of_copies_and_1_for_pairs_on_their_own():
    rng = np.random.default_rng(0)
    once, side = rng.integers(-1, 2, 300).astype(np.float64), rng.choice([-1.0, 1.0], 300)
    three, groups = np.repeat(once, 3), np.repeat(np.arange(300), 3)
    for quantity in ("balanced", "accuracy"):
        assert design_effect(three, np.repeat(side, 3), quantity, groups) == pytest.approx(3)
        assert design_effect(once, side, quantity, np.arange(300)) == 1
        assert design_effect(np.zeros(900), np.repeat(side, 3), quantity, groups) == 3
        loose = design_effect(rng.permutation(three), np.repeat(side, 3), quantity, groups)
        assert 1 <= loose < 1.4


def test_half_of_the_prompts_choose_and_no_prompt_does_both():
    prompts = [f"prompt {k % 31}" for k in range(100)]
    chooses = choosing_half(prompts, 7)
    chosen = {p for p, c in zip(prompts, chosen_list(chooses), strict=True) if c}
    assert len(chosen) == 16
    assert not chosen & {p for p, c in zip(prompts, chosen_list(chooses), strict=True) if not c}
    assert choosing_half(prompts[::-1], 7).tolist() == chosen_list(chooses)[::-1]
    assert choosing_half(prompts, 8).tolist() != chosen_list(chooses)
    assert choosing_half([], 0).tolist() == []


def chosen_list(chooses):
    return [bool(c) for c in chooses]


def test_the_pairs_that_report_have_no_say_in_the_choice():
    """The rounds are equal; one seems best on the choosing half, by chance; the other half has the truth."""
    rng = np.random.default_rng(3)
    heldout = heldout_of()
    apart = []
    for _ in range(60):
        rounds = {number: (rng.random(SIZE) < 0.7).astype(np.float64) for number in range(6)}
        best = best_of(
            rounds, heldout.difference, heldout.groups, heldout.chooses, "balanced", seed=0, resamples=20
        )
        apart.append((best.chosen_by - 0.7, best.score.value - 0.7))
        elsewhere = {
            n: np.where(heldout.chooses, v, rng.random(SIZE) < 0.5).astype(float) for n, v in rounds.items()
        }
        again = best_of(
            elsewhere, heldout.difference, heldout.groups, heldout.chooses, "balanced", seed=0, resamples=20
        )
        assert (again.round, again.chosen_by) == (best.round, best.chosen_by)
    too_large, fair = np.mean(apart, axis=0)
    assert too_large > 0.015
    assert abs(fair) < 0.008


def test_ties_go_to_the_earlier_round_and_the_gain_is_over_round_0():
    heldout = heldout_of()
    low, high = right(300, 300), right(400, 400)
    how = (heldout.difference, heldout.groups, heldout.chooses, "balanced")
    best = best_of({0: low, 2: high, 3: high}, *how, seed=0, resamples=200)
    assert best.round == 2
    assert best.gain.value == pytest.approx(0.2, abs=0.04) and best.gain.low > 0.1
    assert best.score.pairs + int(heldout.chooses.sum()) == SIZE
    assert best.sentence.startswith(
        "round 2 is best by balanced accuracy on half of the held-out prompts; on the other"
    )
    alone = best_of({0: low}, *how, seed=0, resamples=200)
    assert (alone.round, alone.gain.value) == (0, 0)
    with pytest.raises(ValueError, match="No round was promoted"):
        best_of({}, *how, seed=0)


def decisions(levels, patience=1):
    """(decisions, heads, stop reason) of a run whose rounds have these many right pairs on either side."""
    past, stop = [("promote", 0)], None
    for number in range(1, len(levels)):
        state = run_state(past)
        promoted = {r: right(levels[r], levels[r]) for r in state.promoted}
        found = judged(right(levels[number], levels[number]), promoted, line=state.lineage)
        decision, head = decide_round(found, state, round=number, patience=patience, max_rounds=99)
        past.append((decision.decision, head))
        stop = decision.stop_reason
        if stop:
            break
    return [d for d, _ in past], [h for _, h in past], stop


def test_a_slow_decline_is_held_and_rolled_back_to_where_it_began():
    """8 pairs in 500 on a side, 0.016 a round, are below the tolerance; two such falls are not."""
    done, heads, stop = decisions([360, 400, 392, 384, 376])
    assert done == ["promote", "promote", "promote", "hold", "roll_back"]
    assert (heads, stop) == ([0, 1, 2, 2, 1], None)


def test_one_bad_round_is_held_and_the_next_good_one_promoted():
    done, heads, stop = decisions([350, 380, 300, 400, 420])
    assert (done, heads, stop) == (
        ["promote", "promote", "hold", "promote", "promote"],
        [0, 1, 1, 3, 4],
        None,
    )


def test_a_head_that_is_the_best_round_has_nothing_to_go_back_to():
    done, heads, stop = decisions([400, 300, 300])
    assert (done, heads, stop) == (["promote", "hold", "stop"], [0, 0, 0], "degraded")


@pytest.mark.parametrize(("prompts", "each"), [(100, 4), (400, 1)])
def test_pairs_of_one_prompt_that_move_together_give_no_false_verdict(prompts, each):
    """Nothing changed in truth. Nominal 5 % on either side."""
    rng, groups, names = np.random.default_rng(0), np.repeat(np.arange(prompts), each), []
    heldout = Heldout(np.where(groups % 2, 1.0, -1.0), groups, groups % 4 < 2)
    for _ in range(150):
        before = rng.random(prompts) < 0.65
        now = np.where(rng.random(prompts) < 0.2, rng.random(prompts) < 0.65, before)
        now, before = (np.repeat(values, each).astype(np.float64) for values in (now, before))
        names.append(judged(now, {0: before}, heldout=heldout).verdict.name)
    assert names.count("degrading") / 150 <= 0.09 and names.count("improving") / 150 <= 0.09


DEMO = {  # held-out pairs of `sera demo` (SmolLM2-135M, AMD EPYC): which ones each round ranks correctly
    0: "110001000000111011010110011011001100001000011111111110010110",
    1: "110001000000111011010010011001001100001010011101111010010100",
    2: "110001000100111011010010010001001100001000011100111010010100",
}
DEMO_LENGTHS = "0+-++++++++--+-+----+++++-++--+---+0++---+---+++-+++--++-+++"
"""Whether the chosen answer of each pair is longer, shorter or equally long."""


def test_the_decline_of_the_demo_is_held():
    """Accuracy .517, .450, .417; compared with the last head alone each round was promoted."""
    rounds = {number: np.array([float(c) for c in right]) for number, right in DEMO.items()}
    signs = np.array([{"+": 1.0, "-": -1.0, "0": 0.0}[c] for c in DEMO_LENGTHS])
    heldout = Heldout(signs, np.arange(60), choosing_half([str(n) for n in range(60)], 0))
    state = run_state([("promote", 0), ("promote", 1)])
    for metric in ("balanced", "accuracy"):
        found = judged(rounds[2], {0: rounds[0], 1: rounds[1]}, heldout=heldout, rule=Rule(metric=metric))
        assert found.verdict.name == "degrading" and "fell against round 0" in found.verdict.reason
        assert decide_round(found, state, round=2, patience=1, max_rounds=9)[0].decision == "hold"
    alone = judged(rounds[2], {1: rounds[1]}, heldout=heldout, rule=Rule())
    assert alone.verdict.name == "not_enough_evidence"
