"""Do the shards of a step in several processes of this machine, each with the policy.

They are forked like the processes of a training (`processes`), but need not know of each other: if one dies,
the others take its shards, and the step fails only when none is left. On an accelerator each has a GPU of its
own; on a CPU each has its part of the threads.
"""

import json
import time
from dataclasses import dataclass
from typing import Any

from sera_core.artifacts.step import Attempt
from sera_core.errors import SeraError
from sera_core.models.devices import device_of, replica_processes
from sera_core.models.shared_policies import release_policies
from tasks.engines.child_process import release_process, start
from tasks.engines.child_step import Channel
from tasks.engines.members import Listening, Member, asked_of_each, speaking, together
from tasks.engines.replicas import Assignment, ShardWorker
from tasks.engines.shards import Shards

SETTLE_SECONDS = 1
"""Time after the death of a process in which all that it said is heard, while others go on speaking."""

# -------------------------------------------------------------------------------------------------- the owner


def finish_in_processes(attempt: Attempt, shards: Shards, known: dict[int, Any], opened_by: str) -> None:
    """Do the shards that are not known; the parts are in the store afterwards.

    Args:
        attempt: the step's; what a check measures is added to its metrics.
        shards: its shards.
        known: those that are finished.
        opened_by: what opens them in a process, as `module:function` (attempt) -> shards.

    Raises:
        InputError: there are fewer GPUs than processes.
        SeraError: a process raised it (same class), or none is left; the message says how.
    """
    owned: Assignment[_Replica] = Assignment(attempt, shards, known)
    if owned.finished:
        return
    release_process()
    release_policies()
    for policy in ("policy", "model"):
        attempt.input(policy).folder("policy")  # fetched once, not by each process
    count = min(replica_processes(attempt.execution), owned.queue.missing)
    attempt.environment["replicas"] = count
    work, device = f"{opened_by.partition(':')[0]}:do_as_replica", device_of(attempt.execution.device)
    with together(_Replica) as members:
        for rank, request in enumerate(asked_of_each(attempt, count, work, device)):
            request |= {"rank": rank, "opened_by": opened_by}
            members.append(_Replica(attempt, rank, count, start(request, stays=True), owned=owned))
        _listen(owned, members)
        grown = [member.grown for member in members]
    attempt.memory.grown = sum(grown) if device == "cpu" else max(grown)


@dataclass(eq=False)
class _Replica(Member):
    """One of the processes."""

    owned: Assignment["_Replica"] | None = None
    grown: int = 0
    """Bytes by which its memory grew, as far as it has told."""

    def _hear_progress(self, some: int) -> None:
        assert self.owned is not None
        self.owned.progress(self, some)

    def _hear_did(self, result: list[Any]) -> None:
        assert self.owned is not None
        number, metrics, self.grown = result
        self.owned.did(self, number, metrics)


def _listen(owned: Assignment[_Replica], members: list[_Replica]) -> None:
    """Send shards and hear of them until all are done; then tell the processes to end."""
    working = list(members)
    with Listening() as listening:
        for member in working:
            listening.to(member)
            owned.queue.join(member)
        while not owned.finished:
            for member, number, following in owned.to_send():
                member.say([number, following])
            heard = listening.turn()
            for member in [member for member in working if member.failed]:
                if member.error is not None:
                    member.show_last_lines()
                    raise member.error
                if not heard or time.monotonic() > (member.failed_at or 0) + SETTLE_SECONDS:
                    working.remove(member)
                    _lose(owned, member, bool(working))
        for member in working:
            member.say(None)
        while any(not (member.done or member.failed) for member in working if not owned.is_busy(member)):
            listening.turn()


def _lose(owned: Assignment[_Replica], member: _Replica, others: bool) -> None:
    member.show_last_lines()
    said = f"{member.name} {member.how_it_ended()}"
    owned.lost(member, said)
    if not others:
        raise SeraError(
            f"step {member.attempt.spec.step}: {said}, and no other is left; run the same command again to "
            "continue from the last finished shards"
        )


# -------------------------------------------------------------------------------------------- each of them


def serve(request: dict[str, Any], channel: Channel) -> dict[str, Any]:
    """Do the shards that the owner names, one after the other, until it names none.

    Args:
        request: see `ShardWorker`.
        channel: to the owner.
    """
    with speaking(channel), ShardWorker(request) as worker:
        while (line := channel.answers.readline()) and (asked := json.loads(line)):
            number, following = asked
            metrics = worker.do(number, following, lambda some: channel.tell(progress=some))
            channel.tell(did=[number, metrics, worker.attempt.memory.grown])
    return {"ended": True}
