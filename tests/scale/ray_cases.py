"""What a Ray cluster of two nodes loses when a node, the owner of the step or both are killed: nothing."""

import tempfile
from pathlib import Path
from typing import Any

from raycluster import Nodes, cluster
from sharded import CPU, Sharded

from sera_core.artifacts.manifest import find_record
from sera_core.artifacts.step import part_numbers

RAY = CPU.model_copy(update={"distribute": "ray", "replicas": 2})
SHARDS = 8
CASES = [
    ("node killed in sampling", "sample", True, False),
    ("node killed in scoring", "logps", True, False),
    ("owner killed in sampling", "sample", False, True),
    ("owner killed in scoring", "logps", False, True),
    ("node and owner killed in sampling", "sample", True, True),
    ("node and owner killed in scoring", "logps", True, True),
]
"""(case, step, whether a node is killed, whether the owner is)."""
WAIT_SECONDS = 600


def run() -> list[dict[str, Any]]:
    """A row for each case: same_policy (same bytes as one process), shards_repeated, lost."""
    with tempfile.TemporaryDirectory(prefix="sera-ray-") as folder:
        inputs = Sharded(Path(folder) / "inputs", SHARDS)
        alone = inputs.copy(Path(folder) / "alone")
        expected = {spec.step: alone.run(spec).digest for spec in (alone.sample, alone.logps)}
        return [
            _case(inputs.copy(Path(folder) / f"case-{number}"), case, expected)
            for number, case in enumerate(CASES)
        ]


def _case(world: Sharded, case: tuple[str, str, bool, bool], expected: dict[str, str]) -> dict[str, Any]:
    name, step, node, owner = case
    spec = getattr(world, step)
    with cluster(2) as nodes:
        kept = _interrupt(world, spec, nodes, node, owner)
        record = find_record(world.store, spec.step, spec.key)
        left = [number for number in kept if number not in part_numbers(world.store, spec.path)]
    return {
        "case": name,
        "same_policy": record is not None and record.digest == expected[spec.step],
        "shards_repeated": len(world.shards_written(spec)) - SHARDS,
        "lost": len(left),
    }


def _interrupt(world: Sharded, spec: Any, nodes: Nodes, node: bool, owner: bool) -> list[int]:
    """Kill what is to be killed after the first shard, and finish; returns the shards there were then."""
    execution = RAY.model_copy(update={"address": nodes.address})
    working = world.owner(spec, execution)
    assert working.stdout is not None
    working.stdout.readline()  # one shard is done
    if owner:
        working.kill()
    if node:
        nodes.kill(1)
    kept = part_numbers(world.store, spec.path)
    if owner:
        working.wait()
        working = world.owner(spec, execution)
    working.communicate(timeout=WAIT_SECONDS)
    return kept
