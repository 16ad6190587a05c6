"""What the laboratory's policies answer: their sentences, and how often a classifier calls them positive."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from flows.compare import Runs, trained_rounds
from flows.evaluation import answers_of, evidence_of
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.runs import RunStore
from sera_core.judges.reviews import positive
from sera_core.method.features import sentences
from sera_core.method.win_rates import Rate, bootstrap_interval

SETTINGS = ["evaluate.prompts=50", "evaluate.responses=4", "evaluate.max_tokens=96"]
"""As for `--set`: what is sampled where the answers are compared."""
Measured = dict[str, Rate]
"""`sentences`: mean number an answer; `positive`: share of the answers. Intervals by prompt."""


@dataclass(frozen=True)
class LabAnswers:
    """Answers of the last round of each run, and of its round 0, which is the same in all arms."""

    last: Mapping[str, Mapping[int, Measured]]
    first: Mapping[str, Mapping[int, Measured]]


def lab_answers(runs: Runs) -> LabAnswers:
    """Measure the answers to the held-out prompts."""

    def measured(place: int) -> dict[str, dict[int, Measured]]:
        return {
            arm: {seed: _measured(records, place) for seed, records in by_seed.items()}
            for arm, by_seed in runs.items()
        }

    return LabAnswers(measured(-1), measured(0))


def answers_in_words(found: LabAnswers) -> Iterator[str]:
    """The lines below the laboratory's table."""
    arms = list(found.last)
    for name, what in (("sentences", "Sentences an answer"), ("positive", "Share of positive answers")):
        told = [f"round 0 {_mean(found.first[arms[0]], name):.3f}"]
        told += [f"{arm} {_mean(found.last[arm], name):.3f}" for arm in arms]
        yield f"{what}: {', '.join(told)}."


def _mean(by_seed: Mapping[int, Measured], name: str) -> float:
    return float(np.mean([measured[name].value for measured in by_seed.values()]))


def _measured(records: RunStore, place: int) -> Measured:
    number = trained_rounds(records)[place].round
    samples = Artifact(records.store, answers_of(evidence_of(records, number)).samples)
    rows = list(schema.iter_rows(samples.path("responses.parquet"), ["prompt_id", "response"]))
    _, groups = np.unique([row["prompt_id"] for row in rows], return_inverse=True)
    texts = [row["response"] for row in rows]
    values = {
        "sentences": [sentences("", text) for text in texts],
        "positive": [float(positive("", text) > 0) for text in texts],
    }
    return {name: bootstrap_interval(np.array(v), seed=0, groups=groups) for name, v in values.items()}
