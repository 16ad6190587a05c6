"""The fine-tuning before round 0 (`start.sft`), from the records of its steps."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flows.display.dropped import reasons
from sera_core.artifacts.manifest import Artifact, StepRecord, find_record
from sera_core.artifacts.run_records import SFT
from sera_core.artifacts.runs import RunStore
from sera_core.config import CHOSEN

COUNTED = ("read", "kept")
"""Counts of the steps that are not reasons."""


@dataclass(frozen=True)
class FineTuned:
    """What the model was fine-tuned on, and how its loss went."""

    source: str
    examples: int
    """Sequences in one epoch."""
    dropped: Mapping[str, int]
    """Conversations (or chosen answers) left out, by reason."""
    losses: list[float]
    """Mean negative log-likelihood of the answer tokens, in nats, by optimizer step."""
    log: str
    """URI of log.jsonl."""

    @property
    def words(self) -> str:
        """All of it in one sentence."""
        what = "the chosen answers of the train pairs" if self.source == CHOSEN else self.source
        left = f" Left out: {reasons(Counter(self.dropped))}." if self.dropped else ""
        return (
            f"Before round 0 the model was fine-tuned on {what}: {self.examples:,} sequences, "
            f"{len(self.losses):,} steps; the loss went from {self.losses[0]:.3f} to {self.losses[-1]:.3f} "
            f"nats per answer token.{left}"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """The same for `--json`."""
        return {
            "source": self.source,
            "examples": self.examples,
            "dropped": dict(self.dropped),
            "steps": len(self.losses),
            "first_loss": self.losses[0],
            "last_loss": self.losses[-1],
            "log": self.log,
        }


def fine_tuning(records: RunStore) -> FineTuned | None:
    """The fine-tuning of a run; None without one, before round 0 is finished, or if a record is gone."""
    rounds = records.rounds()
    model = rounds[0].steps.get("model") if rounds else None
    if model is None or model.step != SFT:
        return None
    record = find_record(records.store, model.step, model.key)
    examples = None if record is None else _input(records, record, "examples")
    if record is None or examples is None:
        return None
    read = [examples, _input(records, examples, "messages") if "messages" in examples.inputs else None]
    dropped = Counter[str]()
    for step in (step for step in read if step is not None):
        dropped.update({name: count for name, count in step.counts.items() if name not in COUNTED})
    lines = Artifact(records.store, model).path("log.jsonl").read_text().splitlines()
    file = record.files["log.jsonl"]
    return FineTuned(
        records.configs()[-1].settings.start.sft,
        record.counts["examples"],
        dict(sorted(dropped.items())),
        [json.loads(line)["loss"] for line in lines],
        f"{records.store.url}/steps/{record.step}/{record.key}/{file.attempt}/log.jsonl",
    )


def _input(records: RunStore, record: StepRecord, name: str) -> StepRecord | None:
    ref = record.inputs[name]
    return find_record(records.store, ref.step, ref.key)
