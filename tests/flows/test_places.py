"""Where people start the commands: behind proxies, beside packages of their own, with no store named."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import migrated
import pytest
import tinyrun

from flows.cli import parser
from flows.experiments import load_settings
from flows.orchestration import configured_server
from flows.orchestration.embedded_server import bypass_loopback_proxy, free_port, prefect_api
from sera_core.artifacts.folders import cache_folder
from sera_core.errors import InputError

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.flow
def test_proxies_and_packages_of_the_working_directory_do_not_reach_our_server(tmp_path):
    experiment = tinyrun.experiment(tmp_path / "inputs", limits={"rounds": 1})
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("raise ImportError('not ours')")
    (tmp_path / "logging.py").write_text("raise ImportError('not ours')")
    nobody = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:9")
    kept = {k: v for k, v in os.environ.items() if k.lower() not in ("no_proxy", "prefect_api_url")}
    home = migrated.sqlite_home(tmp_path / "prefect")
    done = subprocess.run(
        [sys.executable, "-P", "-m", "flows.cli", "run", str(experiment), "--json"],
        cwd=tmp_path,
        env={**kept, **nobody, "PYTHONPATH": str(REPOSITORY), "PREFECT_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rounds"]) == 1


@pytest.mark.parametrize(("given", "expected"), [
    ("", "127.0.0.1,localhost"),
    ("example.org, localhost", "example.org, localhost,127.0.0.1,localhost"),
    ("*", "*"),
])  # fmt: skip
def test_a_persons_own_exceptions_from_the_proxy_stay(monkeypatch, given, expected):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, given)
    bypass_loopback_proxy()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == expected


def test_an_empty_store_names_none(monkeypatch):
    monkeypatch.setenv("SERA_STORE", "")
    assert parser().parse_args(["list"]).store == "./sera-store"
    assert parser().parse_args(["list", "--store", ""]).store == "./sera-store"
    monkeypatch.setenv("SERA_STORE", "elsewhere")
    assert parser().parse_args(["list", "--store", ""]).store == "elsewhere"
    assert parser().parse_args(["deploy", "--store", ""]).store == "elsewhere"
    monkeypatch.delenv("SERA_STORE")
    assert parser().parse_args(["deploy", "--store", ""]).store is None


def test_an_experiment_with_a_byte_order_mark_is_read(tmp_path):
    file = tmp_path / "one.toml"
    file.write_bytes(b"\xef\xbb\xbf[limits]\nrounds = 2\n")
    assert load_settings(str(file)) == {"limits": {"rounds": 2}}


NOT_A_FOLDER = "/dev/null/x"  # root may write anywhere else


@pytest.mark.flow
def test_a_run_needs_no_home_to_write_to(tmp_path):
    experiment = tinyrun.experiment(tmp_path / "inputs", limits={"rounds": 1})
    names = ("SERA_CACHE", "PREFECT_HOME", "PREFECT_API_URL", "HF_HOME")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "flows.start", "run", str(experiment), "--json"],
        cwd=tmp_path,
        env={**kept, "PYTHONPATH": str(REPOSITORY), "HOME": NOT_A_FOLDER, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["rounds"]) == 1
    said = [line for line in done.stderr.splitlines() if "SERA_CACHE" in line]
    assert len(said) == 1 and NOT_A_FOLDER in said[0] and "Traceback" not in done.stderr


def test_a_cache_without_a_home_is_a_folder_of_this_user_alone(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("SERA_CACHE", "")
    monkeypatch.setenv("HOME", NOT_A_FOLDER)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = cache_folder()
    assert folder == cache_folder() == Path(os.environ["SERA_CACHE"]) and len(caplog.records) == 1
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("SERA_CACHE", "")
    folder.chmod(0o777)
    with pytest.raises(InputError, match="set SERA_CACHE"):
        cache_folder()


@pytest.mark.parametrize("name", ["SERA_CACHE", "PREFECT_HOME"])
def test_a_folder_that_was_named_and_cannot_be_written_to_is_refused_by_that_name(
    name, monkeypatch, tmp_path
):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", "")
    monkeypatch.setenv(name, NOT_A_FOLDER)
    with pytest.raises(InputError, match=f"{NOT_A_FOLDER}.* set {name}"), prefect_api():
        pass


def test_up_names_the_home_that_cannot_be_written_to(sera):
    assert "set --home" in sera("up", "--home", NOT_A_FOLDER, code=2).err


@contextmanager
def answering(data: bytes):
    """A server that says the same to everybody, or nothing at all; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                if data:
                    connection.recv(1 << 16)
                    connection.sendall(data)
                    connection.close()
                else:
                    silent.append(connection)

        silent: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/api"
        listening.shutdown(socket.SHUT_RDWR)


PAGE = b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\nConnection: close\r\n\r\npage"


@pytest.mark.parametrize(
    "url", ["nonsense", "127.0.0.1:4200/api", "http://", "http://host:port/api", "ftp://x/api"]
)
def test_what_is_no_address_of_a_prefect_server_is_named(url, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", url)
    with pytest.raises(InputError, match=r"PREFECT_API_URL=.* not a URL"), prefect_api():
        pass


def test_a_prefect_server_that_nobody_runs_is_named_at_once(monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", f"http://somebody:secret@127.0.0.1:{free_port()}/api")
    with (
        pytest.raises(InputError, match=r"no Prefect server answers .*refused.*sera up") as told,
        prefect_api(),
    ):
        pass
    assert "secret" not in str(told.value)


def test_a_prefect_server_that_is_silent_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(configured_server, "ANSWER_SECONDS", 0.2)
    with (
        answering(b"") as url,
        pytest.raises(InputError, match=r"no Prefect server answers .*timed out"),
    ):
        configured_server.check_server(url)


def test_a_run_with_a_server_that_is_another_ones_says_what_to_do(tmp_path):
    experiment = tinyrun.experiment(tmp_path / "inputs", limits={"rounds": 1})
    with answering(PAGE) as url:
        done = subprocess.run(
            [
                sys.executable,
                "-P",
                "-m",
                "flows.start",
                "run",
                str(experiment),
                "--store",
                str(tmp_path / "s"),
            ],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "PREFECT_API_URL": url},
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"PREFECT_API_URL={url}: this is not Prefect's API" in done.stderr
