"""What every step writes on a small fixed input, by version: `steps.json`, renewed by `make golden`.

A run of two reviewed rounds, runs whose responses a rater orders, and one decided by a judge, in which a
policy's log-probabilities and samples are drawn from hashes, so that the figures are the same on every
processor; training is real, and compared to a part in a thousand. A step that writes something else from the
same inputs under one version is what the table is there to find: a store would hold old and new results under
one key.
"""

import hashlib
import json
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow.parquet as pq
import tiny
import tinyrun
from trainable import Bench

from sera_core.artifacts.manifest import Artifact, StepRef
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.store import Store
from sera_core.config import TrainConfig
from sera_core.steps import VERSIONS
from tasks import step_functions
from tasks.engines.sampler import Request, Sampled, Settings
from tasks.fine_tuning import fine_tune

FILE = Path(__file__).parent / "steps.json"
TRAINED = ("train", "sft")
"""Steps whose entry is the log of a real training."""
MARK = "policy-number"
"""A file of a policy folder that tells policies apart, as weights would."""


# --------------------------------------------------------------------------------------------------- numbers


def drawn(*parts: Any) -> random.Random:
    """A generator that depends on the parts alone."""
    return random.Random(hashlib.sha256(json.dumps(parts).encode()).hexdigest())


def number_of(policy: Path) -> str:
    """Which policy a folder holds."""
    return (policy / MARK).read_text() if (policy / MARK).exists() else "0"


def logps(policy: Path, items: Sequence[Any], **_: Any) -> np.ndarray:
    """Stands in for `sequence_logps`: policies agree on a response to within a few nats."""
    found = []
    for prompt, response in items:
        ids = [list(map(int, prompt)), list(map(int, response))]
        found.append(-3.0 * len(response) + drawn(*ids).uniform(-2, 2))
        found[-1] += drawn(number_of(policy), *ids).uniform(-3, 3) if number_of(policy) != "0" else 0.0
    return np.array(found)


class HashSampler:
    """Stands in for an engine: each response is drawn from its own seed."""

    def __init__(self, policy: Path) -> None:
        self.policy = policy

    def sample(self, requests: Sequence[Request], settings: Settings, finished: Any = None) -> list[Sampled]:
        """One response a request."""
        found = []
        for request in requests:
            draw = drawn(number_of(self.policy), request.seed)
            ids = [draw.randrange(10, 300) for _ in range(draw.randint(1, settings.max_tokens))]
            stops = len(ids) < settings.max_tokens
            ids = tuple([*ids, settings.stop_ids[0]] if stops else ids)
            value = float(logps(self.policy, [(request.prompt_ids, ids)])[0])
            found.append(Sampled(ids, value, "stop" if stops else "length"))
        return found

    def close(self) -> None:
        """Holds nothing."""


def item_scores(
    policy: Path, _: Any, tasks: Sequence[Any], limit: int | None, *__: Any
) -> list[dict[str, Any]]:
    """Stands in for the harness: a policy's scores on ten items of each task."""
    return [
        {"task": task.name, "item": n, "score": float(drawn(number_of(policy), task.name, n).random() < 0.5)}
        for task in tasks
        for n in range(limit or 10)
    ]


def numbered_start(attempt: Attempt) -> list[str]:
    """Stands in for fine-tuning: the model's files under another number."""
    model = attempt.input("model").folder("policy")
    for path in sorted(model.iterdir()):
        attempt.write(f"policy/{path.name}").write_bytes(path.read_bytes())
    attempt.write(f"policy/{MARK}").write_text("fine-tuned")
    return [f"policy/{name}" for name in [*sorted(path.name for path in model.iterdir()), MARK]]


def numbered_policy(attempt: Attempt) -> list[str]:
    """Stands in for training: the start policy's files under a number of the mixture's."""
    start = attempt.input("start").folder("policy")
    names = [path.name for path in sorted(start.iterdir()) if path.name != MARK]
    for name in names:
        attempt.write(f"policy/{name}").write_bytes((start / name).read_bytes())
    mixture = content(attempt.input("mixture").path("mixture.parquet"))
    attempt.write(f"policy/{MARK}").write_text(_sha(mixture))
    attempt.write("log.jsonl").write_text("")
    attempt.metrics |= {"train_loss": 0.5, "tokens/trained": 100, "steps": 1, "pairs": 8}
    return [*(f"policy/{name}" for name in [*names, MARK]), "log.jsonl"]


@contextmanager
def numbers_from_hashes() -> Iterator[None]:
    """Replace what a model computes; all else is the product's own."""
    with (
        patch("sera_core.models.logprobs.sequence_logps", logps),
        patch(
            "sera_core.models.logprobs.plain_sequence_logps",
            lambda policy, items: logps(policy, items) + 1e-6,
        ),
        patch("tasks.scoring.shared_policy", lambda folder, *_: folder),
        patch("tasks.sampling.shared_policy", lambda folder, *_: folder),
        patch("tasks.capabilities.shared_policy", lambda folder, *_: folder),
        patch("tasks.capabilities.harness_scores", item_scores),
        patch("tasks.sampling.open_sampler", lambda engine, policy, **_: HashSampler(policy)),
        patch.dict(
            step_functions.WORK,
            {"train": "golden.table:numbered_policy", "sft": "golden.table:numbered_start"},
        ),
    ):
        yield


# ------------------------------------------------------------------------------------------------ the entries


def content(path: Path) -> Any:
    """What a file says, whatever library wrote it; numbers to nine digits."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        return {"schema": str(table.schema.remove_metadata()), "rows": _plain(table.to_pylist())}
    if path.suffix == ".json":
        return _plain(json.loads(path.read_text()))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(held) for name, held in value.items() if name != "transformers_version"}
    if isinstance(value, list):
        return [_plain(held) for held in value]
    return f"{value:.9g}" if isinstance(value, float) else value


PLACES = ("source_digest",)
"""Fields that depend on the libraries' way of writing a model's files."""


def _sha(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Entries:
    """By step: what a record's fields and inputs say -> what its files say, both as hashes."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.found: dict[str, dict[str, str]] = {}
        self._outputs: dict[str, str] = {}

    def add(self, ref: StepRef) -> str:
        """Add a step and those it was made from; the hash of its output."""
        if ref.key not in self._outputs:
            artifact = Artifact(self.store, ref)
            record = artifact.record
            inputs = {name: self.add(other) for name, other in record.inputs.items()}
            fields = {name: value for name, value in record.fields.items() if name not in PLACES}
            output = _sha({name: content(artifact.path(name)) for name in sorted(record.files)})
            self._outputs[ref.key] = output
            if ref.step not in TRAINED:  # its work is another's here
                self.found.setdefault(ref.step, {})[_sha([fields, inputs])] = output
        return self._outputs[ref.key]


def entries(folder: Path) -> dict[str, dict[str, str]]:
    """Do the fixed run; its entries by step."""
    tiny.tiny_policy(folder / "policy", scale=0.0)
    side = tinyrun.write_rows(folder / "test.jsonl", [pair | {"id": 1} for pair in tinyrun.pairs(8, seed=5)])
    rows = tinyrun.pairs(32)
    tinyrun.write_rows(folder / "pairs.jsonl", [*rows, rows[3], rows[4] | {"rejected": rows[4]["chosen"]}])
    data = {"test": [{"path": str(side)}], "on_overlap": "keep"}
    config = tinyrun.config(folder, data=data, decide={"min_pairs": 4, "on_alarm": "record"})
    rated = tinyrun.config(folder, data=data, pairing={"by": "word-count"}, limits={"rounds": 2})
    win_rate = {"metric": "win-rate", "judge": "word-count", "uncalibrated": "allow"}
    task = str(Path(__file__).parents[1] / "fixtures" / "harness" / "sums.yaml")
    judged = tinyrun.config(
        folder, data=data, decide=win_rate, evaluate={"harness": [task]}, limits={"rounds": 2}
    )
    answers = [{**row, "response": f"{word} it is", "rating": n, "chosen": None, "rejected": None}
               for row in rows for n, word in enumerate(("no", "yes"))]  # fmt: skip
    file = tinyrun.write_rows(folder / "rated.jsonl", answers)
    from_file = tinyrun.config(folder, data=data, pairing={"by": f"file:{file}"}, limits={"rounds": 2})
    chats = tinyrun.write_rows(folder / "chats.jsonl", conversations(8))
    tuned = tinyrun.config(folder, data=data, start={"sft": str(chats)}, limits={"rounds": 1})
    with numbers_from_hashes():
        started = tinyrun.work(tuned, folder / "store", "tuned").rounds()[0]
        records = tinyrun.work(config, folder / "store")
        other = tinyrun.work(rated, folder / "store", "rated").rounds()[1]
        given = tinyrun.work(from_file, folder / "store", "given").rounds()[1]
        by_judge = tinyrun.work(judged, folder / "store", "judged").rounds()[1]
    found = Entries(records.store)
    for manifest in records.rounds():
        for ref in manifest.steps.values():
            if ref is not None:
                found.add(ref)
    for role in ("ratings", "responses"):
        found.add(other.steps[role])
        found.add(given.steps[role])
    found.add(by_judge.steps["decision"])
    found.add(started.steps["model"])
    tested = [held for round in records.rounds() if (held := records.test_evidence(round.round)) is not None]
    found.add(StepRef.model_validate(tested[0]["step"]))
    return found.found


def conversations(count: int) -> list[dict[str, Any]]:
    """Conversations of two questions and answers."""
    turns = [
        ("user", "Why {}?"),
        ("assistant", "so {}"),
        ("user", "And then {}?"),
        ("assistant", "no {} more"),
    ]
    return [
        {"messages": [{"role": role, "content": text.format(n)} for role, text in turns]}
        for n in range(count)
    ]


def training(folder: Path) -> list[dict[str, float]]:
    """The log of a few real optimizer steps."""
    bench = Bench(folder)
    return bench.log(bench.run(bench.spec(bench.mixture(), TrainConfig(batch=4))))


def tuning(folder: Path) -> list[dict[str, float]]:
    """The log of a few real steps of fine-tuning."""
    bench = Bench(folder)
    return bench.log(bench.run(bench.tuning(batch=4), work=fine_tune))


# -------------------------------------------------------------------------------------------------- the table


def changed(kept: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What is wrong: steps whose output changed under their version, and what the table lacks."""
    return [
        problem
        for step, version in now["versions"].items()
        if (problem := _problem(step, version, kept, now)) is not None
    ]


def silent(kept: dict[str, Any], now: dict[str, Any], step: str) -> bool:
    """Whether a step writes something else from the same inputs."""
    if step in TRAINED:
        return not _close(kept[step], now[step])
    before, after = kept["entries"].get(step, {}), now["entries"].get(step, {})
    return any(before[inputs] != after[inputs] for inputs in before.keys() & after.keys())


def _problem(step: str, version: int, kept: dict[str, Any], now: dict[str, Any]) -> str | None:
    if silent(kept, now, step) and version == kept["versions"].get(step):
        return (
            f"step {step} writes something else from the same inputs under version {version}: raise "
            f"VERSIONS[{step!r}] in sera_core/steps.py to {version + 1}, then `make golden`"
        )
    same = step in TRAINED or kept["entries"].get(step) == now["entries"].get(step)
    if not same or version != kept["versions"].get(step):
        return f"step {step}: the table is of an earlier state; renew it with `make golden`"
    return None


def _close(kept: list[dict[str, float]], now: list[dict[str, float]]) -> bool:
    return len(kept) == len(now) and all(
        one.keys() == other.keys()
        and all(math.isclose(one[name], other[name], rel_tol=1e-3, abs_tol=1e-4) for name in one)
        for one, other in zip(kept, now, strict=True)
    )


def current(folder: Path) -> dict[str, Any]:
    """The table as this version of the project makes it."""
    return {
        "versions": dict(VERSIONS),
        "entries": entries(folder / "run"),
        "train": training(folder / "train"),
        "sft": tuning(folder / "sft"),
    }


def renew() -> int:
    """Write the table, unless a step's output changed under its version."""
    with tempfile.TemporaryDirectory() as folder:
        now = current(Path(folder))
    kept = now | (json.loads(FILE.read_text()) if FILE.exists() else {})
    problems = [problem for problem in changed(kept, now) if "raise" in problem]
    if problems:
        sys.stderr.write("\n".join(problems) + "\n")
        return 1
    FILE.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(renew())
