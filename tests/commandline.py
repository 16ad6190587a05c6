"""Our command line for tests: the fixture `sera` runs a command in this process, `process` in a new one."""

import json
import subprocess
import sys
from typing import Any, NamedTuple

import pytest

from flows.cli import main

SERA = [sys.executable, "-m", "flows.cli"]


class Said(NamedTuple):
    """What a command wrote."""

    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        return json.loads(self.out)


class Sera:
    """`sera("verify", "demo", code=1).err`: runs a command in this process and checks its exit code."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self.captured = captured

    def __call__(self, *argv: object, code: int = 0) -> Said:
        self.captured.readouterr()
        found = main([str(word) for word in argv])
        said = Said(*self.captured.readouterr())
        assert found == code, f"sera {' '.join(map(str, argv))}: exit {found}\n{said.err}"
        return said


def process(*argv: object, timeout: float = 600, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; `options` are those of `subprocess.run`."""
    words = [*SERA, *map(str, argv)]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, **options)
