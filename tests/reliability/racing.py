"""Eight processes race to commit the same step, again and again: who wins, and what do the others do?"""

import multiprocessing
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sera_core.artifacts.manifest import Artifact, StepSpec
from sera_core.artifacts.step import Attempt, run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig

RACERS = 8
WAIT_SECONDS = 120.0


@dataclass(frozen=True)
class Saw:
    """What one process saw of one round."""

    round: int
    ours: str
    """Id of its own attempt."""
    committed: str
    """Id of the attempt that the record it was given names."""
    digest: str
    text: str
    """What it read from the committed file."""


def race(url: str, rounds: int, scratch: Path) -> list[list[Saw]]:
    """The rounds, each with what every process saw of it."""
    context = multiprocessing.get_context("fork")
    gate, told = context.Barrier(RACERS), context.SimpleQueue()
    racers = [
        context.Process(target=_racer, args=(url, rounds, scratch / str(number), gate, told))
        for number in range(RACERS)
    ]
    for racer in racers:
        racer.start()
    seen = [told.get() for _ in range(RACERS * rounds)]
    for racer in racers:
        racer.join(WAIT_SECONDS)
    for found in seen:
        if isinstance(found, str):
            raise AssertionError(found)
    return [[saw for saw in seen if saw.round == number] for number in range(rounds)]


def double_commits(rounds: list[list[Saw]]) -> int:
    """Rounds that had not exactly one winner, or where somebody went on with another's work."""
    return sum(not _one_winner(seen) for seen in rounds)


def _one_winner(seen: list[Saw]) -> bool:
    winners = [saw for saw in seen if saw.ours == saw.committed]
    return (
        len(seen) == RACERS
        and len({saw.ours for saw in seen}) == RACERS
        and len(winners) == 1
        and {(saw.committed, saw.digest, saw.text) for saw in seen}
        == {(winners[0].ours, winners[0].digest, f"made by {winners[0].ours}")}
    )


def _racer(url: str, rounds: int, cache: Path, gate: Any, told: Any) -> None:
    os.environ["SERA_CACHE"] = str(cache)
    for number in range(rounds):
        try:
            told.put(_commit(url, number, gate))
        except BaseException as error:
            gate.abort()
            told.put(f"{type(error).__name__}: {error}")


def _commit(url: str, number: int, gate: Any) -> Saw:
    store, own = open_store(url), secrets.token_hex(8)

    def work(attempt: Attempt) -> list[str]:
        nonlocal own
        own = attempt.id
        attempt.write("made.txt").write_text(f"made by {own}")
        gate.wait(WAIT_SECONDS)
        return ["made.txt"]

    spec = StepSpec(step="race", version=1, fields={"round": number}, inputs={})
    record = run_step(store, spec, work, ExecutionConfig())
    artifact = Artifact(store, record.ref)
    text = artifact.path("made.txt").read_text()
    return Saw(number, own, record.files["made.txt"].attempt, record.digest, text)
