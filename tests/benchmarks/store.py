"""What the store costs: a large policy to and from a real S3 server, and a step that moves nothing.

    python -m tests.benchmarks.store [MIB]

The peer is plain s3fs with large parallel parts, on the same server in the same run, by turns with ours.
It hashes nothing, ours hashes every byte both ways. After a turn that is not counted (whoever goes first pays
for fresh memory) nine, each beginning with another rival. A ratio is the median of the turns' own ratios to
the peer's faster setting, beside it their quartiles: a machine may be twice as slow in the next turn.
"""

import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests' own modules

import objectstores

from sera_core.artifacts.checks import Blob
from sera_core.artifacts.manifest import StepSpec
from sera_core.artifacts.s3_requests import S3_CONFIG
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import Store, open_store
from sera_core.config import ExecutionConfig

REPEATS = 9
STEPS = 50
PLAIN_SETTINGS = ((50 * 2**20, 10), (32 * 2**20, 4))
"""Bytes a part and parts at once: s3fs's own, and what was faster on two cores."""
ATTEMPT = "steps/train/key/0123456789abcdef"


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    found = work()
    return time.perf_counter() - start, found


def plain(fs: Any, file: Path, key: str, part: int, at_once: int) -> tuple[float, float]:
    """Seconds s3fs takes up and down."""
    sizes, back = {"chunksize": part, "max_concurrency": at_once}, file.with_name("back")
    up, _ = timed(lambda: fs.put_file(str(file), key, **sizes))
    down, _ = timed(lambda: fs.get_file(key, str(back), **sizes))
    back.unlink()
    fs.rm_file(key)
    return up, down


def ours(store: Store, workspace: Path, name: str) -> tuple[float, float]:
    """Seconds the store takes up and down, every byte hashed."""
    up, blob = timed(lambda: store.commit_file(workspace, ATTEMPT, name))
    assert isinstance(blob, Blob)
    path = f"{ATTEMPT}/{name}"
    down, local = timed(lambda: store.fetch(path, blob.sha256, blob.bytes, name))
    shutil.rmtree(local.parent)
    store.remove(path)
    return up, down


def transfers(mib: int, scratch: Path) -> dict[str, Any]:
    """MiB a second of both ways of both, and the ratios."""
    import s3fs

    file = scratch / "model.safetensors"
    with file.open("wb") as stream:
        for _ in range(mib):
            stream.write(os.urandom(2**20))
    with objectstores.radosgw() as server, server.in_environment():
        url = server.bucket()
        store, fs = open_store(url), s3fs.S3FileSystem(use_listings_cache=False, config_kwargs=S3_CONFIG)
        rivals = [
            lambda: ours(store, scratch, file.name),
            *(partial(plain, fs, file, f"{store.prefix}/plain", *setting) for setting in PLAIN_SETTINGS),
        ]
        turns = [turn(rivals, number) for number in range(REPEATS + 1)][1:]
    found: dict[str, Any] = {"mib": mib}
    for way, name in enumerate(("up", "down")):
        seconds = [[taken[way] for taken in rival] for rival in zip(*turns, strict=True)]
        found |= compared(mib, name, seconds[0], min(seconds[1:], key=statistics.median))
    return found


def turn(rivals: list[Callable[[], tuple[float, float]]], first: int) -> list[tuple[float, float]]:
    """Seconds up and down of each rival, in their order, whoever begins."""
    taken: dict[int, tuple[float, float]] = {}
    for place in range(len(rivals)):
        number = (first + place) % len(rivals)
        taken[number] = rivals[number]()
        time.sleep(3)  # the server frees what was removed
    return [taken[number] for number in range(len(rivals))]


def compared(mib: int, way: str, ours: list[float], peers: list[float]) -> dict[str, Any]:
    """Speeds, and how many times as fast as the peer, from the seconds of each turn."""
    ratios = [peer / own for own, peer in zip(ours, peers, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        f"plain_{way}_mib_per_second": round(mib / statistics.median(peers)),
        f"{way}_mib_per_second": round(mib / statistics.median(ours)),
        f"{way}_ratio": round(middle, 2),
        f"{way}_ratio_quartiles": [round(low, 2), round(high, 2)],
    }


def step_overhead(folder: Path) -> dict[str, float]:
    """Milliseconds that a step costs which does nothing, and one that was done before, on local disk."""
    store, made, found = open_store(str(folder)), [], []
    for number in range(STEPS):
        spec = StepSpec(step="nothing", version=1, fields={"number": number}, inputs={})
        for times in (made, found):
            seconds, _ = timed(lambda spec=spec: run_step(store, spec, lambda attempt: [], ExecutionConfig()))
            times.append(1000 * seconds)
    return {
        "empty_step_ms": round(statistics.median(made), 2),
        "slowest_empty_step_ms": round(max(made[1:]), 2),  # the first one looks at the environment
        "reused_step_ms": round(statistics.median(found), 2),
    }


def main() -> None:
    mib = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    with tempfile.TemporaryDirectory(prefix="sera-bench-") as folder:
        os.environ["SERA_CACHE"] = str(Path(folder) / "cache")
        found = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        found |= step_overhead(Path(folder) / "store")
        found |= transfers(mib, Path(folder))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
