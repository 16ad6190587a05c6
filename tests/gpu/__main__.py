"""Measure the engines and do a small run on the device that is there, without network.

    python -m tests.gpu [--out FILE] [SECTION …]

On a GPU the model has the shape of Llama 3.2 1B and random weights; without one a small shape shows on the
CPU that everything works. Prints a line of JSON for each section, and in the end one object with all of them.
Exit code 1 if a section failed; the others are measured all the same.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules

from tests.benchmarks.speed import scoring
from tests.benchmarks.speed.data import Bench
from tests.benchmarks.speed.sampling import sampling
from tests.benchmarks.speed.timing import peak_gflops
from tests.benchmarks.speed.training import training
from tests.gpu.run import killed_and_resumed
from tests.gpu.shape import RandomBench, random_policy
from tests.gpu.starts import step_starts


def main() -> int:
    """Measure the sections."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu")
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    args = parser.parse_args()
    if unknown := set(args.sections) - SECTIONS.keys():
        parser.error(f"no such section: {', '.join(sorted(unknown))}; choose from {', '.join(SECTIONS)}")
    found: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as scratch:
        bench = bench_for(Path(scratch))
        for name in args.sections or SECTIONS:
            found[name] = measured(SECTIONS[name], bench)
            print(json.dumps({name: found[name]}), file=sys.stderr, flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found))
    return int(any("error" in section for section in found.values()))


def machine() -> dict[str, Any]:
    """What this runs on."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": "1B" if gpu else "small",
    }


def bench_for(folder: Path) -> RandomBench:
    """The 1B shape on a GPU, the small one on a CPU."""
    if torch.cuda.is_available():
        policy = random_policy(folder / "policy", hidden=2048, layers=16, heads=32)
        return RandomBench(policy, 96, "cuda", tokens_per_batch=32_768, batch=16, vocabulary=49_152)
    policy = random_policy(folder / "policy", hidden=64, layers=2, heads=4, vocabulary=1024)
    return RandomBench(policy, 4, vocabulary=1024)


def measured(section: Callable[[Bench], dict[str, Any]], bench: Bench) -> dict[str, Any]:
    """A section's figures, its seconds and the peak of memory; or its error."""
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        found = section(bench)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
    # on a CPU: the process's peak so far
    peak = (
        torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    )
    return {**found, "seconds": round(time.perf_counter() - start, 1), "peak_mib": peak >> 20}


def peaks(bench: Bench) -> dict[str, float]:
    """GFLOP/s of a large matrix product, by dtype."""
    seconds = 3.0 if bench.device == "cuda" else 0.5
    return {dtype: round(peak_gflops(dtype, bench.device, seconds), 1) for dtype in bench.dtypes}


def sampled(bench: Bench) -> dict[str, Any]:
    """New tokens per second in bfloat16."""
    gpu = bench.device == "cuda"
    return sampling(bench, "bfloat16", (32, 128, 256) if gpu else (8,), 96 if gpu else 8)


SECTIONS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "peak_gflops": peaks,
    "pairs": lambda bench: scoring.pairs(bench, peaks(bench)),
    "group8": lambda bench: scoring.groups(bench, peaks(bench), 8),
    "sampling": sampled,
    "training": lambda bench: training(bench, 4 if bench.device == "cuda" else 2),
    "starts": lambda bench: step_starts(bench.device),
    "run": lambda bench: killed_and_resumed(bench.device),
}

if __name__ == "__main__":
    sys.exit(main())
