"""Score a policy on capability tasks, so that a round that forgets something is seen."""

import tempfile
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import finite
from sera_core.artifacts.step import Attempt
from sera_core.data.harness_tasks import HarnessTask, read_tasks
from sera_core.errors import SeraError
from sera_core.method.win_rates import bootstrap_interval
from sera_core.models.devices import device_of
from sera_core.models.policies import load_tokenizer
from sera_core.models.shared_policies import shared_policy
from tasks.engines.harness import harness_scores

HARNESS = "harness.parquet"


def score_capabilities(attempt: Attempt) -> list[str]:
    """Write harness.parquet: the score of each item of each task.

    Raises:
        SeraError: a task file changed since the run was started.
        InputError: a task that cannot be run.
    """
    tasks = _tasks(attempt)
    policy = shared_policy(
        attempt.input("policy").folder("policy"),
        attempt.fields["dtype"],
        device_of(attempt.execution.device),
        attempt.input("model").folder("policy"),
    )
    tokenizer = load_tokenizer(attempt.input("policy").folder("policy"))
    with tempfile.TemporaryDirectory(prefix="sera-harness-") as scratch:
        rows = harness_scores(
            policy, tokenizer, tasks, attempt.fields["items"], Path(scratch), attempt.progress
        )
    schema.write_table(schema.from_rows(schema.HARNESS, rows), attempt.write(HARNESS))
    scores = defaultdict(list)
    for row in rows:
        scores[row["task"]].append(row["score"])
    for name, held in scores.items():
        attempt.counts[f"items/{name}"] = len(held)
        attempt.metrics[f"harness/{name}"] = finite(asdict(bootstrap_interval(np.array(held), seed=0)))
    return [HARNESS]


def _tasks(attempt: Attempt) -> list[HarnessTask]:
    """The tasks, as they were when the run was started."""
    tasks = read_tasks(attempt.spec.where["tasks"])
    now = [{"task": task.name, "digest": task.digest} for task in tasks]
    if now != attempt.fields["tasks"]:
        raise SeraError(
            "a task file of evaluate.harness, or its data, is not the one that this run was started with; "
            "restore it, or start a run under a new name"
        )
    return tasks
