"""Prefect's UI as a person uses it: a real Chromium fills in the form, reads the cards and answers a review.

SERA_PICTURES=1 renews the README's pictures in the folder beside this file; SERA_PICTURES=demo, with pytest's
--timeout 2400, draws them from a run of the demo's model.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest
import servers
import tinyrun

from flows.experiments import load_experiment
from flows.orchestration.form import config_from_form
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store

pytestmark = [pytest.mark.browser, pytest.mark.flow]

ELSEWHERE = "192.0.2.1"  # an address that is nobody's; connecting a datagram socket to it sends nothing
ATTACK = (
    '<script>document.title="pwned"</script><img src="//example.invalid/a.png" onerror="document.title=1">'
    " ![shown](http://example.invalid/b.png) [c](http://example.invalid/c) [do](javascript:document.title=2)"
)
CARD = ".artifact-data-markdown"
"""Where the UI shows an artifact's text."""


@pytest.fixture(scope="module")
def form(place) -> str:
    """Path of the form that starts a run."""
    return f"/deployments/deployment/{deployment(place)}/run"


@pytest.fixture(scope="module")
def finished(meet, place, form, inputs) -> dict[str, str]:
    """A run started with three fields and Submit, everything else as the form has it; its id and name."""
    person = meet()
    person.open(form)
    person.write(inputs["model"], "Model")
    person.write(inputs["pairs"], "Data")
    person.write("3e-5", "Learning Rate")
    flow_run = person.submit()
    person.wait_for_state("Completed")
    assert person.foreign_requests() == []
    person.rest()
    return {"id": flow_run, "name": servers.api(place.environment, f"/flow_runs/{flow_run}")["name"]}


@pytest.fixture
def no_worker(place) -> Iterator[None]:
    """Nothing that is submitted is started."""
    pool = "/work_pools/sera"
    servers.api(place.environment, pool, {"is_paused": True}, method="PATCH")
    yield
    servers.api(place.environment, pool, {"is_paused": False}, method="PATCH")


def runs_of_the_form(place) -> int:
    """How many flow runs of the deployment there are."""
    wanted = {"deployments": {"id": {"any_": [deployment(place)]}}}
    return servers.api(place.environment, "/flow_runs/count", wanted)


def deployment(place) -> str:
    return servers.api(place.environment, "/deployments/name/sera/sera")["id"]


def open_index(person, flow_run: str) -> None:
    """From the flow run's page to the run's index, the newest version of it."""
    person.open(f"/runs/flow-run/{flow_run}")
    person.tab("Artifacts")
    person.page.get_by_role("link", name="-index").first.click()
    person.page.locator("a[href$='-index'][href*='/artifacts/key/']").first.click()
    open_newest(person)


def open_newest(person) -> None:
    """From an artifact's list of versions to the newest one."""
    person.page.wait_for_url("**/artifacts/key/*")
    person.page.locator("a[href*='/artifacts/artifact/']").first.click()
    person.page.locator(f"{CARD} h1").wait_for()


def open_card(person, round: int) -> None:
    """From the index to a round's card, whose link opens a new page."""
    with person.page.context.expect_page() as opened:
        person.page.get_by_role("link", name=f"round {round}", exact=True).click()
    person.page = opened.value
    open_newest(person)


def test_submit_as_the_form_opens_is_the_demo(person, place, form, no_worker):
    person.open(form)
    person.page.get_by_text("config", exact=True).evaluate("label => label.scrollIntoView()")
    person.picture("form")
    flow_run = f"/flow_runs/{person.submit()}"
    parameters = servers.api(place.environment, flow_run)["parameters"]
    servers.api(place.environment, flow_run, method="DELETE")
    assert config_from_form(parameters["config"]) == load_experiment("bundled:demo")
    assert parameters["run"] == "sera-{data}" and not parameters["store"] and not parameters["dry_run"]


def test_three_fields_and_submit_make_a_run_with_a_bar_for_each_round(finished, person, home):
    assert finished["name"].startswith("sera-")
    records = RunStore(open_store(str(home / "store")), finished["name"])
    assert records.configs()[0].settings.train.learning_rate == 3e-5  # typed as that
    person.open(f"/runs/flow-run/{finished['id']}")
    person.wait_for_state("Completed")
    person.tab("Subflow Runs")
    for round in range(3):
        person.page.get_by_role("link", name=f"{finished['name']}-round-{round}").wait_for()
    person.picture("run")


def test_the_index_leads_to_the_cards_whose_plots_are_drawn(finished, person):
    open_index(person, finished["id"])
    assert "stopped (" in person.page.inner_text(CARD)
    person.picture("index")
    open_card(person, 1)
    text = person.page.inner_text(CARD)
    assert "held-out accuracy" in text and "human pairs trained on" in text
    widths = person.page.locator(f"{CARD} img").evaluate_all("all => all.map(image => image.naturalWidth)")
    assert len(widths) >= 3 and min(widths) > 0
    person.page.set_viewport_size({"width": 1200, "height": 1250})
    person.page.get_by_role("heading", name="Metrics").evaluate("heading => heading.scrollIntoView()")
    person.picture("card")


def test_the_report_a_card_names_opens_in_the_browser(finished, person, place, tmp_path):
    open_index(person, finished["id"])
    open_card(person, 2)
    command = person.page.locator("pre", has_text="sera report").inner_text()
    program, *arguments = shlex.split(command)
    assert program == "sera"
    servers.sera(place.environment, *arguments, cwd=tmp_path)
    person.page.goto((tmp_path / "report/index.html").as_uri())
    assert finished["name"] in person.page.inner_text("body")
    person.page.get_by_role("link", name="1", exact=True).first.click()
    person.page.get_by_role("heading", name="Round 1").wait_for()
    assert person.page.locator("svg").count() >= 1


def test_wrong_values_are_marked_at_their_fields_and_nothing_runs(person, place, form):
    before = runs_of_the_form(place)
    person.open(form)
    person.write("", "Model")
    person.write("pairs.jsonl", "Data")
    person.write("0", "Rounds")
    person.write("2-5", "Learning Rate")
    person.write('{"train": {"betta": 1}, "select.fraction": 2}', "Overrides")
    person.write("two words", "name")
    person.page.get_by_role("button", name="Submit").click()
    assert "'model' is a required property" in person.message("Model")
    assert "'pairs.jsonl' does not match" in person.message("Data")
    assert "0 is less than the minimum of 1" in person.message("Rounds")
    assert "'2-5' does not match" in person.message("Learning Rate")
    overrides = person.message("Overrides")
    assert (
        "'betta' is not one of ['losses'" in overrides and "2 is greater than the maximum of 1" in overrides
    )
    assert "'two words' does not match" in person.message("name")
    assert person.page.url.endswith(form)  # what was filled in stays
    assert runs_of_the_form(place) == before


def test_a_name_twice_with_another_setting_fails_and_says_which(finished, person, form, inputs, home):
    person.open(form)
    person.write(inputs["model"], "Model")
    person.write(inputs["pairs"], "Data")
    person.write('{"train.beta": 0.2}', "Overrides")
    person.write("3e-5", "Learning Rate")
    person.write(finished["name"], "name")
    person.submit()
    person.wait_for_state("Failed")
    person.page.get_by_text("exists with another configuration").first.wait_for()
    assert len(RunStore(open_store(str(home / "store")), finished["name"]).configs()) == 1


def test_a_person_answers_the_review_in_its_form_and_the_run_goes_on_from_the_answer(
    person, place, form, inputs, home
):
    person.open(form)
    person.write(inputs["model"], "Model")
    person.write(inputs["pairs"], "Data")
    person.write('{"decide.review": "always"}', "Overrides")
    person.write("asked", "name")
    person.submit()
    person.wait_for_state("Suspended")
    person.page.get_by_role("button", name="Resume").click()
    person.page.get_by_role("dialog").get_by_role("heading", name="asked, round 0").wait_for()
    person.choose("stop", "Decision")
    person.write("the answers are too short", "Note")
    person.picture("review")
    with person.page.expect_response("**/resume"):
        person.page.get_by_role("dialog").get_by_role("button", name="Submit").click()
    person.wait_for_state("Completed")
    records = RunStore(open_store(str(home / "store")), "asked")
    answer = records.answer_of(0)
    assert answer is not None
    assert (answer["decision"], answer["note"]) == ("stop", "the answers are too short")
    assert records.stop_reason() == "reviewer" and len(records.rounds()) == 1


def test_markup_in_pairs_is_shown_as_text_and_does_nothing(person, place, tmp_path):
    rows = tinyrun.pairs(32)
    for row in rows:
        for side in ("prompt", "chosen", "rejected"):
            row[side][0]["content"] += f" {ATTACK}"
    tinyrun.write_rows(tmp_path / "pairs.jsonl", rows)
    form = tinyrun.form(tmp_path, limits={"rounds": 1})
    parameters = {"config": form, "run": "hostile", "store": str(tmp_path / "store")}
    flow_run = servers.trigger(place.environment, "sera/sera", parameters)
    servers.wait_for_state(place.environment, flow_run, seconds=400)
    open_index(person, flow_run)
    open_card(person, 0)
    person.page.wait_for_load_state("networkidle")
    card = person.page.locator(CARD)
    assert '<script>document.title="pwned"</script>' in card.inner_text()
    assert "[do](javascript:document.title=2)" in card.inner_text()
    assert card.locator("script, [onerror], a[href*='example'], a[href^='javascript']").count() == 0
    sources = card.locator("img").evaluate_all("all => all.map(image => image.src)")
    assert all(source.startswith("data:image/svg+xml") for source in sources)
    assert person.page.title() == "Artifact: hostile-round-0 • Prefect Server"
    assert not any("example.invalid" in url for url in person.requests)


def test_the_automations_that_mend_runs_are_on(person):
    person.open("/automations")
    person.page.get_by_text("sera: go on after a crash", exact=True).wait_for()
    switches = person.page.get_by_role("switch")
    assert switches.count() >= 4
    assert all(switch.get_attribute("aria-checked") == "true" for switch in switches.all())
    person.picture("automations")


def test_no_process_of_server_worker_or_run_asked_for_another_machine(finished, place, connections):
    probe = f"import socket; socket.socket(type=socket.SOCK_DGRAM).connect(({ELSEWHERE!r}, 9))"
    environment = {**os.environ, **place.environment}
    subprocess.run([sys.executable, "-c", probe], env=environment, check=True)
    seen = [json.loads(line) for line in connections.read_text().splitlines()]
    watched = {part for line in seen for part in line["process"].split()}
    assert {"server", "worker"} <= watched and any("prefect/engine" in part for part in watched)
    elsewhere = {line["host"] for line in seen} - {"127.0.0.1", "::1", "localhost"}
    assert elsewhere == {ELSEWHERE}  # the probe's, which shows that it would have been seen
