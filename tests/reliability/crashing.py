"""The crash matrix: kill a run at every commit point, resume it, compare it with one that was never killed.

    PYTHONPATH=tests python -m reliability.crashing local moto radosgw:5     # the last with every fifth point

A commit point is a moment at which the store is about to change: a record that is written but not linked, a
file that is not yet durable, a put that is not yet sent, an old checkpoint that is not yet deleted. They are
found by running once and counting. One process imports everything; each case is a fork of it that forks the
run to be killed and the run that resumes. Prints one JSON object a case.
"""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import objectstores
import tiny
import tinyrun

from flows.store_tools.verify import verify
from sera_core.artifacts import local_store, s3_store, step
from sera_core.artifacts.local_store import LocalStore
from sera_core.artifacts.probing import PASSED
from sera_core.artifacts.s3_requests import Requests
from sera_core.config import SeraConfig

TESTS = Path(__file__).parents[1]
WORKERS = 2
CASE_SECONDS = 120.0
OFTEN_REWRITTEN = ("-beat.json", "-doing.json")
SMALLEST: dict[str, dict[str, Any]] = {
    "limits": {"rounds": 2},
    "sampling": {"responses": 2, "max_tokens": 4, "prompts": 4},
    "train": {"learning_rate": 1e-3, "batch": 4},
    "evaluate": {"prompts": 2, "responses": 2, "max_tokens": 4, "resamples": 200},
    "decide": {"min_pairs": 2},
    "execution": {"checkpoint_steps": 1, "keep_checkpoints": 1, "device": "cpu", "child": "never"},
}


@dataclass(frozen=True)
class Crash:
    """One case of the matrix."""

    store: str
    point: int
    at: str
    """What was about to be committed."""
    resumed: bool
    same_policy: bool
    steps_repeated: int
    changed: int
    """Records and files of the killed run that are not as they were."""
    seconds: float
    said: str = ""
    """What a run printed that was not killed, or did not resume."""

    @property
    def is_good(self) -> bool:
        """Resumed to the same end, nothing lost, at most one step done twice."""
        return self.resumed and self.same_policy and self.steps_repeated <= 1 and self.changed == 0


class Backend:
    """Where the stores of the cases lie."""

    def __init__(self, name: str, folder: Path, server: objectstores.ObjectStore | None) -> None:
        self.name, self.folder, self.server = name, folder, server
        self._bucket = "" if server is None else server.bucket()
        self._client = None if server is None else server.client()

    def url(self, case: str) -> str:
        """The store of one case, empty but for the record that it was tried before."""
        if self.server is None:
            return str(self.folder / f"store-{case}")
        bucket, _, prefix = self._bucket.removeprefix("s3://").partition("/")
        self._client.put_object(Bucket=bucket, Key=f"{prefix}/{case}/{PASSED}", Body=b'{"format": 1}')
        self._client.close()  # two forks that inherit an open connection would read each other's answers
        return f"{self._bucket}/{case}"

    def contents(self, url: str) -> dict[str, Any]:
        """What lies in a store, without what is rewritten or thrown away."""
        if self.server is not None:
            found: dict[str, Any] = self.server.objects(url, self._client)
        else:
            files = [path for path in Path(url).rglob("*") if path.is_file()]
            found = {path.relative_to(url).as_posix(): path.read_bytes() for path in files}
        return {
            name: held
            for name, held in found.items()
            if not name.endswith(OFTEN_REWRITTEN) and "/." not in f"/{name}" and "/checkpoint-" not in name
        }

    def forget(self, url: str) -> None:
        """Make room for other cases; a server's room ends with it."""
        if self.server is None:
            shutil.rmtree(url, ignore_errors=True)


@contextmanager
def backend(name: str, folder: Path) -> Iterator[Backend]:
    """`local`, `moto` or `radosgw`, ready."""
    if name == "local":
        yield Backend(name, folder, None)
        return
    with getattr(objectstores, name)() as server, server.in_environment():
        yield Backend(name, folder, server)


def smallest_run(folder: Path) -> SeraConfig:
    """Two rounds on a policy of one layer, with every kind of step, shard and checkpoint."""
    if not (folder / "policy").exists():
        tiny.tiny_policy(folder / "policy", layers=1, hidden=32, positions=256)
        tinyrun.write_rows(folder / "pairs.jsonl", tinyrun.pairs(16))
    return tinyrun.config(folder, **SMALLEST)


# --------------------------------------------------------------------------------------- one forked process


def count_commits(kill_at: int | None) -> list[str]:
    """Tell, from now on, what is about to be committed, and die by SIGKILL at one of these points."""
    points: list[str] = []

    def reached(at: str) -> None:
        points.append(at)
        if len(points) - 1 == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)  # where another thread is asked to die

    def before(owner: Any, name: str, at: Callable[..., str]) -> None:
        real = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            reached(at(*args, **kwargs))
            return real(*args, **kwargs)

        setattr(owner, name, counted)

    before(local_store.os, "link", lambda source, target: f"record {Path(target).name}")
    before(LocalStore, "commit_file", lambda store, folder, path, relative, *_: f"file {relative}")
    before(LocalStore, "remove", lambda store, path: f"removal of {path.rpartition('/')[2]}")
    before(Requests, "delete", lambda requests, key: f"removal of {key.rpartition('/')[2]}")
    before(Requests, "create", lambda requests, key, data: f"record {key.rpartition('/')[2]}")
    before(Requests, "put", lambda requests, key, data: f"file {key.rpartition('/')[2]}")
    return points


def count_steps(log: Path) -> None:
    """Append the key of every step that is begun to a file that outlives the process."""
    real = step.Attempt.__init__

    def begun(self: Any, store: Any, spec: Any, *args: Any, **kwargs: Any) -> None:
        with log.open("a") as stream:
            stream.write(f"{spec.step} {spec.key}\n")
        real(self, store, spec, *args, **kwargs)

    step.Attempt.__init__ = begun


def forked(act: Callable[[], Any], output: Path) -> tuple[int, Any]:
    """The wait status of a fork that does the act, and what the act returned, by JSON."""
    answer = output.with_suffix(".json")
    if (child := os.fork()) == 0:
        signal.alarm(int(CASE_SECONDS))
        with output.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        code = 1
        try:
            answer.write_text(json.dumps(act()))
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    return status, json.loads(answer.read_text()) if answer.exists() else None


def whole_run(config: SeraConfig, url: str, scratch: Path, log: str, kill_at: int | None = None) -> dict:
    """A run in this process, with nothing local; its policies and its commit points."""
    os.environ["SERA_CACHE"] = str(scratch / f"cache-{log}")
    count_steps(scratch / log)
    points = count_commits(kill_at)
    records = tinyrun.work(config, url)
    found = {"points": list(points), "policies": tinyrun.policy_shas(records)}
    if "://" not in url:  # in a bucket the server's own hashes are compared instead
        verify(records)
    return found


def case(
    place: Backend, config: SeraConfig, point: int, at: str, policies: list[str], scratch: Path
) -> Crash:
    """Kill a run at a point, resume it, compare."""
    began, url = time.monotonic(), place.url(f"case-{point}")
    status, _ = forked(lambda: whole_run(config, url, scratch, "first", point), scratch / "first.out")
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    before = place.contents(url)
    status, found = forked(lambda: whole_run(config, url, scratch, "second"), scratch / "second.out")
    after = place.contents(url)
    place.forget(url)
    first, second = (set(_lines(scratch / name)) for name in ("first", "second"))
    said = [*_lines(scratch / "first.out"), "…", *_lines(scratch / "second.out")]
    return Crash(
        store=place.name,
        point=point,
        at=at,
        resumed=killed and status == 0,
        same_policy=found is not None and found["policies"] == policies,
        steps_repeated=len(first & second),
        changed=sum(after.get(name) != held for name, held in before.items()),
        seconds=round(time.monotonic() - began, 2),
        said="" if killed and status == 0 else "\n".join(said)[-3000:],
    )


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


# ---------------------------------------------------------------------------------------------- the matrix


def matrix(place: Backend, folder: Path, every: int = 1) -> Iterator[Crash]:
    """Every `every`-th commit point of a full small run, and what became of it; two cases at a time."""
    config = smallest_run(folder)
    scratch = folder / place.name
    scratch.mkdir()
    url = place.url("never-killed")
    status, whole = forked(lambda: whole_run(config, url, scratch, "whole"), scratch / "whole.out")
    if status != 0:
        raise AssertionError((scratch / "whole.out").read_text()[-3000:])
    place.forget(url)
    waiting = [(n, at) for n, at in enumerate(whole["points"]) if n % every == 0]
    running: dict[int, Path] = {}
    while waiting or running:
        while waiting and len(running) < WORKERS:
            point, at = waiting.pop(0)
            own = scratch / f"case-{point}"
            own.mkdir()
            running[_start(place, config, point, at, whole["policies"], own)] = own
        child, status = os.wait()
        own = running.pop(child)
        if status != 0:
            raise AssertionError((own / "case.out").read_text()[-3000:])
        yield Crash(**json.loads((own / "case.json").read_text()))
        shutil.rmtree(own)


def _start(
    place: Backend, config: SeraConfig, point: int, at: str, policies: list[str], scratch: Path
) -> int:
    if (child := os.fork()) != 0:
        return child
    os.setpgid(0, 0)
    status, _ = forked(
        lambda: asdict(case(place, config, point, at, policies, scratch)), scratch / "case.out"
    )
    os._exit(0 if status == 0 else 1)


def warm_up() -> None:
    """Import and read what a run does, and keep the garbage collector from walking it in every fork."""
    import datasets  # noqa: F401
    import s3fs  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import tasks.step_functions
    from tasks.engines import dpo_trainer, hf_sampler  # noqa: F401

    torch.set_num_threads(1)
    definitions = s3_store._definitions()
    definitions.load_data_with_path("endpoints")
    for kind in ("service-2", "endpoint-rule-set-1"):
        definitions.load_service_model("s3", kind)
    for name in tasks.step_functions.WORK:
        tasks.step_functions.work_of(name)
    with tempfile.TemporaryDirectory(prefix="sera-warm-") as folder:  # what is made at the first use
        os.environ["SERA_CACHE"] = f"{folder}/cache"
        tinyrun.work(smallest_run(Path(folder)), f"{folder}/store")
    gc.collect()
    gc.freeze()


def in_own_process(wanted: str) -> Iterator[Crash]:
    """The program's cases for `store:every`: a case is a fork, slowed by all that was done before it."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "reliability.crashing", wanted]
    with (
        tempfile.TemporaryFile("w+") as said,
        subprocess.Popen(
            command, env=environment, cwd=TESTS.parent, stdout=subprocess.PIPE, stderr=said, text=True
        ) as program,
    ):
        assert program.stdout is not None
        try:
            for line in program.stdout:
                if line.startswith("{"):
                    yield Crash(**json.loads(line))
        except BaseException:
            program.terminate()
            raise
        if program.wait() != 0:
            said.seek(0)
            raise AssertionError(said.read()[-5000:])


def main(wanted: list[str]) -> None:
    """Print the matrix of the stores that are named, each with `:n` for every n-th point only."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers are ended on the way out
    warm_up()
    with tempfile.TemporaryDirectory(prefix="sera-crash-") as folder, ExitStack() as stack:
        for name, _, every in (text.partition(":") for text in wanted):
            place = stack.enter_context(backend(name, Path(folder)))
            for crash in matrix(place, Path(folder), int(every or 1)):
                sys.stdout.write(json.dumps(asdict(crash)) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
    os._exit(0)  # without the complaints of what was imported and never used
