"""Verdicts as a table: two rows for each comparison, one an order, and what they add up to."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sera_core.artifacts.manifest import Artifact, StepRecord, find_record
from sera_core.artifacts.store import Store
from sera_core.errors import StoreError
from sera_core.judges.comparison import Comparison, Verdict
from sera_core.method.features import words
from sera_core.method.judged import Judged, order_flips, ties, wins, wins_at_equal_length

JUDGE_STEP, CALIBRATE_STEP, PROMPT_SET_STEP = "judge", "calibrate", "prompts"
STEPS = (JUDGE_STEP, CALIBRATE_STEP)
ORDERS = ("given", "swapped")
"""Whether the first answer is shown first (A) or second (B)."""
Row = dict[str, Any]
Key = tuple[str, str | None, int | None, str]


@dataclass(frozen=True)
class Item:
    """Two answers to compare: of two policies, or the chosen and the rejected answer of a pair."""

    prompt_id: str
    prompt: Sequence[Mapping[str, str]]
    first: str
    second: str
    sample: int | None = None
    """Number of the sample; None for a pair."""
    pair_id: str | None = None

    @classmethod
    def labelled(
        cls,
        pair_id: str,
        prompt_id: str,
        prompt: Sequence[Mapping[str, str]],
        chosen: Sequence[Mapping[str, str]],
        rejected: Sequence[Mapping[str, str]],
    ) -> "Item":
        """A labelled pair, the chosen answer first."""
        return cls(prompt_id, prompt, chosen[0]["content"], rejected[0]["content"], pair_id=pair_id)

    @property
    def is_equal(self) -> bool:
        """Whether both answers are the same text: a tie that no judge is asked about."""
        return self.first == self.second

    def comparison(self, order: str) -> Comparison:
        """The comparison in one of the orders."""
        texts = (self.first, self.second) if order == "given" else (self.second, self.first)
        return Comparison(self.prompt, *texts)

    def row(self, order: str, verdict: Verdict) -> Row:
        """The verdict as a row of verdicts.parquet."""
        return {
            "prompt_id": self.prompt_id,
            "pair_id": self.pair_id,
            "sample": self.sample,
            "order": order,
            "asked": not self.is_equal,
            "better": verdict.better,
            "failure": verdict.failure,
            "prompt_tokens": verdict.prompt_tokens,
            "answer_tokens": verdict.answer_tokens,
            "first_words": int(words("", self.first)),
            "second_words": int(words("", self.second)),
        }


def key_of(row: Mapping[str, Any]) -> Key:
    """What a row is about."""
    return row["prompt_id"], row["pair_id"], row["sample"], row["order"]


@dataclass(frozen=True)
class Told:
    """The verdicts of a table: comparisons answered in both orders, and counts of the others."""

    judged: Judged
    keys: list[tuple[Any, ...]]
    """What each of them is about: prompt, pair and sample."""
    asked: np.ndarray
    """Whether the judge was asked about each of them; equal answers are ties without asking."""
    comparisons: int
    failed: dict[str, int]
    """Comparisons without a verdict in one of the orders, by reason."""
    tokens: dict[str, int] | None
    """Tokens of prompts and answers; None if the judge never says."""

    @property
    def seen(self) -> Judged:
        """The comparisons that the judge saw."""
        return self.judged.only(self.asked)

    @property
    def equal(self) -> int:
        """Comparisons of equal answers."""
        return int((~self.asked).sum())

    @property
    def figures(self) -> dict[str, Any]:
        """Win rate of the first answers and what belongs to it; order flips of what the judge saw."""
        judged, seen = self.judged, self.seen
        outcomes = judged.outcomes
        return {
            "wins": int((outcomes == 1).sum()),
            "losses": int((outcomes == 0).sum()),
            "disagreed": int((seen.given != seen.swapped).sum()),
            "win_rate": asdict(wins(judged)),
            "length_controlled": asdict(wins_at_equal_length(judged)),
            "ties": asdict(ties(judged)),
            "order_flips": asdict(order_flips(seen)),
        }

    @property
    def counts(self) -> dict[str, Any]:
        """Comparisons by what became of them."""
        failed = sum(self.failed.values())
        return {
            "comparisons": self.comparisons,
            "equal": self.equal,
            "asked": self.comparisons - self.equal,
            "answered": self.comparisons - self.equal - failed,
            "failed": self.failed,
            "tokens": self.tokens,
        }


def told(rows: Iterable[Mapping[str, Any]]) -> Told:
    """What the rows of a table add up to."""
    by_item: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    tokens: Counter[str] = Counter()
    for row in rows:
        by_item.setdefault(key_of(row)[:3], {})[row["order"]] = row
        for name in ("prompt", "answer"):
            if row[f"{name}_tokens"] is not None:
                tokens[name] += row[f"{name}_tokens"]
    failed: Counter[str] = Counter()
    whole = []
    for both in by_item.values():
        reasons = [both[order]["failure"] for order in ORDERS if both[order]["failure"] is not None]
        if reasons:
            failed[reasons[0]] += 1
        else:
            whole.append([both[order] for order in ORDERS])
    return Told(
        _judged(whole),
        [key_of(given)[:3] for given, _ in whole],
        np.array([given["asked"] for given, _ in whole], dtype=bool),
        len(by_item),
        dict(sorted(failed.items())),
        dict(sorted(tokens.items())) or None,
    )


def _judged(whole: Sequence[Sequence[Mapping[str, Any]]]) -> Judged:
    outcome = {"A": 1.0, "tie": 0.5, "B": 0.0}
    lengths = [given["first_words"] - given["second_words"] for given, _ in whole]
    prompts = [given["prompt_id"] for given, _ in whole]
    return Judged(
        np.array([outcome[given["better"]] for given, _ in whole], dtype=np.float64),
        np.array([1 - outcome[swapped["better"]] for _, swapped in whole], dtype=np.float64),
        np.array(lengths, dtype=np.float64),
        np.unique(prompts, return_inverse=True)[1].astype(np.int64),
    )


def recorded(store: Store, step: str) -> list[StepRecord]:
    """The finished steps of this name, oldest first: for display and upkeep, never to find an input."""
    found = [find_record(store, step, key) for key in store.names(f"steps/{step}")]
    return sorted((record for record in found if record is not None), key=lambda record: record.started)


def newest_calibration(store: Store, identity: Mapping[str, Any]) -> Artifact | None:
    """The newest calibration of a judge; None if there is none. Damaged records are passed over."""
    found = []
    for key in store.names(f"steps/{CALIBRATE_STEP}"):
        with suppress(StoreError):  # perhaps another judge's; verify and gc name it
            found.append(find_record(store, CALIBRATE_STEP, key))
    same = [record for record in found if record is not None and record.fields.get("judge") == dict(identity)]
    return Artifact(store, max(same, key=lambda record: record.started).ref) if same else None
