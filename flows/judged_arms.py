"""Compare arms by an independent judge: pairwise win rates, and all of them on one scale.

The answers are those of each run's last round to the same held-out prompts; arms are compared seed by seed.
Verdicts are steps of the store, so nothing is asked twice. Nothing here decides about a round.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from flows.compare import Runs, trained_rounds
from flows.evaluation import (
    JudgedAnswers,
    Tell,
    answers_of,
    calibration_of,
    evidence_of,
    judged_answers,
)
from sera_core.config import SeraConfig
from sera_core.errors import InputError
from sera_core.judges.named import NamedJudge
from sera_core.judges.verdicts import Item
from sera_core.method.bradley_terry import strengths
from sera_core.method.features import bold, headings, list_items, words
from sera_core.method.judged import RESAMPLES, SEED, Judged, order_flips, ties, wins, wins_at_equal_length
from sera_core.method.win_rates import Rate

STYLE = (words, headings, list_items, bold)
"""Features of an answer that style control holds equal."""


@dataclass(frozen=True)
class ArmPair:
    """Two arms, over all seeds: how often the first one's answers are preferred."""

    first: str
    second: str
    win_rate: Rate
    equal_length: Rate
    ties: Rate
    order_flips: Rate
    failed: int
    """Comparisons without a verdict."""


@dataclass(frozen=True)
class JudgedArms:
    """What a judge says of the arms of a comparison."""

    judge: str
    calibration: Mapping[str, Any]
    arms: list[str]
    pairs: list[ArmPair]
    strengths: dict[str, Rate]
    """Expected win rate against the first arm, from all pairs of arms together (Bradley–Terry)."""
    at_equal_style: dict[str, Rate]
    """The same with STYLE held equal."""


def check_judged(config: SeraConfig) -> None:
    """Refuse an experiment whose rounds answer no held-out prompts.

    Raises:
        InputError: evaluate.prompts is 0.
    """
    if config.evaluate.prompts == 0:
        raise InputError(
            "--judge compares answers to held-out prompts, but evaluate.prompts = 0; set it above 0"
        )


def judge_arms(runs: Runs, named: NamedJudge, limit: int | None, tell: Tell) -> JudgedArms:
    """Ask a judge about every pair of arms, under every seed.

    Args:
        runs: finished runs.
        named: the judge.
        limit: compare the answers to this many prompts; None: all.
        tell: called with what this process waits for.

    Raises:
        SeraError: the judge failed more often than it answered.
    """
    arms = list(runs)
    store = next(iter(runs[arms[0]].values())).store
    pairs, asked = [], list[_Asked]()
    for one, other in combinations(range(len(arms)), 2):
        answers = []
        for seed, records in runs[arms[one]].items():
            both = [evidence_of(r, trained_rounds(r)[-1].round) for r in (records, runs[arms[other]][seed])]
            one_side, other_side = map(answers_of, both)
            answers.append(judged_answers(store, one_side, other_side, named, limit, tell))
        asked += [_Asked(one, other, found) for found in answers]
        pairs.append(_pair(arms[one], arms[other], answers))
    plain, styled = _strengths(len(arms), asked)
    return JudgedArms(
        named.name,
        calibration_of(store, named),
        arms,
        pairs,
        dict(zip(arms, plain, strict=True)),
        dict(zip(arms, styled, strict=True)),
    )


@dataclass(frozen=True)
class _Asked:
    """The comparisons of two arms (by number) under one seed."""

    first: int
    second: int
    answers: JudgedAnswers

    @property
    def style(self) -> np.ndarray:
        """STYLE of the first answers less that of the second, of the comparisons with verdicts."""
        by_key = {(item.prompt_id, item.pair_id, item.sample): item for item in self.answers.items}
        rows = [_style(by_key[key]) for key in self.answers.told.keys]
        return np.array(rows, dtype=np.float64).reshape(-1, len(STYLE))

    @property
    def prompts(self) -> list[str]:
        """Prompt of each of these comparisons."""
        return [key[0] for key in self.answers.told.keys]


def _style(item: Item) -> list[float]:
    return [feature("", item.first) - feature("", item.second) for feature in STYLE]


def _pair(first: str, second: str, answers: Sequence[JudgedAnswers]) -> ArmPair:
    prompts = [key[0] for found in answers for key in found.told.keys]
    judged = _together([found.told.judged for found in answers], prompts)
    asked = np.concatenate([found.told.asked for found in answers])
    return ArmPair(
        first,
        second,
        wins(judged),
        wins_at_equal_length(judged),
        ties(judged),
        order_flips(judged.only(asked)),
        sum(sum(found.told.failed.values()) for found in answers),
    )


def _together(every: Sequence[Judged], prompts: Sequence[str]) -> Judged:
    """The comparisons of all seeds; a prompt is one group under all of them."""
    groups = np.unique(np.array(prompts, dtype=np.str_), return_inverse=True)[1].astype(np.int64)
    return Judged(
        np.concatenate([judged.given for judged in every]),
        np.concatenate([judged.swapped for judged in every]),
        np.concatenate([judged.length_difference for judged in every]),
        groups,
    )


def _strengths(arms: int, asked: Sequence[_Asked]) -> tuple[list[Rate], list[Rate]]:
    """Expected win rates against arm 0, plain and at equal style."""
    sizes = [len(found.prompts) for found in asked]
    first = np.repeat(np.array([found.first for found in asked], dtype=np.int64), sizes)
    second = np.repeat(np.array([found.second for found in asked], dtype=np.int64), sizes)
    prompts = [prompt for found in asked for prompt in found.prompts]
    judged = _together([found.answers.told.judged for found in asked], prompts)
    style = np.concatenate([found.style for found in asked])

    def fitted(style: np.ndarray | None) -> list[Rate]:
        return strengths(
            first,
            second,
            judged.outcomes,
            arms,
            style,
            groups=judged.groups,
            seed=SEED,
            resamples=RESAMPLES,
        )

    return fitted(None), fitted(style)
