"""Progress of long steps on stderr: a bar on a terminal, else a line every 30 s.

A deployed flow shows it in Prefect: lines in the run's log and a progress artifact.
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import copy_context
from typing import cast
from uuid import UUID

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from flows.display.deployed import in_deployed_run
from flows.display.logs import run_log
from sera_core.artifacts.step import Progress as Report

LINE_SECONDS = 30.0
ARTIFACT_SECONDS = 2.0
"""Minimum time before the first artifact and between updates."""
LOOK_SECONDS = 0.2
LAST_SECONDS = 5.0
"""Maximum time that a finished step waits for the server."""


@contextmanager
def reporter(title: str) -> Iterator[Report]:
    """Show the progress of one step under its title."""
    if in_deployed_run():
        with _artifact(title) as report:
            yield report
    elif sys.stderr.isatty():
        with _bar(title) as report:
            yield report
    else:
        yield _lines(title)


@contextmanager
def _bar(title: str) -> Iterator[Report]:
    columns = [
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None, unit="")

        def report(done: int, total: int, unit: str) -> None:
            progress.update(task, completed=done, total=total, unit=unit)

        yield report


def _lines(title: str) -> Report:
    last, write = time.monotonic(), run_log()

    def report(done: int, total: int, unit: str) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            write(f"{title}: {done} of {total} {unit}")

    return report


@contextmanager
def _artifact(title: str) -> Iterator[Report]:
    """Log lines and a progress artifact of the current task run; set to 100 % on success."""
    shown, line = ProgressArtifact(title), _lines(title)

    def report(done: int, total: int, unit: str) -> None:
        line(done, total, unit)
        shown.state = (done, total, unit)

    shown.start()
    finished = False
    try:
        yield report
        finished = True
    finally:
        shown.end(finished)


class ProgressArtifact:
    """A progress artifact updated in a thread, so that the work does not wait for the server."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.state: tuple[int, int, str] | None = None
        """Latest done, total and unit."""
        self._sent: tuple[int, int, str] | None = None
        self._id: UUID | None = None
        self._key = _key(title)
        self._log = run_log()
        self._finished = self._failed = False
        self._stop = threading.Event()
        # The context holds the current run and Prefect's open connection.
        self._thread = threading.Thread(target=copy_context().run, args=(self._publish,), daemon=True)

    def start(self) -> None:
        """Start the thread; it publishes after ARTIFACT_SECONDS."""
        self._thread.start()

    def end(self, finished: bool) -> None:
        """Stop the thread; `finished` sets the artifact to 100 %."""
        self._finished = finished
        self._stop.set()
        self._thread.join(LAST_SECONDS)

    def _publish(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(LOOK_SECONDS):
            if self.state != self._sent and time.monotonic() - last >= ARTIFACT_SECONDS:
                self._send()
                last = time.monotonic()
        if self._id is not None:
            self._send()

    def _send(self) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        assert self.state is not None
        state = done, total, unit = self.state
        percent = 100.0 if self._finished else min(100.0, 100.0 * done / max(1, total))
        text = f"{self.title}: {done:,} of {total:,} {unit}" if total else f"{self.title}: no {unit}"
        try:
            if self._id is None:
                made = create_progress_artifact(percent, key=self._key, description=text)
                self._id = cast(UUID, made)  # not a coroutine outside an event loop
            else:
                update_progress_artifact(self._id, percent, description=text)
            self._sent = state
        except Exception as error:  # a server error must not stop the work
            if not self._failed:
                self._log(f"{self.title}: cannot show progress ({error})")
            self._failed = True


def _key(title: str) -> str:
    """Key of the artifact: round, step and task run, since a round scores several times."""
    from prefect.runtime import flow_run, task_run

    from flows.display.cards import key_of

    return key_of(str(flow_run.name), f"{title}-{str(task_run.id or flow_run.id)[-8:]}")
