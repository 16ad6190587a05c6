"""Cards, progress, log lines and events: what a person sees in Prefect, as text and on a real server."""

import base64
import json
import os
import re
import shlex
import subprocess
import sys
import urllib.request
import xml.etree.ElementTree as ElementTree
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import servers
import tinyrun
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from flows.display.cards import index_card, key_of, plan_card
from flows.display.markdown import escape, quote, verbatim
from flows.display.round_card import round_card
from flows.display.run_view import verdict_words
from flows.planning.plan import plan
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.guards.shown import shown
from sera_core.reporting.examples import example_pairs

pytestmark = pytest.mark.slow

ATTACK = (
    "</pre><script>alert(1)</script> [here](javascript:alert(2)) ![x](http://evil.example/x.png)\n\n"
    "# big `code` | a | b |\n|---|---|\n- item\n> said\n```\n<img src=x onerror=alert(3)>\n"
    "www.evil.example and me@evil.example and &lt;b&gt; \u202etxet"
)
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
MARKDOWN.validateLink = lambda url: True  # as Prefect's: javascript: and data: are links too


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Every text of the pairs is an attack, and has words that are nowhere else."""
    folder = tmp_path_factory.mktemp("cards")
    rows = tinyrun.pairs(32)
    for number, row in enumerate(rows):
        for side in ("prompt", "chosen", "rejected"):
            row[side][0]["content"] += f" secret{side}{number} told{number} {ATTACK}"
    tinyrun.write_rows(folder / "pairs.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def records(folder):
    """Two rounds of the real steps on the tiny policy."""
    return tinyrun.work(tinyrun.config(folder, limits={"rounds": 2}), folder / "the store")


@pytest.fixture(scope="module")
def without_pairs(folder):
    """Round 1 has nothing to train on."""
    config = tinyrun.config(folder, select_generated={"min_margin": 1e9}, limits={"rounds": 2})
    return tinyrun.work(config, folder / "no-pairs")


def flat(markdown):
    """What a reader of markdown makes of it: blocks and what stands in them, in order."""
    found = []
    for token in MARKDOWN.parse(markdown):
        found += token.children if token.type == "inline" else [token]
    return found


def text_of(markdown):
    """What is shown as text."""
    ends = ("softbreak", "hardbreak", "td_close", "th_close", "paragraph_close", "heading_close")
    return "".join("\n" if t.type in ends else t.content for t in flat(markdown))


def plots_of(markdown):
    links = [str(t.attrs["src"]) for t in flat(markdown) if t.type == "image"]
    assert all(link.startswith("data:image/svg+xml;base64,") for link in links)
    return [base64.b64decode(link.partition(",")[2]).decode() for link in links]


def row_of(markdown, name):
    """The cells of the row of a table that begins with a name."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def cards_of(records, config, show_text):
    found = {f"round {m.round}": round_card(records, m, show_text) for m in records.rounds()}
    found["index"] = index_card(records)
    found["plan"] = plan_card("other", plan(config, "other", records.store.url))
    return found


# ------------------------------------------------------------------------------------------- a round's card


def test_a_round_card_holds_each_metric_against_the_last_round(records):
    first, second = records.rounds()
    card = round_card(records, second, show_text=False)
    then, now = (m.metrics["heldout/margin"]["value"] for m in (first, second))
    cells = row_of(card, "held-out margin, nats")
    assert cells[1].startswith(f"{now:.3f} [") and cells[1].endswith("(n = 8)")
    assert cells[2:] == [f"{now - then:+.3f}".replace("-", "−"), f"{then:.3f}"]
    assert row_of(card, "generated pairs trained on")[1:] == [str(second.pairs["generated"]), "+4", "0"]
    assert f"**{second.decision}**" in card and second.reason in text_of(card)


def test_a_round_card_counts_every_pair_of_the_ledger_by_reason_in_words(records):
    manifest = records.rounds()[1]
    card = text_of(round_card(records, manifest, show_text=False))
    ledger = Artifact(records.store, manifest.steps["mixture"]).path("ledger.parquet")
    rows = list(schema.iter_rows(ledger))
    shown = re.findall(r"^(human|generated)\n(\w+)\n(.+)\n([\d,]+)$", card, re.M)
    assert sum(int(count) for *_, count in shown) == len(rows)
    assert ("human", "below_cut", "preferred, but beyond the cut") in {tuple(row[:3]) for row in shown}


def test_a_round_card_names_every_artifact_with_its_place_hash_and_size(records):
    for manifest in records.rounds():
        shown = text_of(round_card(records, manifest, show_text=False))
        for role, place in manifest.artifacts.items():
            line = rf"^{role} +{place['bytes']:,} bytes  sha256 {place['sha256']}\n +(.+)$"
            (found,) = re.findall(line, shown, re.M)
            assert found.startswith(f"{records.store.url}/steps/") and Path(found).exists()


def test_the_plots_of_a_card_are_drawings_with_a_size(records, without_pairs):
    last = plots_of(round_card(records, records.rounds()[1], show_text=False))
    assert len(last) == 4  # accuracy, reliance and margins over the rounds, and margins kept and dropped
    assert "trained on (" in last[-1] and "dropped (" in last[-1]
    for run in (records, without_pairs):
        for manifest in run.rounds():
            for plot in plots_of(round_card(run, manifest, show_text=False)):
                root = ElementTree.fromstring(plot)
                assert root.tag == "{http://www.w3.org/2000/svg}svg"
                assert float(root.attrib["width"]) > 100 and float(root.attrib["height"]) > 100


def test_a_round_without_generated_pairs_or_policy_has_a_card_too(records, without_pairs):
    first, last = records.rounds()[0], without_pairs.rounds()[-1]
    assert last.stop_reason == "no_pairs" and "policy" not in last.artifacts
    assert "generated pair" not in round_card(records, first, show_text=True).partition("## Pairs")[2]
    card = round_card(without_pairs, last, show_text=True)
    assert "no pairs were left to train on" in card and "**policy**" not in card
    assert row_of(card, "held-out accuracy")[1] == "–"


# ------------------------------------------------------------------------------------------- texts of pairs


def test_a_card_shows_up_to_three_pairs_word_for_word(records):
    manifest = records.rounds()[1]
    card = text_of(round_card(records, manifest, show_text=True))
    pairs = example_pairs(records.store, manifest)
    assert {pair["kind"] for pair in pairs} == {"kept", "dropped", "generated"}
    for pair in pairs:
        assert pair["pair_id"] in card
    for line in pairs[0]["prompt"].replace("\u202e", "\\u202e").splitlines():
        assert line.strip() in card, line


def test_without_show_text_no_card_holds_any_words_of_a_pair(folder, records):
    config = tinyrun.config(folder, limits={"rounds": 2}, review={"show_text": False})
    cards = "\n".join(cards_of(records, config, show_text=False).values())
    shown = " ".join(re.findall(r"\w+", text_of(cards)))
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    texts = [row[side][0]["content"] for row in rows for side in ("prompt", "chosen", "rejected")]
    responses = Artifact(records.store, records.rounds()[1].steps["responses"]).path("responses.parquet")
    texts += [row["response"] for row in schema.iter_rows(responses, ["response"])]
    sequences = {" ".join(two) for text in texts for two in pairwise(re.findall(r"\w+", text))}
    assert len(sequences) > 400
    assert not [words for words in sequences if f" {words} " in f" {shown} "]
    assert "secretprompt" in round_card(records, records.rounds()[1], show_text=True)


def test_hostile_text_of_data_names_and_reasons_stays_text(folder, records):
    config = tinyrun.config(folder, limits={"rounds": 2})
    hostile = records.rounds()[1].model_copy(update={"reason": ATTACK, "run": ATTACK})
    found = plan(config, "other", records.store.url) | {"note": ATTACK}
    cards = {
        **cards_of(records, config, show_text=True),
        "hostile": round_card(records, hostile, show_text=True),
        "planned": plan_card(ATTACK, found),
    }
    for name, card in cards.items():
        tokens = flat(card)
        kinds = {token.type for token in tokens}
        assert not kinds & {"html_block", "html_inline", "ordered_list_open", "code_block", "s_open"}, name
        items = sum(token.type == "list_item_open" for token in tokens)
        assert items == sum(line.startswith("- ") for line in card.splitlines()), name
        links = [str(t.attrs["href"]) for t in tokens if t.type == "link_open"]
        assert all(link.startswith("/artifacts/key/") for link in links), name
        assert not re.search(r"<[a-zA-Z/!]|https?://|[wW]{3}\.|(?<!\\)@", without_plots(card)), name
        assert "\u202e" not in card


def without_plots(card):
    return re.sub(r"\(data:image/svg\+xml;base64,[^)]*\)", "", card)


PIECES = [
    *"\\`*_[]()|~@#+-=:.!<>&;{}$^'\" \n\ta1w/h",
    *("http://", "www.", "```", "~~~", "<script>", "&amp;", "&#42;", "![x](y)", "- ", "1. ", "---", "    "),
    *("\r\n", "\u2028", "\x00", "\u202e", "\ud800", "[^1]", "| a | b |\n|---|---|\n", ":-:\n"),
]


@given(st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
def test_whatever_is_escaped_comes_out_as_the_same_text(text):
    plain = " ".join(shown(text).split())
    paragraph = flat(f"x {escape(text)}")
    assert {t.type for t in paragraph} <= {"paragraph_open", "paragraph_close", "text"}
    assert " ".join(text_of(f"x {escape(text)}").split()) == f"x {plain}".strip()
    cells = [t.type for t in flat(f"| a | b |\n|---|---|\n| {escape(text)} | z |\n\nend")]
    assert cells.count("td_open") == 2 and cells.count("table_open") == 1
    quoted = {t.type for t in flat(quote(text))}
    breaks = {"hardbreak", "paragraph_open", "paragraph_close"}
    assert quoted <= {"blockquote_open", "blockquote_close", "text", *breaks}
    assert " ".join(text_of(quote(text)).split()) == plain


def test_a_long_text_is_cut_with_a_word_about_the_rest():
    said = quote("word " * 1000)
    assert len(said) < 1400 and "3,800 more characters" in said


def test_no_command_closes_the_fence_it_stands_in():
    (block,) = [t for t in flat(verbatim(["sera show x", "````", "end"])) if t.type == "fence"]
    assert block.content == "sera show x\n````\nend\n"


# ------------------------------------------------------------------------------------------ index and plan


def test_the_index_links_each_round_and_gives_commands_that_a_shell_understands(records):
    card = index_card(records)
    links = [str(t.attrs["href"]) for t in flat(card) if t.type == "link_open"]
    assert links == ["/artifacts/key/tiny-round-0", "/artifacts/key/tiny-round-1"]
    (block,) = [t for t in flat(card) if t.type == "fence"]
    commands = [shlex.split(line) for line in block.content.splitlines()]
    assert [command[1] for command in commands] == ["show", "report", "export"]
    assert all(command[2:5] == ["tiny", "--store", records.store.url] for command in commands)
    assert "stopped (max_rounds)" in text_of(card) and records.store.url in text_of(card)
    assert "head: 1 · best round: 0" in card
    assert verdict_words(records) in text_of(card)


def test_a_plan_card_says_of_each_step_whether_it_runs_and_why(folder, records):
    config = tinyrun.config(folder, limits={"rounds": 3})
    found = plan(config, "other", records.store.url)
    card = text_of(plan_card("other", found))
    shown = re.findall(r"^(\d|–)\n(\w+(?:: .+)?)\n(reuse|run|depends)\n(.+)\n[\d,]+\n.+$", card, re.M)
    assert [row[2] for row in shown] == [row["status"] for row in found["steps"]]
    assert {"reuse", "run", "depends"} == {row[2] for row in shown}
    assert "logps: start policy, held-out answers" in {row[1] for row in shown}
    assert f"{found['reuse']} steps are in the store" in card


def test_keys_are_valid_and_differ_where_names_do():
    names = ["demo", "Demo", "a.b", "a_b", "a-b", "a--sera--s0", "x" * 100, "a-round-1"]
    keys = [key_of(name, what) for name in names for what in ("index", "round-1", "plan")]
    assert all(re.fullmatch(r"[a-z0-9-]+", key) for key in keys)
    assert len(set(keys)) == len(keys)
    assert key_of("a--sera--s0", "index") == "a--sera--s0-index"


# ------------------------------------------------------------------------------------- on a server

PUBLISH = """
import logging, sys, threading, time
from prefect import flow, task
from flows.display import cards
from flows.display import events
from flows.display import progress
from flows.display.logs import library_logs, run_log
from flows.planning.plan import plan
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store

progress.ARTIFACT_SECONDS, progress.LOOK_SECONDS = 0.1, 0.02
records = RunStore(open_store(sys.argv[1]), "tiny")

@task
def train():
    with progress.reporter("train policy") as report, library_logs():
        logging.getLogger("trl.trainer").info("a line of TRL")
        inside = threading.Thread(target=logging.getLogger("vllm.engine").info, args=("a line of vLLM",))
        inside.start()
        inside.join()
        logging.getLogger("transformers.modeling").warning("a line of transformers")
        run_log()("a line of a child, 100 %s")
        for done in range(10):
            report(done, 10, "pairs")
            time.sleep(0.05)
        report(0, 0, "pairs left over")
    with progress.reporter("score responses") as report:
        report(1, 1, "responses")

@task
def fail():
    with progress.reporter("sample responses") as report:
        report(3, 10, "responses")
        time.sleep(0.5)
        raise ValueError("lost")

@flow(flow_run_name="tiny-round-1")
def publish():
    first, second = records.rounds()
    cards.publish_round(records, second, True)
    cards.publish_missing(records)
    raised = second.model_copy(update={"metrics": second.metrics | {"alarm": "amplified"}})
    for manifest in (first, raised):
        events.round_completed(manifest, records.store.url)
    events.run_stopped(records)
    train()
    fail(return_state=True)
    return None

publish()
"""


@pytest.fixture(scope="module")
def published(records, tmp_path_factory):
    """A flow run that takes itself for a deployed one publishes everything; returns a reader of the API.

    The server is one of its own: what other tests publish would be found too.
    """
    with servers.prefect_server(tmp_path_factory.mktemp("prefect")) as server:
        publish(records, server)
        yield partial(ask, server.url)


def publish(records, server):
    """One flow run in a process of its own."""
    environment = {
        **server.environment,
        "PREFECT_LOGGING_LEVEL": "INFO",
        "PREFECT_LOGGING_EXTRA_LOGGERS": "trl,transformers,vllm",  # as deployments/prefect.yaml has it
        "PREFECT__RUNTIME__DEPLOYMENT__ID": "11111111-2222-3333-4444-555555555555",
    }
    command = [sys.executable, "-c", PUBLISH, records.store.url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def ask(url, path, body):
    """What the API answers."""
    request = urllib.request.Request(
        f"{url}{path}", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


@pytest.mark.flow
def test_cards_are_artifacts_of_the_server_and_missing_ones_are_made_up_for(published, records):
    found = {a["key"]: a for a in published("/artifacts/latest/filter", {}) if a["type"] == "markdown"}
    assert set(found) == {"tiny-round-0", "tiny-round-1", "tiny-index"}
    assert found["tiny-round-1"]["data"] == round_card(records, records.rounds()[1], show_text=True)
    assert found["tiny-index"]["data"] == index_card(records)
    assert found["tiny-round-1"]["flow_run_id"] is not None
    every = published("/artifacts/filter", {"sort": "CREATED_DESC"})
    assert sum(a["key"] == "tiny-round-1" for a in every) == 1  # it was there, so it was not made again


@pytest.mark.flow
def test_a_long_step_fills_a_progress_artifact_and_a_short_or_failed_one_does_not(published):
    found = [a for a in published("/artifacts/filter", {}) if a["type"] == "progress"]
    states = {re.sub(r"-[0-9a-f]{8}$", "", a["key"]): (a["data"], a["description"]) for a in found}
    assert states == {
        "tiny-round-1-train-policy": (100.0, "train policy: no pairs left over"),
        "tiny-round-1-sample-responses": (30.0, "sample responses: 3 of 10 responses"),
    }
    assert all(a["task_run_id"] for a in found)


@pytest.mark.flow
def test_lines_of_libraries_and_children_stand_once_in_the_log_of_their_task_run(published):
    lines = [line for line in published("/logs/filter", {}) if "a line of" in line["message"]]
    told = sorted((line["message"], line["name"]) for line in lines)
    assert told == [
        ("a line of TRL", "trl.trainer"),
        ("a line of a child, 100 %s", "prefect.task_runs.sera"),
        ("a line of transformers", "transformers.modeling"),
        ("a line of vLLM", "vllm.engine"),
    ]
    assert len({line["task_run_id"] for line in lines}) == 1 and lines[0]["task_run_id"]


@pytest.mark.flow
def test_events_say_what_happened_and_hold_no_text(published, records):
    found = published("/events/filter", {"filter": {"event": {"prefix": ["sera."]}}})["events"]
    rounds = {e["payload"]["round"]: e for e in found if e["event"] == "sera.round.completed"}
    assert set(rounds) == {0, 1}
    assert rounds[1]["resource"]["prefect.resource.id"] == "sera.run.tiny"
    assert rounds[1]["payload"]["generated_share"] == records.rounds()[1].generated_share
    (alarm,) = [e for e in found if e["event"] == "sera.alarm.amplification"]
    assert alarm["payload"]["round"] == 1
    (stopped,) = [e for e in found if e["event"] == "sera.run.stopped"]
    assert stopped["payload"]["reason"] == "max_rounds" and stopped["payload"]["best_round"] == 0
    assert "secret" not in json.dumps(found)


def test_without_a_server_events_are_silent_and_progress_goes_to_stderr(records):
    code = (
        "import sys; from flows.display import events, progress; from flows.display.logs import run_log\n"
        "from sera_core.artifacts.runs import RunStore; from sera_core.artifacts.store import open_store\n"
        "records = RunStore(open_store(sys.argv[1]), 'tiny'); progress.LINE_SECONDS = 0\n"
        "events.round_completed(records.rounds()[1], sys.argv[1]); events.run_stopped(records)\n"
        "run_log()('to stderr')\n"
        "with progress.reporter('train') as report: report(1, 2, 'pairs')\n"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    done = subprocess.run(
        [sys.executable, "-c", code, records.store.url],
        env={**clean, "PREFECT_HOME": str(Path(records.store.url).parent / "home")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stderr == "to stderr\ntrain: 1 of 2 pairs\n"
