"""Shared fixtures; shapes and types of the mathematics are checked in every test run."""

import gc
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

_hook = install_import_hook(["sera_core.method", "sera_core.models.losses"], "beartype.beartype")

# Nothing leaves the machine while tests run, and nothing of the user's is read or written.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tiny policy's matrices are slower on several threads

os.environ.pop("COLUMNS", None)  # pytest-xdist sets it; outputs would be folded to it

_absent: list[str] = []


LONGEST_FILES = ("test_wheel.py", "test_in_the_browser.py", "test_deploying.py", "test_options.py")
"""Run first: a long file that starts last keeps one worker busy while the other has nothing left to do."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


_imported = [0]


def freeze_imports():
    """What was imported stays: each training ends with a garbage collection, which need not go through it."""
    if len(sys.modules) > _imported[0] + 100:
        _imported[0] = len(sys.modules)
        gc.collect()
        gc.freeze()


def pytest_runtest_setup():
    """transformers logs to the stderr of the test that imported it, which may be closed by now."""
    freeze_imports()
    logs = sys.modules.get("transformers.utils.logging")
    handler = logs and logs._default_handler
    if handler and handler.stream.closed:
        handler.stream, handler.flush = sys.__stderr__, sys.__stderr__.flush


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report):
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _absent.append(f"{report.nodeid}: {reason}")


def pytest_terminal_summary(terminalreporter):
    if _absent:
        terminalreporter.section("NOT TESTED HERE", red=True)
        for line in _absent:
            terminalreporter.line(line)


def pytest_sessionfinish(session, exitstatus):
    """In CI a missing install is a failure; only what needs an accelerator may be skipped."""
    gc.unfreeze()  # else triton complains at the exit of what it takes for lost
    missing = [line for line in _absent if "accelerator" not in line]
    if missing and os.environ.get("CI") == "true" and exitstatus == 0:
        session.exitstatus = 1


@pytest.fixture
def sera(capfd):
    """Runs a command in this process: `sera("list", "--json").json`."""
    from commandline import Sera

    return Sera(capfd)


@pytest.fixture
def kept_store(tmp_path):
    """A copy of the small store of format 1: run `first` with two rounds, `second` with the same round 0."""
    return Path(shutil.copytree(Path(__file__).parent / "fixtures" / "store-format-1", tmp_path / "store"))


@pytest.fixture(scope="session")
def _present_store(tmp_path_factory):
    """Run `first` of the kept store, made by this version."""
    import tiny
    import tinyrun
    from fixtures import make_store

    folder = tmp_path_factory.mktemp("present")
    tiny.tiny_policy(folder / "policy", layers=1, hidden=32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERA_CACHE", str(folder / "cache"))
        tinyrun.work(tinyrun.config(folder, **make_store.SMALL), folder / "store", "first")
    return folder / "store"


@pytest.fixture
def present_store(_present_store, tmp_path):
    """A copy of a store whose steps are of the present versions: a resumed run reuses them."""
    return Path(shutil.copytree(_present_store, tmp_path / "store"))


@pytest.fixture
def special():
    """Makes what is no plain file: `special("pipe", path)`, likewise a device or a socket."""
    sockets = []

    def make(kind: str, path: Path) -> Path:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        else:
            sockets.append(socket.socket(socket.AF_UNIX))
            sockets[-1].bind(str(path))
        return path

    yield make
    for one in sockets:
        one.close()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Folders put together from the store live in the test's own place."""
    monkeypatch.setenv("SERA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
