"""Mix human and generated pairs at the round's share, and write one ledger of all pairs and prompts."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.streaming import Lookup, Scatter, Writer, numbers, row_groups, strings, texts
from sera_core.errors import SeraError
from sera_core.method.mixing import SHUFFLED, mix, training_order


def mix_pairs(attempt: Attempt) -> list[str]:
    """Write mixture.parquet (training pairs in order) and ledger.parquet (each pair and prompt, with reason).

    If the share needs generated pairs and there are none, or no pair is left, the record says `no_pairs` and
    the mixture is empty.
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
    total = mixture.human.size + mixture.generated.size
    _write_mixture(attempt, {human: mixture.human, generated: mixture.generated}, total)
    reason = mixture.reason or (None if total else "no_pairs")
    attempt.metrics |= {
        "pairs/human": len(mixture.human),
        "pairs/generated": len(mixture.generated),
        "target_share": mixture.target_share,
        "generated_share": mixture.share,
        "reason": reason,
        **_write_ledger(attempt, human, generated),
    }
    return ["mixture.parquet", "ledger.parquet"]


class _Side:
    """The pairs of one origin, and which of them are selected and mixed."""

    def __init__(self, attempt: Attempt, origin: str) -> None:
        self._attempt, self._origin = attempt, origin
        self._ledger: Path | None = None
        self._kept = np.empty(0, dtype=np.int64)
        self.ids, self._turned = np.empty(0, dtype="U16"), np.empty(0, dtype=bool)
        ranks, self.margins = np.empty(0, dtype=np.int64), np.empty(0)
        if f"{origin}_ledger" in attempt.spec.inputs:
            path = self._ledger = attempt.input(f"{origin}_ledger").path("ledger.parquet")
            kept = numbers(path, schema.LEDGER, "kept").astype(bool)
            self._kept = np.flatnonzero(kept)
            self.ids = strings(path, schema.LEDGER, "pair_id")[kept]
            self._turned = (strings(path, schema.LEDGER, "reason") == "relabelled")[kept]
            ranks = numbers(path, schema.LEDGER, "rank")[kept].astype(np.int64)
            margins = numbers(path, schema.LEDGER, "ensemble_margin")[kept].astype(np.float64)
            self.margins = np.where(self._turned, -margins, margins)  # as the pair is trained on
        # A rule without an order: all places are equal, so the mix takes a seeded draw.
        self.places = ranks if origin in attempt.fields["by_rank"] else np.zeros_like(ranks)
        self._over = np.empty(0, dtype=np.int64)

    def drop(self, over_share: np.ndarray) -> None:
        """Mark selected pairs beyond the share as dropped."""
        self._over = self._kept[over_share]

    def ledger(self) -> Iterator[pa.Table]:
        """The selection's ledger, with the pairs dropped by the mix."""
        first = 0
        for table in row_groups(self._ledger, schema.LEDGER) if self._ledger else ():
            over = np.zeros(table.num_rows, dtype=bool)
            low, high = np.searchsorted(self._over, [first, first + table.num_rows])
            over[self._over[low:high] - first] = True
            first += table.num_rows
            dropped = {"kept": False, "reason": "over_share", "stage": "mix"}
            for name, value in dropped.items() if over.any() else ():
                column = [value if o else v for o, v in zip(over, table[name].to_pylist(), strict=True)]
                table = _with(table, name, column)
            yield table

    def pairs(self, taken: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """The taken pairs for training, in the file's order: (number within taken, rows).

        Relabelled pairs are swapped; each row has reference log-probabilities.

        Args:
            taken: indices into `ids`.
        """
        if not taken.size:
            return
        lookup, turned = Lookup(self.ids[taken]), self._turned[taken]
        references = _References(self._attempt, self._origin, lookup, taken.size, self._pairs_path())
        found = 0
        for table in row_groups(self._pairs_path(), schema.PAIRS):
            places = lookup.places(texts(table["pair_id"]))
            for turn in (False, True):
                rows = np.flatnonzero((places >= 0) & (turned[places] == turn))
                found += rows.size
                if rows.size:
                    yield places[rows], references.beside(table.take(rows), places[rows], turn)
        if found != taken.size:
            raise SeraError(
                f"{self._pairs_path()}: has {found} of the {taken.size} {self._origin} pairs that the "
                "selection kept; delete that step and run again"
            )

    @property
    def schema(self) -> pa.Schema:
        """Schema of the pairs' file."""
        return pq.read_schema(self._pairs_path())

    def _pairs_path(self) -> Path:
        if self._origin == "human":
            return self._attempt.input("rendered").path("train.parquet")
        return self._attempt.input("responses").path("pairs.parquet")


class _References:
    """Reference log-probabilities of the taken pairs by side, in nats; null without a source."""

    def __init__(self, attempt: Attempt, origin: str, lookup: Lookup, count: int, pairs: Path) -> None:
        self._attempt, self._lookup, self._pairs = attempt, lookup, pairs
        self._values = np.zeros((2, count))
        self._known = np.zeros((2, count), dtype=bool)
        source, name = attempt.fields["generated_reference"], f"{origin}_reference"
        if origin == "generated" and source in ("ref_logps", "policy_logps"):
            self._read_samples(source)
        elif name in attempt.spec.inputs:
            self._read_logps(attempt.input(name).path("logps.parquet"))

    def beside(self, pairs: pa.Table, places: np.ndarray, turn: bool) -> pa.Table:
        """Rows of the mixture: the pairs at these places, with chosen and rejected swapped if `turn`."""
        sides = ("rejected", "chosen") if turn else ("chosen", "rejected")
        source = {"chosen": sides[0], "rejected": sides[1]}
        source |= {f"{side}_ids": f"{source[side]}_ids" for side in ("chosen", "rejected")}
        columns = [pairs[source.get(name, name)] for name in schema.PAIRS.names]
        columns += [
            pa.array(self._values[side, places], mask=~self._known[side, places])
            for side in ((1, 0) if turn else (0, 1))
        ]
        return pa.Table.from_arrays(columns, schema=schema.as_held(schema.MIXTURE, pairs.schema))

    def _read_logps(self, path: Path) -> None:
        """Read a file whose rows alternate between chosen and rejected response of each pair."""
        for table in row_groups(path, schema.LOGPS):
            ids = [id.removesuffix("/chosen") for id in table["id"].to_pylist()[0::2]]
            places = self._lookup.places(np.array(ids, dtype=np.str_))
            rows = np.flatnonzero(places >= 0)
            values, known = table["logps"].to_numpy(), table["logps"].is_valid().to_numpy()
            for side in (0, 1):
                self._values[side, places[rows]] = values[side::2][rows]
                self._known[side, places[rows]] = known[side::2][rows]

    def _read_samples(self, column: str) -> None:
        """Read values from responses.parquet, where they are already computed."""
        made = self._attempt.input("responses")
        keys, where = np.unique(self._sample_keys(), return_inverse=True)
        samples, values = Lookup(keys), np.zeros(keys.size)
        known, seen = np.zeros(keys.size, dtype=bool), np.zeros(keys.size, dtype=bool)
        names = ["prompt_id", "sample", column]
        for table in row_groups(made.path("responses.parquet"), schema.RESPONSES, names):
            places = samples.places(_keys(table["prompt_id"].to_pylist(), table["sample"].to_pylist()))
            rows = np.flatnonzero(places >= 0)
            values[places[rows]] = table[column].to_numpy()[rows]
            known[places[rows]] = table[column].is_valid().to_numpy()[rows]
            seen[places[rows]] = True
        if not seen.all():
            raise SeraError(f"sample {keys[~seen][0]}: used in a pair, but missing in responses.parquet")
        self._values, self._known = values[where], known[where]

    def _sample_keys(self) -> np.ndarray:
        """`<prompt_id>/<sample>` of both sides of each taken pair, [side, pair]."""
        prompts = np.zeros(self._values.shape[1], dtype="U16")
        samples = np.zeros(self._values.shape, dtype=np.int64)
        for table in row_groups(self._pairs, schema.PAIRS, ["pair_id", "prompt_id"]):
            places = self._lookup.places(texts(table["pair_id"]))
            prompts[places[places >= 0]] = texts(table["prompt_id"])[places >= 0]
        path = self._attempt.input("responses").path("pair_samples.parquet")
        for table in row_groups(path, schema.PAIR_SAMPLES):
            places = self._lookup.places(texts(table["pair_id"]))
            for side, name in enumerate(("chosen_sample", "rejected_sample")):
                samples[side, places[places >= 0]] = table[name].to_numpy()[places >= 0]
        return np.stack([_keys(prompts, side) for side in samples])


def _keys(prompts: Any, samples: Any) -> np.ndarray:
    return np.array([f"{p}/{s}" for p, s in zip(prompts, samples, strict=True)], dtype=np.str_)


def _write_mixture(attempt: Attempt, taken: dict[_Side, np.ndarray], total: int) -> None:
    ids = np.concatenate([side.ids[chosen] for side, chosen in taken.items()])
    fields = attempt.fields
    margins = np.concatenate([side.margins[chosen] for side, chosen in taken.items()])
    seed = derived_seed(fields["seed"], fields["round"], "order")
    order = training_order(ids, seed, margins, fields.get("order", SHUFFLED))
    places = np.empty(total, dtype=np.int64)
    places[order] = np.arange(total)
    held = schema.as_held(schema.MIXTURE, *(side.schema for side, chosen in taken.items() if chosen.size))
    with (
        tempfile.TemporaryDirectory(prefix="sera-mix-") as scratch,
        Writer(attempt.write("mixture.parquet"), held) as out,
    ):
        scatter, first = Scatter(Path(scratch), held, total), 0
        for side, chosen in taken.items():
            for found, table in side.pairs(chosen):
                scatter.add(places[first + found], table)
            first += chosen.size
        for table in scatter.tables():
            out.write(table)


def _write_ledger(attempt: Attempt, human: _Side, generated: _Side) -> dict[str, Any]:
    """Write the ledger of every input pair, generated pair and prompt without a pair.

    Returns how many of the dropped human pairs had a flipped label, and how many are expected by chance.
    """
    flipped = set(json.loads(attempt.input("rendered").path("flipped.json").read_text()))
    counts: Counter[tuple[bool, bool]] = Counter()
    with Writer(attempt.write("ledger.parquet"), schema.LEDGER) as out:
        for table in _ledger(attempt, human, generated):
            out.write(table)
            rows = table.select(["pair_id", "origin", "stage", "kept", "reason"]).to_pylist()
            attempt.counts.update(f"{row['origin']}/{row['reason']}" for row in rows)
            counts.update(
                (row["pair_id"] in flipped, row["kept"])
                for row in rows
                if row["origin"] == "human" and row["stage"] in ("select", "mix")
            )
    return _flips(counts) if flipped else {}


def _ledger(attempt: Attempt, human: _Side, generated: _Side) -> Iterator[pa.Table]:
    yield from human.ledger()
    yield from generated.ledger()
    for table in row_groups(attempt.input("rendered").path("dropped.parquet"), schema.LEDGER):
        yield _with(table, "round", [attempt.fields["round"]] * table.num_rows)
    for name, file in (("samples", "dropped.parquet"), ("responses", "ledger.parquet")):
        if name in attempt.spec.inputs:
            for table in row_groups(attempt.input(name).path(file), schema.LEDGER):
                yield _with(table, "round", [attempt.fields["round"]] * table.num_rows)  # a file's have none


def _with(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    """The table with one column replaced."""
    place = table.schema.get_field_index(name)
    field = table.schema.field(place)
    return table.set_column(place, field, pa.array(values, type=field.type))


def _flips(counts: Counter[tuple[bool, bool]]) -> dict[str, Any]:
    """Metrics of flipped labels. `counts`: number of human pairs by (flipped label, kept)."""
    dropped = counts[True, False] + counts[False, False]
    share = (counts[True, True] + counts[True, False]) / max(1, counts.total())
    return {
        "flipped": counts[True, True] + counts[True, False],
        "flipped/dropped": counts[True, False],
        "flipped/dropped_by_chance": round(share * dropped, 3),
        "dropped": dropped,
    }
