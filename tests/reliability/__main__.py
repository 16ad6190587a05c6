"""Everything that can go wrong, on every store: `make faults`. Writes tests/reliability/latest.json.

    PYTHONPATH=tests python -m reliability [STORE[:EVERY] …]     # default: local moto radosgw, every point

`crash`: a run killed at each commit point and resumed. `races`: eight processes commit the same step.
`faults`: each operation of the store while the server answers 503 or 500, drops, cuts or stalls the
connection, or stores without answering; `survived` says that it succeeded or ended in a clear error within
two minutes with nothing wrong committed, and that it succeeded once the fault was over. Exit code 1 if
anything did not hold.
"""

import json
import os
import signal
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import objectstores
from reliability import crashing
from reliability.faulting import as_json, fault_table
from reliability.racing import double_commits, race

from sera_core.artifacts.s3_requests import Patience

LATEST = Path(__file__).with_name("latest.json")
DEFAULT = ("local", "moto", "radosgw")
ROUNDS = 20


def say(line: str) -> None:
    """To a person who waits."""
    sys.stderr.write(line + "\n")


def crashes(name: str, every: int) -> list[dict[str, Any]]:
    """The crash matrix of one store."""
    rows = []
    for crash in crashing.in_own_process(f"{name}:{every}"):
        rows.append(asdict(crash) | {"good": crash.is_good})
        say(f"{name}: killed at point {crash.point} ({crash.at}): {'good' if crash.is_good else 'BAD'}")
    return rows


def races(name: str, folder: Path) -> dict[str, Any]:
    """Twenty races on one store."""
    with crashing.backend(name, folder) as place:
        doubles = double_commits(race(place.url("races"), ROUNDS, folder / f"races-{name}"))
    say(f"{name}: {ROUNDS} races of eight processes, {doubles} with another outcome than one winner")
    return {"store": name, "rounds": ROUNDS, "double_commits": doubles}


def faults(name: str) -> list[dict[str, Any]]:
    """The fault table of one server, with the store's own patience."""
    with getattr(objectstores, name)() as server:
        rows = as_json(fault_table(server, Patience()))
    for row in rows:
        say(f"{name}: {row['fault']}: {row['outcome']} after {row['seconds']:.1f} s")
    return rows


def main(wanted: list[str]) -> int:
    """Run it all; 0 if everything held."""
    stores = [(name, int(every or 1)) for name, _, every in (text.partition(":") for text in wanted)]
    if absent := objectstores.absent_programs():
        say(f"NOT TRIED: radosgw, for {', '.join(absent)} are missing: {objectstores.INSTALL}")
        stores = [(name, every) for name, every in stores if name != "radosgw"]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers are ended on the way out
    crashing.warm_up()
    with tempfile.TemporaryDirectory(prefix="sera-faults-") as scratch:
        folder = Path(scratch)
        os.environ["SERA_CACHE"] = str(folder / "cache")
        found: dict[str, list[dict[str, Any]]] = {"crash": [], "races": [], "faults": []}
        for name, every in stores:  # what is known so far is kept, should the rest be interrupted
            found["races"].append(races(name, folder))
            found["faults"] += faults(name) if name != "local" else []
            LATEST.write_text(json.dumps(found, indent=1) + "\n")
            found["crash"] += crashes(name, every)
            LATEST.write_text(json.dumps(found, indent=1) + "\n")
    bad = [row for row in found["crash"] if not row["good"]]
    bad += [row for row in found["races"] if row["double_commits"]]
    bad += [row for row in found["faults"] if not row["survived"]]
    for row in bad:
        say(f"DOES NOT HOLD: {row}")
    counts = ", ".join(f"{len(rows)} {kind}" for kind, rows in found.items())
    say(f"{LATEST}: {counts}; {len(bad)} do not hold")
    return 1 if bad else 0


if __name__ == "__main__":
    code = main(sys.argv[1:] or list(DEFAULT))
    sys.stderr.flush()
    os._exit(code)
