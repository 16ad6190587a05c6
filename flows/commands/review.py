"""`sera review`: show or answer an open review."""

import argparse
import getpass
import json
from typing import Any

from flows.commands.tables import print_text
from flows.display.run_view import run_records
from sera_core.artifacts.store import open_store
from sera_core.errors import InputError


def add_review(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera review RUN [--decision D --note …]`."""
    sub = commands.add_parser("review", parents=[common], help="show or answer an open review")
    sub.add_argument("run")
    sub.add_argument("--decision", choices=["promote", "hold", "roll_back", "stop"], help="your answer")
    sub.add_argument("--note", default="", help="reason, recorded with the answer")
    sub.set_defaults(command=review_command)


def review_command(args: argparse.Namespace) -> int:
    """Show the open review; with --decision, record the answer (only the first answer counts)."""
    records = run_records(open_store(args.store), args.run)
    waiting = records.waiting()
    if waiting is None:
        if args.decision:
            raise InputError(f"run {args.run!r}: no review is open; see `sera show {args.run}` for its state")
        _print(args, {"run": args.run, "waiting": None}, f"run {args.run}: no review is open.")
        return 0
    question = records.question(waiting["round"]) or {}
    if args.decision is None:
        lines = [f"round {waiting['round']} is waiting for a decision until {waiting['until']}"]
        lines += [f"  {name}: {value}" for name, value in question["evidence"].items()]
        offered = "|".join(records.decisions())
        lines.append(f"answer with: sera review {args.run} --decision {offered} --note …")
        _print(args, {"run": args.run, "waiting": waiting, "question": question}, "\n".join(lines))
        return 0
    answer = records.answer(waiting["round"], args.decision, args.note, getpass.getuser())
    text = f"round {waiting['round']} of {args.run}: {answer['decision']}; the next `sera run` applies it."
    _print(args, {"run": args.run, "round": waiting["round"], "answer": answer}, text)
    return 0


def _print(args: argparse.Namespace, found: dict[str, Any], text: str) -> None:
    if args.json:
        print(json.dumps(found))
    else:
        print_text(text)
