"""Progress of long work: a bar on a terminal, a line now and then elsewhere; always on stderr."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from sera_core.artifacts.step import Progress as Report

LINE_SECONDS = 30.0


@contextmanager
def reporter(title: str) -> Iterator[Report]:
    """Show the progress of one step under its title."""
    if sys.stderr.isatty():
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
    last = time.monotonic()

    def report(done: int, total: int, unit: str) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_SECONDS:
            last = time.monotonic()
            sys.stderr.write(f"{title}: {done} of {total} {unit}\n")
            sys.stderr.flush()

    return report
