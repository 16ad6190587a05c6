"""A store with a tiny policy, prompts and pairs: the steps whose shards several workers can do."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny import tiny_policy

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact, StepRecord, StepSpec
from sera_core.artifacts.step import Attempt, no_progress, run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from tasks.step_functions import do_work

CPU = ExecutionConfig(device="cpu")
SAMPLED = {
    "engine": "transformers",
    "dtype": "float32",
    "model_dtype": "float32",
    "scored_again": False,
    "temperature": 0.8,
    "top_p": 1.0,
    "prompts": None,
    "max_parity_nats": 0.01,
    "seed": 7,
    "round": 1,
    "side": "train",
}
OWNER = """
import sys
from sera_core.artifacts.manifest import StepSpec
from sera_core.config import ExecutionConfig
from tasks.step_functions import do_work

store, spec, execution = sys.argv[1:]
spec, execution = StepSpec.model_validate_json(spec), ExecutionConfig.model_validate_json(execution)
do_work(store, spec, execution, lambda done, *_: print(done, flush=True))
"""
TESTS = Path(__file__).parent


class Sharded:
    """A step of sampling (64 prompts a shard) and one of scoring (128 pairs a shard), with their inputs."""

    def __init__(
        self, folder: Path, shards: int = 5, responses: int = 4, tokens: int = 12, **policy: Any
    ) -> None:
        """`policy`: of the tiny policy."""
        self.folder, self.shards = folder, shards
        self.url = str(folder / "store")
        self.store = open_store(self.url)
        self.model = self._put("model", lambda attempt: self._policy(attempt, policy))
        rendered = self._put("render", lambda attempt: self._texts(attempt, shards))
        inputs = {"policy": self.model, "model": self.model, "rendered": rendered, "texts": rendered}
        fields = SAMPLED | {"responses": responses, "max_tokens": tokens}
        self.sample = StepSpec(step="sample", version=1, fields=fields, inputs=inputs)
        fields = {"file": "train.parquet", "dtype": "float32"}
        self.logps = StepSpec(step="logps", version=1, fields=fields, inputs=inputs)

    def copy(self, to: Path) -> "Sharded":
        """The same in another folder."""
        shutil.copytree(self.folder, to)
        return Sharded(to, self.shards)

    def _put(self, step: str, work: Callable[[Attempt], list[str]]) -> Any:
        return run_step(self.store, StepSpec(step=step, version=1, fields={}, inputs={}), work, CPU).ref

    def _policy(self, attempt: Attempt, options: dict[str, Any]) -> list[str]:
        folder = tiny_policy(attempt.folder / "policy", **options)
        return [f"policy/{path.name}" for path in folder.iterdir()]

    def _texts(self, attempt: Attempt, shards: int) -> list[str]:
        def ids(number: int, length: int) -> list[int]:
            return [3 + (7 * number + i) % 400 for i in range(length)]

        prompts = [
            {"prompt_id": f"{n:016x}", "prompt_ids": ids(n, 4 + n % 9)} for n in range(64 * shards - 3)
        ]
        pairs = [
            {"pair_id": f"{n:016x}", "prompt_id": f"{n:016x}", "prompt_ids": ids(n, 4 + n % 9)}
            | {"chosen_ids": ids(n + 1, 3 + n % 11), "rejected_ids": ids(n + 2, 3 + n % 7)}
            for n in range(128 * shards - 5)
        ]
        tables = {
            "prompts.parquet": schema.from_rows(schema.PROMPTS, prompts),
            "heldout.parquet": schema.from_rows(schema.PAIRS, []),
            "train.parquet": schema.from_rows(schema.PAIRS, pairs),
        }
        for name, table in tables.items():
            schema.write_table(table, attempt.write(name))
        return list(tables)

    def run(
        self, spec: StepSpec, execution: ExecutionConfig = CPU, progress: Any = no_progress
    ) -> StepRecord:
        """The step's record."""
        return do_work(self.url, spec, execution, progress or no_progress)

    def parts(self, spec: StepSpec) -> list[str]:
        """Names of the records of finished shards, in order."""
        return sorted(path.name for path in (self.folder / "store" / spec.path).glob("part-*.json"))

    def shards_written(self, spec: StepSpec) -> list[str]:
        """Names of the files of shards, one for each time that a shard was done, in order."""
        return sorted(path.name for path in (self.folder / "store" / spec.path).glob("*/part-*.parquet"))

    def path(self, record: StepRecord, name: str) -> Path:
        """One of a step's files."""
        return Artifact(self.store, record.ref).path(name)

    def owner(self, spec: StepSpec, execution: ExecutionConfig) -> "subprocess.Popen[bytes]":
        """The step in a process of its own, which prints its progress."""
        return subprocess.Popen(
            [sys.executable, "-c", OWNER, self.url, spec.model_dump_json(), execution.model_dump_json()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join((str(TESTS.parent), str(TESTS)))},
            stdout=subprocess.PIPE,
        )
