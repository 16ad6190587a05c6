"""Kill Ray nodes and owners, time two workers against one, mix 10 million pairs, simulate 1,024 workers.

python -m tests.scale [ray] [speedup] [selection] [simulator] [--pairs N]

Without names all four run, about half an hour. What was measured is written to tests/scale/latest.json,
beside what an earlier call has written of the others.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # a worker has one thread, so the one it is compared with has one too
TESTS = Path(__file__).parents[1]
LATEST = Path(__file__).with_name("latest.json")


def _ray(_: int) -> Any:
    from tests.scale.ray_cases import run

    return run()


def _speedup(_: int) -> Any:
    from tests.scale.speedup import run

    return run()


def _selection(pairs: int) -> Any:
    from tests.scale.big_tables import run

    return run(pairs)


def _simulator(pairs: int) -> Any:
    from tests.scale.simulator import run

    return run(pairs)


SECTIONS: dict[str, Callable[[int], Any]] = {
    "ray": _ray,
    "speedup": _speedup,
    "selection": _selection,
    "simulator": _simulator,
}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale")
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--pairs", type=int, default=10_000_000)
    given = parser.parse_args()
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the sections are {', '.join(SECTIONS)}")
    sys.path.insert(0, str(TESTS))  # the cases share modules with the tests
    latest = json.loads(LATEST.read_text()) if LATEST.exists() else {}
    for name in given.sections or SECTIONS:
        measured = SECTIONS[name](given.pairs)
        machine = {"cores": os.cpu_count(), "system": platform.platform()}
        latest[name] = {"machine": machine, "measured": measured}
        LATEST.write_text(json.dumps(latest, indent=1) + "\n")
        sys.stdout.write(json.dumps({name: measured}) + "\n")


if __name__ == "__main__":
    main()
