"""Decide about a round: promote, hold, roll back or stop, from the evidence of all promoted rounds."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import finite
from sera_core.artifacts.run_records import BEST, HEAD
from sera_core.artifacts.step import Attempt
from sera_core.compared_answers import compared_answers
from sera_core.compared_rounds import (
    ComparedRounds,
    Scores,
    TrainPairs,
    changes_since_head,
    compared_rounds,
    train_pairs,
)
from sera_core.method.alarm import PanelAlarm, panel_alarm
from sera_core.method.best import Best, best_of
from sera_core.method.capabilities import capability_changes, lost
from sera_core.method.convergence import (
    Comparison,
    Rule,
    Verdict,
    compare_round,
    quantity_for,
    score_of,
    score_words,
)
from sera_core.method.decisions import Decision, RunState, decide, decide_round, run_state
from sera_core.method.estimates import Estimate
from sera_core.method.panel import TOKENS
from sera_core.method.reliance import reliance_changes
from sera_core.method.selected import selected

UNLIMITED = 10**9
"""A decision never records `max_rounds`: the run adds it, so that raising its limits continues the run."""
CHANGES = ("reliance", "balanced")
"""Quantities of every feature of the panel that are compared with earlier rounds."""


@dataclass(frozen=True)
class Result:
    """The verdict and the decision on a round."""

    verdict: Verdict
    quantity: str
    score: Estimate
    comparison: Comparison | None
    """None in the first round, which has nothing to be compared with."""
    decision: Decision
    head: int | None
    """The head after the decision."""
    best: Best | None
    """The best promoted round after the decision; None if none was promoted."""


def decide_on_round(attempt: Attempt) -> list[str]:
    """Write decision.json: the decision with its reason, the verdict and its evidence, and the alarm."""
    state = run_state([(entry["decision"], entry["head"]) for entry in attempt.fields["history"]])
    compared, changes = compared_rounds(attempt), changes_since_head(attempt)
    train = train_pairs(attempt.input) if state.lineage else None
    alarm = None if train is None else _alarm(attempt, compared, state, train)
    by_win_rate = attempt.fields["metric"] == "win-rate"
    scores = compared_answers(attempt) if by_win_rate else compared.scores
    result = _result(attempt, scores, state, changes, alarm)
    content = _content(attempt, result, scores, changes, alarm)
    content |= {"changes": _feature_changes(attempt, compared)}
    content |= {"selection": _selection(attempt, train), **_judge(attempt)}
    if capabilities := _capabilities(attempt):
        content["capabilities"] = {task: asdict(change) for task, change in capabilities.items()}
    text = json.dumps(finite(content), indent=1, sort_keys=True)
    attempt.write("decision.json").write_text(text + "\n")
    attempt.metrics |= {
        **asdict(result.decision),
        **changes,
        "verdict": result.verdict.name,
        "verdict_reason": result.verdict.reason,
        "alarm": None if alarm is None else alarm.state,
        "alarm_reason": None if alarm is None else alarm.sentence,
        "ask": attempt.fields["answer"] is None and _needs_review(attempt, alarm),
        "score": _rate(result.score),
        "score_metric": result.quantity,
        "since_round_0": None if result.comparison is None else _rate(result.comparison.since_first),
        BEST: None if result.best is None else result.best.round,
        "best_reason": None if result.best is None else result.best.sentence,
        HEAD: result.head,
    }
    return ["decision.json"]


def _content(
    attempt: Attempt,
    result: Result,
    scores: Scores,
    changes: Mapping[str, float | None],
    alarm: PanelAlarm | None,
) -> dict[str, Any]:
    fields, comparison = attempt.fields, result.comparison
    metrics = attempt.input("evidence").record.metrics
    against = None if comparison is None else {n: asdict(c) for n, c in comparison.against.items()}
    verdict = {"name": result.verdict.name, "reason": result.verdict.reason}
    return {
        **asdict(result.decision),
        **{name: fields[name] for name in ("round", "answer", "metric", "feature")},
        "head": result.head,
        "verdict": {**verdict, "thresholds": asdict(_rule(attempt))},
        "quantity": result.quantity,
        "score": asdict(result.score),
        "against": against,
        "since_round_0": None if comparison is None else asdict(comparison.since_first),
        "trend": None if comparison is None or comparison.trend is None else asdict(comparison.trend),
        "best": None if result.best is None else asdict(result.best),
        "pairs": {"compared": len(scores.now), "left_out": scores.left_out},
        "alarm": None if alarm is None else {**asdict(alarm), "state": alarm.state},
        "signals": {
            "accuracy": metrics["heldout/rewards/accuracies"],
            "accuracy_change": None if comparison is None else metrics["heldout/accuracy_change"],
            **changes,
        },
    }


def _capabilities(attempt: Attempt) -> dict[str, Estimate]:
    """Each capability task's paired change against the start policy."""
    if "capabilities" not in attempt.spec.inputs:
        return {}
    now, start = (_scores_of(attempt, name) for name in ("capabilities", "start_capabilities"))
    return capability_changes(now, start, seed=attempt.fields["seed"], resamples=attempt.fields["resamples"])


def _scores_of(attempt: Attempt, name: str) -> dict[str, np.ndarray]:
    """Scores by task, in the order of the items."""
    found: dict[str, list[float]] = {}
    for row in schema.iter_rows(attempt.input(name).path("harness.parquet"), ["task", "score"]):
        found.setdefault(row["task"], []).append(row["score"])
    return {task: np.array(scores) for task, scores in found.items()}


def _judge(attempt: Attempt) -> dict[str, Any]:
    """The judge that decided by win rate, and how well it agrees with the labels of the held-out pairs."""
    if "calibration" not in attempt.spec.inputs:
        return {}
    record = attempt.input("calibration").record
    return {"judge": record.fields["judge"] | {"calibration": record.metrics}}


def _feature_changes(attempt: Attempt, compared: ComparedRounds) -> dict[str, dict[str, dict[str, Any]]]:
    """Paired change of each feature's reliance and balanced accuracy against every promoted round."""
    kept = np.isfinite(compared.margins)
    before = {str(number): margins[kept] for number, margins in compared.promoted.items()}
    if not before:
        return {}
    found = {}
    for name in attempt.fields["panel"]:
        changed = reliance_changes(
            compared.differences[name][kept],
            compared.margins[kept],
            before,
            compared.heldout.groups[kept],
            seed=attempt.fields["seed"],
            resamples=attempt.fields["resamples"],
        )
        found[name] = {
            quantity: {number: asdict(change) for number, change in changed[quantity].items()}
            for quantity in CHANGES
        }
    return found


def _selection(attempt: Attempt, train: TrainPairs | None) -> dict[str, Any]:
    """Each feature's share and its correlation with the margin, before and after the selection."""
    if train is None:
        return {}
    rows = np.isfinite(train.margins)
    return {
        name: asdict(
            selected(
                train.differences[name][rows],
                train.margins[rows],
                train.kept[rows],
                train.differences[TOKENS][rows],
                train.groups[rows],
                seed=attempt.fields["seed"],
                resamples=attempt.fields["resamples"],
            )
        )
        for name in attempt.fields["panel"]
    }


def _rule(attempt: Attempt) -> Rule:
    fields = attempt.fields
    return Rule(
        metric=fields["metric"],
        tolerance=fields["min_effect"],
        min_effect=fields["min_effect"],
        min_prompts=fields["min_pairs"],
        min_overlap=fields["min_overlap"],
        max_ks=fields["max_ks"],
        resamples=fields["resamples"],
    )


def _result(
    attempt: Attempt,
    scores: Scores,
    state: RunState,
    changes: Mapping[str, float | None],
    alarm: PanelAlarm | None,
) -> Result:
    fields, rule = attempt.fields, _rule(attempt)
    answer = fields["answer"]
    settings: dict[str, Any] = {
        "round": fields["round"],
        "patience": fields["patience"],
        "max_rounds": UNLIMITED,
        "reviewer": None if answer is None else answer["decision"],
        "alarm": alarm is not None and bool(alarm.raised),
        "on_alarm": "hold" if fields["on_alarm"] == "hold" else "ignore",
        "lost": lost(_capabilities(attempt), fields["min_effect"]),
    }
    if not state.lineage:
        return _first_result(attempt, scores, rule, settings)
    comparison = compare_round(
        scores.now,
        scores.before,
        state.lineage,
        scores.heldout,
        rule,
        seed=fields["seed"],
        overlap=changes["overlap"],
        ks=changes["ks"],
    )
    decision, head = decide_round(comparison, state, **settings)
    best = _best(attempt, scores, state, decision, comparison.quantity)
    return Result(comparison.verdict, comparison.quantity, comparison.score, comparison, decision, head, best)


def _first_result(attempt: Attempt, scores: Scores, rule: Rule, settings: Mapping[str, Any]) -> Result:
    """The first round becomes the head, unless a person stops the run."""
    quantity = quantity_for(scores.heldout.difference, rule)
    score = score_of(scores.now, scores.heldout, quantity, rule, seed=attempt.fields["seed"])
    verdict = Verdict(False, "not_enough_evidence", "there is no earlier head to compare with", {})
    decision = decide(
        verdict=verdict,
        score=score_words(quantity, score),
        held_in_a_row=0,
        rolled_back=False,
        **settings,
    )
    head = attempt.fields["round"] if decision.decision == "promote" else None
    best = _best(attempt, scores, run_state([]), decision, quantity)
    return Result(verdict, quantity, score, None, decision, head, best)


def _best(
    attempt: Attempt, scores: Scores, state: RunState, decision: Decision, quantity: str
) -> Best | None:
    promoted = {number: scores.before[number] for number in state.promoted}
    if decision.decision == "promote":
        promoted[attempt.fields["round"]] = scores.now
    if not promoted:
        return None
    heldout = scores.heldout
    return best_of(
        promoted,
        heldout.difference,
        heldout.groups,
        heldout.chooses,
        quantity,
        seed=attempt.fields["seed"],
        resamples=attempt.fields["resamples"],
    )


def _rate(estimate: Estimate) -> dict[str, Any]:
    """An estimate as records hold rates."""
    rate = asdict(estimate.rate)
    return finite({name: round(v, 6) if isinstance(v, float) else v for name, v in rate.items()})


def _alarm(attempt: Attempt, compared: ComparedRounds, state: RunState, train: TrainPairs) -> PanelAlarm:
    """Whether training on the kept pairs made the policy rely more on a feature since the last head."""
    panel = attempt.fields["panel"]
    return panel_alarm(
        heldout={name: compared.differences[name] for name in panel},
        train={name: train.differences[name] for name in panel},
        correct_now=compared.now,
        correct_head=compared.before[state.lineage[-1]],
        correct_random=None,
        kept=train.kept,
        heldout_groups=compared.heldout.groups,
        train_groups=train.groups,
        seed=attempt.fields["seed"],
    )


def _needs_review(attempt: Attempt, alarm: PanelAlarm | None) -> bool:
    review = attempt.fields["review"]
    return review == "always" or (review == "alarm" and alarm is not None and bool(alarm.raised))
