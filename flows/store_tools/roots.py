"""What a store must keep: every step that a run rests on, or that an unfinished run would reuse. No Prefect.

Roots are the manifests of every run with the steps they name, the evidence on the test side, the open round
of every run that may go on (its steps recomputed as `sera plan` does), and steps that are being done now.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from flows import round as box
from flows.planning.plan import Walk, walk_rounds
from flows.running.open_run import test_record
from sera_core.artifacts.lease import claim_path, look
from sera_core.artifacts.manifest import StepRecord, StepRef, find_record, parse_record
from sera_core.artifacts.records import StrictModel, read_typed
from sera_core.artifacts.runs import RunStore, list_runs
from sera_core.artifacts.store import Store

COLLECTED = "collected.json"
"""The copy of a step's record that was taken away, kept until its files go too."""
Place = tuple[str, str]
"""Name and key of a step."""


class Collected(StrictModel):
    """What `COLLECTED` holds."""

    format: int
    record: dict[str, Any] | None


class Roots:
    """The steps to keep; the records of those that are done, each read once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.records: dict[Place, StepRecord | None] = {}
        for run in list_runs(store):
            for place in of_run(RunStore(store, run)):
                self._keep(place)

    def __contains__(self, place: Place) -> bool:
        return place in self.records

    def _keep(self, place: Place) -> None:
        """The step, and every step it was made from."""
        waiting = [place]
        while waiting:
            place = waiting.pop()
            if place not in self.records:
                record = self.records[place] = find_record(self.store, *place)
                record = record or _collected(self.store, place)
                waiting += [] if record is None else _places(record.inputs.values())


def _collected(store: Store, place: Place) -> StepRecord | None:
    """The copy of a record that an earlier pass took away."""
    path = f"steps/{place[0]}/{place[1]}/{COLLECTED}"
    copy = read_typed(store, path, Collected)
    if copy is None or copy.record is None:
        return None
    return parse_record(copy.record, f"{store.url}/{path}")


def is_claimed(store: Store, place: Place) -> bool:
    """Whether somebody is at work on the step."""
    seen = look(store, claim_path(*place))
    return seen is not None and not seen.is_over


def of_run(records: RunStore) -> Iterator[Place]:
    """Steps that a run rests on, or would reuse when it goes on."""
    if not records.configs():
        return
    for manifest in records.rounds():
        yield from _places([*manifest.used, *manifest.steps.values()])
        # Every round's, not only the best one's: another version may have called another round the best.
        if (final := records.test_evidence(manifest.round)) is not None:
            yield from _places([StepRef.model_validate(final["step"])])
    if records.stop_reason() in (None, "budget"):  # a budget that is raised lets the open round go on
        yield from _of_open_round(records)
    yield from _of_test_side(records)


def _of_open_round(records: RunStore) -> Iterator[Place]:
    walk = Walk(records.store.url)
    config = records.configs()[-1].settings
    digests = records.configs()[-1].resolved["digests"]
    walk_rounds(config, digests, records.history(), walk, records.given_answer)
    yield from ((row["step"], row["key"]) for row in walk.rows if row["key"] is not None)


def _of_test_side(records: RunStore) -> Iterator[Place]:
    """The last word of a run, as far as it was prepared."""
    best = records.history().best
    if best is None or test_record(records) is not None:
        return
    walk = Walk(records.store.url)
    config = records.configs()[-1].settings
    sides = box.prepare(config, records.configs()[-1].resolved["digests"], walk.do)
    box.test_evidence(config, sides, best.steps["policy"], walk.do)
    yield from ((row["step"], row["key"]) for row in walk.rows if row["key"] is not None)


def _places(refs: Iterable[StepRef]) -> list[Place]:
    return [(ref.step, ref.key) for ref in refs]
