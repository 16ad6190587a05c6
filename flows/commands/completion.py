"""`sera completion SHELL`: print a completion script for bash, zsh or fish.

The script is made from the parser and is static: importing `sera` at each Tab would take seconds. It
completes commands, flags, choices, files, and the runs in a local store ($SERA_STORE or ./sera-store).
"""

import argparse
import sys
from typing import Any

from flows.commands.output import print_result

SHELLS = ("bash", "zsh", "fish")
INSTALL = """where to put it:
  bash  source <(sera completion bash)         (in ~/.bashrc: for every shell)
  zsh   sera completion zsh > "${fpath[1]}/_sera"
  fish  sera completion fish > ~/.config/fish/completions/sera.fish"""
TOML = ("experiment",)
RUNS = ("run", "left", "right")
FOLDERS = ("store", "to", "policy", "reference", "home")
FILES = ("file", "data", "out", "pairs", "scored", "prompts", "calibrate", "template", "chat_template")
_NAMES = "2>/dev/null | grep -xE '[A-Za-z0-9][A-Za-z0-9._-]*'"
"""Only what may be a run's name: bash would expand anything else that a folder is called."""


def add_completion(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera completion bash|zsh|fish`."""
    sub = commands.add_parser(
        "completion",
        parents=[common],
        help="print a completion script for bash, zsh or fish",
        description="Print a completion script: commands, flags, files, and runs of a local store.",
        epilog=INSTALL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("shell", choices=SHELLS)
    sub.set_defaults(command=completion_command)


def completion_command(args: argparse.Namespace) -> int:
    """Print the script."""
    script = completion_script(args.shell)
    if args.json:
        print_result(args, {"shell": args.shell, "script": script}, [])
    else:
        sys.stdout.write(script + "\n")
    return 0


def completion_script(shell: str) -> str:
    """The script for a shell."""
    import shtab

    from flows.cli import parser

    top = parser()
    commands = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    helps = {listed.dest: listed.help for listed in commands._choices_actions}
    for name, sub in commands.choices.items():
        sub.description = helps[name]  # zsh and fish show it beside the command
        for action in sub._actions:
            if (complete := _complete(name, action.dest)) is not None:
                action.complete = complete  # pyright: ignore[reportAttributeAccessIssue]
    return shtab.complete(top, shell)


def _complete(command: str, argument: str) -> dict[str, Any] | None:
    """How a shell completes an argument, as shtab takes it; None: not at all."""
    import shtab

    if argument in TOML:
        return shtab.glob("*.toml")
    if argument in RUNS:
        return _runs()
    if argument in FOLDERS or (command, argument) == ("report", "out"):
        return shtab.DIRECTORY
    return shtab.FILE if argument in FILES else None


def _runs() -> dict[str, Any]:
    """The names of the folders in `runs/` of the local store."""
    import shtab

    store = "set -l store ./sera-store; set -q SERA_STORE; and set store $SERA_STORE"
    fish = f"{store}; ls $store/runs {_NAMES}"
    return {**shtab.cmd(f'ls "${{SERA_STORE:-./sera-store}}/runs" {_NAMES}'), "fish": f"({fish})"}
