"""Checkpoints of a training as parts of its step. Nothing here imports torch until one is written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sera_core.artifacts.step import Attempt

RATE = "train.learning_rate"
"""The setting to lower if weights are not finite."""


def store_checkpoint(
    attempt: Attempt,
    parameters: Mapping[str, Any],
    optimizer: Any,
    state: Mapping[str, Any],
    rate: str = RATE,
    processes: int | None = None,
) -> None:
    """Commit a checkpoint as a part, and drop those that it supersedes.

    Args:
        attempt: the training.
        parameters: the trained weights.
        optimizer: their optimizer.
        state: what else to restore; its `step` is the number of steps done.
        rate: the setting of the learning rate, for messages.
        processes: how many processes train together; None: this one alone.

    Raises:
        SeraError: some trained weights are not finite.
    """
    from tasks.engines.checkpoints import FILES, refuse_not_finite, save_checkpoint

    step = state["step"]
    refuse_not_finite(parameters, step - 1, rate)
    folder = f"checkpoint-{step:06d}"
    save_checkpoint(attempt.write(f"{folder}/{FILES[0]}").parent, parameters, optimizer, state)
    parts = attempt.parts()
    files = [f"{folder}/{name}" for name in FILES]
    several = {} if processes is None else {"processes": processes}
    parts.append(attempt.commit_part(len(parts), files, {"step": step, **several}))
    for number in superseded(parts, attempt.execution.keep_checkpoints):
        attempt.drop_part(number)


def latest_checkpoint(attempt: Attempt) -> dict[str, Path] | None:
    """Files of the last checkpoint by name; None if there is none."""
    parts = attempt.parts()
    if not parts:
        return None
    part = max(parts, key=lambda part: part["info"]["step"])
    return {Path(name).name: attempt.part_path(part, name) for name in part["files"]}


def superseded(parts: Sequence[dict[str, Any]], keep: int) -> list[int]:
    """Numbers of all checkpoints but the `keep` latest."""
    return sorted(range(len(parts)), key=lambda number: parts[number]["info"]["step"])[:-keep]
