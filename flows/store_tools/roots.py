"""Steps that a store must keep: those that a run uses or an unfinished run would reuse. No Prefect.

Roots are the steps named in the manifests of all runs, the test evidence, and the steps that open rounds
would use (computed as in `sera plan`). Claimed steps are kept too. A judge's verdicts are kept as long as the
answers they are about, or the policies that gave them, and calibrations always: asking again may cost money.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from flows import round as sera_round
from flows.planning.plan import Walk, walk_rounds
from flows.running.open_run import test_record
from sera_core.artifacts.lease import claim_path, look
from sera_core.artifacts.manifest import StepRecord, StepRef, find_record, parse_record
from sera_core.artifacts.records import StrictModel, read_typed
from sera_core.artifacts.runs import RunStore, list_runs
from sera_core.artifacts.store import Store
from sera_core.judges.verdicts import CALIBRATE_STEP, JUDGE_STEP, recorded

COLLECTED = "collected.json"
"""Copy of a step's deleted record, kept until its files are deleted."""
Place = tuple[str, str]
"""Name and key of a step."""


class Collected(StrictModel):
    """Content of `COLLECTED`."""

    format: int
    record: dict[str, Any] | None


class Roots:
    """The steps to keep, with the records of those that are done."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.records: dict[Place, StepRecord | None] = {}
        for run in list_runs(store):
            for place in steps_of_run(RunStore(store, run)):
                self._keep(place)
        for record in [*self._verdicts(), *recorded(store, CALIBRATE_STEP)]:
            self._keep((record.step, record.key))

    def __contains__(self, place: Place) -> bool:
        return place in self.records

    def _verdicts(self) -> list[StepRecord]:
        """Verdicts about answers that are kept, and about answers of kept policies to a set of prompts."""
        return [record for record in recorded(self.store, JUDGE_STEP) if self._is_about_kept(record)]

    def _is_about_kept(self, record: StepRecord) -> bool:
        if all(place in self for place in _places(record.inputs.values())):
            return True
        samples = (
            find_record(self.store, *_places([record.inputs[name]])[0]) for name in ("samples", "against")
        )
        return all(one is not None and _places([one.inputs["policy"]])[0] in self for one in samples)

    def _keep(self, place: Place) -> None:
        """Keep the step and all its ancestors."""
        waiting = [place]
        while waiting:
            place = waiting.pop()
            if place not in self.records:
                record = self.records[place] = find_record(self.store, *place)
                record = record or _collected(self.store, place)
                waiting += [] if record is None else _places(record.inputs.values())


def _collected(store: Store, place: Place) -> StepRecord | None:
    """The copy of a record deleted in an earlier pass."""
    path = f"steps/{place[0]}/{place[1]}/{COLLECTED}"
    copy = read_typed(store, path, Collected)
    if copy is None or copy.record is None:
        return None
    return parse_record(copy.record, f"{store.url}/{path}")


def is_claimed(store: Store, place: Place) -> bool:
    """Whether a process is doing the step."""
    seen = look(store, claim_path(*place))
    return seen is not None and not seen.is_over


def steps_of_run(records: RunStore) -> Iterator[Place]:
    """Steps that a run uses, or would reuse when it resumes."""
    if not records.configs():
        return
    for manifest in records.rounds():
        yield from _places([*manifest.used, *manifest.steps.values()])
        # Of every round: another version may have chosen another best round.
        if (final := records.test_evidence(manifest.round)) is not None:
            yield from _places([StepRef.model_validate(final["step"])])
    if records.stop_reason() in (None, "budget"):  # after a raised budget the open round resumes
        yield from _open_round_steps(records)
    yield from _test_steps(records)


def _open_round_steps(records: RunStore) -> Iterator[Place]:
    walk = Walk(records.store.url)
    config = records.configs()[-1].settings
    digests = records.configs()[-1].resolved["digests"]
    walk_rounds(config, digests, records.history(), walk, records.given_answer)
    yield from ((row["step"], row["key"]) for row in walk.rows if row["key"] is not None)


def _test_steps(records: RunStore) -> Iterator[Place]:
    """Steps of a test evaluation that is not finished."""
    best = records.history().best
    if best is None or test_record(records) is not None:
        return
    walk = Walk(records.store.url)
    config = records.configs()[-1].settings
    sides = sera_round.prepare(config, records.configs()[-1].resolved["digests"], walk.do)
    sera_round.test_evidence(config, sides, best.steps["policy"], walk.do)
    yield from ((row["step"], row["key"]) for row in walk.rows if row["key"] is not None)


def _places(refs: Iterable[StepRef]) -> list[Place]:
    return [(ref.step, ref.key) for ref in refs]
