"""What a decision by win rate compares: a round's answers to held-out prompts beside the start policy's.

The opponent is the same in every round, so two rounds are compared answer by answer, as on held-out pairs.
"""

import numpy as np

from sera_core.artifacts import schema
from sera_core.artifacts.step import Attempt
from sera_core.compared_rounds import PROMOTED, Scores
from sera_core.judges.verdicts import told
from sera_core.method.best import choosing_half
from sera_core.method.convergence import Heldout
from sera_core.reviewers import numbered_groups

VERDICTS = "verdicts"
Outcomes = dict[tuple[str, int], float]
"""(prompt_id, sample) -> 1 the round's answer wins, 0.5 a tie, 0 it loses."""


def compared_answers(attempt: Attempt) -> Scores:
    """The answers that the judge gave a verdict on in this round and in every promoted one.

    A comparison that failed is left out in all rounds: it is no win, no loss and no tie.
    """
    asked, now = _outcomes(attempt, VERDICTS)
    promoted = {
        int(name.removeprefix(PROMOTED)): _outcomes(attempt, name.replace(PROMOTED, f"{VERDICTS}-"))[1]
        for name in sorted(attempt.spec.inputs)
        if name.startswith(PROMOTED)
    }
    common = sorted(set(now).intersection(*promoted.values()))
    prompts = [prompt for prompt, _ in common]
    # All prompts are halved, so that a failure moves no other prompt.
    kinds = sorted({prompt for prompt, _ in asked})
    halves = dict(zip(kinds, choosing_half(kinds, attempt.fields["split_seed"]), strict=True))
    chooses = np.array([halves[prompt] for prompt in prompts], dtype=bool)
    return Scores(
        _values(now, common),
        {number: _values(outcomes, common) for number, outcomes in promoted.items()},
        Heldout(np.zeros(len(common)), numbered_groups(prompts), chooses),
        len(asked) - len(common),
    )


def _outcomes(attempt: Attempt, name: str) -> tuple[set[tuple[str, int]], Outcomes]:
    """What the judge was asked about, and the outcomes it gave."""
    path = attempt.input(name).path("verdicts.parquet")
    rows = schema.read_table(path, schema.VERDICTS).to_pylist()
    found = told(rows)
    keys = [(prompt, sample) for prompt, _, sample in found.keys]
    asked = {(row["prompt_id"], row["sample"]) for row in rows}
    return asked, dict(zip(keys, found.judged.outcomes.tolist(), strict=True))


def _values(outcomes: Outcomes, common: list[tuple[str, int]]) -> np.ndarray:
    return np.array([outcomes[key] for key in common], dtype=np.float64)
