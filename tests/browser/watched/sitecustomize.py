"""A Python process with this folder on PYTHONPATH writes down whom it looks up or connects to.

One line of JSON a process and address: what the process is, the event, the host.
"""

import json
import os
import sys

LOG = os.environ["SERA_TEST_CONNECTIONS"]
EVENTS = {
    "socket.connect": lambda arguments: arguments[1],
    "socket.sendto": lambda arguments: arguments[1],
    "socket.getaddrinfo": lambda arguments: arguments,
    "socket.gethostbyname": lambda arguments: arguments,
    "socket.gethostbyaddr": lambda arguments: arguments,
}

sys.modules["uvloop"] = None  # type: ignore[assignment]  # it connects without Python's sockets, unseen from here
_seen: set[tuple[int, str, str]] = set()


def watch(event: str, arguments: tuple) -> None:
    """Write the event down unless this process had it before."""
    if event not in EVENTS:
        return
    address = EVENTS[event](arguments)
    if not isinstance(address, tuple):  # a socket in the file system
        return
    found = (os.getpid(), event, str(address[0]))
    if found in _seen:
        return
    _seen.add(found)
    line = {"process": " ".join(getattr(sys, "argv", [])), "event": event, "host": found[2]}
    with open(LOG, "a", encoding="utf-8") as log:  # noqa: PTH123 - pathlib is not imported before a process begins
        log.write(json.dumps(line) + "\n")


sys.addaudithook(watch)
