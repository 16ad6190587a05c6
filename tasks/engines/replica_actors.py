"""Do the shards of a step on a Ray cluster, each worker with the policy. The only module that imports Ray.

A worker is an actor, placed by the CPUs or GPUs that it needs; a lost one is replaced where there is room,
and meanwhile others take its shards. Each opens the store itself, and only acknowledgements come back. On
every machine one worker fetches the policy's files into the store's local cache; the others wait for it.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import signal
import socket
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sera_core.artifacts.step import Attempt, environment
from sera_core.artifacts.store import LocalStore, Store, open_store
from sera_core.config import AUTO, ExecutionConfig
from sera_core.errors import InputError, SeraError
from sera_core.guards.shown import shown_line
from sera_core.settings.kinds import Size
from tasks.engines.fork_server import WAKE_SECONDS
from tasks.engines.members import told_error
from tasks.engines.replicas import Assignment, ShardWorker
from tasks.engines.shards import Shards

CONNECT_SECONDS = 5
END_SECONDS = 10
"""Time in which idle workers clean up at the end."""
NO_ROOM_SECONDS = 300
"""Time without any worker after which the step fails; a cluster that grows may take minutes."""
LOST_BEFORE_WORK = 3
"""Workers, for each that is wanted, that may be lost one after the other before one answers."""
COMPARED = ("torch", "transformers", "peft", "vllm", "numpy", "pyarrow")
"""Packages whose version must be the owner's, because they compute or write what is stored."""


# -------------------------------------------------------------------------------------------------- the owner


def finish_on_ray(attempt: Attempt, shards: Shards, known: dict[int, Any], opened_by: str) -> None:
    """Do the shards that are not known; the parts are in the store afterwards.

    Args:
        attempt: the step's; what a check measures is added to its metrics.
        shards: its shards.
        known: those that are finished.
        opened_by: what opens them in a worker, as `module:function` (attempt) -> shards.

    Raises:
        InputError: Ray or the cluster is missing, or no machine of it can do the step.
        SeraError: a worker raised it (same class), or none can be had.
    """
    owned: Assignment[int] = Assignment(attempt, shards, known)
    if owned.finished:
        return
    connect(attempt.execution.address)
    room = room_for(attempt.execution, _resources(), owned.queue.missing)
    execution = attempt.execution.model_copy(update={"device": "cuda" if room.gpus else "cpu"})
    request = {
        "store": _url_for_all(attempt.store),
        "spec": attempt.spec.model_dump(),
        "execution": execution.model_dump(),
        "opened_by": opened_by,
        "threads": None if room.gpus else room.cpus,
    }
    attempt.environment |= {"replicas": room.replicas, "distribute": "ray"}
    workers = _Workers(owned, request, room)
    try:
        workers.run()
    finally:
        workers.end()
    attempt.memory.grown = max(workers.grown.values(), default=0)


def _url_for_all(store: Store) -> str:
    return str(store.root.absolute()) if isinstance(store, LocalStore) else store.url


def connect(address: str) -> None:
    """Join the Ray cluster of `execution.address`, once in this process.

    Raises:
        InputError: Ray is not installed, or there is no cluster; the message says what was tried.
    """
    if find_spec("ray") is None:
        raise InputError(
            "execution.distribute = \"ray\": Ray is not installed; run pip install 'sera-flow[ray]' on every "
            'machine of the cluster, or set execution.distribute = "processes"'
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else it warns about its own future
    import ray

    if ray.is_initialized():
        return
    tried = address or os.environ.get("RAY_ADDRESS", "")
    if ":" in tried:
        _refuse_silent(tried)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    with _own_signals():
        try:
            ray.init(address=address or None, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(_no_cluster(tried, shown_line(str(error)))) from error


def refuse_unusable_cluster(execution: ExecutionConfig) -> None:
    """Raises InputError, before any work, if the cluster of the settings cannot hold a worker."""
    if execution.distribute == "ray":
        connect(execution.address)
        room_for(execution, _resources(), 1)


def _refuse_silent(address: str) -> None:
    """Refuse an address where nothing answers: Ray itself would try for a minute."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise InputError(_no_cluster(address, str(error))) from error


def _no_cluster(tried: str, why: str) -> str:
    return (
        f'execution.distribute = "ray": no Ray cluster at {tried or "this machine"} ({why:.200}). Start one '
        "with `ray start --head --port 6379` on one machine and `ray start --address HOST:6379` on the "
        'others, and set execution.address = "HOST:6379"; or set it to "local"'
    )


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's handler of SIGTERM: Ray installs one that ends the process without cleaning up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _resources() -> list[dict[str, float]]:
    """CPUs and GPUs of each living machine."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


@dataclass(frozen=True)
class Room:
    """How many workers are started, and what Ray keeps for each."""

    replicas: int
    cpus: int
    gpus: float


def room_for(execution: ExecutionConfig, nodes: list[dict[str, float]], shards: int) -> Room:
    """Workers that the cluster has room for, at most one a shard.

    Args:
        execution: execution settings.
        nodes: resources of each machine.
        shards: number of shards to do.

    Raises:
        InputError: no machine has what one worker needs.
    """
    most = max((node.get("GPU", 0.0) for node in nodes), default=0.0)
    gpus = execution.gpus_per_replica
    if execution.device == "cpu":
        gpus = 0.0
    elif gpus is None:
        gpus = 1.0 if most >= 1 or execution.device == "cuda" else 0.0
    if gpus > most:
        raise InputError(
            f"execution.gpus_per_replica = {gpus:g}, but no machine of the Ray cluster has more than "
            f"{most:g} GPUs; lower it, or start Ray with --num-gpus on a machine that has more"
        )
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if max(cpus, default=0) < 1:
        raise InputError(
            'execution.distribute = "ray": no machine of the Ray cluster has a CPU to give; start one with '
            "--num-cpus 1 or more"
        )
    if gpus:
        fit = sum(min(int(node.get("GPU", 0) / gpus), int(node.get("CPU", 0))) for node in nodes)
        return Room(_at_most(execution.replicas, fit, shards), 1, gpus)
    replicas = _at_most(execution.replicas, sum(count > 0 for count in cpus), shards)
    enough = (size for size in range(max(cpus), 0, -1) if sum(count // size for count in cpus) >= replicas)
    return Room(replicas, next(enough, 1), 0.0)


def _at_most(replicas: Size, fit: int, shards: int) -> int:
    return max(1, min(fit if replicas == AUTO else int(replicas), shards))


class _Workers:
    """The actors of a step, by number; a lost one gets a successor with a new number."""

    def __init__(self, owned: Assignment[int], request: dict[str, Any], room: Room) -> None:
        import ray

        self.owned, self.request, self.room = owned, request, room
        self.grown: dict[int, int] = {}
        """Bytes by which each one's memory grew."""
        self._kind = ray.remote(num_cpus=room.cpus, num_gpus=room.gpus, max_restarts=0)(_Replica)
        self._actors: dict[int, Any] = {}
        self._machines: dict[int, str] = {}
        self._answers: dict[Any, int] = {}
        """The worker of each answer that is awaited."""
        self._started, self._lost_in_a_row, self._without_since = 0, 0, time.monotonic()
        self._here = environment()
        policy = owned.attempt.spec.inputs["policy"]
        assert policy is not None
        self._known = f"steps/{policy.step}/{policy.key}/done.json"

    def run(self) -> None:
        """Start the workers, and send shards until all are done."""
        import ray

        for _ in range(self.room.replicas):
            self._start()
        while not self.owned.finished:
            for worker, number, following in self.owned.to_send():
                self._answers[self._actors[worker].do.remote(number, following)] = worker
            ready, _ = ray.wait(list(self._answers), timeout=WAKE_SECONDS)
            for answer in ready:
                self._hear(self._answers.pop(answer), answer)
            self._refuse_none()

    def end(self) -> None:
        """End all workers; those that are idle clean up."""
        import ray

        idle = [actor for worker, actor in self._actors.items() if worker not in self._answers.values()]
        with contextlib.suppress(Exception):  # they end anyway
            if self.owned.finished and idle:
                ray.wait([actor.end.remote() for actor in idle], num_returns=len(idle), timeout=END_SECONDS)
        for actor in self._actors.values():
            with contextlib.suppress(Exception):
                ray.kill(actor)

    def _start(self) -> None:
        worker = self._started
        self._started += 1
        self._actors[worker] = self._kind.remote(self.request)
        self._answers[self._actors[worker].look.remote(self._known)] = worker

    def _hear(self, worker: int, answer: Any) -> None:
        """Take one answer; that of a lost worker is an error of Ray."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            said: Any = ray.get(answer)
        except RayTaskError as error:
            raise SeraError(f"{self._name(worker)}: {shown_line(str(error.cause)):.500}") from error
        except RayError as error:
            self._lose(worker, error)
            return
        if "error" in said:
            raise told_error(said["error"])
        if "did" in said:
            number, metrics, self.grown[worker] = said["did"]
            self.owned.did(worker, number, metrics)
            return
        self._machines[worker] = said["machine"]
        self._refuse_other(said)
        self._lost_in_a_row = 0
        self.owned.queue.join(worker)

    def _lose(self, worker: int, error: Exception) -> None:
        import ray

        actor = self._actors.pop(worker)
        with contextlib.suppress(Exception):
            ray.kill(actor)  # it may only be unreachable
        self._answers = {answer: other for answer, other in self._answers.items() if other != worker}
        how = f"{self._name(worker)} was lost ({type(error).__name__})"
        self.owned.lost(worker, how)
        self._without_since = time.monotonic()
        self._lost_in_a_row += 1
        if self._lost_in_a_row > LOST_BEFORE_WORK * self.room.replicas:
            raise SeraError(
                f"step {self.owned.attempt.spec.step}: {self._lost_in_a_row} workers were lost before one "
                f"could work; the last error of Ray: {shown_line(str(error)):.300}"
            )
        self._start()

    def _name(self, worker: int) -> str:
        return f"worker {worker + 1} on {self._machines.get(worker, 'the Ray cluster')}"

    def _refuse_none(self) -> None:
        if self.owned.queue.workers:
            self._without_since = time.monotonic()
        elif time.monotonic() > self._without_since + NO_ROOM_SECONDS:
            raise SeraError(
                f"step {self.owned.attempt.spec.step}: the Ray cluster has had no room for a worker "
                f"({self.room.cpus} CPUs, {self.room.gpus:g} GPUs) for {NO_ROOM_SECONDS} s; free some, or "
                "start another machine, and run the same command again to continue"
            )

    def _refuse_other(self, said: dict[str, Any]) -> None:
        """Refuse a machine that would write other bytes, or elsewhere.

        Raises:
            InputError: its packages are others, or it does not reach the store.
        """
        if differing := differences(said["environment"], self._here):
            raise InputError(
                f"{said['machine']} of the Ray cluster has {', '.join(differing)}; install the same on all: "
                "pip install -c constraints.txt 'sera-flow[ray]'"
            )
        store = self.owned.attempt.store
        expected = store.read_bytes(self._known)
        if expected is None or said["record"] != hashlib.sha256(expected).hexdigest():
            raise InputError(
                f"{said['machine']} of the Ray cluster does not reach the store {self.request['store']} "
                f"({said['why']}); use s3://bucket/prefix, with credentials on every machine, or a folder "
                "that all of them mount at this path"
            )


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What another machine has that is not as here, for a message."""
    found = [
        f"{name} {there['packages'].get(name, 'missing')} (here {here['packages'].get(name, 'missing')})"
        for name in COMPARED
        if there["packages"].get(name) != here["packages"].get(name)
    ]
    if there["sera-flow"] != here["sera-flow"] or there["code"] != here["code"]:
        code = (f"{one['sera-flow']} (code {one['code'][:8]})" for one in (there, here))
        found.append(f"sera-flow {next(code)} (here {next(code)})")
    return found


# ---------------------------------------------------------------------------------------------- each of them


class _Replica:
    """A worker, which Ray makes an actor."""

    def __init__(self, request: dict[str, Any]) -> None:
        self._request = request
        self._worker: ShardWorker | None = None

    def look(self, path: str) -> dict[str, Any]:
        """What this machine is, and whether it sees a record of the store."""
        record, why = None, "its record of the policy is not there"
        try:
            record = open_store(self._request["store"]).read_bytes(path)
        except Exception as error:
            why = shown_line(f"{type(error).__name__}: {error}")[:300]
        return {
            "machine": f"{socket.gethostname()} ({_address()})",
            "environment": environment(),
            "record": None if record is None else hashlib.sha256(record).hexdigest(),
            "why": why,
        }

    def do(self, number: int, following: list[int]) -> dict[str, Any]:
        """Do a shard, or the check; returns `did`: number, metrics, bytes of memory, or `error`."""
        try:
            if self._worker is None:
                self._worker = self._opened()
            metrics = self._worker.do(number, following, lambda _: None)
            return {"did": [number, metrics, self._worker.attempt.memory.grown]}
        except SeraError as error:
            return {"error": [type(error).__module__, type(error).__qualname__, str(error)]}
        except Exception as error:
            traceback.print_exc()
            message = f"step {self._request['spec']['step']}: {type(error).__name__}: {error}"
            return {"error": [SeraError.__module__, SeraError.__qualname__, message]}

    def end(self) -> None:
        """Clean up."""
        if self._worker is not None:
            self._worker.__exit__(None, None, None)

    def _opened(self) -> ShardWorker:
        if self._request["threads"] is not None:
            import torch

            torch.set_num_threads(self._request["threads"])
        worker = ShardWorker(self._request)
        with _alone_on_this_machine(worker.attempt):
            for policy in ("policy", "model"):
                worker.attempt.input(policy).folder("policy")
        return worker.__enter__()


def _address() -> str:
    import ray

    return ray.util.get_node_ip_address()


@contextlib.contextmanager
def _alone_on_this_machine(attempt: Attempt) -> Iterator[None]:
    """Hold a lock of this machine, so that one worker fetches files, and the others find them."""
    ref = attempt.spec.inputs["policy"]
    assert ref is not None
    name = f"sera-{os.getuid()}-{ref.digest[:16]}.lock"
    with (Path(tempfile.gettempdir()) / name).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
