"""Read a run without Prefect or torch: rounds and artifacts as DataFrames, the policy as a path.

run = sera_core.open_run("./sera-store", "demo")
run.rounds; run[2].pairs(); run[2].pair_batches(); run[2].ledger(); run[2].policy_path(); run.history(pair_id)
run.plot(); run.compare("other"); run[2].compare(run[1])  # in a notebook
"""

import json
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from sera_core.artifacts import schema
from sera_core.artifacts.differing import Side
from sera_core.artifacts.folders import assemble
from sera_core.artifacts.manifest import Artifact, StepRef
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.artifacts.streaming import Lookup, column, keys, numbers, row_groups
from sera_core.errors import InputError
from sera_core.notebook.tables import html, rounds_table

if TYPE_CHECKING:
    from sera_core.notebook.comparison import Comparison
    from sera_core.notebook.figures import RunFigure

SHOWN = ("round", "decision", "reason", "human", "generated", "generated_share", "accuracy")
"""Columns of `Run.rounds` that a notebook shows."""


class Run:
    """A run in a store, read-only."""

    def __init__(self, store: str, name: str) -> None:
        self._records = RunStore(open_store(store), name)
        if not self._records.configs():
            raise InputError(f"run {name!r}: not in the store {store}; `sera list` shows its runs")
        self.name = name

    @property
    def rounds(self) -> pd.DataFrame:
        """One row per finished round: decision, reason, pairs, shares, and every single-valued metric."""
        return rounds_table(self._records.rounds())

    @property
    def stop_reason(self) -> str | None:
        """Why the run stopped; None while it is open."""
        return self._records.stop_reason()

    @property
    def best_round(self) -> int | None:
        """The best promoted round, as the last decision recorded it."""
        best = self._records.history().best
        return None if best is None else best.round

    def __len__(self) -> int:
        return len(self._records.rounds())

    def __repr__(self) -> str:
        count = len(self)
        state = "open" if (reason := self.stop_reason) is None else f"stopped: {reason}"
        best = "" if self.best_round is None else f", best round {self.best_round}"
        rounds = "1 round" if count == 1 else f"{count} rounds"
        return f"<run {self.name} in {self._records.store.url}: {rounds}, {state}{best}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the run in a line, and its rounds."""
        rounds = self.rounds
        table = html(rounds.filter(items=list(SHOWN)))
        return f"<p>{escape(repr(self))}</p>{table}"

    def __getitem__(self, round: int) -> "Round":
        rounds = self._records.rounds()
        if not -len(rounds) <= round < len(rounds):
            raise IndexError(
                f"run {self.name!r} has rounds 0 to {len(rounds) - 1}; round {round} is not finished"
            )
        return Round(self._records, rounds[round])

    def plot(self, panel: str | None = None) -> "RunFigure":
        """A matplotlib figure of all panels, or of one: `margins`, `accuracy`, `reliance`, `pairs`.

        `margins`: those of the human pairs in each reviewed round, by what became of the pairs. `accuracy`:
        held-out accuracy by round, balanced and plain. `reliance`: on the features the policies rely on most.
        `pairs`: trained on, by origin, with the generated share. Where something is not recorded, the panel
        says so.

        Raises:
            InputError: no such panel, or matplotlib is not installed.
        """
        figures = _figures()
        from sera_core.notebook.panels import Rounds

        feature = self._records.configs()[-1].settings.decide.feature
        rounds = [self[number] for number in range(len(self))]
        return figures.run_figure(self.name, Rounds(rounds, feature, self.best_round), panel)

    def compare(self, other: Union["Run", str]) -> "Comparison":
        """This run beside another one: settings that differ, rounds side by side, the policies' differences.

        Args:
            other: a run, or the name of one in the same store.

        Raises:
            InputError: no such run, or something that is no run.
        """
        from sera_core.notebook.comparison import compare_runs

        if isinstance(other, str):
            other = Run(self._records.store.url, other)
        if not isinstance(other, Run):
            raise InputError(
                f"compare({other!r:.100}): give a run (open_run) or the name of one in this store"
            )
        return compare_runs(self._side(), other._side())

    def _side(self) -> Side:
        rounds = self._records.rounds()
        return Side(self._records, rounds[-1] if rounds else None)

    def history(self, pair_id: str) -> pd.DataFrame:
        """One pair in every round: margin, rank, kept or dropped, and why."""
        tables = [self[number].ledger().assign(round=number) for number in range(len(self))]
        ledger = pd.concat(tables) if tables else pd.DataFrame(columns=["pair_id"])
        return ledger.loc[ledger["pair_id"] == pair_id].reset_index(drop=True)


class Round:
    """One finished round of a run, read-only."""

    def __init__(self, records: RunStore, manifest: RoundManifest) -> None:
        self._records, self._store, self.manifest = records, records.store, manifest

    def __repr__(self) -> str:
        manifest = self.manifest
        return f"<round {manifest.round} of {manifest.run}: {manifest.decision}>"

    def pairs(self) -> pd.DataFrame:
        """The pairs trained on in this round, human and generated, in training order, with their margins."""
        mixture = self._frame("mixture")
        margins = self.ledger().drop_duplicates("pair_id")[["pair_id", "ensemble_margin"]]
        return mixture.merge(margins, on="pair_id", how="left")

    def pair_batches(self) -> Iterator[pd.DataFrame]:
        """The same in pieces of at least 1,024 pairs, one in memory at a time, for what does not fit whole.

        `pandas.concat` of all pieces is `pairs()`. Ids and margins of all pairs are in memory.
        """
        if "mixture" not in self.manifest.artifacts:
            return
        margins, first = self._margins(), 0
        for table in row_groups(self._file("mixture"), schema.MIXTURE):
            frame = table.to_pandas()
            frame.index = pd.RangeIndex(first, first := first + len(frame))
            yield frame.assign(ensemble_margin=margins(table["pair_id"]))

    def _margins(self) -> Callable[[pa.ChunkedArray], np.ndarray]:
        """A function from pair ids to their ensemble margins, in nats; nan without one."""
        ids = column(self._file("ledger"), schema.LEDGER, "pair_id")
        is_pair = ids.is_valid()  # prompts without a pair have none
        lookup = Lookup(keys(ids.filter(is_pair)))
        values = numbers(self._file("ledger"), schema.LEDGER, "ensemble_margin")[is_pair.to_numpy()]

        def of(pair_ids: pa.ChunkedArray) -> np.ndarray:
            places = lookup.places(keys(pair_ids))
            return np.where(places < 0, np.nan, values[places])

        return of

    def scored(self) -> pd.DataFrame:
        """Every human pair with its log-probabilities, rewards and margins, in input order."""
        return self._frame("scored")

    def ledger(self) -> pd.DataFrame:
        """Every input pair, generated pair and prompt: kept or dropped, at which stage, and why."""
        return self._frame("ledger")

    def responses(self) -> pd.DataFrame:
        """The policy's responses with their rewards (an empty table in a round that sampled none)."""
        return self._frame("responses")

    def plot(self) -> "RunFigure":
        """A matplotlib figure: margins of this round's human and generated pairs, and the ledger's reasons.

        Raises:
            InputError: matplotlib is not installed.
        """
        return _figures().round_figure(self)

    def compare(self, other: "Round") -> "Comparison":
        """This round beside another one, of the same run or of another, such as `run[2].compare(run[1])`.

        Raises:
            InputError: something that is no round.
        """
        from sera_core.notebook.comparison import compare_rounds

        if not isinstance(other, Round):
            raise InputError(f"compare({other!r:.100}): give a round, such as run[1]")
        return compare_rounds(Side(self._records, self.manifest), Side(other._records, other.manifest))

    def evidence(self) -> dict:
        """The evidence the decision rests on."""
        return json.loads(self._artifact("evidence").path("evidence.json").read_text())

    def policy_path(self) -> Path:
        """A folder for `AutoModelForCausalLM.from_pretrained`: the policy, or its adapter beside its base."""
        policy = self._artifact("policy")
        folder = policy.folder("policy")
        if not self.is_adapter:
            return folder
        base = StepRef.model_validate_json((folder / "base.json").read_text())
        return _adapter_beside(policy, Artifact(self._store, base).folder("policy"))

    def copy_policy(self, folder: Path) -> None:
        """Copy exactly the policy's recorded files into a folder.

        Raises:
            StoreError: one of them is missing, or does not match its hash.
        """
        self._artifact("policy").copy("policy", folder)

    @property
    def is_adapter(self) -> bool:
        """Whether the policy is an adapter, which needs its base."""
        return "policy/adapter_config.json" in self._artifact("policy").record.files

    def _artifact(self, role: str) -> Artifact:
        if role not in self.manifest.steps:
            raise InputError(f"round {self.manifest.round} of {self.manifest.run!r} has no {role}")
        return Artifact(self._store, self.manifest.steps[role])

    def _frame(self, role: str) -> pd.DataFrame:
        if role not in self.manifest.artifacts:
            return pd.DataFrame(columns=getattr(schema, role.upper()).names)
        return pq.read_table(self._file(role)).to_pandas()

    def _file(self, role: str) -> Path:
        place = self.manifest.artifacts[role]
        step = StepRef(step=place["step"], key=place["key"], digest=self._digest(role))
        return Artifact(self._store, step).path(place["path"])

    def _digest(self, role: str) -> str:
        key = self.manifest.artifacts[role]["key"]
        return next(ref.digest for ref in self.manifest.steps.values() if ref.key == key)


def _figures() -> Any:
    """The module that draws.

    Raises:
        InputError: matplotlib is not installed.
    """
    try:
        from sera_core.notebook import figures
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise InputError("a plot needs the extra `plot`: pip install 'sera-flow[plot]'") from error
    return figures


def _adapter_beside(policy: Artifact, base: Path) -> Path:
    """A cached copy of the adapter whose config has the local path of its base (the store has no paths)."""
    names = [name for name in policy.record.files if name.startswith("policy/")]
    files = {name.removeprefix("policy/"): policy.path(name) for name in names}
    config = json.loads(files.pop("adapter_config.json").read_text())
    beside = json.dumps(config | {"base_model_name_or_path": str(base)}, indent=2, sort_keys=True) + "\n"
    return assemble(f"{policy.ref.digest}-adapter", files, {"adapter_config.json": beside})
