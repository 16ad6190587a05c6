"""Run the step of a request in a process of its own.

    python -P -m tasks.engines.child_step CHANNEL_FD PARENT_PID

A request is JSON: work (step function as `module:function`), store, spec, execution, threads, talkative
(whether libraries log in detail). Progress, completion and errors go to the channel, a socket, as JSON lines;
the result is in the store. After a finished step the process reads the next request from the channel, and
leaves at its end.

With `rank` in the request the process is one of several that do the step together: work is a function
(request, channel) -> result, told at its end, and only the owner of the step's attempt commits
(`tasks.engines.processes`).
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import IO, Any

from sera_core.artifacts.manifest import StepSpec
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.errors import SeraError
from sera_core.guards.orphans import exit_with_parent, guarded_group
from tasks.engines.library_logs import VERBOSE_LIBRARIES, forward_library_logs


@dataclass(frozen=True)
class Channel:
    """How a process speaks with the one that started it."""

    tell: Callable[..., None]
    """tell(name=value): send a message."""
    answers: IO[bytes]

    def ask(self, **question: Any) -> Any:
        """Send a message and wait for its answer."""
        self.tell(**question)
        return json.loads(self.answers.readline())


def main() -> None:
    """Run the step of the request on stdin."""
    run_request(json.load(sys.stdin), int(sys.argv[1]), int(sys.argv[2]))


def run_request(request: dict[str, Any], channel: int, parent: int) -> None:
    """Run the step in this process, which leads a process group that ends with it and with its parent.

    Args:
        request: see above.
        channel: file descriptor of the socket for messages and further requests.
        parent: ID of the parent process.
    """
    os.set_inheritable(channel, False)
    with guarded_group(), socket.socket(fileno=channel) as messages, messages.makefile("rb") as requests:
        exit_with_parent(parent)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # clean up, then exit
        while _serve(request, messages, requests) and (line := requests.readline()):
            request = json.loads(line)


def _serve(request: dict[str, Any], messages: socket.socket, requests: Any) -> bool:
    """Run the step, and report completion or the error to the parent; returns whether it was completed."""

    def tell(**message: Any) -> None:
        with speaking:
            messages.sendall(json.dumps(message).encode() + b"\n")

    spec, speaking = StepSpec.model_validate(request["spec"]), threading.Lock()
    try:
        _use_threads(request["threads"])
        module, name = request["work"].split(":")
        output = logging.StreamHandler()
        output.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        with (
            forward_library_logs(output, VERBOSE_LIBRARIES)
            if request["talkative"]
            else contextlib.nullcontext()
        ):
            work, result = getattr(import_module(module), name), True
            if "rank" in request:
                result = work(request, Channel(tell, requests))
            else:
                run_step(
                    open_store(request["store"], remember=True),
                    spec,
                    work,
                    ExecutionConfig.model_validate(request["execution"]),
                    lambda *report: tell(progress=report),
                )
        sys.stdout.flush()
        sys.stderr.flush()
        tell(done=result)
        return True
    except SeraError as error:
        tell(error=[type(error).__module__, type(error).__qualname__, str(error)])
    except Exception as error:
        traceback.print_exc()
        message = f"step {spec.step}: {type(error).__name__}: {error} (see its log for the traceback)"
        tell(error=[SeraError.__module__, SeraError.__qualname__, message])
    return False


def _use_threads(count: int | None) -> None:
    if count is None:
        return
    import torch

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


if __name__ == "__main__":
    main()
