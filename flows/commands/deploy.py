"""`sera deploy`, `sera up`: set up Prefect to drive runs, on an existing server or one started here."""

import argparse
import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from flows.commands.output import print_note
from flows.commands.tables import print_table, print_text
from flows.orchestration.authentication import CLIENT_SECRET, SERVER_SECRET
from flows.orchestration.embedded_server import disable_telemetry
from sera_core.guards.shown import shown


def add_deploy(commands: Any, _: argparse.ArgumentParser) -> None:
    """`sera deploy [--pool-type process] [--image NAME] [--store URL] [--notify URL]`."""
    sub = commands.add_parser(
        "deploy",
        help="create the work pool, limit, variable, automations and deployments on the Prefect server",
        description="Create everything the Prefect server at PREFECT_API_URL needs to drive runs. "
        "Safe to repeat: existing objects are kept, and so is what you switched on or off.",
    )
    _add_flags(sub)
    sub.add_argument(
        "--pool-type",
        metavar="TYPE",
        help="what flow runs start in: process, docker, kubernetes, or another type of Prefect's "
        "(default: the existing pool's, else process)",
    )
    sub.add_argument(
        "--image",
        metavar="NAME",
        help="container image of flow runs in a docker or Kubernetes pool, unless a deployment or flow run "
        "sets its job variable `image` (default: the pool's)",
    )
    sub.set_defaults(command=deploy_command)


def add_up(commands: Any, _: argparse.ArgumentParser) -> None:
    """`sera up [--port 4200] [--store URL] [--home DIR] [--notify URL]`."""
    sub = commands.add_parser(
        "up",
        help="start a Prefect server with UI, a worker and the deployments; Ctrl-C stops them",
        description="Start a Prefect server and its UI on the loopback interface, run `sera deploy`, start "
        "a worker. A process that dies is restarted; Ctrl-C stops them all.",
    )
    _add_flags(sub)
    sub.add_argument("--port", type=int, default=4200, help="port of the UI (default: 4200)")
    sub.add_argument(
        "--home",
        type=Path,
        default=Path(os.environ.get("SERA_HOME", "~/.sera")),
        help="folder for Prefect's database (SQLite, unless PREFECT_SERVER_DATABASE_CONNECTION_URL names "
        "another), settings and logs (default: $SERA_HOME, else ~/.sera); your own Prefect profile is not "
        "changed",
    )
    sub.set_defaults(command=up_command)


def _add_flags(sub: argparse.ArgumentParser) -> None:
    # Not the common --store: if it is not given, the server keeps its store.
    sub.add_argument(
        "--store",
        default=os.environ.get("SERA_STORE") or None,
        type=lambda given: given or os.environ.get("SERA_STORE") or None,
        help="folder or s3://bucket/prefix for runs triggered from Prefect "
        "(default: $SERA_STORE, else the server's current one, else ./sera-store)",
    )
    sub.add_argument(
        "--notify",
        metavar="URL",
        default=os.environ.get("SERA_NOTIFY_URL") or None,
        help="webhook that is sent a JSON text when a run stops or raises its alarm "
        "(default: $SERA_NOTIFY_URL, else none)",
    )
    sub.add_argument("--json", action="store_true", help="print one JSON object on stdout and nothing else")
    sub.add_argument("--debug", action="store_true", help="show tracebacks")


def deploy_command(args: argparse.Namespace) -> int:
    """Create what is missing and print the result."""
    disable_telemetry()
    from flows.orchestration.deployments import deploy

    def warn(line: str) -> None:
        print_note(f"sera: warning: {line}")

    made = deploy(warn, args.pool_type, args.store, args.notify, args.image)
    if args.json:
        print(json.dumps(made))
        return 0
    rows = [[kind, name, found] for kind, names in made.items() for name, found in names.items()]
    print_table("on the Prefect server", ["what", "name", "id or value"], rows)
    print_text(_next_steps(args.pool_type))
    return 0


def _next_steps(pool_type: str | None) -> str:
    extra = f"`pip install 'sera-flow[{pool_type}]'`, then " if pool_type in ("docker", "kubernetes") else ""
    return (
        f"A worker has to run: {extra}`prefect worker start --pool sera`.\n"
        "Start runs from the UI, with `prefect deployment run sera/sera`, or on a schedule."
    )


def up_command(args: argparse.Namespace) -> int:
    """Run server and worker until interrupted."""
    from flows.orchestration.supervisor import up

    home = args.home.expanduser().absolute()

    def ready(made: dict[str, Any], password: str, file: Path | None) -> None:
        password_file = None if file is None else str(file)
        ui = f"http://127.0.0.1:{args.port}"
        info = {"ui": ui, "home": str(home), "password_file": password_file, **made}
        print(json.dumps(info) if args.json else _welcome(info, password), flush=True)

    up(home, args.port, deploy_arguments(args), ready, lambda line: print_note(f"sera: {line}"))
    return 0


def _welcome(info: dict[str, Any], password: str) -> str:
    store, file = info["variables"]["sera_store"], info["password_file"]
    where = f"in {file}" if file else f"the one in {SERVER_SECRET}"
    if file and sys.stdout.isatty():  # keep the password out of logs
        where = f"{password}  ({where})"
    secret = f'"$(cat {shlex.quote(file)})"' if file else f'"${SERVER_SECRET}"'
    return shown(f"""\
Prefect's UI  {info["ui"]}
password      {where}; the browser asks for it once
store         {store}
logs          {info["home"]}/server.log, {info["home"]}/worker.log

Start a run: {info["ui"]}/deployments, then `sera`, then Run. Or from a shell, on this server:
  export PREFECT_API_URL={info["ui"]}/api {CLIENT_SECRET}={secret}
  sera run EXPERIMENT.toml --store {store}
Ctrl-C stops everything. Running `sera up` again resumes unfinished runs.""")


def deploy_arguments(args: argparse.Namespace) -> list[str]:
    """The flags to pass to `sera deploy`."""
    given = {"--store": args.store, "--notify": args.notify}
    return [word for flag, value in given.items() if value is not None for word in (flag, value)]
