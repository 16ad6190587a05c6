"""Which worker does which shard: every shard is done, whoever is lost, and by few workers twice."""

import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.engines.shard_queue import STRAGGLING_SECONDS, ShardFailsError, ShardQueue


def queue_of(shards: int, workers: str, ahead: int = 1) -> ShardQueue[str]:
    queue = ShardQueue[str](range(shards), ahead)
    for worker in workers:
        queue.join(worker)
    return queue


def test_shards_go_in_order_to_whoever_has_been_idle_longest() -> None:
    queue = queue_of(5, "ab")
    assert queue.assign(0) == [("a", 0), ("b", 1)] and queue.assign(0) == []
    assert queue.acknowledge("b", 1, 1) and queue.acknowledge("a", 0, 2)
    assert queue.assign(2) == [("b", 2), ("a", 3)]
    assert (queue.missing, queue.waiting, queue.workers, queue.finished) == (3, 1, 2, False)
    queue.acknowledge("a", 3, 3)
    assert queue.assign(3) == [("a", 4)]
    queue.acknowledge("a", 4, 4)
    queue.acknowledge("b", 2, 4)
    assert queue.finished and queue.assign(5) == []


def test_only_missing_shards_are_given_out() -> None:
    queue = ShardQueue[str]([7, 2, 4])
    queue.join("a")
    done = []
    while not queue.finished:
        ((worker, shard),) = queue.assign(0)
        queue.acknowledge(worker, shard, 0)
        done.append(shard)
    assert done == [2, 4, 7]


def test_a_lost_workers_shards_are_the_next_that_others_do() -> None:
    queue = queue_of(6, "abc", ahead=2)
    assert queue.assign(0) == [("a", 0), ("b", 1), ("c", 2), ("a", 3), ("b", 4), ("c", 5)]
    assert queue.held_by("a") == [0, 3] and queue.lose("a") == [0, 3]
    queue.acknowledge("c", 2, 1)
    queue.acknowledge("b", 1, 1)
    assert queue.assign(1) == [("c", 0), ("b", 3)]
    assert queue.lose("unknown") == [] and queue.lose("a") == []


def test_a_shard_that_ends_every_worker_ends_the_step_and_is_named() -> None:
    """With three lost; the shard that waited behind it each time is not blamed."""
    queue = ShardQueue[str]([8, 9], ahead=2)
    for worker in "ab":
        queue.join(worker)
        queue.assign(0)
        assert queue.lose(worker) == [8, 9]
    queue.join("c")
    assert queue.assign(0) == [("c", 8), ("c", 9)]
    with pytest.raises(ShardFailsError, match="shard 8: 3 workers were lost while they did it"):
        queue.lose("c")


def test_the_acknowledgement_of_a_worker_taken_for_lost_counts() -> None:
    queue = queue_of(2, "ab")
    queue.assign(0)
    queue.lose("a")
    assert queue.acknowledge("a", 0, 1) and not queue.acknowledge("a", 0, 1)
    queue.acknowledge("b", 1, 1)
    assert queue.finished and queue.assign(1) == []


def test_a_straggler_is_given_to_one_idle_worker_when_nothing_else_waits() -> None:
    """The mean is 20 s, so the third shard straggles 60 s after it was given out."""
    queue = queue_of(3, "abc")
    queue.assign(0)
    assert queue.straggles_at() is None
    queue.acknowledge("a", 0, 20)
    queue.acknowledge("b", 1, 20)
    assert queue.assign(59) == [] and queue.straggles_at() == 60
    assert queue.assign(60) == [("a", 2)] and queue.assign(200) == []
    assert queue.lose("a") == [] and queue.assign(201) == [("b", 2)], "the copy's worker was lost"
    assert queue.acknowledge("b", 2, 202) and queue.finished
    assert not queue.acknowledge("c", 2, 203) and queue.held_by("c") == []


def test_short_shards_are_not_taken_for_stragglers() -> None:
    queue = queue_of(2, "ab")
    queue.assign(0)
    queue.acknowledge("a", 0, 0.1)
    assert queue.straggles_at() == STRAGGLING_SECONDS


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), ahead=st.integers(1, 3), shards=st.integers(0, 40))
def test_every_shard_is_acknowledged_once_whoever_is_lost_and_whenever(
    seed: int, ahead: int, shards: int
) -> None:
    """At random: workers finish, die, are replaced, and speak after they were taken for lost."""
    drawn, now, first = random.Random(seed), 0.0, []
    queue = ShardQueue[int](range(shards), ahead, failures=10**6)
    workers = list(range(3))
    for worker in workers:
        queue.join(worker)
    ghosts: list[tuple[int, int]] = []
    while not queue.finished:
        now += drawn.expovariate(0.1)
        for worker, shard in queue.assign(now):
            assert len(queue.held_by(worker)) <= ahead and shard in queue.held_by(worker)
        worker = drawn.choice(workers)
        held = queue.held_by(worker)
        if held and drawn.random() < 0.7:
            first += [held[0]] * queue.acknowledge(worker, held[0], now)
        elif drawn.random() < 0.2:
            ghosts += [(worker, shard) for shard in held[:1]]
            queue.lose(worker)
            workers[workers.index(worker)] = new = max(workers) + 1
            queue.join(new)
        elif ghosts and drawn.random() < 0.2:
            worker, shard = ghosts.pop()
            first += [shard] * queue.acknowledge(worker, shard, now)
    assert sorted(first) == list(range(shards))


def test_a_thousand_workers_and_eighty_thousand_shards_take_seconds() -> None:
    """About 1 s; a queue that looks at every worker or shard for each event would take hours."""
    started = time.process_time()
    queue = ShardQueue[int](range(80_000))
    for worker in range(1024):
        queue.join(worker)
    given = queue.assign(0)
    now = 0.0
    while not queue.finished:
        for worker, shard in given:
            now += 0.01
            queue.acknowledge(worker, shard, now)
        given = queue.assign(now)
    assert time.process_time() - started < 20
