"""Render chat templates in a separate process with limits on time, memory and output.

One process per Python process; it starts with the first conversation (0.1 s) and ends with its parent. The
limits apply to each conversation: see `Limits`.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MIB = 2**20
_HEADER = 8
_HERE = str(Path(__file__).parents[2])
_KEPT = ("PATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ")
"""Environment variables passed to the process: no credentials."""


class TemplateError(Exception):
    """The template rejected the conversation; the message is the template's."""


class TemplateLimitError(Exception):
    """The template exceeded a limit; the message says which: `needs more than 256 MiB`."""


@dataclass(frozen=True)
class Limits:
    """Limits of a template for one conversation.

    Attributes:
        seconds: CPU time; templates usually need less than 0.01 s.
        memory: bytes beyond the process's own and 16 times the conversation; enforced only on Linux.
        characters: output beyond four times the conversation.
    """

    seconds: float = 5.0
    memory: int = 256 * MIB
    characters: int = MIB


def render(text: str, variables: Mapping[str, Any], limits: Limits) -> str:
    """Render a template.

    Args:
        text: the template.
        variables: the template's variables, JSON values by name.
        limits: limits for this call.

    Raises:
        TemplateError: it cannot be compiled, or raised an error.
        TemplateLimitError: it exceeded a limit.
    """
    return _shared.render(text, json.dumps(variables, ensure_ascii=False, default=str), limits)


class _Process:
    """The process, its pipes, and the templates sent to it so far."""

    def __init__(self) -> None:
        environment = {name: os.environ[name] for name in _KEPT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join([_HERE, os.environ.get("PYTHONPATH", "")]).rstrip(
            os.pathsep
        )
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "sera_core.data.templating",
            ],  # -P: a folder sera_core here is not ours
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env=environment,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        self.numbers: dict[str, int] = {}

    def ask(self, text: str, variables: str, request: dict[str, Any]) -> dict[str, str] | None:
        """Response to a request (variables are JSON text); None if the process ended."""
        known = text in self.numbers
        number = self.numbers.setdefault(text, len(self.numbers))
        head = json.dumps({**request, "template": number, **({} if known else {"text": text})})
        data = f'{head[:-1]}, "variables": {variables}}}'.encode("utf-8", "surrogatepass")
        try:
            self._write(len(data).to_bytes(_HEADER) + data)
        except BrokenPipeError:
            return None
        return self._answer()

    def end(self) -> int:
        """End the process; returns its exit status."""
        self.close()
        try:
            return self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def close(self) -> None:
        """Close this side of the pipes."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self.stdin, left) :]

    def _answer(self) -> dict[str, str] | None:
        found = bytearray()
        while len(found) < _HEADER or len(found) < _HEADER + int.from_bytes(found[:_HEADER]):
            if not (piece := os.read(self.stdout, MIB)):
                return None
            found += piece
        return json.loads(found[_HEADER:].decode("utf-8", "surrogatepass"))


class _Shared:
    """The shared rendering process, started on first use."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.held: _Process | None = None

    def render(self, text: str, variables: str, limits: Limits) -> str:
        request = {
            "seconds": limits.seconds,
            "memory": limits.memory + MIB * (16 * len(variables) // MIB),
            "characters": limits.characters + 4 * len(variables),
        }
        with self.lock:
            answer, status = self._asked(text, variables, request)
        if "text" in answer:
            return answer["text"]
        if "error" in answer:
            raise TemplateError(answer["error"])
        if answer.get("over") == "characters":
            raise TemplateLimitError(f"writes more than {request['characters']:,} characters")
        if answer.get("over") == "memory":
            raise TemplateLimitError(f"needs more than {request['memory'] // MIB:,} MiB of memory")
        if status == -signal.SIGPROF:
            raise TemplateLimitError(f"takes more than {limits.seconds:g} s")
        raise TemplateLimitError(f"ends the process that renders it (status {status})")

    def _asked(self, text: str, variables: str, request: dict[str, Any]) -> tuple[dict[str, str], int]:
        """(response, 0), or ({}, exit status) if the process ended."""
        if self.held is not None and self.held.process.poll() is not None:
            self._end()  # it was killed while idle
        process = self.held = self.held or _Process()
        try:
            answer = process.ask(text, variables, request)
        except BaseException:  # interrupted: the next response would belong to this request
            process.process.kill()
            self._end()
            raise
        if answer is None:
            return {}, self._end()
        if "over" in answer:
            self._end()  # its memory would count for the next request
        return answer, 0

    def _end(self) -> int:
        held, self.held = self.held, None
        return 0 if held is None else held.end()

    def end(self) -> None:
        """End the process."""
        with self.lock:
            self._end()

    def forget(self) -> None:
        """After a fork: leave the process to the parent."""
        self.lock = threading.Lock()
        if self.held is not None:
            self.held.close()
            self.held.process.returncode = 0  # not our child: nothing to wait for
            self.held = None


_shared = _Shared()
atexit.register(_shared.end)
os.register_at_fork(after_in_child=_shared.forget)
