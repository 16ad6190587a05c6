"""A run in a notebook: figures, tables and comparisons show what the records hold, read here another way."""

import base64
import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pyarrow.parquet as pq
import pytest
import tinyrun
from fixtures import make_store
from IPython.core.formatters import DisplayFormatter
from matplotlib.collections import LineCollection
from matplotlib.colors import to_hex
from nbclient import NotebookClient
from PIL import Image

import sera_core
from sera_core.artifacts.canonical import files_digest
from sera_core.errors import InputError
from sera_core.notebook import panels

NOTHING = "No finished round yet"


def manifest(store: Path, run: str, number: int) -> dict:
    """A round's record as it lies in the store."""
    return json.loads((store / "runs" / run / f"round-{number:03d}.json").read_text())


def rows(store: Path, found: dict, role: str) -> list[dict]:
    """Rows of a round's artifact, from the file itself."""
    place = found["artifacts"][role]
    (file,) = store.glob(f"steps/{place['step']}/{place['key']}/*/{place['path']}")
    return pq.read_table(file).to_pylist()


def heldout(store: Path, found: dict, role: str, file: str) -> dict[str, dict]:
    """Rows of a file of a round's evidence, or of a step that it rests on, by pair."""
    ref = found["steps"]["evidence"]
    if role != "evidence":
        done = json.loads((store / "steps" / ref["step"] / ref["key"] / "done.json").read_text())
        ref = done["inputs"][role]
    (path,) = store.glob(f"steps/{ref['step']}/{ref['key']}/*/{file}")
    return {row["pair_id"]: row for row in pq.read_table(path).to_pylist()}


def texts(figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for axes in figure.axes for text in axes.texts)


def bars(axes) -> dict[str, np.ndarray]:
    """Heights of each kind of bar, by its name in the legend (a histogram's is its first bar's)."""
    names = [held.get_label() for held in axes.containers]
    names = [
        held[0].get_label() if name.startswith("_") else name
        for name, held in zip(names, axes.containers, strict=True)
    ]
    return {
        name: np.array([bar.get_height() for bar in held])
        for name, held in zip(names, axes.containers, strict=True)
    }


def series(axes, name: str) -> tuple[dict[int, float], dict[int, tuple[float, float]]]:
    """(values, intervals) by round, of the line with this name in the legend."""
    legend = axes.get_legend()
    colours = {
        t.get_text(): h.get_color() for t, h in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    line = next(one for one in axes.lines if one.get_color() == colours[name])
    values = {round(x): y for x, y in zip(*line.get_data(), strict=True)}
    ends = {}
    for one in axes.collections:
        if isinstance(one, LineCollection) and to_hex(one.get_colors()[0]) == colours[name]:
            ends |= {round(low[0]): (low[1], high[1]) for low, high in one.get_segments()}
    return values, ends


@pytest.fixture(scope="module")
def two_runs(_present_store, tmp_path_factory):
    """A store of this version: run `first` with two rounds, `third` with wrong labels, which ranks worse."""
    store = Path(shutil.copytree(_present_store, tmp_path_factory.mktemp("two") / "store"))
    settings = {**make_store.SMALL, "limits": {"rounds": 3}, "train": {"learning_rate": 3e-4}}
    settings["data"] = {**settings["data"], "flip_fraction": 0.4}
    tinyrun.work(tinyrun.config(_present_store.parent, **settings), store, "third")
    return store


# ------------------------------------------------------------------------------------------------ figures


def test_the_margins_are_the_ledger_s_by_what_became_of_the_pairs(kept_store):
    run = sera_core.open_run(str(kept_store), "first")
    (axes,) = run.plot("margins").axes  # round 0 has no reviewer
    ledger = rows(kept_store, manifest(kept_store, "first", 1), "ledger")
    human = [row for row in ledger if row["origin"] == "human" and row["ensemble_margin"] is not None]
    over = [row["ensemble_margin"] for row in human if row["reason"] == "over_share"]
    kept = [row["ensemble_margin"] for row in human if row["kept"]]
    dropped = [row["ensemble_margin"] for row in human if not row["kept"] and row["reason"] != "over_share"]
    edges = [bar.get_x() for bar in axes.containers[0]]
    edges.append(edges[-1] + axes.containers[0][0].get_width())
    drawn = bars(axes)
    wanted = {"trained on": kept, "selected, no room in the mix": over, "dropped": dropped}
    assert drawn.keys() == wanted.keys() and all(wanted.values())
    for name, values in wanted.items():
        assert drawn[name].tolist() == np.histogram(values, edges)[0].tolist()
    cut = next(line for line in axes.lines if line.get_label() == "smallest margin selected")
    assert cut.get_xdata()[0] == min(kept + over) >= max(dropped)
    assert axes.get_title() == f"round 1: {len(kept)} of {len(human)} trained on"


def test_there_is_no_cut_where_the_rule_drops_larger_margins():
    found = {"kept": np.array([1.0]), "over_share": np.array([2.0]), "dropped": np.array([1.5])}
    assert panels.cut_of(found) is None
    assert panels.cut_of({**found, "dropped": np.array([0.5, -1.0])}) == 1.0
    assert panels.cut_of({**found, "dropped": np.array([])}) is None


def test_the_pairs_are_those_of_the_records_with_their_share(kept_store):
    (axes,) = sera_core.open_run(str(kept_store), "first").plot("pairs").axes
    found = [manifest(kept_store, "first", number) for number in (0, 1)]
    drawn = bars(axes)
    for origin in ("human", "generated"):
        assert drawn[origin].tolist() == [one["pairs"][origin] for one in found]
    assert [text.get_text() for text in axes.texts] == [
        f"{found[1]['generated_share']:.0%}".replace("%", " %")
    ]


@pytest.mark.slow
def test_accuracy_and_reliance_are_those_of_the_records_with_their_intervals(two_runs):
    run = sera_core.open_run(str(two_runs), "third")
    metrics = [manifest(two_runs, "third", number)["metrics"] for number in range(3)]
    accuracy, reliance = (run.plot(panel).axes[0] for panel in ("accuracy", "reliance"))
    wanted = [
        (accuracy, "balanced by length in tokens", "heldout/reliance/tokens/balanced"),
        (accuracy, "all held-out pairs", "heldout/rewards/accuracies"),
        (reliance, "length in tokens", "heldout/reliance/tokens/reliance"),
        (reliance, "length in words", "heldout/reliance/words/reliance"),
    ]
    for axes, name, key in wanted:
        rates = {number: found[key] for number, found in enumerate(metrics)}
        values, ends = series(axes, name)
        assert values == {number: rate["value"] for number, rate in rates.items()}, name
        whole = {number: (rate["low"], rate["high"]) for number, rate in rates.items()}
        assert ends == {number: both for number, both in whole.items() if None not in both}, name
    assert "best: round" in accuracy.get_title()


def test_a_panel_without_its_records_says_so(kept_store):
    run = sera_core.open_run(str(kept_store), "first")  # of a version that measured no reliance
    assert "no reliance on features in their records" in texts(run.plot())
    assert "none balanced" in run.plot("accuracy").axes[0].get_title()
    (kept_store / "runs" / "first" / "round-001.json").unlink()
    assert "No reviewed round yet" in texts(sera_core.open_run(str(kept_store), "first").plot())
    (kept_store / "runs" / "first" / "round-000.json").unlink()
    empty = sera_core.open_run(str(kept_store), "first")
    for panel in ("margins", "accuracy", "reliance", "pairs"):
        assert NOTHING in texts(empty.plot(panel))
    assert texts(empty.plot()).count(NOTHING) == 4


def test_one_round_shows_both_kinds_of_pairs_and_the_reasons(kept_store):
    run = sera_core.open_run(str(kept_store), "first")
    human, generated, reasons = run[1].plot().axes
    ledger = rows(kept_store, manifest(kept_store, "first", 1), "ledger")
    for axes, origin in ((human, "human"), (generated, "generated")):
        judged = [r for r in ledger if r["origin"] == origin and r["ensemble_margin"] is not None]
        assert sum(heights.sum() for heights in bars(axes).values()) == len(judged)
        assert bars(axes)["trained on"].sum() == sum(row["kept"] for row in judged)
    counts = {label.get_text(): place for place, label in enumerate(reasons.get_yticklabels())}
    for held in reasons.containers:
        for reason, place in counts.items():
            same = [r for r in ledger if (r["reason"], r["origin"]) == (reason, held.get_label())]
            assert held[place].get_width() == len(same)
    first = run[0].plot()
    assert "no policy has reviewed them" in texts(first) and "generated pairs: none was judged" in texts(
        first
    )


def test_names_are_drawn_as_they_are():
    """A `$` starts no formula, a leading underscore does not hide a name from the legend."""
    assert panels.plain("column:$x") == r"column:\$x" and panels.plain("_own:length") == " _own:length"
    assert panels.plain("a\x1bb") == r"a\x1bb"


def test_what_cannot_be_drawn_or_compared_is_refused(kept_store):
    run = sera_core.open_run(str(kept_store), "first")
    for wrong, said in (
        (lambda: run.plot("margin"), "there are margins, accuracy, reliance, pairs"),
        (lambda: run.compare("nobody"), "run 'nobody': not in the store"),
        (lambda: run.compare(run[1]), "give a run"),
        (lambda: run[1].compare(0), "give a round"),
    ):
        with pytest.raises(InputError, match=said):
            wrong()


def test_without_matplotlib_the_error_names_the_install_and_the_rest_works(kept_store):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import sera_core; run = sera_core.open_run(sys.argv[1], 'first')\n"
        "run._repr_html_(), run.compare('second')._repr_html_(), run[1].compare(run[0])\n"
        "assert not {'torch', 'prefect', 'transformers'} & set(sys.modules)\n"
        "run.plot()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(kept_store)], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith("InputError: a plot needs the extra `plot`: pip install 'sera-flow[plot]'")


# -------------------------------------------------------------------------------------------- comparisons


def test_two_runs_side_by_side_are_what_their_records_say(kept_store, sera):
    runs = [sera_core.open_run(str(kept_store), name) for name in ("first", "second")]
    found = runs[0].compare("second")
    told = sera("diff", "first", "second", "--store", kept_store, "--json").json
    assert found.settings.to_dict("records") == told["config"]
    assert list(found.steps["role"]) == [row["role"] for row in told["steps"]]
    assert list(found.metrics["metric"]) == [row["metric"] for row in told["metrics"]]
    for number in (0, 1):
        left, right = (manifest(kept_store, name, number) for name in ("first", "second"))
        row = found.rounds.loc[number]
        assert row["decision"].to_dict() == {"left": left["decision"], "right": right["decision"]}
        pairs = {"left": left["pairs"]["human"], "right": right["pairs"]["human"]}
        assert row["human"].to_dict() == {**pairs, "difference": pairs["left"] - pairs["right"]}
        margins = [one["metrics"]["heldout/margin"]["value"] for one in (left, right)]
        assert row["heldout/margin", "difference"] == pytest.approx(margins[0] - margins[1])
    assert repr(found).splitlines()[:2] == [
        "<first against second: 1 setting differs>",
        "select.fraction: 0.7 | 0.5",
    ]
    assert "Round 0: the same policy" in repr(found)
    assert repr(runs[0].compare(runs[1])) == repr(found)


def balanced(store: Path, found: dict) -> tuple[float, dict[str, float]]:
    """Balanced accuracy by length, and each pair's correctness, from the files alone."""
    margins = {id: row["margin"] for id, row in heldout(store, found, "evidence", "heldout.parquet").items()}
    tokens = {id: row["tokens"] for id, row in heldout(store, found, "features", "heldout.parquet").items()}
    correct = {id: 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for id, margin in margins.items()}
    sides = [[c for id, c in correct.items() if sign * tokens[id] > 0] for sign in (1, -1)]
    return float(np.mean([np.mean(side) for side in sides])), correct


@pytest.mark.slow
def test_the_policies_are_compared_on_the_same_heldout_pairs(two_runs):
    first, third = (sera_core.open_run(str(two_runs), name) for name in ("first", "third"))
    found = third.compare(first).heldout
    assert list(zip(found["left_round"], found["right_round"], strict=True)) == [
        pair for pair in ((0, 0), (1, 1), (2, 1)) for _ in range(3)
    ]
    rows = found.set_index(["left_round", "right_round", "quantity"])
    for a, b in ((0, 0), (1, 1), (2, 1)):
        (left, mine), (right, theirs) = (
            balanced(two_runs, manifest(two_runs, *place)) for place in (("third", a), ("first", b))
        )
        row = rows.loc[(a, b, "balanced")]
        assert (row["left"], row["right"]) == pytest.approx((left, right))
        assert row["difference"] == pytest.approx(left - right) and row["left_out"] == 0
        assert row["low"] <= row["difference"] + 1e-12 and row["difference"] <= row["high"] + 1e-12
        row = rows.loc[(a, b, "accuracy")]
        assert row["difference"] == pytest.approx(np.mean([mine[id] - theirs[id] for id in mine]))
        assert row["pairs"] == len(mine) == 8
    missing = third.compare(first).rounds.loc[2]
    assert missing["human", "left"] == third.rounds.loc[2, "human"] and np.isnan(missing["accuracy", "right"])
    assert "Round 2 | 1: held-out balanced accuracy" in repr(third.compare(first))
    assert (rows.xs("accuracy", level="quantity")["difference"] < 0).all()  # the labels were wrong


@pytest.mark.slow
def test_two_rounds_of_a_run_are_compared_the_same_way(two_runs, tmp_path):
    store = Path(shutil.copytree(two_runs, tmp_path / "store"))
    rewrite_heldout(store, "third", 2, "margin", lambda margins: [-abs(m) for m in margins])  # all wrong
    third = sera_core.open_run(str(store), "third")
    found = third[2].compare(third[0])
    assert not len(found.settings) and found.left == "third:2" and found.right == "third:0"
    assert found.rounds["round"].to_dict("records") == [{"left": 2, "right": 0}]
    now, then = (balanced(store, manifest(store, "third", number))[0] for number in (2, 0))
    assert found.heldout["difference"][0] == pytest.approx(now - then) == -then < 0
    assert third[0].compare(third[2]).heldout["difference"][0] == pytest.approx(then)
    assert third[0].compare(third[0]).notes == ("Round 0: the same policy",)


def test_only_heldout_pairs_that_both_have_count(kept_store):
    """A run whose evidence lacks a held-out pair of the other is compared on the rest."""
    first, second = (sera_core.open_run(str(kept_store), name) for name in ("first", "second"))
    rewrite_heldout(kept_store, "second", 1, "pair_id", lambda ids: ["f" * 16, *ids[1:]])
    found = first[1].compare(second[1])
    accuracy = found.heldout.set_index("quantity").loc["accuracy"]
    assert accuracy["pairs"] == 7 and accuracy["left_out"] == 2
    assert "2 held-out pairs that only one side has left out" in found.notes[0]
    other = [f"{number:016x}" for number in range(8)]
    rewrite_heldout(kept_store, "second", 1, "pair_id", lambda ids: other)
    none = first[1].compare(second[1])
    assert "no held-out pair in common" in repr(none) and not len(none.heldout)


def test_a_run_is_compared_as_far_as_it_came(kept_store):
    first, second = (sera_core.open_run(str(kept_store), name) for name in ("first", "second"))
    (kept_store / "runs" / "second" / "round-001.json").unlink()
    found = first.compare(second)
    assert [note.split(":")[0] for note in found.notes] == ["Round 0", "Round 1 | 0"]
    assert found.rounds.loc[1, "human"].isna().to_dict() == {"left": False, "right": True, "difference": True}
    assert "–" in found._repr_html_()
    (kept_store / "runs" / "second" / "round-000.json").unlink()
    assert "No two rounds with a trained policy" in repr(first.compare(second))
    for run in (first, second):
        for path in (kept_store / "runs" / run.name).glob("round-*.json"):
            path.unlink()
    assert "select.fraction" in first.compare(second)._repr_html_()


def rewrite_heldout(store: Path, run: str, number: int, column: str, change) -> None:
    """Change a column of the held-out pairs of a round's evidence, with the records of it."""
    path = store / "runs" / run / f"round-{number:03d}.json"
    record = json.loads(path.read_text())
    ref = record["steps"]["evidence"]
    step = store / "steps" / ref["step"] / ref["key"]
    done = json.loads((step / "done.json").read_text())
    (file,) = step.glob("*/heldout.parquet")
    table = pq.read_table(file)
    place = table.column_names.index(column)
    table = table.set_column(place, column, [change(table[column].to_pylist())])
    file.unlink()
    pq.write_table(table, file)
    data = file.read_bytes()
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    done["files"]["heldout.parquet"] |= entry
    digest = files_digest({name: one["sha256"] for name, one in done["files"].items()})
    (step / "done.json").write_text(json.dumps(done))
    for named in [ref, *record["used"]]:
        if named["key"] == ref["key"]:
            named["digest"] = digest
    path.write_text(json.dumps(record))


# --------------------------------------------------------------------------------------------- a notebook


MARKUP = "<img src=x onerror=alert(1)>"


def test_no_text_of_a_record_becomes_markup(kept_store):
    path = kept_store / "runs" / "second" / "run-000.json"
    record = json.loads(path.read_text())
    record["config"]["data"]["train"][0]["path"] = MARKUP + "\u202e"
    path.write_text(json.dumps(record))
    path = kept_store / "runs" / "second" / "round-001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"reason": MARKUP * 3}))
    run = sera_core.open_run(str(kept_store), "second")
    shown = run._repr_html_() + run.compare("first")._repr_html_()
    assert shown.count("&lt;img src=x onerror=alert(1)&gt;") == 4  # whole, though long
    assert "<img" not in shown and "\u202e" not in shown and r"\u202e" in shown


def test_a_figure_is_one_picture_with_its_words(kept_store):
    figure = sera_core.open_run(str(kept_store), "first").plot()
    data, told = DisplayFormatter().format(figure)
    picture = Image.open(io.BytesIO(data["image/png"]))
    assert picture.width == 2 * told["image/png"]["width"] == 2200
    assert "round 1: 9 of 20 trained on" in told["image/png"]["alt"]
    assert len(set(picture.convert("L").getdata())) > 10  # something is drawn


CELLS = (
    "import sys, sera_core\nrun = sera_core.open_run('store', 'first')\nrun",
    "run.plot()",
    "import matplotlib.pyplot\nrun.plot('pairs')",
    "run.compare('second')",
    "print(sorted({'torch', 'prefect', 'transformers'} & set(sys.modules)))",
)


@pytest.mark.slow
def test_a_real_notebook_shows_the_run_its_figures_and_a_comparison(kept_store, tmp_path, monkeypatch):
    for name in (
        "IPYTHONDIR",
        "JUPYTER_RUNTIME_DIR",
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_DATA_DIR",
        "MPLCONFIGDIR",
    ):
        monkeypatch.setenv(name, str(tmp_path / name))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    place = {"metadata": {"path": str(kept_store.parent)}}
    NotebookClient(book, timeout=240, kernel_name="python3", resources=place).execute()
    shown, figure, one, compared, modules = (cell["outputs"] for cell in book.cells)
    (table,) = (output["data"]["text/html"] for output in shown)
    assert "&lt;run first in store: 2 rounds" in table and table.count("<tr") == 3
    for outputs, width in ((figure, 1100), (one, 550)):
        (output,) = outputs  # once, also after pyplot was imported
        assert output["metadata"]["image/png"]["width"] == width
        picture = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
        assert picture.width == 2 * width
    assert "select.fraction" in compared[0]["data"]["text/html"]
    assert modules[0]["text"].strip() == "[]"
