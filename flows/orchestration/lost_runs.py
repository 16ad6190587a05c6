"""Flow runs whose processes ended with their worker: given back to the server, so that another takes them.

Without that the server would miss their heartbeat after minutes. Only flow runs of this machine are given
back, known by the processes that were seen at work on them (Linux).
"""

import time
import urllib.error
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from flows.orchestration.authentication import ask

_AGAIN = {
    "type": "SCHEDULED",
    "name": "AwaitingRetry",
    "message": "The worker ended, and this flow with it. Scheduled again, it goes on after the last step.",
}
_BECOMES = {"PENDING": _AGAIN, "RUNNING": _AGAIN, "CANCELLING": {"type": "CANCELLED", "name": "Cancelled"}}
"""What a flow run becomes when its process is gone; in any other state it is left alone."""


class Seen:
    """The flow runs a worker's process group works on, kept in a file that outlives us."""

    def __init__(self, file: Path, secret: str) -> None:
        self.file, self.secret = file, secret
        self.at_work: set[str] = set()
        self.lost: set[str] = set()
        self.looked = 0.0
        if file.exists():
            self.lost, self.looked = set(file.read_text().split()), file.stat().st_mtime

    def look(self, group: int) -> None:
        """See who is at work now."""
        self.looked = time.time()
        self.at_work = set(_at_work(group))
        self._write()

    def lose(self) -> None:
        """The worker has ended, and who was at work with it."""
        self.lost |= self.at_work
        self.at_work = set()

    def give_back(self, api: str) -> None:
        """Give the lost ones back to the server; what cannot be told now stays for the next time."""
        for flow_run in sorted(self.lost):
            try:
                self._give_back_one(api, f"/flow_runs/{flow_run}")
            except urllib.error.HTTPError as error:
                if error.code != 404:  # deleted
                    continue
            except OSError:
                continue
            self.lost.discard(flow_run)
            self._write()

    def _give_back_one(self, api: str, path: str) -> None:
        """Give one back, unless it goes on elsewhere since it was last seen."""
        state = ask(api, path, secret=self.secret)["state"]
        since = datetime.fromisoformat(state["timestamp"]).timestamp()
        if state["type"] in _BECOMES and since <= self.looked:
            ask(api, f"{path}/set_state", {"state": _BECOMES[state["type"]]}, self.secret)

    def _write(self) -> None:
        self.file.write_text("\n".join(sorted(self.at_work | self.lost)))


def _at_work(group: int) -> Iterator[str]:
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) != group or fields[0] == "Z":
                continue
            for variable in (folder / "environ").read_bytes().split(b"\0"):
                name, _, value = variable.decode(errors="replace").partition("=")
                if name == "PREFECT__FLOW_RUN_ID":
                    yield value
