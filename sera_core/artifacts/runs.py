"""A run: its configuration records and round manifests, and its head, best round and stop reason.

runs/<run>/lease/                 who works on it (lease.py)
runs/<run>/run-000.json           resolved configuration; later numbers only for changed limits and execution
runs/<run>/round-000.json         create-only manifest of a finished round, with the sha256 of its parent
runs/<run>/stop-000.json          the budget that ended the run under run-000.json
runs/<run>/review-000.json        a question to a person; review-000-answer.json the answer
runs/<run>/final-000.json         evidence on the test side for one best round, once the run has stopped
"""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

from sera_core.artifacts import lease
from sera_core.artifacts.canonical import sha256_json
from sera_core.artifacts.history import History
from sera_core.artifacts.records import FORMAT, read_series, read_typed, typed
from sera_core.artifacts.run_records import (
    HEADLESS_DECISIONS,
    Answer,
    DecisionName,
    Final,
    Question,
    RoundManifest,
    RunRecord,
    Stop,
    check_name,
    differences,
    is_run_name,
    now,
)
from sera_core.artifacts.store import Store, create_json
from sera_core.config import SeraConfig
from sera_core.errors import InputError, StoreError


class RunStore:
    """The records of one run."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.run = store, check_name(run)
        self.path = f"runs/{run}"

    def configs(self) -> list[RunRecord]:
        """run-000.json and its successors."""
        found = read_series(self.store, self.path + "/run-{:03d}.json")
        return [typed(RunRecord, data, self._where(f"run-{number:03d}")) for number, data in found]

    def rounds(self) -> list[RoundManifest]:
        """Manifests of the finished rounds, in order, each checked against its parent's hash."""
        manifests: list[RoundManifest] = []
        parent = None
        for number, data in read_series(self.store, self.path + "/round-{:03d}.json"):
            manifest = typed(RoundManifest, data, self._where(f"round-{number:03d}"))
            if manifest.parent_sha256 != parent or manifest.round != number:
                raise StoreError(
                    f"{self._where(f'round-{number:03d}')}: its parent hash does not match "
                    "the manifest before it; restore both from a copy of the store"
                )
            manifests.append(manifest)
            parent = self.sha256_of_round(number)
        return manifests

    def _where(self, name: str) -> str:
        return f"{self.store.url}/{self.path}/{name}.json"

    def sha256_of_round(self, number: int) -> str | None:
        """sha256 of a round's manifest in the store; None when it does not exist."""
        data = self.store.read_bytes(f"{self.path}/round-{number:03d}.json")
        return None if data is None else hashlib.sha256(data).hexdigest()

    def test_evidence(self, round: int) -> dict[str, Any] | None:
        """The evidence on the test side under a round's policy, if it was recorded."""
        found = read_typed(self.store, f"{self.path}/final-{round:03d}.json", Final)
        if found is not None and found.round != round:
            raise StoreError(
                f"{self._where(f'final-{round:03d}')}: is the record of round {found.round}; restore it from "
                "a copy of the store"
            )
        return None if found is None else found.model_dump()

    def history(self) -> History:
        """The run's history."""
        return History(self.rounds())

    def open(self, config: SeraConfig, resolved: Mapping[str, Any]) -> RunRecord:
        """Create the run, or open it with the same configuration; record changed limits and execution.

        Raises:
            InputError: a setting that changes results differs; the message lists the differences.
        """
        dump = config.model_dump(mode="json")
        sha = sha256_json(resolved)
        records = self.configs()
        if records and records[-1].config_sha256 != sha:
            lines = "\n  ".join(differences(records[0].resolved, resolved))
            raise InputError(
                f"run {self.run!r} exists with another configuration:\n  {lines}\n"
                "Undo the change, or start another run with --name"
            )
        if records and sha256_json(records[-1].config) == sha256_json(dump):
            return records[-1]
        record = RunRecord(
            format=FORMAT,
            run=self.run,
            config=dump,
            config_sha256=sha,
            resolved=dict(resolved),
            created=now(),
        )
        winner, _ = create_json(
            self.store, f"{self.path}/run-{len(records):03d}.json", record.model_dump(mode="json")
        )
        return typed(RunRecord, winner, self._where(f"run-{len(records):03d}"))

    def commit_round(self, manifest: RoundManifest) -> RoundManifest:
        """Create the round's manifest, unless it exists; returns the one in the store.

        Raises:
            BusyError: another process took over this process's lease on the run.
        """
        number = manifest.round
        parent = self.sha256_of_round(number - 1) if number else None
        data = manifest.model_copy(update={"parent_sha256": parent, "epoch": self._epoch()})
        winner, ours = create_json(
            self.store, f"{self.path}/round-{number:03d}.json", data.model_dump(mode="json")
        )
        if not ours:
            self._epoch()
        return typed(RoundManifest, winner, self._where(f"round-{number:03d}"))

    def _epoch(self) -> int | None:
        """Number of the epoch this process holds on the run, after a check that it is the newest; or None."""
        held = lease.held(self.store, self.run)
        if held is None:
            return None
        held.check()
        return held.number

    def record_stop(self, reason: str, after: str) -> None:
        """Record that the budget ended the run under its current configuration.

        Raises:
            BusyError: another process took over this process's lease on the run.
        """
        self._epoch()
        number = len(self.configs()) - 1
        record = {"format": FORMAT, "reason": reason, "after": after, "created": now()}
        create_json(self.store, f"{self.path}/stop-{number:03d}.json", record)

    def stop_reason(self) -> str | None:
        """Why the run stopped, None while it is open. Raising a limit re-opens it."""
        state = self.state()
        return None if state in ("open", "waiting") else state

    def state(self) -> str:
        """`open`, `waiting` (for a person's answer), or why the run stopped."""
        records, history = self.configs(), self.history()
        if history.rounds and history.rounds[-1].stop_reason:
            return history.rounds[-1].stop_reason
        if self._asks(history.next_round) is not None:
            return "waiting"
        if not records:
            return "open"
        limits = records[-1].settings.limits
        if history.next_round >= limits.rounds:
            return "max_rounds"
        stop = self.stop()
        return "open" if stop is None else stop.reason

    def stop(self) -> Stop | None:
        """The budget that ended the run under its current configuration, or None."""
        return read_typed(self.store, f"{self.path}/stop-{len(self.configs()) - 1:03d}.json", Stop)

    def decisions(self) -> tuple[DecisionName, ...]:
        """The allowed answers for the open round: those that leave the run with a head, or end it."""
        return HEADLESS_DECISIONS if self.history().head is None else get_args(DecisionName)

    def _check_decision(self, round: int, decision: str) -> None:
        offered = self.decisions()
        if decision not in offered:
            raise InputError(
                f"run {self.run!r}, round {round}: {decision!r} is not allowed, because no round is promoted "
                f"yet and the run would be without a head; answer {' or '.join(offered)}"
            )

    def ask(self, round: int, evidence: Mapping[str, Any], hours: float, default: str) -> dict[str, Any]:
        """Record the question whether to promote a round; the deadline counts from the first record.

        Raises:
            InputError: the default would leave the run without a head.
        """
        self._check_decision(round, default)
        until = (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")
        question = {
            "format": FORMAT,
            "round": round,
            "evidence": evidence,
            "until": until,
            "default": default,
        }
        record, _ = create_json(self.store, f"{self.path}/review-{round:03d}.json", question)
        return record

    def answer(self, round: int, decision: str, note: str, who: str) -> dict[str, Any]:
        """Record the answer to a question; the first answer stands.

        Raises:
            InputError: the answer would leave the run without a head.
        """
        self._check_decision(round, decision)
        answer = {"format": FORMAT, "decision": decision, "note": note, "who": who, "when": now()}
        record, _ = create_json(self.store, f"{self.path}/review-{round:03d}-answer.json", answer)
        return record

    def question(self, round: int) -> dict[str, Any] | None:
        """The question asked of a round, or None."""
        found = read_typed(self.store, f"{self.path}/review-{round:03d}.json", Question)
        return None if found is None else found.model_dump()

    def given_answer(self, round: int) -> dict[str, Any] | None:
        """The recorded answer, or None; ignores the deadline."""
        found = read_typed(self.store, f"{self.path}/review-{round:03d}-answer.json", Answer)
        return None if found is None else found.model_dump()

    def answer_of(self, round: int) -> dict[str, Any] | None:
        """The answer to a round's question; after the deadline, record and return the default."""
        found = self.given_answer(round)
        question = self.question(round)
        if found is None and question and datetime.fromisoformat(question["until"]) < datetime.now(UTC):
            default, note = question["default"], "no answer before the deadline"
            if default not in self.decisions():  # a question of an older version; the rule for round 0
                default, note = "promote", f"{note}; the default {default} would leave the run without a head"
            return self.answer(round, default, note, "deadline")
        return found

    def waiting(self) -> dict[str, Any] | None:
        """The unanswered question of the open round: {"round", "until"}, or None."""
        return self._asks(self.history().next_round)

    def _asks(self, number: int) -> dict[str, Any] | None:
        question = self.question(number)
        if question is None or self.answer_of(number) is not None:
            return None
        return {"round": number, "until": question["until"]}


def list_runs(store: Store) -> list[str]:
    """Names of the runs in a store, for display."""
    return [name for name in store.names("runs") if is_run_name(name)]
