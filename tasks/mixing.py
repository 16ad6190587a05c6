"""Mix human and generated pairs at the round's share, and write one ledger of all pairs and prompts."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.step import Attempt
from sera_core.artifacts.streaming import JOINED, Lookup, Scatter, Writer, compute, keys, row_groups
from sera_core.errors import SeraError
from sera_core.method.mixing import SHUFFLED, mix, training_order

_SELECTED = ("pair_id", "ensemble_margin", "rank", "kept", "reason")
"""What the mix reads of a selection's ledger before it writes."""


def mix_pairs(attempt: Attempt) -> list[str]:
    """Write mixture.parquet (training pairs in order) and ledger.parquet (each pair and prompt, with reason).

    If the share needs generated pairs and there are none, or no pair is left, the record says `no_pairs` and
    the mixture is empty.
    """
    fields = attempt.fields
    with ThreadPoolExecutor(2, thread_name_prefix="sera-side") as threads:
        human, generated = threads.map(lambda origin: _Side(attempt, origin), ("human", "generated"))
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
    with (
        tempfile.TemporaryDirectory(prefix="sera-mix-") as scratch,
        ThreadPoolExecutor(1, thread_name_prefix="sera-ledger") as beside,
    ):
        ordered = _ordered(attempt, {human: mixture.human, generated: mixture.generated}, Path(scratch))
        flips = beside.submit(_write_ledger, attempt, human, generated)
        with Writer(attempt.write("mixture.parquet"), ordered.schema) as out:
            for table in ordered.tables():
                out.write(table)
    reason = mixture.reason or (None if total else "no_pairs")
    attempt.metrics |= {
        "pairs/human": len(mixture.human),
        "pairs/generated": len(mixture.generated),
        "target_share": mixture.target_share,
        "generated_share": mixture.share,
        "reason": reason,
        **flips.result(),
    }
    return ["mixture.parquet", "ledger.parquet"]


class _Side:
    """The pairs of one origin, and which of them are selected and mixed."""

    def __init__(self, attempt: Attempt, origin: str) -> None:
        self._attempt, self._origin = attempt, origin
        self._ledger: Path | None = None
        self._pairs = Path()
        self._kept, self._rows = np.empty(0, dtype=np.int64), 0
        self.ids, self._turned = np.empty(0, dtype="S16"), np.empty(0, dtype=bool)
        ranks, self.margins = np.empty(0, dtype=np.int64), np.empty(0)
        if f"{origin}_ledger" in attempt.spec.inputs:
            self._ledger = attempt.input(f"{origin}_ledger").path("ledger.parquet")
            ranks = self._read(self._ledger)
            self._pairs = self._pairs_path()
        # A rule without an order: all places are equal, so the mix takes a seeded draw.
        self.places = ranks if origin in attempt.fields["by_rank"] else np.zeros_like(ranks)
        self._over = np.empty(0, dtype=np.int64)

    def _read(self, path: Path) -> np.ndarray:
        """Read the selection's ledger; returns the rank of each kept pair."""
        found = []
        for table in row_groups(path, schema.LEDGER, _SELECTED, JOINED):
            rows = np.flatnonzero(table["kept"].to_numpy())
            kept = table.take(rows)
            turned = compute.equal(kept["reason"], "relabelled").to_numpy()
            margins = kept["ensemble_margin"].to_numpy()
            margins = np.where(turned, -margins, margins)  # as the pair is trained on
            ids, ranks = keys(kept["pair_id"]), kept["rank"].to_numpy().astype(np.int64)
            found.append((rows + self._rows, ids, turned, margins, ranks))
            self._rows += table.num_rows
        if not found:
            return np.empty(0, dtype=np.int64)
        self._kept, self.ids, self._turned, self.margins, ranks = map(
            np.concatenate, zip(*found, strict=True)
        )
        return ranks

    def drop(self, over_share: np.ndarray) -> None:
        """Mark selected pairs beyond the share as dropped."""
        self._over = self._kept[over_share]

    def ledger(self) -> Iterator[pa.Table]:
        """The selection's ledger, with the pairs dropped by the mix."""
        first = 0
        for table in row_groups(self._ledger, schema.LEDGER, size=JOINED) if self._ledger else ():
            over = np.zeros(table.num_rows, dtype=bool)
            low, high = np.searchsorted(self._over, [first, first + table.num_rows])
            over[self._over[low:high] - first] = True
            first += table.num_rows
            dropped = {"kept": False, "reason": "over_share", "stage": "mix"}
            for name, value in dropped.items() if over.any() else ():
                table = _with(table, name, compute.if_else(pa.array(over), value, table[name]))
            yield table

    def pairs(self, taken: np.ndarray, ordered: np.ndarray) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """The taken pairs for training, piece by piece of their file: (ascending places, rows).

        Relabelled pairs are swapped; each row has reference log-probabilities.

        Args:
            taken: indices into `ids`.
            ordered: the place of each in the training order.
        """
        if not taken.size:
            return
        turned = self._turned[taken]
        places = _Places(self._kept[taken], self.ids[taken], self._rows)
        references = _References(self._attempt, self._origin, places, self._pairs)
        for here, table in places.pieces(self._pairs, schema.PAIRS):
            for turn in (False, True):
                rows = np.flatnonzero((here >= 0) & (turned[here] == turn))
                if rows.size:
                    rows = rows[np.argsort(ordered[here[rows]])]
                    yield ordered[here[rows]], references.beside(table.take(rows), here[rows], turn)

    @property
    def schema(self) -> pa.Schema:
        """Schema of the pairs' file."""
        return pq.read_schema(self._pairs)

    def _pairs_path(self) -> Path:
        if self._origin == "human":
            return self._attempt.input("rendered").path("train.parquet")
        return self._attempt.input("responses").path("pairs.parquet")


class _Places:
    """Which rows of a file are taken, and the number of each among the taken pairs.

    All files of one origin have its pairs in the same order: that of the file with the texts.
    """

    def __init__(self, rows: np.ndarray, ids: np.ndarray, total: int) -> None:
        """`rows`, `ids`: row and id of each taken pair; `total`: rows of each file."""
        self.ids = ids
        self._places = np.full(total, -1, dtype=np.int64)
        self._places[rows] = np.arange(rows.size)

    def pieces(
        self, path: Path, kind: pa.Schema, columns: Sequence[str] | None = None
    ) -> Iterator[tuple[np.ndarray, pa.Table]]:
        """Pieces of a file, each with the number of its pairs among the taken ones; -1 for one not taken.

        Args:
            path: a file with a row for each pair, or (without `pair_id`) two for its responses.
            kind: its schema.
            columns: the columns to read, with the id; None for all.

        Raises:
            SeraError: the file has other pairs than the selection.
        """
        first = 0
        for table in row_groups(path, kind, columns, JOINED):
            ids = table["pair_id"] if "pair_id" in table.column_names else _pair_ids(table["id"])
            places = self._places[first : first + len(ids)]
            rows = np.flatnonzero(places >= 0)
            first += len(ids)
            if first > self._places.size or not np.array_equal(keys(ids.take(rows)), self.ids[places[rows]]):
                raise _other_pairs(path)
            yield places, table
        if first != self._places.size:
            raise _other_pairs(path)


def _pair_ids(responses: pa.ChunkedArray) -> pa.ChunkedArray:
    """The pair of every second response, where the chosen and the rejected one of each pair come in turn."""
    chosen = responses.take(np.arange(0, len(responses), 2))
    return compute.utf8_slice_codeunits(chosen, 0, -len("/chosen"))


def _other_pairs(path: Path) -> SeraError:
    return SeraError(
        f"{path}: its pairs are not those of the selection, in the same order; delete that step and run again"
    )


class _References:
    """Reference log-probabilities of the taken pairs by side, in nats; null without a source."""

    def __init__(self, attempt: Attempt, origin: str, places: _Places, pairs: Path) -> None:
        self._attempt, self._places, self._pairs = attempt, places, pairs
        self._values = np.zeros((2, places.ids.size))
        self._known = np.zeros((2, places.ids.size), dtype=bool)
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
        for places, table in self._places.pieces(path, schema.LOGPS, ["id", "logps"]):
            rows = np.flatnonzero(places >= 0)
            values, known = table["logps"].to_numpy(), table["logps"].is_valid().to_numpy()
            for side in (0, 1):
                self._values[side, places[rows]] = values[side::2][rows]
                self._known[side, places[rows]] = known[side::2][rows]

    def _read_samples(self, name: str) -> None:
        """Read values from responses.parquet, where they are already computed."""
        made = self._attempt.input("responses")
        prompts, samples = self._samples(made)
        lookup, most = Lookup(prompts), int(samples.max()) + 1
        wanted, where = np.unique(lookup.places(prompts) * most + samples, return_inverse=True)
        values = np.zeros(wanted.size)
        known, seen = np.zeros(wanted.size, dtype=bool), np.zeros(wanted.size, dtype=bool)
        responses = Lookup(wanted)
        columns = ["prompt_id", "sample", name]
        for table in row_groups(made.path("responses.parquet"), schema.RESPONSES, columns, JOINED):
            prompt, sample = lookup.places(keys(table["prompt_id"])), table["sample"].to_numpy()
            numbered = np.where((prompt >= 0) & (sample < most), prompt * most + sample, -1)
            places = responses.places(numbered)
            rows = np.flatnonzero(places >= 0)
            values[places[rows]] = table[name].to_numpy()[rows]
            known[places[rows]] = table[name].is_valid().to_numpy()[rows]
            seen[places[rows]] = True
        if not seen.all():
            missing = int(wanted[~seen][0])
            key = f"{prompts[missing // most].decode()}/{missing % most}"
            raise SeraError(f"sample {key}: used in a pair, but missing in responses.parquet")
        self._values, self._known = values[where], known[where]

    def _samples(self, made: Artifact) -> tuple[np.ndarray, np.ndarray]:
        """The prompt of each taken pair, [pair], and the numbers of its two samples, [side, pair]."""
        samples = np.zeros(self._values.shape, dtype=np.int64)
        found, taken = [], []
        for places, table in self._places.pieces(self._pairs, schema.PAIRS, ["pair_id", "prompt_id"]):
            taken.append(places[places >= 0])
            found.append(keys(table["prompt_id"].take(np.flatnonzero(places >= 0))))
        for places, table in self._places.pieces(made.path("pair_samples.parquet"), schema.PAIR_SAMPLES):
            for side, name in enumerate(("chosen_sample", "rejected_sample")):
                samples[side, places[places >= 0]] = table[name].to_numpy()[places >= 0]
        prompts = np.concatenate(found)
        return prompts[np.argsort(np.concatenate(taken))], samples


def _ordered(attempt: Attempt, taken: dict[_Side, np.ndarray], scratch: Path) -> Scatter:
    """The rows of the mixture in training order, in blocks in an empty folder."""
    ids = np.concatenate([side.ids[chosen] for side, chosen in taken.items()])
    fields = attempt.fields
    margins = np.concatenate([side.margins[chosen] for side, chosen in taken.items()])
    seed = derived_seed(fields["seed"], fields["round"], "order")
    order = training_order(ids, seed, margins, fields.get("order", SHUFFLED))
    places = np.empty(ids.size, dtype=np.int64)
    places[order] = np.arange(ids.size)
    held = schema.as_held(schema.MIXTURE, *(side.schema for side, chosen in taken.items() if chosen.size))
    scatter = Scatter(scratch, held, ids.size)

    def add(side: _Side, own: np.ndarray) -> None:
        for found, table in side.pairs(taken[side], own):
            scatter.add(found, table)

    ends = np.cumsum([chosen.size for chosen in taken.values()])[:-1]
    with ThreadPoolExecutor(len(taken), thread_name_prefix="sera-side") as threads:
        list(threads.map(add, taken, np.split(places, ends)))
    return scatter


def _write_ledger(attempt: Attempt, human: _Side, generated: _Side) -> dict[str, Any]:
    """Write the ledger of every input pair, generated pair and prompt without a pair.

    Returns how many of the dropped human pairs had a flipped label, and how many are expected by chance.
    """
    flipped = json.loads(attempt.input("rendered").path("flipped.json").read_text())
    counts: Counter[tuple[bool, bool]] = Counter()
    with Writer(attempt.write("ledger.parquet"), schema.LEDGER) as out:
        for table in _ledger(attempt, human, generated):
            out.write(table)
            for (origin, reason), count in _counted(table, "origin", "reason"):
                attempt.counts[f"{origin}/{reason}"] += count
            if flipped:
                counts.update(_flipped_and_kept(table, flipped))
    return _flips(counts) if flipped else {}


def _counted(table: pa.Table, *names: str) -> Iterator[tuple[tuple[Any, ...], int]]:
    """(values of these columns, number of rows with them)."""
    for row in table.group_by(list(names), use_threads=False).aggregate([([], "count_all")]).to_pylist():
        yield tuple(row[name] for name in names), row["count_all"]


def _flipped_and_kept(table: pa.Table, flipped: list[str]) -> dict[tuple[bool, bool], int]:
    """Number of selected human pairs by (flipped label, kept)."""
    selected = compute.is_in(table["stage"], value_set=pa.array(["select", "mix"]))
    rows = table.filter(compute.and_(compute.equal(table["origin"], "human"), selected))
    of_flipped = compute.is_in(rows["pair_id"], value_set=pa.array(flipped, pa.string()))
    rows = rows.append_column("flipped", of_flipped)
    return {(turned, kept): count for (turned, kept), count in _counted(rows, "flipped", "kept")}


def _ledger(attempt: Attempt, human: _Side, generated: _Side) -> Iterator[pa.Table]:
    yield from human.ledger()
    yield from generated.ledger()
    for table in row_groups(attempt.input("rendered").path("dropped.parquet"), schema.LEDGER):
        yield _with(table, "round", pa.repeat(attempt.fields["round"], table.num_rows))
    for name, file in (("samples", "dropped.parquet"), ("responses", "ledger.parquet")):
        if name in attempt.spec.inputs:
            for table in row_groups(attempt.input(name).path(file), schema.LEDGER):
                yield _with(
                    table, "round", pa.repeat(attempt.fields["round"], table.num_rows)
                )  # a file's have none


def _with(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with one column replaced."""
    place = table.schema.get_field_index(name)
    field = table.schema.field(place)
    return table.set_column(place, field, values.cast(field.type))


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
