"""Several runs at the same time, each in a process of its own: what `--jobs` of `sera compare` does.

    python -P -m flows.side_by_side STORE PARENT_PID DEBUG

does one run: its name and configuration are JSON on stdin.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import IO

from flows.commands.output import print_note
from flows.commands.run import finishing
from flows.compare import FinishAll
from flows.start import exit_at_once
from sera_core.config import SeraConfig
from sera_core.errors import BusyError, InputError, SeraError
from sera_core.guards.orphans import exit_with_parent
from sera_core.models.devices import device_of

ERRORS = {error.exit_code: error for error in (InputError, BusyError)}
LEAVE_SECONDS = 30
"""Time for an interrupted run to leave its step."""


@contextmanager
def side_by_side(args: argparse.Namespace, jobs: int) -> Iterator[FinishAll]:
    """A function that does runs, up to `jobs` at a time; one server serves them all.

    A run that fails ends the others. Each uses its share of the cores (OMP_NUM_THREADS, unless that is set),
    and where there are several GPUs the runs take them in turn.

    Args:
        args: `store` and `debug`, of the command line.
        jobs: number of processes, at least 2.
    """
    with ExitStack() as stack:
        served: list[str] = []

        def finish_all(runs: Sequence[tuple[SeraConfig, str]]) -> None:
            if not served:
                from flows.orchestration.embedded_server import prefect_api

                served.append(stack.enter_context(prefect_api(args.debug)))
            with _Processes(args, jobs) as processes:
                for config, run in runs:
                    processes.start(config, run)
                processes.wait_for_all()

        yield finish_all


@dataclass(frozen=True)
class _Process:
    run: str
    slot: int
    started: subprocess.Popen[bytes]
    relay: threading.Thread
    last: deque[str]
    """The last line of its output."""


class _Processes:
    """The running processes; none outlives the block."""

    def __init__(self, args: argparse.Namespace, jobs: int) -> None:
        self.args, self.jobs = args, jobs
        self.running: list[_Process] = []

    def __enter__(self) -> "_Processes":
        self._before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.running:
            process.started.terminate()  # SIGINT is ignored where a shell started us in the background
        for process in self.running:
            try:
                process.started.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                process.started.kill()
                process.started.wait()
            process.relay.join()
        signal.signal(signal.SIGTERM, self._before)

    def start(self, config: SeraConfig, run: str) -> None:
        """Start a run, as soon as fewer than `jobs` are running."""
        while len(self.running) >= self.jobs:
            self._wait_for_one()
        slot = min(set(range(self.jobs)) - {process.slot for process in self.running})
        command = [sys.executable, "-P", "-m", "flows.side_by_side"]
        started = subprocess.Popen(
            [*command, self.args.store, str(os.getpid()), str(int(self.args.debug))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C goes to this process, which passes it on
            env={**os.environ, **environment(config, slot, self.jobs)},
        )
        assert started.stdin is not None and started.stdout is not None
        with suppress(BrokenPipeError), started.stdin as stdin:  # if it died at once, its exit code says so
            stdin.write(json.dumps({"run": run, "config": config.model_dump(mode="json")}).encode())
        last: deque[str] = deque(maxlen=1)
        relay = threading.Thread(target=_relay, args=(started.stdout, run, last))
        relay.start()
        self.running.append(_Process(run, slot, started, relay, last))

    def wait_for_all(self) -> None:
        """Wait until every run is done.

        Raises:
            SeraError: one failed; of the class that its exit code says.
        """
        while self.running:
            self._wait_for_one()

    def _wait_for_one(self) -> None:
        while True:
            for process in self.running:
                try:
                    code = process.started.wait(0.2)
                except subprocess.TimeoutExpired:
                    continue
                self.running.remove(process)
                process.relay.join()
                if code:
                    said = "".join(process.last).removeprefix("sera: ") or f"exit code {code}"
                    raise ERRORS.get(code, SeraError)(f"run {process.run!r}: {said}")
                return


def environment(config: SeraConfig, slot: int, jobs: int) -> dict[str, str]:
    """Environment variables of the run in one of the slots."""
    import torch

    device = device_of(config.execution.device)
    if device == "cpu":
        if "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // jobs))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    devices = visible.split(",")
    if device != "cuda" or len(devices) < 2:
        return {}
    return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}


def _relay(output: IO[bytes], run: str, last: deque[str]) -> None:
    """Pass lines on to stderr with the run's name before each."""
    with output:
        for line in output:
            if text := line.decode(errors="replace").strip():
                last.append(text)
                print_note(f"{run}: {text}")


def main() -> int:
    """Do one run; returns the exit code of `sera run`."""
    store, parent, debug = sys.argv[1:]
    exit_with_parent(int(parent))
    given = json.load(sys.stdin)

    def finish(args: argparse.Namespace) -> int:
        with finishing(args) as finish:
            finish(SeraConfig.stored(given["config"]), given["run"])
        return 0

    from flows.cli import guarded

    return guarded(argparse.Namespace(store=store, debug=debug == "1", json=True, command=finish))


if __name__ == "__main__":
    exit_at_once(main())
