"""What `make scale` writes, in the shape that its readers rely on; what takes minutes is replaced."""

import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sera_core.artifacts.manifest import StepRef
from tests.scale import __main__ as scale
from tests.scale import big_tables, ray_cases, speedup, training

SHARDS = 8


class World:
    """Steps that are done already."""

    store, sample, logps = (
        None,
        *(SimpleNamespace(step=step, key="k", path="p") for step in ("sample", "logps")),
    )

    model = StepRef(step="model", key="0" * 64, digest="0" * 64)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def copy(self, _: Path) -> "World":
        return self

    def run(self, spec: Any, execution: Any = None, _: Any = None) -> Any:
        return SimpleNamespace(digest=spec.step) if execution is None else execution.replicas * 1.5

    def shards_written(self, _: Any) -> list[str]:
        return ["part"] * (SHARDS + 1)


RATES = {"none": 100.0, "processes": 50.0, "ray": 25.0}
"""Small shards a second."""
LOSSES = {"store": [1.0, 2.0], "whole_copies": [1.5, 2.0], "shared_weights": [1.0, 1.75]}


class Training:
    """Two trainings whose losses differ by 0.5 and 0.25 from that of one process."""

    def __init__(self, *_: Any) -> None: ...

    def mixture(self) -> None: ...

    def spec(self, *_: Any) -> None: ...

    def run(self, *_: Any) -> None: ...

    def again(self, *_: Any) -> None: ...

    def log(self, _: Any, name: str = "store") -> list[dict[str, Any]]:
        return [{"step": step, "loss": loss} for step, loss in enumerate(LOSSES[name])]


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls `python -m tests.scale` with these words; what the file then holds."""
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))  # put back at the end
    monkeypatch.setattr(scale, "LATEST", tmp_path / "latest.json")
    monkeypatch.setattr(ray_cases, "Sharded", World)
    monkeypatch.setattr(ray_cases, "cluster", contextlib.nullcontext)
    monkeypatch.setattr(ray_cases, "_interrupt", lambda *_: [0, 2])
    monkeypatch.setattr(ray_cases, "find_record", lambda _, step, __: SimpleNamespace(digest=step))
    monkeypatch.setattr(ray_cases, "part_numbers", lambda *_: [0, 1])
    monkeypatch.setattr(speedup, "Sharded", World)
    monkeypatch.setattr(
        speedup,
        "_ray_worker",
        lambda: contextlib.nullcontext(speedup.CPU.model_copy(update={"distribute": "ray"})),
    )
    monkeypatch.setattr(speedup, "_rate", lambda work: work(None))
    monkeypatch.setattr(speedup, "run_step", lambda *given: RATES[given[3].distribute] * given[3].replicas)
    monkeypatch.setattr(training, "Bench", Training)
    told = {"seconds": 2.0, "peak_mib": 30, "rows": 5}
    monkeypatch.setattr(big_tables, "_in_process", lambda *_: told)

    def call(*words: str) -> dict[str, Any]:
        scale.main(list(words))
        return json.loads((tmp_path / "latest.json").read_text())

    return call


def test_every_section_has_its_shape(written: Any) -> None:
    found = written("--pairs", "20000")
    assert set(found) == {"ray", "speedup", "training", "selection_10m", "simulator", "machine"}
    assert [set(row) for row in found["ray"]] == [{"case", "same_policy", "shards_repeated", "lost"}] * 6
    assert found["ray"][0] == {
        "case": "node killed in sampling",
        "same_policy": True,
        "shards_repeated": 1,
        "lost": 1,
    }
    assert found["speedup"] == {
        "sampling": 2.0,
        "scoring": 2.0,
        "shard_overhead_ms": 10.0,  # 20 ms a shard in a worker, 10 in the owner
        "shard_overhead_ray_ms": 30.0,
    }
    assert found["training"] == {
        "loss_max_diff": 0.5,
        "whole_copies": 0.5,
        "shared_weights": 0.25,
        "steps": 2,
    }
    assert (found["selection_10m"]["seconds"], found["selection_10m"]["peak_mib"]) == (6.0, 30)
    asked = {"workers", "pairs", "makespan_s", "utilisation", "store_requests_per_s", "owner_mib"}
    assert [row["workers"] for row in found["simulator"]] == [8, 64, 1024] * 2
    assert all(asked <= set(row) and row["pairs"] == 20_000 for row in found["simulator"])
    assert set(found["machine"]) == set(found) - {"machine"}


def test_a_section_is_renewed_beside_what_an_earlier_call_wrote(written: Any, capsys: Any) -> None:
    written("training")
    scale.LATEST.write_text(
        json.dumps({**json.loads(scale.LATEST.read_text()), "ray": {"measured": "before"}})
    )
    found = written("speedup")
    assert set(found) == {"speedup", "training", "machine"}, "a section without its machine is of no version"
    with pytest.raises(SystemExit):
        written("selection")
    assert "unknown: selection" in capsys.readouterr().err
