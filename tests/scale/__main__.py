"""Kill Ray nodes and owners, time workers, train in two processes, mix 10 million pairs, simulate workers.

python -m tests.scale [ray] [speedup] [training] [selection_10m] [simulator] [--pairs N]
python -m tests.scale --replay STORE RUN [--pairs N]    a finished run's last round on many workers

Without names all five sections run, about half an hour. What was measured is written to
tests/scale/latest.json, by section, beside what an earlier call has written of the others; `machine` there
says where each was measured.
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


def _training(_: int) -> Any:
    from tests.scale.training import run

    return run()


def _selection(pairs: int) -> Any:
    from tests.scale.big_tables import run

    return run(pairs)


def _simulator(pairs: int) -> Any:
    from tests.scale.simulator import run

    return run(pairs)


def _replay(store: str, run: str, pairs: int) -> Any:
    from tests.scale.measured_times import replay, round_times
    from tests.scale.simulator import WORKERS

    times = round_times(store, run)
    return [replay(times, pairs, workers) for workers in (1, *WORKERS)]


REPLAY = "replay"
SECTIONS: dict[str, Callable[[int], Any]] = {
    "ray": _ray,
    "speedup": _speedup,
    "training": _training,
    "selection_10m": _selection,
    "simulator": _simulator,
}


def main(argv: list[str] | None = None) -> None:
    """See above."""
    parser = argparse.ArgumentParser(prog="python -m tests.scale")
    parser.add_argument("sections", nargs="*", metavar="section", help=", ".join(SECTIONS))
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument(
        "--replay", nargs=2, metavar=("STORE", "RUN"), help="rates from a finished run's round"
    )
    given = parser.parse_args(argv)
    if unknown := set(given.sections) - set(SECTIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; the sections are {', '.join(SECTIONS)}")
    _share_the_tests_modules()
    if given.replay:
        tell(REPLAY, _replay(*given.replay, given.pairs))
    for name in given.sections or ([] if given.replay else SECTIONS):
        tell(name, SECTIONS[name](given.pairs))


def tell(name: str, measured: Any) -> None:
    """Write and print a section."""
    write(name, measured)
    sys.stdout.write(json.dumps({name: measured}) + "\n")


def _share_the_tests_modules() -> None:
    """The cases share modules with the tests, in this process and in those that it starts."""
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(TESTS), os.environ.get("PYTHONPATH"))))


def write(name: str, measured: Any) -> None:
    """Put a section into the file, and where it was measured; the other sections stay."""
    earlier = json.loads(LATEST.read_text()) if LATEST.exists() else {}
    machines = earlier.get("machine", {})
    machines[name] = {"cores": os.cpu_count(), "system": platform.platform()}
    sections = {**earlier, name: measured}
    told = {section: sections[section] for section in (*SECTIONS, REPLAY) if section in machines}
    LATEST.write_text(json.dumps({**told, "machine": machines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
