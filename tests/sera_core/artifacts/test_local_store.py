"""A store in a folder: full or read-only disks, links, and paths that would leave it."""

import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from sera_core.artifacts.manifest import StepSpec
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import LocalStore, open_store
from sera_core.config import ExecutionConfig
from sera_core.errors import StoreError

ROOM = 256 * 1024
HOSTILE = [
    "../outside", "/etc/passwd", "runs/../../outside", "runs\\..\\outside", "runs//x", "runs/./x", "", ".",
    "runs/x\n",
    "runs/x\x00", "runs/\u202egnp.exe", "runs/\uff0e\uff0e/x", "runs/.hidden", "runs/x.", "r" * 1000,
]  # fmt: skip


def in_a_fork(act: Callable[[], object]) -> str:
    """What the act returned, as text, or the error it ended with; in a process of its own."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            said = str(act())
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        said = stream.read()
    os.waitpid(child, 0)
    return said


@contextmanager
def small_disk() -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder with room for 256 KiB, and what a process must call to feel it where none can be mounted."""
    folder = Path(tempfile.mkdtemp(prefix="sera-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0

    def feel() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))

    try:
        yield folder, (lambda: None) if mounted else feel
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        shutil.rmtree(folder)


def files_in(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir())


def test_a_record_that_finds_no_room_is_one_clear_error_and_leaves_nothing():
    with small_disk() as (folder, feel):
        store = open_store(str(folder / "store"))
        store.create("runs/x/run-000.json", b"first")

        def act() -> bytes:
            feel()
            return store.create("runs/x/round-000.json", b"x" * (2 * ROOM))

        assert "disk is full" in (said := in_a_fork(act)) and said.startswith("StoreError")
        assert files_in(folder) == ["store/runs/x/run-000.json"]


@pytest.mark.parametrize("committed", [False, True], ids=["before a part", "after a part"])
def test_a_step_that_finds_no_room_is_refused_and_what_it_had_finished_is_kept(committed):
    with small_disk() as (folder, feel):
        store = open_store(str(folder))
        spec = StepSpec(step="sample", version=1, fields={}, inputs={})

        def work(attempt):
            attempt.write("small.txt").write_bytes(b"x" * 1000)
            if committed:
                attempt.commit_part(0, ["small.txt"], {})
            attempt.write("large.txt").write_bytes(b"x" * (2 * ROOM))
            return ["large.txt"]

        def act() -> object:
            feel()
            return run_step(store, spec, work, ExecutionConfig())

        said = in_a_fork(act)
        assert said.startswith("StoreError") and "disk is full" in said
        left = [Path(name).name for name in files_in(folder)]
        assert "done.json" not in left
        assert ("part-00000.json" in left) == committed
        assert ("small.txt" in left) == committed, "what no record names may go, what one names may not"


def test_a_store_that_may_not_be_written_is_one_clear_error():
    folder = Path(tempfile.mkdtemp(prefix="sera-closed-"))
    folder.chmod(0o755)
    store = LocalStore(folder)
    store.create("runs/x/run-000.json", b"first")
    for place in (folder, *folder.rglob("*")):
        place.chmod(0o555 if place.is_dir() else 0o444)

    def act() -> bytes:
        if os.getuid() == 0:
            os.setuid(65534)
        assert store.read_bytes("runs/x/run-000.json") == b"first"
        return store.create("runs/x/round-000.json", b"second")

    try:
        said = in_a_fork(act)
        assert said.startswith("StoreError") and "cannot read or write" in said and "--store" in said
        assert files_in(folder) == ["runs/x/run-000.json"]
    finally:
        for place in (folder, folder / "runs", folder / "runs" / "x"):
            place.chmod(0o755)
        shutil.rmtree(folder)


@pytest.mark.parametrize("path", HOSTILE)
def test_no_path_leaves_the_store(tmp_path, path):
    store = open_store(str(tmp_path / "store"))
    for act in (
        lambda: store.read_bytes(path),
        lambda: store.create(path, b"x"),
        lambda: store.workspace(path),
        lambda: store.fetch(path, "0" * 64, 1, "x"),
        lambda: store.remove(path),
        lambda: store.names(path),
    ):
        with pytest.raises(StoreError, match="not a path inside the store"):
            act()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sha256", "size"), [("../../x", 1), ("a" * 63, 1), ("A" * 64, 1), ("0" * 64, -1), ("0" * 64, 1.5)]
)
def test_a_file_that_no_file_can_be_is_refused_before_it_is_looked_for(tmp_path, sha256, size):
    store = open_store(str(tmp_path / "store"))
    with pytest.raises(StoreError, match="modified"):
        store.fetch("steps/train/key/0123456789abcdef/model.safetensors", sha256, size, "model.safetensors")


@pytest.mark.parametrize("link", ["runs", "runs/x", "runs/x/round-000.json"])
def test_a_link_that_leads_out_of_the_store_is_refused(tmp_path, link):
    outside = tmp_path / "outside"
    (outside / "x").mkdir(parents=True)
    for name in ("round-000.json", "x/round-000.json"):
        (outside / name).write_text(json.dumps({"secret": 1}))
    store = open_store(str(tmp_path / "store"))
    place = tmp_path / "store" / link
    place.parent.mkdir(parents=True)
    place.symlink_to(outside / "round-000.json" if link.endswith("json") else outside)
    before = files_in(outside)
    for act in (
        lambda: store.read_bytes("runs/x/round-000.json"),
        lambda: store.create("runs/x/round-000.json", b"mine"),
        lambda: store.fetch("runs/x/round-000.json", "0" * 64, 1, "round-000.json"),
    ):
        with pytest.raises(StoreError, match="leads out of the store"):
            act()
    assert files_in(outside) == before


def test_a_store_behind_a_link_is_a_store(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "store").symlink_to(tmp_path / "disk")
    store = open_store(str(tmp_path / "store"))
    assert store.create("runs/x/run-000.json", b"first") == b"first"
    assert (tmp_path / "disk/runs/x/run-000.json").read_bytes() == b"first"


def test_a_pipe_in_a_files_place_is_refused_and_keeps_nobody_waiting(tmp_path):
    store = open_store(str(tmp_path))
    (tmp_path / "runs").mkdir()
    os.mkfifo(tmp_path / "runs" / "x")
    with pytest.raises(StoreError, match="not a regular file"):
        store.read_bytes("runs/x")
    with pytest.raises(StoreError, match="not a regular file"):
        store.fetch("runs/x", "0" * 64, 0, "x")


def test_of_eight_writers_one_wins_and_all_go_on_with_its_record(tmp_path):
    store = open_store(str(tmp_path))
    mine = [f"writer {number}".encode() for number in range(8)]
    gate = threading.Barrier(8)

    def write(data: bytes) -> bytes:
        gate.wait()
        return store.create("runs/x/round-000.json", data)

    with ThreadPoolExecutor(8) as pool:
        there = set(pool.map(write, mine))
    assert there == {store.read_bytes("runs/x/round-000.json")} < set(mine)
    assert files_in(tmp_path) == ["runs/x/round-000.json"]


@pytest.mark.parametrize(
    "url", ["s3://key:secret@bucket/x", "s3://bucket/x?token=secret", "ftp://u:secret@h/x"]
)
def test_a_url_with_credentials_is_refused_and_not_repeated(url):
    with pytest.raises(ValueError, match="AWS_ACCESS_KEY_ID") as refused:
        open_store(url)
    assert "secret" not in str(refused.value)
