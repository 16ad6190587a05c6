"""Measure speed, each figure beside a peer or the machine's peak from the same run.

    python -m tests.benchmarks.speed [--small] [SECTION …]

Prints a table of ratios and writes tests/benchmarks/results/latest.json, where sections that are not named
stay as they are.
"""

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from sera_core.models.model_sources import materialise
from tests.benchmarks import memory
from tests.benchmarks.speed import scoring
from tests.benchmarks.speed.data import MODEL, Bench
from tests.benchmarks.speed.loop import loop
from tests.benchmarks.speed.sampling import sampling
from tests.benchmarks.speed.selection import selection
from tests.benchmarks.speed.timing import peak_gflops
from tests.benchmarks.speed.training import training

RESULTS = Path(__file__).parents[1] / "results" / "latest.json"
SECTIONS = ("pairs", "group4", "group8", "sampling", "training", "loop", "selection_10m", "scaling")


def main() -> None:
    """Measure the sections."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.speed")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--small", action="store_true", help="a few pairs and steps: whether it works")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"no such section: {', '.join(sorted(unknown))}; choose from {', '.join(SECTIONS)}")
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(materialise(MODEL, Path(scratch) / "policy"), pairs=2 if args.small else 12)
        peaks = {dtype: round(peak_gflops(dtype), 1) for dtype in bench.dtypes}
        found = {"machine": machine(), "peak_gflops": peaks}
        for name in args.sections or SECTIONS:
            found[name] = WORK[name](bench, peaks, args.small)
            print(f"{name}: {json.dumps(found[name])}", flush=True)
    if not args.small:
        write(found)
    print_table(found)


def machine() -> dict[str, Any]:
    """What it ran on."""
    with open("/proc/cpuinfo") as info:  # noqa: PTH123
        text = info.read()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.machine(),
        "amx": "amx_bf16" in text,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def scaling(small: bool) -> dict[str, Any]:
    """Seconds and peak MiB of the pairing step at 1, 4 and 16 times the responses, each in a process."""
    first = 400 if small else 4_000
    found: dict[str, Any] = {"peak_mib": {}}
    for times in (1, 4, 16):
        with tempfile.TemporaryDirectory() as scratch:
            told = memory.measure("pair", first * times, Path(scratch))
        found[f"{times}x"] = told["seconds"]
        found["peak_mib"][f"{times}x"] = told["peak_mib"]
    return {**found, "responses": first}


WORK: dict[str, Callable[[Bench, dict[str, float], bool], dict[str, Any]]] = {
    "pairs": lambda bench, peaks, _: scoring.pairs(bench, peaks),
    "group4": lambda bench, peaks, _: scoring.groups(bench, peaks, 4),
    "group8": lambda bench, peaks, _: scoring.groups(bench, peaks, 8),
    "sampling": lambda bench, _, small: sampling(bench, "float32", (8,), 8 if small else 32),
    "training": lambda bench, _, small: training(bench, 2 if small else 5),
    "loop": lambda bench, _, small: loop(bench, small),
    "selection_10m": lambda _, __, small: selection(10_000 if small else 10_000_000),
    "scaling": lambda _, __, small: scaling(small),
}


def write(found: dict[str, Any]) -> None:
    """Write the results; sections of an earlier run stay."""
    before = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(before | found, indent=1) + "\n")


def print_table(found: dict[str, Any]) -> None:
    """Ratios by section and dtype."""
    for name, section in found.items():
        for kind, told in section.items() if isinstance(section, dict) else ():
            for ratio in ("ratio_trl", "ratio_stock", "ratio_generate"):
                if isinstance(told, dict) and ratio in told:
                    print(f"{name:<10} {kind:<10} {told[ratio]:.2f} × {ratio.removeprefix('ratio_')}")


if __name__ == "__main__":
    main()
