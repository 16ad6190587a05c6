"""Decide about a round: promote, hold, roll back or stop, from this round's evidence and the head's."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import finite
from sera_core.artifacts.step import Attempt
from sera_core.method.convergence import Decision, Signals, Verdict, accuracy_falls, decide, verdict
from sera_core.method.diagnostics import (
    Alarm,
    amplification_alarm,
    correctness,
    jaccard,
    ks_distance,
    sign_changes,
)
from sera_core.method.win_rates import Rate
from sera_core.reviewers import prompt_groups

UNLIMITED = 10**9
"""`max_rounds` is no decision about a round: the run derives it from its limits; raising them re-opens it."""


def decide_round(attempt: Attempt) -> list[str]:
    """Write decision.json: the decision, its reason, the signals, the verdict and the alarm."""
    signals = _signals(attempt)
    alarm = _alarm(attempt)
    found = _verdict(attempt, signals)
    decision = _decide(attempt, signals, found, alarm is not None and alarm.raised)
    ask = attempt.fields["answer"] is None and _wants_review(attempt, alarm)
    result = {
        "round": attempt.fields["round"],
        "decision": decision.decision,
        "reason": decision.reason,
        "stop_reason": decision.stop_reason,
        "answer": attempt.fields["answer"],
        "verdict": {
            "name": found.name,
            "reason": found.reason,
            "thresholds": found.evidence.get("thresholds"),
        },
        "alarm": None if alarm is None else asdict(alarm),
        "signals": asdict(signals),
    }
    text = json.dumps(finite(result), indent=1, sort_keys=True)
    attempt.write("decision.json").write_text(text + "\n")
    attempt.metrics |= {
        "decision": decision.decision,
        "reason": decision.reason,
        "stop_reason": decision.stop_reason,
        "verdict": found.name,
        "alarm": None if alarm is None else alarm.reason,
        "ask": ask,
        "overlap": signals.overlap,
        "ks": signals.ks,
        "sign_changes": signals.sign_changes,
    }
    return ["decision.json"]


def _decide(attempt: Attempt, signals: Signals, found: Verdict, alarm: bool) -> Decision:
    history = attempt.fields["history"]
    promoted = [
        entry["accuracy"]
        for entry in history
        if entry["decision"] == "promote" and entry["accuracy"] is not None
    ]
    best = max(promoted, default=None)
    head = attempt.fields["head_accuracy"]
    answer = attempt.fields["answer"]
    return decide(
        round=attempt.fields["round"],
        verdict=found,
        accuracy=signals.accuracy.value,
        best_accuracy=best,
        held_in_a_row=_held(history),
        patience=attempt.fields["patience"],
        rolled_back=any(entry["decision"] == "roll_back" for entry in history),
        max_rounds=UNLIMITED,
        reviewer=None if answer is None else answer["decision"],
        alarm=alarm,
        on_alarm="hold" if attempt.fields["on_alarm"] == "hold" else "ignore",
        head_is_best=best is not None and head == best,
    )


def _held(history: list[dict[str, Any]]) -> int:
    count = 0
    for entry in reversed(history):
        if entry["decision"] != "hold":
            break
        count += 1
    return count


def _wants_review(attempt: Attempt, alarm: Alarm | None) -> bool:
    wanted = attempt.fields["review"]
    return wanted == "always" or (wanted == "alarm" and alarm is not None and alarm.raised)


def _verdict(attempt: Attempt, signals: Signals) -> Verdict:
    fields = attempt.fields
    found = verdict(
        signals, min_effect=fields["min_effect"], min_overlap=fields["min_overlap"], max_ks=fields["max_ks"]
    )
    pairs = signals.accuracy.independent
    if pairs >= fields["min_pairs"]:
        return found
    reason = (
        f"held-out pairs of {pairs} prompts, fewer than decide.min_pairs = {fields['min_pairs']}: too few to "
        "tell"
    )
    return Verdict(False, "not_enough_evidence", reason, found.evidence)


def _signals(attempt: Attempt) -> Signals:
    metrics = attempt.input("evidence").record.metrics
    accuracy = _rate(metrics["heldout/rewards/accuracies"])
    kl: dict[str, Any] = {
        name: (metrics.get(f"samples/{name}") or {}).get("value") for name in ("kl_reference", "kl_previous")
    }
    if "head_evidence" not in attempt.spec.inputs:
        return Signals(accuracy, **kl)
    now, before = _margins(attempt, "scored"), _margins(attempt, "head_scored")
    return Signals(
        accuracy,
        accuracy_change=_rate(metrics["heldout/accuracy_change"]),
        falls=_falls(attempt),
        overlap=jaccard(_kept(attempt, "human"), _kept(attempt, "head_human")),
        ks=ks_distance(now, before) if len(now) and len(before) else None,
        sign_changes=sign_changes(before, now) if len(now) == len(before) else None,
        **kl,
    )


def _rate(value: dict[str, Any]) -> Rate:
    filled: dict[str, Any] = {
        name: float("nan") if v is None and name != "groups" else v for name, v in value.items()
    }
    return Rate(**filled)


def _falls(attempt: Attempt) -> dict[str, Rate]:
    """Change of held-out accuracy against round 0, the best head and the last head."""
    names = sorted(name for name in attempt.spec.inputs if name.startswith("past-"))
    margins = {name: _heldout(attempt, name)["margin"].to_numpy() for name in names}
    now = _heldout(attempt, "evidence")
    usable = np.isfinite(now["margin"].to_numpy())
    for values in margins.values():
        usable &= np.isfinite(values)
    correct = {name: correctness(values[usable]) for name, values in margins.items()}
    best = max(names, key=lambda name: (correct[name].mean() if usable.any() else 0.0, name))
    compared = {names[0]: "round 0", best: "the best round", names[-1]: "the last head"}
    groups = prompt_groups(_rendered(attempt, "heldout"), now["pair_id"].to_pylist())
    return accuracy_falls(
        correctness(now["margin"].to_numpy()[usable]),
        {said: correct[name] for name, said in compared.items()},
        groups[usable],
        seed=attempt.fields["seed"],
    )


def _rendered(attempt: Attempt, side: str) -> Path:
    return attempt.input("rendered").path(f"{side}.parquet")


def _margins(attempt: Attempt, name: str) -> np.ndarray:
    margins = _table(attempt, name)["ensemble_margin"].to_numpy()
    return margins[np.isfinite(margins)]


def _table(attempt: Attempt, name: str) -> pa.Table:
    return schema.read_table(attempt.input(name).path("scored.parquet"), schema.SCORED)


def _kept(attempt: Attempt, name: str) -> list[str]:
    rows = schema.iter_rows(attempt.input(name).path("ledger.parquet"), ["pair_id", "kept"])
    return [row["pair_id"] for row in rows if row["kept"]]


def _alarm(attempt: Attempt) -> Alarm | None:
    """Has training on the kept pairs made the policy lean on length since the last head (METHOD, alarm)?"""
    if "head_evidence" not in attempt.spec.inputs:
        return None
    heldout = {name: _heldout(attempt, name) for name in ("evidence", "head_evidence")}
    scored = _table(attempt, "scored")
    kept = set(_kept(attempt, "human"))
    now, before = (heldout[name]["margin"].to_numpy() for name in ("evidence", "head_evidence"))
    usable = np.isfinite(now) & np.isfinite(before)
    return amplification_alarm(
        heldout_feature=_longer(heldout["evidence"])[usable],
        correct_now=correctness(now[usable]),
        correct_before=correctness(before[usable]),
        train_feature=_longer(scored),
        kept=np.array([id in kept for id in scored["pair_id"].to_pylist()], dtype=bool),
        heldout_groups=prompt_groups(
            _rendered(attempt, "heldout"), heldout["evidence"]["pair_id"].to_pylist()
        )[usable],
        train_groups=prompt_groups(_rendered(attempt, "train"), scored["pair_id"].to_pylist()),
        comparison="the last head",
        seed=attempt.fields["seed"],
    )


def _heldout(attempt: Attempt, name: str) -> pa.Table:
    return schema.read_table(attempt.input(name).path("heldout.parquet"), schema.SCORED)


def _longer(scored: pa.Table) -> np.ndarray:
    """Tokens of the chosen answer less those of the rejected one."""
    return scored["chosen_tokens"].to_numpy().astype(np.int64) - scored["rejected_tokens"].to_numpy().astype(
        np.int64
    )
