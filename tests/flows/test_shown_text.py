"""Data that drives terminals and turns text round, from the file to everything a person looks at."""

import logging

import pytest
import tinyrun
from hidden import ACTING, hidden_in

from flows.cli import main
from flows.commands.deploy import _welcome
from flows.commands.summary import closing_lines
from flows.display import logs
from flows.display.cards import index_card, plan_card
from flows.display.round_card import round_card
from flows.experiments import load_experiment
from sera_core.errors import InputError, SeraError, StoreError
from sera_core.reporting.examples import example_pairs
from sera_core.reporting.round_page import title_of
from tasks.engines.child import to_stderr

FILE = "pairs\x1b[2J\u202elnosj.jsonl"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Prompts, answers and the name of their file hold what acts on a terminal."""
    folder = tmp_path_factory.mktemp("acting")
    rows = tinyrun.pairs(32)
    for row in rows:
        for side in ("prompt", "chosen", "rejected"):
            row[side][0]["content"] = f"{ACTING} {row[side][0]['content']} {ACTING}"
    tinyrun.write_rows(folder / FILE, rows)
    return folder


@pytest.fixture(scope="module")
def experiment(folder):
    source = {"train": [{"path": str(folder / FILE)}], "heldout_fraction": 0.25}
    return tinyrun.experiment(folder, data=source, limits={"rounds": 2})


@pytest.fixture(scope="module")
def records(folder, experiment):
    return tinyrun.work(load_experiment(str(experiment)), folder / "store")


@pytest.fixture
def said(sera):
    """What a command wrote on both streams, where nothing hidden may be."""

    def both(*args, code=0):
        out, err = sera(*args, code=code)
        assert not hidden_in(out) and not hidden_in(err), args
        return out + err

    return both


@pytest.mark.slow
def test_no_command_writes_a_character_that_acts(folder, experiment, records, said):
    store = ["--store", records.store.url]
    assert r"\x1b]0;owned\x07" in said("run", str(experiment), *store)
    assert r"\x1b]0;owned\x07" in said("show", "tiny", *store)
    for command in (
        ["show", "tiny", "--round", "1"],
        ["list"],
        ["plan", str(experiment)],
        ["lineage", "tiny"],
    ):
        said(*command, *store)
        said(*command, "--json", *store)


@pytest.mark.slow
def test_no_page_and_no_card_holds_one(folder, records, said):
    store = ["--store", records.store.url]
    said("report", "tiny", "--out", str(folder / "report"), *store)
    said("export", "tiny", "--to", str(folder / "exported"), *store)
    pages = [*(folder / "report").glob("*.html"), folder / "exported" / "README.md"]
    pages.append(folder / "exported" / "lineage.json")
    cards = [page.read_text(encoding="utf-8") for page in pages]
    cards += [round_card(records, manifest, show_text=True) for manifest in records.rounds()]
    cards += [index_card(records), plan_card("a\x1bb", {**PLAN, "note": ACTING})]
    assert len(cards) == 10
    for card in cards:
        assert not hidden_in(card)
    assert any(r"\x1b]0;owned\x07" in card for card in cards)


PLAN = {
    "reuse": 0,
    "run_now": 0,
    "depends": 0,
    "tokens": 0,
    "seconds": 0.0,
    "bytes": 0,
    "steps": [],
    "rounds": [],
    "warnings": [],
}


def test_a_message_about_the_data_holds_none(tmp_path, said):
    file = tinyrun.write_rows(tmp_path / FILE, tinyrun.pairs(8))
    experiment = tinyrun.experiment(tmp_path, data={"train": [{"path": str(file)}]})
    file.write_text("{not json\n")
    told = said("run", str(experiment), "--store", str(tmp_path / "store"), code=2)
    assert r"pairs\x1b[2J\u202elnosj.jsonl" in told
    with_trace = said("run", str(experiment), "--debug", "--store", str(tmp_path / "store"), code=2)
    assert "Traceback" in with_trace


def test_what_the_parser_says_of_an_argument_holds_none(capfd):
    with pytest.raises(SystemExit, match="2"):
        main(["show", "demo", "--round", ACTING])
    assert not hidden_in(capfd.readouterr().err.replace("\r\n", "\n"))


def test_a_line_of_a_child_holds_none(capsys):
    to_stderr(ACTING)
    assert not hidden_in(capsys.readouterr().err)


def test_the_log_of_a_deployed_run_holds_none(monkeypatch):
    import prefect.logging
    from prefect.logging.handlers import APILogHandler
    from prefect.logging.loggers import PrefectLogAdapter

    heard: list[str] = []
    handler = APILogHandler()
    monkeypatch.setattr(APILogHandler, "emit", lambda self, record: heard.append(self.format(record)))
    logger = logging.getLogger("run-of-a-test")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(logging.Handler())
    monkeypatch.setattr(prefect.logging, "get_run_logger", lambda: PrefectLogAdapter(logger, {}))
    monkeypatch.setattr(logs, "in_deployed_run", lambda: True)
    monkeypatch.setattr(PrefectLogAdapter, "getChild", lambda self, name: self)
    monkeypatch.setattr(logger.handlers[0], "emit", lambda record: heard.append(record.getMessage()))
    logs.run_log()(ACTING)
    with logs.library_logs():
        logging.getLogger("trl.trainer").warning("said %s", ACTING)
    handler.close()
    assert len(heard) == 2 and not hidden_in("".join(heard))


def test_what_prefect_itself_logs_of_a_run_holds_none(caplog):
    from prefect.logging.loggers import flow_run_logger  # noqa: F401 - Prefect's loggers are set up

    logs.escape_prefect_logs()
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logger = logging.getLogger(name)
        logger.addHandler(caplog.handler)
        try:
            raise ValueError(f"{ACTING} of http://alice:PL4NTED@host/p")
        except ValueError:
            logger.exception("failed: %s in %s", ACTING, "http%3A%2F%2Falice%3APL4NTED%40host")
        finally:
            logger.removeHandler(caplog.handler)
    assert "Traceback" in caplog.text and not hidden_in(caplog.text) and "PL4NTED" not in caplog.text


def test_an_error_of_ours_is_shown_text_wherever_it_is_written():
    for error in (SeraError, InputError, StoreError):
        assert not hidden_in(str(error(ACTING))) and str(error("two\nlines")) == "two\nlines"


def test_the_welcome_of_up_holds_none():
    told = {"ui": "http://127.0.0.1:4200", "home": "/h\x1b[2J", "variables": {"sera_store": "/s\u202e"}}
    for file in ("/h\x1b[2J/auth", None):
        assert not hidden_in(_welcome({**told, "password_file": file}, "a password\x1b[2J"))


@pytest.mark.parametrize(("reason", "margin", "said"), [
    ("not_preferred", -0.5, "Dropped as suspicious"),
    ("not_preferred", 0.0001, "Dropped as not clearly preferred"),  # noise alone can be that large
    ("below_cut", 0.5, "Dropped: "),
])  # fmt: skip
def test_a_dropped_pair_is_called_suspicious_only_where_the_policy_prefers_the_other_answer(
    reason, margin, said
):
    assert title_of({"kind": "dropped", "reason": reason, "ensemble_margin": margin}).startswith(said)


@pytest.mark.slow
def test_the_command_line_introduces_a_pair_as_its_page_does(records):
    lines = "\n".join(closing_lines(records))
    manifest = next(m for m in reversed(records.rounds()) if len(example_pairs(records.store, m)) > 1)
    for example in example_pairs(records.store, manifest):
        assert f"  {title_of(example)} ({example['pair_id']}" in lines
