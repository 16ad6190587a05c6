"""Do the shards of a step that are not finished: here, or in several workers (`execution.distribute`)."""

from collections.abc import Sequence
from typing import Any

from sera_core.artifacts.step import Attempt
from tasks.engines.shards import Shards


def finish_shards(attempt: Attempt, shards: Shards, opened_by: str) -> list[dict[str, Any]]:
    """Do the missing shards; returns the parts of all, in order, from which the result is made.

    Args:
        attempt: the step's.
        shards: its shards.
        opened_by: what opens them in another process, as `module:function` (attempt) -> shards.
    """
    total = len(shards.sizes)
    known = attempt.shards(total)
    if attempt.execution.distribute == "none" or not total:
        try:
            _finish_here(attempt, shards, [number for number in range(total) if number not in known])
        finally:
            shards.close()
        if shards.checked == "at the end" and total:
            shards.check()
    elif attempt.execution.distribute == "processes":
        from tasks.engines.replica_processes import finish_in_processes

        finish_in_processes(attempt, shards, known, opened_by)
    else:
        from tasks.engines.replica_actors import finish_on_ray

        finish_on_ray(attempt, shards, known, opened_by)
    parts = list(attempt.shards(total).values())
    attempt.use_parts(parts)
    return parts


def _finish_here(attempt: Attempt, shards: Shards, missing: Sequence[int]) -> None:
    sizes, unit = shards.sizes, shards.unit
    total, done = sum(sizes), sum(sizes) - sum(sizes[number] for number in missing)
    if shards.checked == "early" and sizes and 0 not in missing:
        shards.check()
    for place, number in enumerate(missing):
        before = done
        shards.do(
            number,
            missing[place + 1 :],
            lambda some, before=before: attempt.progress(before + some, total, unit),
        )
        done += sizes[number]
        if shards.checked == "early" and number == 0:
            shards.check()
