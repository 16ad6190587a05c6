"""Databases with Prefect's tables, made once and copied: a hundred migrations take ten seconds of a core."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEMPLATES = ROOT / ".pytest_cache" / f"prefect-{version('prefect')}"


def template(name: str, make: Callable[[Path], None]) -> Path:
    """The template of this name, made by the first of all test processes that wants it."""
    TEMPLATES.mkdir(parents=True, exist_ok=True)
    made, unfinished = TEMPLATES / name, TEMPLATES / f"{name}.unfinished"
    with (TEMPLATES / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            make(unfinished)
            unfinished.rename(made)
    return made


def migrate(home: Path, database_url: str | None = None) -> None:
    """Make Prefect's tables, as a server does that starts for the first time."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment = {**kept, "PREFECT_HOME": str(home), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    if database_url is not None:
        environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = database_url
    command = [sys.executable, "-P", "-m", "prefect", "server", "database", "upgrade", "--yes"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def sqlite_home(home: Path) -> Path:
    """A home for a Prefect server, whose SQLite database has its tables."""
    made = template("sqlite", migrate)
    home.mkdir(parents=True, exist_ok=True)
    for file in made.glob("prefect.db*"):
        if not (home / file.name).exists():
            shutil.copyfile(file, home / file.name)
    return home
