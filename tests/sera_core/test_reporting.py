import re
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact, StepSpec
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.reporting import evidence, flow, length, plots, words
from sera_core.reporting.examples import examples
from sera_core.reporting.files import RoundFiles


def rate(value, low=None, high=None, n=100):
    return {"value": value, "low": low, "high": high, "n": n}


def measured(margin_change, accuracy_change, trained=None, heldout=None):
    return {
        "heldout/margin_change": margin_change,
        "heldout/accuracy_change": accuracy_change,
        "trained/margin": trained or rate(1.0, 0.9, 1.1),
        "heldout/margin": heldout or rate(1.0, 0.9, 1.1),
    }


def decided(verdict="not_enough_evidence", change=True):
    return {"verdict": {"name": verdict}, "signals": {"accuracy_change": rate(0.0) if change else None}}


# ------------------------------------------------------------------------------------------------ the lesson


def test_growing_margins_without_growing_accuracy_are_called_by_name():
    said = evidence.margin_notes(measured(rate(0.52, 0.4, 0.6), rate(-0.02, -0.05, 0.01)))
    assert len(said) == 1
    assert said[0].endswith("did not (−0.020 [−0.050, +0.010]): growing margins are not growing accuracy.")


def test_margins_and_accuracy_that_both_grow_are_said_to():
    said = evidence.margin_notes(measured(rate(0.52, 0.4, 0.6), rate(0.1, 0.02, 0.2)))
    assert "held-out accuracy grew with it" in said[0]


def test_with_few_pairs_nothing_is_said_about_accuracy():
    said = evidence.margin_notes(measured(rate(0.52, 0.4, 0.6, 29), rate(-0.02, -0.05, 0.01, 29)))
    assert "29 held-out pairs are too few pairs to tell" in said[0]
    assert "not growing accuracy" not in said[0]


def test_trained_margins_above_held_out_ones_are_called_memorised():
    trained, heldout = rate(3.0, 2.5, 3.5), rate(0.5, 0.2, 0.8)
    said = evidence.margin_notes(measured(rate(0.0, -0.1, 0.1), rate(0.0, -0.1, 0.1), trained, heldout))
    assert "did not clearly grow" in said[0]
    assert "memorised" in said[1]
    few = measured(rate(0.0, -0.1, 0.1), rate(0.0, -0.1, 0.1), trained, heldout | {"n": 29})
    assert len(evidence.margin_notes(few)) == 1


# ----------------------------------------------------------------------------------------------- the evidence


def test_thirty_observations_are_enough_and_twenty_nine_are_not():
    assert evidence.rate_line("x", rate(0.5, 0.3, 0.7, 30)).note == ""
    assert evidence.rate_line("x", rate(0.5, 0.3, 0.7, 29)).note == "too few pairs to tell"


def test_a_verdict_without_enough_evidence_is_said_beside_the_change_of_accuracy():
    metrics = {"heldout/accuracy_change": rate(0.01, -0.03, 0.05, 200)}
    assert evidence.lines(metrics, decided())[0].note == "too few pairs to tell"
    assert evidence.lines(metrics, decided("improving"))[0].note == ""
    assert "start policy" in evidence.lines(metrics, decided(change=False))[0].note


def test_what_was_not_measured_has_no_row_or_a_dash():
    assert evidence.lines({}, None) == []
    assert evidence.rate_line("x", rate(None, n=0)).value == "–"
    assert words.number(float("nan")) == "–"
    assert words.interval(rate(-0.25, -0.5, 0.0), signed=True) == "−0.250 [−0.500, +0.000]"


def test_each_part_of_the_alarm_says_whether_it_holds():
    alarm = {
        "counter_change": rate(-0.2, -0.3, -0.1),
        "aligned_change": rate(-0.2, -0.3, -0.1),
        "kept_share_excess": rate(0.1, -0.1, 0.2, 12),
        "reason": "not_enough_evidence",
    }
    notes = [line.note for line in length.alarm_parts(alarm)]
    assert notes == ["fell: holds", "did not fall: does not hold", "too few pairs to tell"]
    assert length.alarm_words(alarm).startswith("Too few pairs to tell")


# -------------------------------------------------------------------------------------------------- the plots


@given(st.floats(-1e4, 1e4), st.floats(0, 1e4))
@example(0.0, 5e-324)
@example(0.0, 1e-299)
@example(0.5, 6.6e-17)
@example(1e4, 1e-12)
def test_ticks_cover_their_range_in_equal_round_steps(low, span):
    found = plots.ticks(low, low + span)
    slack = 1e-6 * plots.nice_step(span, 5) + 1e-9 * abs(low)
    assert found[0] <= low + slack
    assert found[-1] >= low + span - slack
    assert 2 <= len(found) <= 8


@pytest.mark.parametrize("value", [0.0, 4.0, -0.25, 0.00123, 12_345.0, 3e6])
@pytest.mark.parametrize("spread", [0.0, 1e-7])
def test_labels_of_an_axis_differ_also_where_the_values_hardly_do(value, spread):
    points = [plots.Point(0, value), plots.Point(1, value * (1 + spread))]
    svg = str(plots.lines([plots.Series("loss", "a", points)], "step", "loss"))
    labels = re.findall(r'text-anchor="end">([^<]+)<', svg)
    assert 2 <= len(labels) == len(set(labels)) and max(map(len, labels)) <= 9


def heights(svg, style):
    return [
        float(h) for h in re.findall(rf'class="bar {style}" x="\S+" y="\S+" width="\S+" height="(\S+)"', svg)
    ]


def test_a_histogram_has_kept_above_dropped_in_proportion_to_their_counts():
    """3 kept at 1, 1 dropped at −1: bars three to one, beside two swatches (10 high)."""
    svg = str(plots.histogram([1.0, 1.0, 1.0], [-1.0], "margins"))
    kept, dropped = ([h for h in heights(svg, s) if h != 10.0] for s in ("kept", "dropped"))
    assert len(kept) == len(dropped) == 1
    assert kept[0] == pytest.approx(3 * dropped[0], abs=0.2)
    assert "trained on (3)" in svg
    assert "dropped (1)" in svg


def test_no_pair_is_lost_beyond_the_ends_of_a_histogram():
    """200 pairs at 0, 200 at 1 and one far outside: the last bar holds 201."""
    svg = str(plots.histogram([0.0] * 200 + [1.0] * 200 + [1e6], [], "margins"))
    first, last = (h for h in heights(svg, "kept") if h != 10.0)
    assert last == pytest.approx(first * 201 / 200, abs=0.11)
    assert last > first


def test_margins_that_do_not_differ_have_no_histogram():
    assert plots.histogram([0.0] * 5, [], "margins") is None
    assert plots.histogram([], [], "margins") is None


def test_a_plot_escapes_its_labels():
    point = plots.Point(0, 0.5, 0.4, 0.6)
    for svg in (
        plots.intervals([("<script>", "a", point)], "<b>"),
        plots.lines([plots.Series("<script>", "a", [point])], "<b>", "<b>"),
    ):
        assert "<script>" not in str(svg)
        assert "&lt;script&gt;" in str(svg)


def test_a_path_goes_by_arrows_from_its_first_point_to_its_last():
    """To the right and up: the line and its head end left of and below the second dot; 0.2 px apart: none."""
    far = plots.Series("arm", "a", [plots.Point(0.0, 0.5), plots.Point(0.4, 0.7)])
    svg = str(
        plots.paths([far, plots.Series("other", "b", [plots.Point(0.0, 0.5)] * 2)], "reliance", "score")
    )
    dots = [(float(a), float(b)) for a, b in re.findall(r'class="dot a" cx="(\S+)" cy="(\S+)"', svg)]
    (tip,) = re.findall(r'polygon class="dot a" points="(\S+),(\S+) ', svg)
    assert dots[0][0] < float(tip[0]) < dots[1][0] and dots[0][1] > float(tip[1]) > dots[1][1]
    assert svg.count("<polygon") == 1 and svg.count("<circle") == 4
    assert plots.paths([], "reliance", "score") is None


def test_a_higher_value_is_drawn_higher_and_its_interval_around_it():
    points = [plots.Point(0, 0.2, 0.1, 0.3), plots.Point(1, 0.8, 0.7, 0.9)]
    svg = str(plots.lines([plots.Series("accuracy", "a", points)], "round", "accuracy", 0.5))
    low, high = (float(y) for y in re.findall(r'class="dot a" cx="\S+" cy="(\S+)"', svg))
    assert high < low
    whisker = re.search(r'class="whisker a" x1="\S+" y1="(\S+)" x2="\S+" y2="(\S+)"', svg)
    assert float(whisker[1]) > low > float(whisker[2])


# ------------------------------------------------------------------------------------- the ledger, hand-made


def messages(role, text):
    return [{"role": role, "content": text}]


def ledger_row(pair, margin, kept, reason, origin="human", stage="select", prompt="p"):
    row = {"pair_id": pair, "prompt_id": prompt, "origin": origin, "stage": stage, "round": 1}
    return row | {"ensemble_margin": margin, "kept": kept, "reason": reason}


def pair_row(pair, origin="human"):
    texts = {
        "chosen": messages("assistant", f"{pair} good"),
        "rejected": messages("assistant", f"{pair} bad"),
    }
    prompt = [*messages("user", "first"), *messages("assistant", "so"), *messages("user", f"asks {pair}")]
    return {"pair_id": pair, "prompt_id": "p", "prompt": prompt, "origin": origin, **texts}


@pytest.fixture
def made(tmp_path):
    """Makes the files of a round from rows."""
    store = open_store(str(tmp_path / "store"))

    def step(name, tables):
        def work(attempt):
            for file, (columns, rows) in tables.items():
                schema.write_table(schema.from_rows(columns, rows), attempt.write(file))
            return list(tables)

        spec = StepSpec(step=name, version=1, fields={"tables": repr(tables)}, inputs={})
        return Artifact(store, run_step(store, spec, work, ExecutionConfig()).ref)

    def files(ledger, train, mixed):
        pairs = [pair_row(id) for id in train]
        scored = [{"pair_id": id, "margin": -1.5, "chosen_tokens": 7, "rejected_tokens": 3} for id in train]
        return RoundFiles(
            {
                "pairs": step("render", {"train.parquet": (schema.PAIRS, pairs)}),
                "scored": step("review", {"scored.parquet": (schema.SCORED, scored)}),
                "mixture": step(
                    "mix",
                    {
                        "ledger.parquet": (schema.LEDGER, ledger),
                        "mixture.parquet": (schema.MIXTURE, [pair_row(id) for id in mixed]),
                    },
                ),
            }
        )

    return files


def test_a_ledger_that_lost_a_pair_is_not_balanced(made):
    rows = [ledger_row("a", 1.0, True, "kept"), ledger_row("b", -1.0, False, "not_preferred")]
    whole = flow.blocks(made(rows, ["a", "b"], ["a"]), rows)[0]
    assert (whole.given, whole.kept, whole.lost, whole.balanced) == (2, 1, 1, True)
    lost = flow.blocks(made(rows, ["a", "b", "c"], ["a"]), rows)[0]
    assert (lost.given, lost.balanced) == (3, False)


def test_pairs_of_other_sides_do_not_count_among_the_human_pairs(made):
    rows = [
        ledger_row("a", 1.0, True, "kept"),
        ledger_row("h", None, False, "too_long", stage="render_heldout"),
        ledger_row("t", None, False, "too_long", stage="render"),
    ]
    block = flow.blocks(made(rows, ["a"], ["a"]), rows)[0]
    assert block.dropped == [("token ids", "too_long", "an answer over the limit", 1)]
    assert block.balanced
    assert flow.dropped_on_other_sides(rows) == [
        ("token ids, held-out side", "too_long", "an answer over the limit", 1)
    ]


def test_the_dropped_example_is_one_the_policy_does_not_prefer_and_of_those_the_lowest(made):
    rows = [
        ledger_row("a", 2.0, True, "kept"),
        ledger_row("b", 9.0, False, "over_share", stage="mix"),
        ledger_row("c", -1.0, False, "not_preferred"),
        ledger_row("d", -3.0, False, "not_preferred"),
        ledger_row("e", float("nan"), False, "non_finite"),
    ]
    found = {e["kind"]: e for e in examples(made(rows, list("abcde"), ["a"]))}
    assert {kind: e["pair_id"] for kind, e in found.items()} == {"kept": "a", "dropped": "d"}
    assert found["dropped"]["prompt"] == "asks d"


def test_a_relabelled_pair_is_shown_as_it_was_trained_on(made):
    rows = [ledger_row("a", 1.0, True, "kept"), ledger_row("b", -4.0, True, "relabelled")]
    (kept,) = examples(made(rows, ["a", "b"], ["a", "b"]))
    assert (kept["pair_id"], kept["chosen"], kept["rejected"]) == ("b", "b bad", "b good")
    assert (kept["ensemble_margin"], kept["margin"]) == (4.0, 1.5)
    assert (kept["chosen_tokens"], kept["rejected_tokens"]) == (3, 7)


def test_a_relabelled_pair_counts_by_its_new_labels_among_the_kept_lengths(made):
    rows = [ledger_row("a", 1.0, True, "kept"), ledger_row("b", -4.0, True, "relabelled")]
    shares = dict(length.shares(made(rows, ["a", "b"], ["a", "b"]), rows, None))
    assert shares["all human pairs"]["value"] == 1.0
    assert shares["human pairs trained on"]["value"] == 0.5


def test_reports_and_examples_import_neither_torch_nor_prefect():
    code = (
        "import sys; import flows.display.run_report, tasks.reporting, sera_core.reporting.examples;"
        "print(sorted({'torch', 'prefect', 'transformers', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
