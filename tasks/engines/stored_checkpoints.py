"""Checkpoints of a training as parts of its step. Nothing here imports torch until one is written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sera_core.artifacts.step import Attempt

if TYPE_CHECKING:
    from tasks.engines.ranks import Ranks

RATE = "train.learning_rate"
"""The setting to lower if weights are not finite."""


def store_checkpoint(
    attempt: Attempt,
    parameters: Mapping[str, Any],
    optimizer: Any,
    state: Mapping[str, Any],
    rate: str = RATE,
    ranks: "Ranks | None" = None,
    sharded: bool = False,
) -> None:
    """Commit a checkpoint as a part, and drop those that it supersedes.

    Of several processes each has to call this, and the first one commits.

    Args:
        attempt: the training.
        parameters: the trained weights.
        optimizer: their optimizer.
        state: what else to restore; its `step` is the number of steps done.
        rate: the setting of the learning rate, for messages.
        ranks: the processes that train together; None: this one alone.
        sharded: whether each of them has its own rows of the weights, and so writes them.

    Raises:
        SeraError: some trained weights are not finite.
    """
    from tasks.engines.checkpoints import checkpoint_files, refuse_not_finite, save_checkpoint
    from tasks.engines.ranks import ALONE

    step, part = state["step"], ranks if ranks is not None and sharded else ALONE
    if ranks is not None and not (ranks.first or sharded):
        return
    refuse_not_finite(parameters, step - 1, rate)
    folder = f"checkpoint-{step:06d}"
    names = checkpoint_files(part.count)
    save_checkpoint(attempt.write(f"{folder}/{names[0]}").parent, parameters, optimizer, state, part)
    if part.count > 1:
        part.wait()  # until the others' files are complete
    if not part.first:
        return
    parts = attempt.parts()
    files = [f"{folder}/{name}" for name in names]
    several = {} if ranks is None else {"processes": ranks.count}
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
