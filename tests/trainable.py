"""A store with a tiny model and a mixture, and the train step on them."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_policy
from torch.nn.utils import parameters_to_vector

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact, StepRecord, StepRef, StepSpec
from sera_core.artifacts.step import Attempt, Work, no_progress, run_step
from sera_core.artifacts.store import Store, open_store
from sera_core.config import ExecutionConfig, TrainConfig
from sera_core.models.policies import Precision, load_policy
from tasks.training import train_policy

CPU = ExecutionConfig(device="cpu", micro_batch=2, checkpoint_steps=0)


def logps(model: Any, prompt: list[int], response: list[int]) -> float:
    """log π(y|x) by one plain forward pass, the definition."""
    ids = torch.tensor([prompt + response], device=model.device)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return logits.gather(1, torch.tensor(response, device=model.device)[:, None]).sum().item()


def random_pairs(count: int, seed: int = 0, lowest: int = 2, highest: int = 12) -> list[dict[str, Any]]:
    """Rows of random token ids and lengths."""
    draw = random.Random(seed)

    def ids() -> list[int]:
        return [draw.randrange(3, 300) for _ in range(draw.randint(lowest, highest))]

    return [
        {
            "pair_id": f"{number:016x}",
            "prompt_id": f"{number:016x}",
            "origin": "human",
            "round": 0,
            "prompt_ids": ids(),
            "chosen_ids": ids(),
            "rejected_ids": ids(),
        }
        for number in range(count)
    ]


class Bench:
    """Steps `model`, `mix` and `train` in a store of their own."""

    def __init__(self, folder: Path, pairs: int = 10, policy: Callable[[Path], Path] = tiny_policy) -> None:
        """`policy` writes the model's folder, with `write_tokenizer`'s tokenizer."""
        self.folder = folder
        self.store: Store = open_store(str(folder / "store"))
        self.model = self.commit("model", {"policy": policy(folder / "tiny")})
        self.rows = random_pairs(pairs)

    def commit(self, step: str, folders: dict[str, Path], **fields: Any) -> StepRef:
        """A finished step that holds copies of folders."""

        def work(attempt: Attempt) -> list[str]:
            files = []
            for name, folder in folders.items():
                for path in sorted(folder.iterdir()):
                    shutil.copyfile(path, attempt.write(f"{name}/{path.name}"))
                    files.append(f"{name}/{path.name}")
            return files

        return run_step(self.store, StepSpec(step=step, version=1, fields=fields, inputs={}), work, CPU).ref

    def mixture(self, dtype: Precision = "float32", **changes: Any) -> StepRef:
        """The rows with the model's log-probabilities; `changes` by pair_id, or of `every` row."""
        policy = load_policy(self.folder / "tiny", dtype)
        rows = []
        for row in self.rows:
            refs = {
                f"ref_{side}_logps": logps(policy, row["prompt_ids"], row[f"{side}_ids"])
                for side in ("chosen", "rejected")
            }
            rows.append({**row, **refs, **changes.get(row["pair_id"], {}), **changes.get("every", {})})

        def work(attempt: Attempt) -> list[str]:
            schema.write_table(schema.from_rows(schema.MIXTURE, rows), attempt.write("mixture.parquet"))
            return ["mixture.parquet"]

        fields = {"changes": repr(changes), "dtype": dtype}
        return run_step(self.store, StepSpec(step="mix", version=1, fields=fields, inputs={}), work, CPU).ref

    def change(self, record: StepRecord) -> torch.Tensor:
        """How far a round's training moved the weights, [parameters]."""
        policies = (Artifact(self.store, record.ref).folder("policy"), self.folder / "tiny")
        trained, start = (parameters_to_vector(load_policy(folder).parameters()) for folder in policies)
        return trained - start

    def spec(
        self,
        mixture: StepRef,
        train: TrainConfig,
        *,
        start: StepRef | None = None,
        same: bool = True,
        dtype: str = "float32",
        round: int = 0,
        rate: float = 1e-3,
        where: dict[str, Any] | None = None,
        **fields: Any,
    ) -> StepSpec:
        """The train step as flows build it."""
        return StepSpec(
            step="train",
            version=1,
            fields={
                "train": train.model_dump(
                    mode="json", exclude={"learning_rate", "start", "reference", "tokens"}
                ),
                "learning_rate": rate,
                "dtype": dtype,
                "seed": 0,
                "round": round,
                "start_is_reference": same,
                **fields,
            },
            inputs={"start": start or self.model, "model": self.model, "mixture": mixture},
            where=where or {},
        )

    def run(
        self,
        spec: StepSpec,
        execution: ExecutionConfig = CPU,
        progress: Any = no_progress,
        store: Store | None = None,
        work: Work = train_policy,
    ) -> StepRecord:
        """Train."""
        return run_step(store or self.store, spec, work, execution, progress)

    def again(
        self,
        spec: StepSpec,
        execution: ExecutionConfig = CPU,
        name: str = "other",
        work: Work = train_policy,
    ) -> StepRecord:
        """Train in a copy of the store without such steps: the same work done a second time."""
        return self.run(spec, execution, store=self.copy(name), work=work)

    def examples(self) -> StepRef:
        """The chosen answers of the rows, to fine-tune on."""
        rows = [
            {
                "conversation_id": row["pair_id"],
                "ids": row["prompt_ids"] + row["chosen_ids"],
                "labels": [-100] * len(row["prompt_ids"]) + row["chosen_ids"],
            }
            for row in self.rows
        ]

        def work(attempt: Attempt) -> list[str]:
            schema.write_table(schema.from_rows(schema.EXAMPLES, rows), attempt.write("examples.parquet"))
            return ["examples.parquet"]

        return run_step(self.store, StepSpec(step="examples", version=1, fields={}, inputs={}), work, CPU).ref

    def tuning(self, batch: int = 4, dtype: str = "float32", rate: float = 1e-3, **train: Any) -> StepSpec:
        """The step of fine-tuning as flows build it: two epochs over `examples`."""
        return StepSpec(
            step="sft",
            version=1,
            fields={
                "train": {"method": "full", "warmup": 0.1, "max_grad_norm": 1.0, **train},
                "learning_rate": rate,
                "epochs": 2,
                "batch": batch,
                "dtype": dtype,
                "seed": 0,
            },
            inputs={"model": self.model, "examples": self.examples()},
        )

    def copy(self, name: str) -> Store:
        """A copy of the store without steps that train."""
        ignore = shutil.ignore_patterns("train", "sft")
        shutil.copytree(self.folder / "store", self.folder / name, ignore=ignore)
        return open_store(str(self.folder / name))

    def log(self, record: StepRecord, store: str = "store") -> list[dict[str, Any]]:
        """Lines of log.jsonl."""
        path = self.result(record, store) / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def result(self, record: StepRecord, store: str = "store") -> Path:
        """The folder that a training wrote."""
        attempt = record.files["log.jsonl"].attempt
        return self.folder / store / "steps" / record.step / record.key / attempt


def same_steps(one: list[dict[str, Any]], other: list[dict[str, Any]], bound: float = 1e-5) -> None:
    """Whether two trainings logged the same in every step, up to the order in which numbers are added."""
    assert [line["pairs"] for line in one] == [3, 3, 3, 1] == [line["pairs"] for line in other]
    for line, same in zip(one, other, strict=True):
        assert line.pop("grad_norm") == pytest.approx(same.pop("grad_norm"), rel=bound)
        assert line == pytest.approx(same, rel=0, abs=bound)


def shas(record: StepRecord) -> dict[str, str]:
    """Content of every file."""
    return {name: file.sha256 for name, file in record.files.items()}
