"""Answers to the same held-out prompts under the policy of each round, side by side on one page."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.reporting.examples import last_user_turn
from sera_core.reporting.pages import render

PAGE = "answers.html"
MOST_BYTES = 3_000_000
"""Of prompts and answers, so that the page stays below 5 MB; prompts after that are counted, not shown."""
_COLUMNS = ["prompt_id", "sample", "response", "tokens", "finish_reason"]


@dataclass(frozen=True)
class Answer:
    """One sampled answer."""

    text: str
    tokens: int
    cut: bool
    """Whether it reached `evaluate.max_tokens`."""


def answers_page(run: str, evidence: Mapping[int, Artifact]) -> str | None:
    """The page; None if no round sampled held-out prompts.

    Args:
        run: name of the run.
        evidence: each round's evidence, by number; rounds of another set of prompts have empty columns.
    """
    sampled = {number: one for number, one in evidence.items() if "samples" in one.record.inputs}
    if not sampled:
        return None
    answers = {number: _answers(one) for number, one in sampled.items()}
    ids = list(dict.fromkeys(id for by_prompt in answers.values() for id in by_prompt))
    shown, size = [], 0
    prompts = _prompts(next(iter(sampled.values())))
    for id in ids:
        by_round = [answers[number].get(id, []) for number in sampled]
        texts = [prompts[id], *(answer.text for column in by_round for answer in column)]
        size += sum(len(text.encode()) for text in texts)
        if size > MOST_BYTES:
            break
        shown.append({"id": id, "prompt": prompts[id], "answers": by_round})
    return render("answers.html.j2", run=run, rounds=list(sampled), shown=shown, prompts=len(ids))


def _answers(evidence: Artifact) -> dict[str, list[Answer]]:
    samples = Artifact(evidence.store, evidence.record.inputs["samples"]).path("responses.parquet")
    found: dict[str, list[Answer]] = {}
    rows: list[dict[str, Any]] = sorted(
        schema.iter_rows(samples, _COLUMNS), key=lambda row: (row["prompt_id"], row["sample"])
    )
    for row in rows:
        answer = Answer(row["response"], row["tokens"], row["finish_reason"] == "length")
        found.setdefault(row["prompt_id"], []).append(answer)
    return found


def _prompts(evidence: Artifact) -> dict[str, str]:
    """Last user turn of each held-out prompt."""
    pairs = Artifact(evidence.store, evidence.record.inputs["rendered"]).path("heldout.parquet")
    rows = schema.iter_rows(pairs, ["prompt_id", "prompt"])
    return {row["prompt_id"]: last_user_turn(row["prompt"]) for row in rows}
