"""Reschedule flow runs whose processes died with their worker, so that another worker resumes them.

Otherwise the server would notice only after minutes, by a missing heartbeat. Only flow runs of this machine
are rescheduled; their processes are found in /proc (Linux).
"""

import time
import urllib.error
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from flows.orchestration.authentication import request

_RESCHEDULED = {
    "type": "SCHEDULED",
    "name": "AwaitingRetry",
    "message": "The worker died and this flow run with it. Rescheduled; it resumes after the last step.",
}
_NEW_STATES = {
    "PENDING": _RESCHEDULED,
    "RUNNING": _RESCHEDULED,
    "CANCELLING": {"type": "CANCELLED", "name": "Cancelled"},
}
"""New state of a flow run whose process is gone; flow runs in other states are left alone."""


class FlowRunTracker:
    """Tracks the flow runs of a worker's process group, in a file that survives a restart."""

    def __init__(self, file: Path, secret: str) -> None:
        self.file, self.secret = file, secret
        self.active: set[str] = set()
        self.lost: set[str] = set()
        self.scanned = 0.0
        if file.exists():
            self.lost, self.scanned = set(file.read_text().split()), file.stat().st_mtime

    def scan(self, group: int) -> None:
        """Find the flow runs that are active now."""
        self.scanned = time.time()
        self.active = set(_active_flow_runs(group))
        self._write()

    def mark_lost(self) -> None:
        """Mark the active flow runs as lost, after the worker died."""
        self.lost |= self.active
        self.active = set()

    def reschedule_lost(self, api: str) -> None:
        """Reschedule the lost flow runs; those that fail are retried at the next call."""
        for flow_run in sorted(self.lost):
            try:
                self._reschedule(api, f"/flow_runs/{flow_run}")
            except urllib.error.HTTPError as error:
                if error.code != 404:  # 404: the flow run was deleted
                    continue
            except OSError:
                continue
            self.lost.discard(flow_run)
            self._write()

    def _reschedule(self, api: str, path: str) -> None:
        """Reschedule one flow run, unless its state changed since the last scan."""
        state = request(api, path, secret=self.secret)["state"]
        since = datetime.fromisoformat(state["timestamp"]).timestamp()
        if state["type"] in _NEW_STATES and since <= self.scanned:
            request(api, f"{path}/set_state", {"state": _NEW_STATES[state["type"]]}, self.secret)

    def _write(self) -> None:
        self.file.write_text("\n".join(sorted(self.active | self.lost)))


def _active_flow_runs(group: int) -> Iterator[str]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) != group or fields[0] == "Z":
                continue
            for variable in (folder / "environ").read_bytes().split(b"\0"):
                name, _, value = variable.decode(errors="replace").partition("=")
                if name == "PREFECT__FLOW_RUN_ID":
                    yield value
