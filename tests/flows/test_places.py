"""Where people start the commands: behind proxies, beside packages of their own, with no store named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tinyrun

from flows.cli import parser
from flows.experiments import load_settings
from flows.serving.embedded_server import never_proxy_loopback

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.flow
def test_proxies_and_packages_of_the_working_directory_do_not_reach_our_server(tmp_path):
    experiment = tinyrun.experiment(tmp_path / "inputs", limits={"rounds": 1})
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").write_text("raise ImportError('not ours')")
    (tmp_path / "logging.py").write_text("raise ImportError('not ours')")
    nobody = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"), "http://127.0.0.1:9")
    kept = {k: v for k, v in os.environ.items() if k.lower() not in ("no_proxy", "prefect_api_url")}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "flows.cli", "run", str(experiment), "--json"],
        cwd=tmp_path,
        env={**kept, **nobody, "PYTHONPATH": str(REPOSITORY), "PREFECT_HOME": str(tmp_path / "prefect")},
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
    never_proxy_loopback()
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
