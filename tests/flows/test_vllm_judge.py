"""vLLM's own OpenAI-compatible server as a judge's endpoint: a real server with structured outputs."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec

import pytest
import tiny
import tinyrun
from judgeserver import labelled

SECONDS = 240
"""Until the server must be up."""


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory):
    """The URL of a server with a random policy, named `m`."""
    folder = tmp_path_factory.mktemp("vllm")
    tiny.tiny_policy(folder / "policy", positions=4096)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--model", str(folder / "policy"), "--served-model-name", "m"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "4096"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | settings,
            start_new_session=True,
            cwd=folder,
        )
    try:
        until = time.monotonic() + SECONDS
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < until, (folder / "log").read_text()[-3000:]
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def answers(url):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return opener.open(url, timeout=5).status == 200
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(("mode", "asked"), [("pairwise", 2), ("single", 1)])
def test_a_random_model_behind_vllm_answers_in_the_asked_form_and_is_not_believed(
    vllm_server, sera, tmp_path, monkeypatch, mode, asked
):
    monkeypatch.setenv("OPENAI_BASE_URL", vllm_server)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    pairs = tinyrun.write_rows(tmp_path / "pairs.jsonl", labelled(12))
    command = ("evaluate", "--judge", "openai:m", "--calibrate", pairs, "--mode", mode)
    found = sera(*command, "--concurrency", 4, "--store", tmp_path / "store", "--json").json
    assert (found["comparisons"], found["answered"], found["failed"]) == (12, 12, {})
    assert found["status"] == "uncalibrated"
    assert found["tokens"]["prompt"] > 12 * asked * 200 and found["tokens"]["answer"] > 12 * asked
    if mode == "single":
        assert found["measures"]["order_flips"]["value"] == 0
