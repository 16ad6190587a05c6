"""`sera export --gguf`, `--adapter`, and the printed command that serves the policy."""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tiny
import tinyrun
from fixtures import make_store

from sera_core import open_run
from sera_core.models import gguf_writing
from sera_core.models.gguf_check import load_gguf
from sera_core.models.logprobs import plain_sequence_logps
from sera_core.models.policies import load_policy, load_tokenizer

ITEMS = [([3, 4, 5, 6], [7, 8, 9, 10, 11]), ([12, 13], [14, 15, 16])]
SECONDS = 240
"""Until a server must be up."""


@pytest.mark.slow
def test_a_gguf_file_lies_in_the_folder_and_says_how_far_it_is_from_the_policy(kept_store, sera, tmp_path):
    to = tmp_path / "policy"
    asked = ["export", "first", "--round", 1, "--to", to, "--gguf", "q8_0", "--store", kept_store]
    found = sera(*asked, "--json").json
    gguf = found["gguf"]
    assert gguf["file"] == "policy-q8_0.gguf" and gguf["texts"] > 10 and gguf["tokens"] > 8
    assert 0 < gguf["mean_nats"] < gguf["largest_nats"]
    assert (to / "model.safetensors").is_file() and "policy-q8_0.gguf" in (to / "README.md").read_text()
    policy, read = load_policy(to), load_gguf(to / gguf["file"])
    apart = plain_sequence_logps(policy, ITEMS) - plain_sequence_logps(read, ITEMS)
    assert 0 < np.abs(apart).max() < 1
    served = shlex.split(found["serve"]["llama.cpp"])
    assert served[:3] == ["llama-server", "-m", str(to / gguf["file"])] and "--jinja" in served
    assert served[served.index("--ctx-size") + 1] == "512"


@pytest.mark.slow
def test_a_name_that_ends_in_gguf_gives_one_file(kept_store, sera, tmp_path):
    to = tmp_path / "mine.gguf"
    out = sera("export", "first", "--to", to, "--gguf", "f16", "--store", kept_store).out
    assert [file.name for file in tmp_path.iterdir() if file.name != "store"] == ["mine.gguf"]
    assert "nats a token" in out and f"llama-server -m {to}" in out and "vllm" not in out


@pytest.mark.slow
def test_a_file_that_is_not_the_policy_does_not_stay(kept_store, sera, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_writing, "interleaved", lambda weight, heads: -weight)
    for to in (tmp_path / "mine.gguf", tmp_path / "folder"):
        command = ["export", "first", "--to", to, "--gguf", "f32", "--store", kept_store]
        assert "the file is not written" in sera(*command, code=1).err
    assert [file.name for file in tmp_path.iterdir()] == ["store"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--to", "x.gguf"], "--gguf f16"),
        (["--to", "x.gguf", "--gguf", "f16", "--push-to", "a/b"], "name a folder"),
        (["--to", "x", "--gguf", "f16", "--adapter"], "leave --adapter out"),
        (["--to", "x", "--adapter"], "there is no adapter"),
    ],
)
def test_what_makes_no_export_is_refused(kept_store, sera, flags, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert said in sera("export", "first", *flags, "--store", kept_store, code=2).err
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_tokenizer_that_llama_cpp_lacks_is_refused_before_the_work(kept_store, sera, tmp_path, monkeypatch):
    monkeypatch.setattr("sera_core.models.gguf_tokenizer._WORDS", ())
    monkeypatch.setattr("flows.commands.export.export_policy", None)
    command = ["export", "first", "--to", tmp_path / "x", "--gguf", "f16", "--store", kept_store]
    assert "splits words by" in sera(*command, code=2).err


@pytest.mark.slow
def test_an_adapter_is_the_policy_beside_its_base(sera, tmp_path):
    from peft import AutoPeftModelForCausalLM

    lora = {"train": {"method": "lora", "lora_rank": 4, "learning_rate": 3e-2}, "limits": {"rounds": 1}}
    config = tinyrun.config(tmp_path, **make_store.SMALL | lora)
    tinyrun.work(config, tmp_path / "store", "lora")
    found = {}
    for name, flags in (("adapter", ["--adapter"]), ("merged", [])):
        command = ["export", "lora", "--round", 0, "--to", tmp_path / name, "--store", tmp_path / "store"]
        found[name] = sera(*command, *flags, "--json").json
    adapter = tmp_path / "adapter"
    assert not list(adapter.glob("model*.safetensors")) and not (adapter / "base.json").exists()
    assert "AutoPeftModelForCausalLM" in (adapter / "README.md").read_text()
    peft = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()  # finds the base by itself
    merged, start = (
        plain_sequence_logps(load_policy(tmp_path / name), ITEMS) for name in ("merged", "policy")
    )
    np.testing.assert_allclose(plain_sequence_logps(peft.merge_and_unload(), ITEMS), merged, atol=1e-4)
    assert np.abs(merged - start).max() > 1e-3
    words = shlex.split(found["adapter"]["serve"]["vllm"])
    assert words[:2] == ["vllm", "serve"] and (Path(words[2]) / "config.json").is_file()
    assert "--enable-lora" in words and f"lora-0={adapter}" in words
    assert words[words.index("--max-lora-rank") + 1] == "8"
    path = open_run(str(tmp_path / "store"), "lora")[0].policy_path()
    assert (path / "adapter_config.json").read_text() == (adapter / "adapter_config.json").read_text()
    command = ["export", "lora", "--adapter", "--push-to", "a/b", "--store", tmp_path / "store"]
    assert "base is not on the hub" in sera(*command, code=2).err


def test_the_command_has_the_arithmetic_the_length_and_the_sampling_of_the_run(tmp_path):
    from types import SimpleNamespace
    from typing import Any

    from flows.exports.serving import llama_command, vllm_command

    folder = tiny.tiny_policy(tmp_path / "policy", positions=20_000)
    manifest: Any = SimpleNamespace(run="mine", round=2)
    sections = {"model": {"template_kwargs": {"enable_thinking": False}}, "sampling": {"temperature": 0.5}}
    config = tinyrun.config(tmp_path, **sections)
    (folder / "generation_config.json").write_text(json.dumps({"top_k": 20, "repetition_penalty": 1.1}))
    words = shlex.split(vllm_command(config, manifest, folder, "a b"))
    told = dict(zip(words[3::2], words[4::2], strict=True))
    assert words[:3] == ["vllm", "serve", "a b"]
    assert told["--served-model-name"] == "mine-2" and told["--dtype"] == "float32"
    assert told["--max-model-len"] == "8192"
    assert json.loads(told["--override-generation-config"]) == {"top_k": 0, "repetition_penalty": 1.0}
    assert json.loads(told["--default-chat-template-kwargs"]) == {"enable_thinking": False}
    words = shlex.split(llama_command(config, manifest, folder, "f.gguf"))
    assert words[words.index("--temp") + 1] == "0.5"
    assert json.loads(words[words.index("--chat-template-kwargs") + 1]) == {"enable_thinking": False}


def test_generation_ends_where_the_run_ends_an_answer(tmp_path):
    from flows.exports.folder import add_stops

    folder = tiny.tiny_policy(tmp_path / "policy", layers=1, hidden=32)
    place = folder / "generation_config.json"
    before = place.read_bytes()
    add_stops(folder, {})
    assert place.read_bytes() == before  # it names the end of a turn already
    place.write_text(json.dumps({"eos_token_id": 0, "top_k": 5}))
    add_stops(folder, {})
    assert json.loads(place.read_text()) == {"eos_token_id": [2, 0], "top_k": 5}


# ------------------------------------------------------------------------------------------ the real server


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(2 * SECONDS)
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_the_printed_command_serves_the_policy_greedy_answer_and_all(kept_store, sera, tmp_path):
    """With flags for a small machine behind the printed ones: a port, and no compilation."""
    import torch

    to = tmp_path / "policy"
    found = sera("export", "first", "--round", 1, "--to", to, "--store", kept_store, "--json").json
    words = shlex.split(found["serve"]["vllm"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    settings["PYTHONPATH"] = str(named_vllm(tmp_path / "site"))
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | settings, start_new_session=True
        )
    chat = [{"role": "user", "content": "Question 3: boat?"}]
    try:
        until = time.monotonic() + SECONDS
        while (said := ask(port, None)) is None:
            assert server.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.5)
        assert [model["id"] for model in said["data"]] == ["first-1"]
        asked = {"model": "first-1", "messages": chat, "temperature": 0, "max_tokens": 16}
        answer = ask(port, asked)
    finally:
        stop(server)
    tokenizer = load_tokenizer(to)
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    made = load_policy(to).generate(torch.tensor([ids]), do_sample=False, max_new_tokens=16)  # pyright: ignore
    expected = tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
    assert answer is not None and answer["choices"][0]["message"]["content"] == expected != ""


def named_vllm(site: Path) -> Path:
    """The CPU build is the package `vllm-cpu`, but vLLM's command line asks for that of `vllm`."""
    info = site / "vllm-0.30.0+cpu.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.30.0+cpu\n")
    return site


def stop(server: subprocess.Popen) -> None:
    """End a server and everything that it started."""
    for wanted in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, wanted)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(30)


def ask(port: int, body: dict | None) -> dict | None:
    """An answer of the server: to a chat, else its models; None while it is not there."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    url = f"http://127.0.0.1:{port}/v1/" + ("models" if body is None else "chat/completions")
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with opener.open(request, timeout=60) as answer:
            return json.loads(answer.read())
    except (urllib.error.URLError, ConnectionError):
        if body is not None:
            raise
        return None
