import json
import re
import shutil
from collections import Counter
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tinyrun

from flows.display.run_report import write_run_report
from sera_core import steps
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.errors import InputError
from sera_core.guards.shown import shown
from sera_core.reporting import answers_page
from sera_core.reporting.examples import example_pairs
from tasks.reporting import report_round

ATTACK = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """What a browser would make of a page: its tags, its table rows, its text."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.attributes, self.rows, self.text = Counter(), [], [], ""
        self.in_cell = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def prose(self):
        return " ".join(self.text.split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every text of the pairs is an attack on the page that shows it."""
    folder = tmp_path_factory.mktemp("reporting")
    rows = tinyrun.pairs(32)
    for row in rows:
        for side in ("prompt", "chosen", "rejected"):
            row[side][0]["content"] += ATTACK
    tinyrun.write_rows(folder / "pairs.jsonl", [*rows, rows[0], rows[1]])
    return folder


@pytest.fixture(scope="module")
def records(folder):
    """Two rounds of the real steps on the tiny policy."""
    config = tinyrun.config(
        folder, data={**source(folder), "flip_fraction": 0.2, "test_fraction": 0.1}, limits={"rounds": 2}
    )
    return tinyrun.work(config, folder / "store")


@pytest.fixture(scope="module")
def without_pairs(folder):
    """Round 1 has no generated pair: every answer is cut by the limit."""
    pairing, limits = {"allow_cut": False}, {"rounds": 3}
    config = tinyrun.config(folder, data=source(folder), pairing=pairing, limits=limits)
    return tinyrun.work(config, folder / "no-pairs")


def source(folder):
    """The attacked pairs, a quarter of them held out."""
    return {"train": [{"path": str(folder / "pairs.jsonl")}], "heldout_fraction": 0.25}


def artifacts(records, round):
    return {role: Artifact(records.store, ref) for role, ref in records.rounds()[round].steps.items()}


def html(records, round):
    return artifacts(records, round)["report"].path("report.html").read_text()


def ledger(records, round):
    return list(schema.iter_rows(artifacts(records, round)["mixture"].path("ledger.parquet")))


def test_a_response_with_a_script_stays_text(records):
    for number in range(2):
        page = Page(html(records, number))
        assert "<script>alert(1)</script>" in page.text
        assert page.tags["script"] == page.tags["img"] == 0
        assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_a_page_asks_for_nothing_outside_itself(records, tmp_path):
    paths = write_run_report(records.store.url, records.run, tmp_path)
    for text in (path.read_text() for path in paths if path.parent == tmp_path):
        page = Page(text)
        assert not page.tags.keys() & {"link", "iframe", "object", "embed", "img", "script", "base"}
        links = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
        assert all(
            re.fullmatch(r"(index|answers)\.html|round-\d{3}(\.html|/pairs\.html)", link) for link in links
        )
        assert "url(" not in text
        assert "@import" not in text


def test_the_page_depends_on_the_files_alone_not_on_dates_hosts_or_paths(records, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(Path(records.store.url), copy, ignore=shutil.ignore_patterns("report"))
    for path in copy.glob("steps/*/*/done.json"):
        record = json.loads(path.read_text())
        changed = {
            "started": "1999-01-01T00:00:00+00:00",
            "seconds": 4242.0,
            "environment": {"system": "Elsewhere"},
        }
        path.write_text(json.dumps(record | changed))
    store = open_store(str(copy))
    for number, manifest in enumerate(records.rounds()):
        inputs = {
            role: ref for role, ref in manifest.steps.items() if role not in ("data", "model", "report")
        }
        again = run_step(store, steps.report(number, inputs), report_round, ExecutionConfig())
        assert again.ref == manifest.steps["report"]


def test_every_count_of_the_ledger_is_on_the_page(records):
    for number in range(2):
        dropped = [row for row in ledger(records, number) if not row["kept"]]
        counts = Counter((row["origin"], row["stage"], row["reason"]) for row in dropped)
        assert counts, "this run drops something in every round"
        expected = Counter((reason, str(count)) for (_, _, reason), count in counts.items())
        shown = Counter((row[1], row[3]) for row in Page(html(records, number)).rows if len(row) == 4)
        assert expected <= shown


def test_kept_and_dropped_add_up_to_what_came_in(records):
    for number in range(2):
        rows = Page(html(records, number)).rows
        starts = [i for i, row in enumerate(rows) if row and row[0] == "in"]
        assert len(starts) == (1 if number == 0 else 3)
        for start in starts:
            block = rows[start + 1 :]
            end = next(i for i, row in enumerate(block) if not row[0].startswith("dropped at"))
            lost = sum(int(row[3]) for row in block[:end])
            assert int(rows[start][3]) == lost + int(block[end][3])
        assert "does not add up" not in html(records, number)


def test_few_held_out_pairs_are_said_to_be_too_few(records):
    rows = {row[0]: row for row in Page(html(records, 1)).rows if row}
    held_out = rows["held-out reward accuracy"]
    assert int(held_out[2]) < 30
    assert held_out[3] == "too few pairs to tell"
    assert rows["its change since the policy before"][3] == "too few pairs to tell"


def test_the_decision_and_its_reason_are_those_of_the_record(records):
    for number, manifest in enumerate(records.rounds()):
        text = Page(html(records, number)).prose()
        assert manifest.reason in text
        assert f"Round {number} {manifest.decision}" in text


def test_the_flipped_labels_are_those_the_mixture_counted(records):
    metrics = artifacts(records, 1)["mixture"].record.metrics
    text = Page(html(records, 1)).prose()
    flipped, dropped = metrics["flipped/dropped"], metrics["dropped"]
    expected = f"{metrics['flipped']} had a turned label; {dropped} were dropped, {flipped} of them"
    assert expected in text
    assert f"would give {metrics['flipped/dropped_by_chance']:.1f}" in text


def test_a_round_that_ended_without_pairs_has_a_page_that_says_so(without_pairs):
    assert [m.stop_reason for m in without_pairs.rounds()] == [None, "no_pairs"]
    page = Page(html(without_pairs, 1))
    assert "no pairs were left to train on" in page.prose()
    assert "held-out reward accuracy" not in page.prose()
    dropped = {row[1]: row[3] for row in page.rows if row and row[0].startswith("dropped at")}
    assert dropped["no_valid_response"] == "10"
    assert "no_pairs" in page.text


def test_the_examples_are_the_largest_kept_the_lowest_dropped_and_a_generated_pair(records):
    human = [
        row for row in ledger(records, 1) if row["origin"] == "human" and row["stage"] in ("select", "mix")
    ]
    found = {example["kind"]: example for example in example_pairs(records.store, records.rounds()[1])}
    assert list(found) == ["kept", "dropped", "generated"]
    assert found["kept"]["ensemble_margin"] == max(row["ensemble_margin"] for row in human if row["kept"])
    suspects = [row for row in human if row["reason"] == "not_preferred"] or [
        r for r in human if not r["kept"]
    ]
    assert found["dropped"]["ensemble_margin"] == min(row["ensemble_margin"] for row in suspects)
    pairs = {
        row["pair_id"]: row
        for row in schema.iter_rows(artifacts(records, 1)["responses"].path("pairs.parquet"))
    }
    pair = pairs[found["generated"]["pair_id"]]
    assert found["generated"]["chosen"] == pair["chosen"][0]["content"]
    assert found["generated"]["rejected"] == pair["rejected"][0]["content"]
    assert found["generated"]["prompt"] == pair["prompt"][-1]["content"]


def test_the_run_page_shows_each_round_its_best_round_and_how_to_get_the_policy(records, tmp_path):
    paths = write_run_report(records.store.url, records.run, tmp_path / "out")
    names = [path.relative_to(tmp_path / "out").as_posix() for path in paths]
    rounds = [f"round-{n:03d}" for n in range(2)]
    assert names == [
        "index.html",
        "answers.html",
        *(f"{r}.html" for r in rounds),
        *(f"{r}/pairs.html" for r in rounds),
    ]
    page = Page(paths[0].read_text())
    best = records.history().best
    assert f"Round {best.round} is best by" in page.prose()
    assert f"sera export {records.run} --to policy --store" in page.prose()
    for manifest in records.rounds():
        assert manifest.reason in page.prose()
        assert paths[2 + manifest.round].read_text() == html(records, manifest.round)
    for head in records.history().lineage:
        assert head.artifacts["policy"]["sha256"] in page.text
    assert "it reached limits.rounds" in page.prose()
    assert "recompute none" in page.prose()


def test_every_answer_stands_under_its_prompt_beside_those_of_the_other_rounds(records, tmp_path):
    text = write_run_report(records.store.url, records.run, tmp_path)[1].read_text()
    blocks = text.split("<details")[1:]
    by_round = [sampled(records, number) for number in range(2)]
    prompts = list(dict.fromkeys(row["prompt_id"] for row in by_round[0]))
    assert len(blocks) == len(prompts) and f"{len(prompts)} of {len(prompts)} sampled prompts are" in text
    for block, prompt in zip(blocks, sorted(prompts), strict=True):
        columns = block.split("<section>")[1:]
        for number, (column, rows) in enumerate(zip(columns, by_round, strict=True)):
            wanted = [shown(row["response"]) for row in rows if row["prompt_id"] == prompt]
            told = re.findall(r'<pre class="text">(.*?)</pre>', column, re.DOTALL)
            assert f"Round {number}" in column and [unescape(answer) for answer in told] == wanted
    heldout = schema.iter_rows(artifacts(records, 0)["pairs"].path("heldout.parquet"))
    for row in heldout:
        if row["prompt_id"] in prompts:
            place = sorted(prompts).index(row["prompt_id"])
            assert escape(shown(row["prompt"][-1]["content"])) in blocks[place]


def sampled(records, number):
    evidence = artifacts(records, number)["evidence"]
    samples = Artifact(records.store, evidence.record.inputs["samples"])
    rows = list(schema.iter_rows(samples.path("responses.parquet")))
    return sorted(rows, key=lambda row: (row["prompt_id"], row["sample"]))


def test_answers_beyond_the_largest_page_are_counted(records, tmp_path, monkeypatch):
    monkeypatch.setattr(answers_page, "MOST_BYTES", 1)
    text = write_run_report(records.store.url, records.run, tmp_path)[1].read_text()
    assert "<details" not in text and re.search(r"0 of \d+ sampled prompts are", text)


def test_the_run_page_gives_the_test_side_once(records, tmp_path):
    page = Page(write_run_report(records.store.url, records.run, tmp_path)[0].read_text())
    best = records.history().best
    final = json.loads((Path(records.store.url) / f"runs/tiny/final-{best.round:03d}.json").read_text())
    accuracy = final["metrics"]["test/rewards/accuracies"]
    row = next(row for row in page.rows if row and row[0] == "reward accuracy")
    assert row[1].startswith(f"{accuracy['value']:.3f}")
    assert row[2] == str(accuracy["n"])


def test_a_run_without_pairs_has_a_report_too(without_pairs, tmp_path):
    page = Page(write_run_report(without_pairs.store.url, without_pairs.run, tmp_path)[0].read_text())
    assert "no pairs were left to train on" in page.prose()


def test_a_report_replaces_its_own_pages_and_refuses_any_other_file(records, tmp_path):
    first = write_run_report(records.store.url, records.run, tmp_path)
    (tmp_path / "notes.html").write_text("mine")
    assert write_run_report(records.store.url, records.run, tmp_path) == first
    assert (tmp_path / "notes.html").read_text() == "mine"
    (tmp_path / "round-001.html").write_text("<html>mine too</html>")
    with pytest.raises(InputError, match=r"round-001\.html: exists and is not a sera-flow report"):
        write_run_report(records.store.url, records.run, tmp_path)
    assert (tmp_path / "round-001.html").read_text() == "<html>mine too</html>"


def test_a_folder_of_other_files_is_not_written_into(records, tmp_path):
    (tmp_path / "round-000").mkdir()
    (tmp_path / "round-000/rows.js").write_text("mine")
    with pytest.raises(InputError, match="round-000: this folder has files of another kind"):
        write_run_report(records.store.url, records.run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["round-000"]
    shutil.rmtree(tmp_path / "round-000")
    (tmp_path / "round-000").symlink_to(tmp_path)
    with pytest.raises(InputError, match="round-000: this is a link or a file"):
        write_run_report(records.store.url, records.run, tmp_path)


def test_an_unknown_run_is_refused_and_nothing_is_written(records, tmp_path):
    with pytest.raises(InputError, match="'nobody': not in the store"):
        write_run_report(records.store.url, "nobody", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run_says_what_comes_next(records, tmp_path):
    """The same store with the last manifest gone is a run with a round to go."""
    copy = tmp_path / "store"
    shutil.copytree(Path(records.store.url), copy)
    (copy / "runs/tiny/round-001.json").unlink()
    assert RunStore(open_store(str(copy)), "tiny").stop_reason() is None
    page = Page(write_run_report(str(copy), "tiny", tmp_path / "out")[0].read_text())
    assert "1 round of at most 2 finished" in page.prose()
    assert "It resumes with round 1" in page.prose()
