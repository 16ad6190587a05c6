"""`sera deploy`, `sera up`: what drives runs from Prefect, on a server that is there or one started here."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from flows.commands.output import say
from flows.commands.tables import print_table, print_text
from flows.orchestration.authentication import CLIENT_SECRET, SERVER_SECRET
from flows.orchestration.embedded_server import track_nothing
from sera_core.guards.shown import shown


def add_deploy(commands: Any, _: argparse.ArgumentParser) -> None:
    """`sera deploy [--pool-type process] [--store URL] [--notify URL]`."""
    sub = commands.add_parser(
        "deploy",
        help="make work pool, limit, variable, automations and deployments on the Prefect server",
        description="Makes on the Prefect server of PREFECT_API_URL what driving runs from there takes. "
        "May be repeated: what is there already stays, and what was switched on or off stays so.",
    )
    _add_flags(sub)
    sub.add_argument("--pool-type", default="process", help="type of the work pool (default: process)")
    sub.set_defaults(command=deploy_command)


def add_up(commands: Any, _: argparse.ArgumentParser) -> None:
    """`sera up [--port 4200] [--store URL] [--home DIR] [--notify URL]`."""
    sub = commands.add_parser(
        "up",
        help="start Prefect's server and UI, a worker and the deployments here, until Ctrl-C",
        description="Starts a Prefect server with its UI on the loopback interface, does what `sera deploy` "
        "does, and starts a worker. Whichever of them dies is started again; Ctrl-C ends them all.",
    )
    _add_flags(sub)
    sub.add_argument("--port", type=int, default=4200, help="port of the UI (default: 4200)")
    sub.add_argument(
        "--home",
        type=Path,
        default=Path(os.environ.get("SERA_HOME", "~/.sera")),
        help="folder for Prefect's database (SQLite, unless PREFECT_SERVER_DATABASE_CONNECTION_URL names "
        "another), settings and logs (default: $SERA_HOME, else ~/.sera); your own Prefect profile is not "
        "touched",
    )
    sub.set_defaults(command=up_command)


def _add_flags(sub: argparse.ArgumentParser) -> None:
    # Not the common --store: without it, the store that the server has already stays.
    sub.add_argument(
        "--store",
        default=os.environ.get("SERA_STORE") or None,
        type=lambda given: given or os.environ.get("SERA_STORE") or None,
        help="folder or s3://bucket/prefix that runs triggered from Prefect use "
        "(default: $SERA_STORE, else what the server has, else ./sera-store)",
    )
    sub.add_argument(
        "--notify",
        metavar="URL",
        default=os.environ.get("SERA_NOTIFY_URL") or None,
        help="webhook that gets a JSON text when a run stops or its alarm is raised "
        "(default: $SERA_NOTIFY_URL, else nobody is told)",
    )
    sub.add_argument(
        "--json", action="store_true", help="print one JSON object on stdout and nothing else there"
    )
    sub.add_argument("--debug", action="store_true", help="show tracebacks")


def deploy_command(args: argparse.Namespace) -> int:
    """Make everything; print what is there now."""
    track_nothing()
    from flows.orchestration.deployments import deploy, warnings

    made = deploy(args.pool_type, args.store, args.notify)
    for warning in warnings():
        say(f"sera: warning: {warning}")
    if args.json:
        print(json.dumps(made))
        return 0
    rows = [[kind, name, found] for kind, names in made.items() for name, found in names.items()]
    print_table("on the Prefect server", ["what", "name", "id or value"], rows)
    print_text("Runs start from the UI, from `prefect deployment run sera/sera`, or by schedule.")
    return 0


def up_command(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    from flows.orchestration.supervisor import up

    home = args.home.expanduser().absolute()

    def ready(made: dict[str, Any], password: str, file: Path | None) -> None:
        kept = None if file is None else str(file)
        told = {"ui": f"http://127.0.0.1:{args.port}", "home": str(home), "password_file": kept, **made}
        print(json.dumps(told) if args.json else _welcome(told, password), flush=True)

    up(home, args.port, deploy_arguments(args), ready, lambda line: say(f"sera: {line}"))
    return 0


def _welcome(told: dict[str, Any], password: str) -> str:
    store, file = told["variables"]["sera_store"], told["password_file"]
    where = f"in {file}" if file else f"that of {SERVER_SECRET}"
    if file and sys.stdout.isatty():  # a log keeps no password
        where = f"{password}  ({where})"
    secret = f'"$(cat {shlex.quote(file)})"' if file else f'"${SERVER_SECRET}"'
    return shown(f"""\
Prefect's UI  {told["ui"]}
password      {where}; a browser asks for it once
store         {store}
logs          {told["home"]}/server.log, {told["home"]}/worker.log

Start a run: {told["ui"]}/deployments, then `sera`, then Run. Or on this server from a shell:
  export PREFECT_API_URL={told["ui"]}/api {CLIENT_SECRET}={secret}
  sera run EXPERIMENT.toml --store {store}
Ctrl-C ends it all. `sera up` again goes on with the runs that were under way.""")


def deploy_arguments(args: argparse.Namespace) -> list[str]:
    """The same wishes for `sera deploy`."""
    given = {"--store": args.store, "--notify": args.notify}
    return [word for flag, value in given.items() if value is not None for word in (flag, value)]
