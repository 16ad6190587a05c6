"""Credentials in a source's URL are refused at every door, and stand in no store, log or database."""

import json
import time
import urllib.error
from pathlib import Path

import pytest
import servers
import tinyrun
from hidden import ACTING, hidden_in

from flows.cli import main
from flows.orchestration.form import config_from_form
from sera_core.config import SeraConfig
from sera_core.errors import InputError

SECRET = "PL4NTED"
URLS = [
    f"http://alice:{SECRET}@127.0.0.1:9/pairs.jsonl",
    f"https://127.0.0.1:9/p.jsonl?X-Amz-Signature={SECRET}",
]
ENCODED = [
    f"http%3A%2F%2Falice%3A{SECRET}%40127.0.0.1%3A9%2Fpairs.jsonl",
    f"http://alice%3A{SECRET}@127.0.0.1:9/pairs.jsonl",
    f"s3://KEY:{SECRET}%40bucket/pairs.jsonl",
    f"https://127.0.0.1:9/p.jsonl?X-Amz-%53ignature={SECRET}",
    f"https://127.0.0.1:9/p.jsonl%253Fsig%253D{SECRET}",
]
SETTINGS = ["data.train", "data.heldout", "data.test", "data.prompts", "model.source", "model"]


RUN = "tiny"


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
    """The store of a run whose records hold credentials."""
    folder = tmp_path_factory.mktemp("old")
    tinyrun.work(tinyrun.config(folder, limits={"rounds": 1}), folder / "store", RUN)
    for record in (folder / "store" / "runs" / RUN).glob("run-*.json"):
        record.chmod(0o644)
        record.write_text(record.read_text().replace(str(folder / "pairs.jsonl"), URLS[0]))
    assert holding(folder / "store")
    return folder / "store"


def holding(folder: Path) -> list[str]:
    """Files below a folder in which the secret stands."""
    return [str(p) for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("command", ["run", "plan"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_with_credentials_is_refused_before_anything_is_written(
    tmp_path, sera, setting, command, url
):
    experiment = tinyrun.experiment(tmp_path)
    store = tmp_path / "store"
    said = sera(command, experiment, "--store", store, "--set", f"{setting}={url}", code=2)
    assert "must not contain credentials" in said.err and SECRET not in said.out + said.err
    assert holding(tmp_path) == [] and not store.exists()


@pytest.mark.parametrize("url", URLS)
def test_an_experiment_file_with_credentials_is_refused_by_the_field(tmp_path, sera, url):
    experiment = tinyrun.experiment(tmp_path, data={"heldout": [{"path": url}]})
    said = sera("run", experiment, "--store", tmp_path / "store", "--debug", code=2)
    assert "data.heldout.0.path" in said.err and SECRET not in said.out + said.err


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "--pairs", "{url}", "--policy", "{policy}", "--reference", "{policy}", "--out", "{out}"],
        ["score", "--pairs", "{pairs}", "--policy", "{url}", "--reference", "{policy}", "--out", "{out}"],
        ["score", "--pairs", "{pairs}", "--policy", "{policy}", "--reference", "{url}", "--out", "{out}"],
        ["sample", "--n", "2", "--prompts", "{url}", "--policy", "{policy}", "--out", "{out}"],
        ["sample", "--n", "2", "--prompts", "{pairs}", "--policy", "{url}", "--out", "{out}"],
        ["run", "{url}"],
        ["run", "{pairs}", "--set", "{url}"],
    ],
)
def test_a_flag_with_credentials_is_refused(tmp_path, sera, arguments, url):
    tinyrun.settings(tmp_path)
    places = {name: tmp_path / name for name in ("policy", "out")} | {"pairs": tmp_path / "pairs.jsonl"}
    said = sera(*(text.format(url=url, **places) for text in arguments), code=2)
    assert "://127.0.0.1:9/p" in said.err or "TOML" in said.err
    assert SECRET not in said.out + said.err and holding(tmp_path) == []


def test_a_flag_that_does_not_exist_is_told_without_credentials(capfd):
    with pytest.raises(SystemExit):
        main(["list", URLS[0]])
    assert SECRET not in capfd.readouterr().err


@pytest.mark.parametrize("url", URLS + ENCODED)
def test_the_form_refuses_credentials_in_fields_and_overrides(url):
    three = {"model": "/m", "data": "/p.jsonl", "rounds": 3}
    planted = [{"model": url}, {"data": url}, {"overrides": {"data": {"test": [{"path": url}]}}}]
    for more in (*planted, {"overrides": {"data.heldout": url}}):
        with pytest.raises(InputError, match="must not contain credentials") as refused:
            config_from_form({**three, **more})
        assert SECRET not in str(refused.value)


def test_a_record_of_an_older_version_is_read_without_its_credentials(tmp_path):
    held = json.loads(tinyrun.config(tmp_path).model_dump_json())
    held["data"]["train"][0]["path"] = URLS[0]
    assert SeraConfig.stored(held).data.train[0].path == "http://127.0.0.1:9/pairs.jsonl"


@pytest.mark.parametrize("command", ["show", "list", "lineage", "report", "diff"])
def test_a_run_of_an_older_version_is_shown_without_its_credentials(old_run, tmp_path, sera, command):
    arguments = {
        "list": [],
        "report": [RUN, "--out", str(tmp_path / "report")],
        "diff": [f"{RUN}:0", f"{RUN}:0"],
    }
    given = (command, *arguments.get(command, [RUN]), "--store", old_run)
    assert SECRET not in "".join([*sera(*given), *sera(*given, "--json")]) and holding(tmp_path) == []


@pytest.mark.flow
@pytest.mark.parametrize("url", URLS + ENCODED)
def test_prefects_server_refuses_credentials_before_it_stores_them(place, tmp_path, url):
    form = tinyrun.form(tmp_path)
    planted = [
        {**form, "data": url},
        {**form, "model": url},
        {**form, "overrides": {"data": {"heldout": url}}},
        {**form, "overrides": {"data.heldout": url}},
        {**form, "overrides": {"data": {"test": [{"path": url}]}}},
    ]
    for config in planted:
        with pytest.raises(urllib.error.HTTPError, match="409"):
            servers.trigger(place.environment, "sera/sera", {"config": config, "run": "planted"})
    assert holding(Path(place.environment["PREFECT_HOME"])) == []  # the server's and the worker's log too
    assert SECRET not in servers.dumped(place.environment)


@pytest.mark.flow
def test_a_run_that_fails_leaves_no_character_that_acts_with_prefect(place, tmp_path):
    config = {**tinyrun.form(tmp_path), "data": f"/none/{ACTING}/pairs.jsonl"}
    run = servers.trigger(place.environment, "sera/sera", {"config": config, "run": "failing"})
    ended = servers.wait_for_state(place.environment, run, ("FAILED", "CRASHED"))
    asked, deadline = {"logs": {"flow_run_id": {"any_": [run]}}}, time.monotonic() + 60
    lines: list[str] = []
    while not any("Traceback" in line for line in lines):  # logs are sent now and then, after the state too
        assert time.monotonic() < deadline, lines
        lines = [line["message"] for line in servers.api(place.environment, "/logs/filter", asked)]
        time.sleep(0.5)
    assert "/none/" in ended["state"]["message"]
    assert not hidden_in("\n".join([ended["state"]["message"], *lines]).replace("\r\n", "\n"))
