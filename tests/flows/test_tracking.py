"""Trackers, the real packages and nothing sent: a run of its own for every round, told every step."""

import json
import os
import sqlite3
import subprocess
from contextlib import closing
from pathlib import Path

import pytest
import tinyrun
from commandline import process

from tasks.engines.tracking import ended

pytestmark = pytest.mark.flow
TOLD = {"tiny-round-0": 3, "tiny-round-1": 3}
"""Optimizer steps of each round: 24 pairs, eight at a time."""


def two_rounds(folder: Path, tracking: str, **environment: str) -> subprocess.CompletedProcess:
    """By command line, in a home of its own."""
    experiment = tinyrun.experiment(folder, limits={"rounds": 2}, execution={"tracking": tracking})
    home = {**os.environ, "HOME": str(folder), **environment}
    return process("run", experiment, "--store", folder / "store", cwd=folder, env=home)


def rows(database: Path, query: str) -> list[tuple]:
    with closing(sqlite3.connect(database)) as opened:
        return opened.execute(query).fetchall()


def test_mlflow_gets_a_finished_run_for_every_round(tmp_path):
    database = tmp_path / "mlflow.db"
    done = two_rounds(tmp_path, "mlflow", MLFLOW_TRACKING_URI=f"sqlite:///{database}")
    assert done.returncode == 0, done.stderr
    assert rows(database, "select name, status from runs") == [(name, "FINISHED") for name in TOLD]
    steps = "select name, count(*) from metrics join runs using (run_uuid) where key = 'rewards/margins'"
    assert dict(rows(database, f"{steps} group by name")) == TOLD


def test_a_training_that_fails_ends_its_run_and_leaves_its_owners_open(tmp_path, monkeypatch):
    import mlflow

    database = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")

    def fails() -> None:
        with ended("mlflow"):
            mlflow.start_run(run_name="tiny-round-0")
            raise RuntimeError("the loss is not finite")

    with pytest.raises(RuntimeError):
        fails()
    with mlflow.start_run(run_name="mine"):
        with ended("mlflow"):
            pass
        assert mlflow.active_run() is not None
    assert rows(database, "select name, status from runs") == [
        ("tiny-round-0", "FAILED"),
        ("mine", "FINISHED"),
    ]


def test_trackio_gets_a_run_for_every_round(tmp_path):
    done = two_rounds(tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "curves"))
    assert done.returncode == 0, done.stderr
    told = rows(tmp_path / "curves" / "sera-flow.db", "select run_name, metrics from metrics")
    margins = [name for name, metrics in told if "train/rewards/margins" in json.loads(metrics)]
    assert {name: margins.count(name) for name in margins} == TOLD


def test_wandb_gets_a_run_for_every_round(tmp_path):
    done = two_rounds(tmp_path, "wandb", WANDB_MODE="offline", WANDB_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    logs = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(logs) == len(TOLD)
    for log, name in zip(logs, TOLD, strict=True):
        held = log.read_bytes()
        assert name.encode() in held and held.count(b"train/rewards/margins") >= TOLD[name]
        assert not [other for other in TOLD if other != name and other.encode() in held]


def test_a_tracker_that_nobody_logged_in_to_is_said_in_one_line(tmp_path):
    done = two_rounds(tmp_path, "wandb", WANDB_MODE="online", WANDB_API_KEY="", NETRC=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "wandb login" in done.stderr
    assert "Traceback" not in done.stderr
