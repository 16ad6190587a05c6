"""`sera watch RUN`: follow a run from another terminal or machine, through the store alone."""

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from flows.commands.output import print_result
from flows.commands.tables import print_text
from flows.display import watched
from flows.display.run_view import run_records
from flows.display.watched import Seen, Watcher
from sera_core.artifacts.store import open_store
from sera_core.errors import SeraError
from sera_core.guards.shown import shown

POLL_SECONDS = 2.0
GONE_SECONDS = 300.0
"""A run that nobody works on for this long will hardly be continued by itself; Prefect restarts within two
minutes."""


def add_watch(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera watch RUN [--once]`."""
    sub = commands.add_parser(
        "watch",
        parents=[common],
        help="follow a run: step, progress, finished rounds, time left",
        description="Follow a run, from the store alone: which step of which round is being done, how far "
        "it is, the rounds so far, and the time left as estimated. Ends when the run stops or waits for a "
        "review (exit code 0), or when nobody has worked on it for five minutes (1). With --json one object "
        "with the present state.",
    )
    sub.add_argument("run")
    sub.add_argument("--once", action="store_true", help="print the present state and end")
    sub.set_defaults(command=watch_command)


def watch_command(args: argparse.Namespace) -> int:
    """Follow the run until it stops; with --json or --once print its state now."""
    watcher = Watcher(run_records(open_store(args.store), args.run))
    if args.json or args.once:
        seen = watcher.look()
        print_result(args, seen.json(), lines(seen, args.store))
        return 0
    try:
        last = _live(watcher, args.store) if sys.stdout.isatty() else _piped(watcher, args.store)
    except KeyboardInterrupt:  # the usual end of a watch: nothing was interrupted
        return 130
    if last.state == "idle":
        raise SeraError(f"run {args.run!r}: nobody has worked on it for {GONE_SECONDS / 60:.0f} minutes")
    return 0


def lines(seen: Seen, store: str) -> Iterator[str]:
    """The state of a run in lines."""
    yield from (watched.round_line(manifest) for manifest in seen.rounds)
    yield from _now(seen, store)


def _now(seen: Seen, store: str) -> Iterator[str]:
    if seen.state == "idle":
        yield watched.idle_line(seen, store)
    elif seen.state == "working":
        yield watched.step_line(seen)
        if (left := watched.time_line(seen)) is not None:
            yield f"  {left}"
        yield f"  by {watched.holder_line(seen)}"
    else:
        yield from watched.end_lines(seen, store)


def _looks(watcher: Watcher) -> Iterator[Seen]:
    """The run, every POLL_SECONDS, until it ends or nobody has worked on it for GONE_SECONDS."""
    worked = time.monotonic()
    while True:
        seen = watcher.look()
        yield seen
        if seen.state != "idle":
            worked = time.monotonic()
        if seen.state in ("stopped", "waiting") or time.monotonic() - worked > GONE_SECONDS:
            return
        time.sleep(POLL_SECONDS)


def _piped(watcher: Watcher, store: str) -> Seen:
    """A line for each change."""
    rounds, last, seen = 0, "", None
    for seen in _looks(watcher):
        for manifest in seen.rounds[rounds:]:
            print_text(watched.round_line(manifest))
        rounds = len(seen.rounds)
        line = _line(seen, store)
        if line != last:
            left = watched.time_line(seen) if seen.state == "working" else None
            print_text(line if left is None else f"{line}; {left}")
            sys.stdout.flush()
        last = line
    assert seen is not None
    return seen


def _line(seen: Seen, store: str) -> str:
    """What happens now, without what changes at each look."""
    return watched.step_line(seen) if seen.state == "working" else "\n".join(_now(seen, store))


def _live(watcher: Watcher, store: str) -> Seen:
    """A view that is refreshed in place."""
    seen = None
    with Live(console=Console(), auto_refresh=False) as live:
        for seen in _looks(watcher):
            live.update(_view(seen, store), refresh=True)
    assert seen is not None
    return seen


def _view(seen: Seen, store: str) -> RenderableType:
    parts: list[RenderableType] = [Text(f"run {seen.run}", style="bold")]
    parts += [Text(shown(line)) for line in lines(seen, store)]
    doing = seen.doing
    if seen.state == "working" and doing is not None and doing.total:
        parts.append(ProgressBar(total=doing.total, completed=doing.done or 0, width=40))
    return Group(*parts)
