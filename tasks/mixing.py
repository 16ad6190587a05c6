"""Mix human and generated pairs at the round's share, and account for every pair and prompt in one ledger."""

import json
from collections import Counter
from typing import Any

import numpy as np

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.artifacts.step import Attempt
from sera_core.mixing import mix, training_order

Row = dict[str, Any]


def mix_pairs(attempt: Attempt) -> list[str]:
    """Write mixture.parquet (pairs trained on, in order) and ledger.parquet (each pair and prompt, and why).

    When the share asks for generated pairs and there are none, or nothing is left at all, the record says
    `no_pairs` and the mixture is empty.
    """
    fields = attempt.fields
    human = _Side(attempt, "human")
    generated = _Side(attempt, "generated")
    mixture = mix(
        human.places,
        human.ids,
        generated.places,
        generated.ids,
        share=fields["share"],
        size=fields["size"],
        on_short=fields["on_short"],
        seed=fields["seed"],
    )
    human.drop(mixture.over_share_human)
    generated.drop(mixture.over_share_generated)
    rows = [human.pair(int(i)) for i in mixture.human] + [generated.pair(int(i)) for i in mixture.generated]
    order = training_order(
        [row["pair_id"] for row in rows], derived_seed(fields["seed"], fields["round"], "order")
    )
    mixed = schema.from_rows(schema.MIXTURE, [rows[int(i)] for i in order])
    schema.write_table(mixed, attempt.write("mixture.parquet"))
    ledger = _ledger(attempt, human, generated)
    schema.write_table(schema.from_rows(schema.LEDGER, ledger), attempt.write("ledger.parquet"))
    reason = mixture.reason or (None if rows else "no_pairs")
    attempt.counts.update(f"{row['origin']}/{row['reason']}" for row in ledger)
    attempt.metrics |= {
        "pairs/human": len(mixture.human),
        "pairs/generated": len(mixture.generated),
        "target_share": mixture.target_share,
        "generated_share": mixture.share,
        "reason": reason,
        **_flips(attempt, ledger),
    }
    return ["mixture.parquet", "ledger.parquet"]


class _Side:
    """The pairs of one origin: their selection, and what the mix takes."""

    def __init__(self, attempt: Attempt, origin: str) -> None:
        self.rows: list[Row] = []
        self._attempt, self._origin = attempt, origin
        if f"{origin}_ledger" in attempt.spec.inputs:
            ledger = attempt.input(f"{origin}_ledger").path("ledger.parquet")
            self.rows = list(schema.iter_rows(ledger))
        self._kept = [row for row in self.rows if row["kept"]]
        self.ids = [row["pair_id"] for row in self._kept]
        ranks = np.array([row["rank"] for row in self._kept], dtype=np.int64)
        # Without an order of its own the rule's kept pairs are drawn from: equal places, a seeded order.
        self.places = ranks if origin in attempt.fields["by_rank"] else np.zeros_like(ranks)
        self._pairs = {row["pair_id"]: row for row in self._read_pairs()} if self._kept else {}
        self._references = self._read_references() if self._kept else {}

    def pair(self, index: int) -> Row:
        """A kept pair as it is trained on: relabelled ones turned, reference log-probabilities beside it."""
        kept = self._kept[index]
        row = dict(self._pairs[kept["pair_id"]])
        chosen, rejected = self._references.get(kept["pair_id"], (None, None))
        if kept["reason"] == "relabelled":
            row |= {"chosen": row["rejected"], "rejected": row["chosen"]}
            row |= {"chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]}
            chosen, rejected = rejected, chosen
        return row | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    def drop(self, over_share: np.ndarray) -> None:
        """Mark the kept pairs the share had no room for."""
        for row, over in zip(self._kept, over_share.tolist(), strict=True):
            if over:
                row |= {"kept": False, "reason": "over_share", "stage": "mix"}

    def _read_pairs(self) -> list[Row]:
        if self._origin == "human":
            return list(schema.iter_rows(self._attempt.input("rendered").path("train.parquet")))
        return list(schema.iter_rows(self._attempt.input("responses").path("pairs.parquet")))

    def _read_references(self) -> dict[str, tuple[float, float]]:
        source = self._attempt.fields["generated_reference"]
        if self._origin == "generated" and source in ("ref_logps", "policy_logps"):
            return self._references_of_samples(source)
        name = f"{self._origin}_reference"
        if name not in self._attempt.spec.inputs:
            return {}
        table = schema.read_table(self._attempt.input(name).path("logps.parquet"), schema.LOGPS)
        ids, values = table["id"].to_pylist()[0::2], table["logps"].to_pylist()
        return {
            id.removesuffix("/chosen"): (chosen, rejected)
            for id, chosen, rejected in zip(ids, values[0::2], values[1::2], strict=True)
        }

    def _references_of_samples(self, column: str) -> dict[str, tuple[float, float]]:
        """Values that stand in responses.parquet already: no policy runs twice on a response."""
        made = self._attempt.input("responses")
        values = {
            (row["prompt_id"], row["sample"]): row[column]
            for row in schema.iter_rows(made.path("responses.parquet"), ["prompt_id", "sample", column])
        }
        prompts = {id: row["prompt_id"] for id, row in self._pairs.items()}
        return {
            row["pair_id"]: (
                values[prompts[row["pair_id"]], row["chosen_sample"]],
                values[prompts[row["pair_id"]], row["rejected_sample"]],
            )
            for row in schema.iter_rows(made.path("pair_samples.parquet"))
        }


def _ledger(attempt: Attempt, human: _Side, generated: _Side) -> list[Row]:
    """Every input pair, generated pair and prompt without one: kept or dropped, where and why."""
    rendered = list(schema.iter_rows(attempt.input("rendered").path("dropped.parquet")))
    dropped = [row | {"round": attempt.fields["round"]} for row in rendered]
    for name, file in (("samples", "dropped.parquet"), ("responses", "ledger.parquet")):
        if name in attempt.spec.inputs:
            dropped += list(schema.iter_rows(attempt.input(name).path(file)))
    return [*human.rows, *generated.rows, *dropped]


def _flips(attempt: Attempt, ledger: list[Row]) -> dict[str, Any]:
    """How many of the dropped human pairs had a turned label, and how many chance would have dropped."""
    path = attempt.input("rendered").path("flipped.json")
    flipped = set(json.loads(path.read_text()))
    if not flipped:
        return {}
    judged = [row for row in ledger if row["origin"] == "human" and row["stage"] in ("select", "mix")]
    counts = Counter((row["pair_id"] in flipped, row["kept"]) for row in judged)
    dropped = counts[True, False] + counts[False, False]
    share = (counts[True, True] + counts[True, False]) / max(1, len(judged))
    return {
        "flipped": counts[True, True] + counts[True, False],
        "flipped/dropped": counts[True, False],
        "flipped/dropped_by_chance": round(share * dropped, 3),
        "dropped": dropped,
    }
