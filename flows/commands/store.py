"""`sera diff`, `sera gc`: compare rounds, and delete unreferenced steps."""

import argparse
import re
from collections.abc import Iterator
from typing import Any

from flows.commands.output import print_result
from flows.commands.tables import leaves_room, metric_cell, print_compared_table, print_text
from flows.store_tools.diff import side_of
from flows.store_tools.garbage import collect, collected_lines, parse_age
from sera_core.artifacts.differing import difference
from sera_core.artifacts.store import open_store

DIGEST = re.compile("[0-9a-f]{64}")


def add_diff(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera diff RUN[:N] RUN[:N]`."""
    sub = commands.add_parser("diff", parents=[common], help="compare two rounds: settings, steps, metrics")
    for side in ("left", "right"):
        sub.add_argument(side, metavar="RUN[:N]", help="round N of a run (default: its last finished round)")
    sub.set_defaults(command=diff_command)


def diff_command(args: argparse.Namespace) -> int:
    """Show the differences; the exit code is 0 in any case."""
    store = open_store(args.store)
    left, right = side_of(store, args.left), side_of(store, args.right)
    found = difference(left, right)
    if args.json:
        print_result(args, found, [])
        return 0
    for line in _heading(found):
        print_text(line)
    names = [_name(found["left"]), _name(found["right"])]
    _table("settings", ["key", *names, "changes results"], found["config"], "key", "changes_result")
    _table("steps", ["role", *names, "why"], found["steps"], "role", "why")
    _metrics(names, found["metrics"])
    return 0


def add_gc(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera gc [--delete] [--older-than 7d]`."""
    sub = commands.add_parser(
        "gc", parents=[common], help="list unreferenced files in the store; --delete deletes them"
    )
    sub.add_argument("--delete", action="store_true", help="delete them; without this nothing changes")
    sub.add_argument(
        "--older-than",
        default="7d",
        metavar="AGE",
        help="keep anything younger, by the store's clock: 90s, 30m, 12h, 7d, 2w (default: 7d)",
    )
    sub.set_defaults(command=gc_command)


def gc_command(args: argparse.Namespace) -> int:
    """List unreferenced files, or delete them."""
    found = collect(open_store(args.store), args.delete, parse_age(args.older_than))
    print_result(args, found, collected_lines(found))
    return 0


def _heading(found: dict[str, Any]) -> Iterator[str]:
    yield f"{_name(found['left'])} vs {_name(found['right'])}"
    if found["same_artifacts"]:
        yield "All steps have the same content."
    if not found["config"]:
        yield "The settings are the same."


def _name(side: dict[str, Any]) -> str:
    return side["run"] if side["round"] is None else f"{side['run']}:{side['round']}"


def _table(title: str, columns: list[str], rows: list[dict[str, Any]], *names: str) -> None:
    if rows:
        first, *more = names
        cells = [
            [row[first], _cell(row["left"]), _cell(row["right"]), *(row[n] for n in more)] for row in rows
        ]
        print_compared_table(title, columns, cells)


def _metrics(names: list[str], rows: list[dict[str, Any]]) -> None:
    """Both values of each metric; where there is room, also by how much they differ."""
    columns = ["metric", *names]
    cells = [[row["metric"], _cell(row["left"]), _cell(row["right"])] for row in rows]
    changes = [_change(row["left"], row["right"]) for row in rows]
    if rows and leaves_room(columns, cells, max(map(len, ["change", *changes]))):
        columns = [*columns, "change"]
        cells = [[*row, change] for row, change in zip(cells, changes, strict=True)]
    if rows:
        print_compared_table("metrics", columns, cells)


def _cell(value: Any) -> Any:
    """A step as shortened key and digest, a metric with its interval, a digest shortened."""
    if isinstance(value, dict) and "digest" in value:
        return f"key {value['key'][:12]}… digest {value['digest'][:12]}…"
    if isinstance(value, str) and DIGEST.fullmatch(value):
        return f"{value[:12]}…"
    return metric_cell(value)


def _change(left: Any, right: Any) -> str:
    """The right number less the left one; of rates their values."""
    left, right = (side.get("value") if isinstance(side, dict) else side for side in (left, right))
    if not all(isinstance(side, int | float) and not isinstance(side, bool) for side in (left, right)):
        return "–"
    change = right - left
    return (f"{change:+,}" if isinstance(change, int) else f"{change:+.3f}").replace("-", "−")
