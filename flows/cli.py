"""`sera`: the command line.

Exit codes: 0 done or waiting, 1 failed, 2 bad input, 3 in use by another process, 130 interrupted.
"""

import argparse
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from flows.commands import (
    capability_flags,
    chat,
    compare,
    completion,
    deploy,
    doctor,
    export,
    init,
    lab,
    review,
    run,
    show,
    store,
    watch,
)
from flows.orchestration.embedded_server import bypass_loopback_proxy
from flows.start import entry
from sera_core import __version__
from sera_core.artifacts.store import default_store
from sera_core.errors import SeraError
from sera_core.guards.shown import shown
from sera_core.guards.urls import without_secrets_in

ADDERS = (
    init.add_init,
    run.add_run,
    run.add_demo,
    run.add_advance,
    run.add_plan,
    compare.add_compare,
    lab.add_lab,
    show.add_list,
    show.add_show,
    watch.add_watch,
    chat.add_chat,
    review.add_review,
    store.add_diff,
    store.add_gc,
    show.add_verify,
    show.add_report,
    export.add_export,
    export.add_lineage,
    doctor.add_doctor,
    capability_flags.add_data,
    capability_flags.add_score,
    capability_flags.add_select,
    capability_flags.add_sample,
    capability_flags.add_evaluate,
    deploy.add_up,
    deploy.add_deploy,
    completion.add_completion,
)


class Parser(argparse.ArgumentParser):
    """A parser whose error messages are escaped and contain no URL credentials."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        super().error(shown(without_secrets_in(message)))


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--store",
        default=default_store(),
        type=lambda given: given or default_store(),  # an empty --store means the default
        help="folder or s3://bucket/prefix that holds the artifacts "
        "(default: $SERA_STORE, else ./sera-store)",
    )
    common.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout and nothing else"
    )
    common.add_argument("--debug", action="store_true", help="show tracebacks and Prefect's log")
    top = Parser(
        prog="sera",
        description="SeRA (Self-Reviewing and Alignment): preference alignment in self-reviewed rounds.",
    )
    top.add_argument("--version", action="version", version=f"sera-flow {__version__}")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in ADDERS:
        add(commands, common)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    args = parser().parse_args(argv)
    if not args.debug:  # warnings for library developers
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
    bypass_loopback_proxy()
    return guarded(args)


def guarded(args: argparse.Namespace) -> int:
    """Do a command; an error is one message on stderr, and the exit code says its kind."""
    try:
        return args.command(args)
    except SeraError as error:
        return _failed(args, str(error), error.exit_code)
    except KeyboardInterrupt:
        return _failed(args, "interrupted; run the same command again to resume", 130)
    except BrokenPipeError:  # the reader closed the pipe
        return 1
    except Exception as error:  # unexpected: one line, the traceback with --debug
        return _failed(args, f"{type(error).__name__}: {error} (--debug shows the traceback)", 1)


def _failed(args: argparse.Namespace, message: str, code: int) -> int:
    if args.debug:
        print(shown(without_secrets_in(traceback.format_exc())), end="", file=sys.stderr)
    print(f"sera: {shown(without_secrets_in(message))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    entry()
