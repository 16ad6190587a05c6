"""Three pairs worth looking at: one kept, one dropped, one generated (no torch, no Prefect)."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.store import Store
from sera_core.reporting.files import RoundFiles, Row

ROLES = ("pairs", "scored", "mixture", "responses")
"""The roles examples are read from."""
_MARGINS = ("margin", "chosen_tokens", "rejected_tokens")


def example_pairs(store: Store, manifest: RoundManifest) -> list[Row]:
    """The examples of a finished round."""
    steps = manifest.steps
    return examples(RoundFiles({role: Artifact(store, steps[role]) for role in ROLES if role in steps}))


def examples(files: RoundFiles, ledger: Sequence[Row] | None = None) -> list[Row]:
    """Up to three examples: kept, dropped, generated; a kind the round has no pair of is left out.

    - `kept`: the human pair trained on with the largest ensemble margin;
    - `dropped`: the human pair with the smallest ensemble margin among those the policy does not prefer,
      else among those dropped later;
    - `generated`: the generated pair trained on with the largest ensemble margin, else the largest dropped.

    Each: kind, pair_id, prompt (its last user turn), chosen, rejected, ensemble_margin, margin (the head's
    alone), chosen_tokens, rejected_tokens, reason. A relabelled pair is shown as it was trained on.
    """
    rows = list(files.rows("mixture", "ledger.parquet")) if ledger is None else ledger
    judged = [row for row in rows if row["pair_id"] and _finite(row["ensemble_margin"])]
    human = [row for row in judged if row["origin"] == "human" and row["stage"] in ("select", "mix")]
    picked = {
        "kept": _largest(row for row in human if row["kept"]),
        "dropped": _suspicious([row for row in human if not row["kept"]]),
        "generated": _largest(row for row in judged if row["origin"] == "generated"),
    }
    return _texts(files, {kind: row for kind, row in picked.items() if row is not None})


def last_user_turn(prompt: Sequence[dict[str, str]]) -> str:
    """What the last answer is an answer to."""
    return next((m["content"] for m in reversed(prompt) if m["role"] == "user"), "")


def _largest(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda r: (not r["kept"], -_trained_margin(r), r["pair_id"]), default=None)


def _suspicious(dropped: Sequence[Row]) -> Row | None:
    return min(
        dropped,
        key=lambda r: (r["reason"] != "not_preferred", r["ensemble_margin"], r["pair_id"]),
        default=None,
    )


def _trained_margin(row: Row) -> float:
    """A relabelled pair is turned, and its margin with it."""
    return -row["ensemble_margin"] if row["reason"] == "relabelled" else row["ensemble_margin"]


def _finite(margin: float | None) -> bool:
    return margin is not None and math.isfinite(margin)


def _texts(files: RoundFiles, picked: dict[str, Row]) -> list[Row]:
    made = []
    for kind, row in picked.items():
        generated = row["origin"] == "generated"
        pair = _find(files, "responses" if generated else "pairs", _pairs_file(generated), row["pair_id"])
        scored = _find(files, "responses" if generated else "scored", "scored.parquet", row["pair_id"])
        made.append(_example(kind, row, pair, scored))
    return made


def _pairs_file(generated: bool) -> str:
    return "pairs.parquet" if generated else "train.parquet"


def _find(files: RoundFiles, role: str, file: str, pair_id: str) -> Row:
    columns = (
        ["pair_id", *_MARGINS] if file == "scored.parquet" else ["pair_id", "prompt", "chosen", "rejected"]
    )
    return files.row(role, file, pair_id, columns)


def said(message: Row) -> str:
    """A message as a person reads it, its reasoning first."""
    return "\n\n".join(text for text in (message.get("reasoning_content"), message["content"]) if text)


def _example(kind: str, row: Row, pair: Row, scored: Row) -> dict[str, Any]:
    turned = row["reason"] == "relabelled"
    sides = ("rejected", "chosen") if turned else ("chosen", "rejected")
    return {
        "kind": kind,
        "pair_id": row["pair_id"],
        "prompt": last_user_turn(pair["prompt"]),
        "chosen": "\n\n".join(map(said, pair[sides[0]])),
        "rejected": "\n\n".join(map(said, pair[sides[1]])),
        "ensemble_margin": _trained_margin(row),
        "margin": -scored["margin"] if turned else scored["margin"],
        "chosen_tokens": scored[f"{sides[0]}_tokens"],
        "rejected_tokens": scored[f"{sides[1]}_tokens"],
        "reason": row["reason"],
    }
