"""`sera chat`: its answers are those of the policy that the round left."""

import io
import json

import pytest
import tinyrun
import torch
from transformers import AutoModelForCausalLM

from sera_core import open_run
from sera_core.data.rendering import Renderer

QUESTION = "What is a tide?"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two rounds that move the policy far: (store, start policy's folder)."""
    folder = tmp_path_factory.mktemp("made")
    config = tinyrun.config(folder, limits={"rounds": 2}, train={"learning_rate": 1e-2, "epochs": 3})
    settings = folder / "policy" / "generation_config.json"  # with a penalty that sampling in a run ignores
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"repetition_penalty": 9.0}))
    tinyrun.work(config, folder / "store")
    return folder / "store", folder / "policy"


def greedy(folder, *turns, tokens=12):
    """The most probable answer by transformers alone."""
    renderer, model = Renderer(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    ids = renderer.prompt_ids(messages)
    for _ in range(tokens):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        if ids[-1] in renderer.stop_ids:
            break
    return renderer.text(ids[len(renderer.prompt_ids(messages)) :])


def chat(*words):
    return ("chat", *words, "--temperature", "0", "--max-tokens", "12")


def test_it_answers_as_the_policy_of_the_round_and_beside_it_the_start(sera, made):
    store, start = made
    found = sera(*chat("tiny:1", "--against", "start", "--prompt", QUESTION, "--store", store, "--json")).json
    policy = open_run(str(store), "tiny")[1].policy_path()
    assert found["answers"] == {"round 1": greedy(policy, QUESTION), "start": greedy(start, QUESTION)}
    assert found["answers"]["round 1"] != found["answers"]["start"]


def test_a_conversation_goes_on_until_another_begins(sera, made, monkeypatch):
    store, _ = made
    policy = open_run(str(store), "tiny")[0].policy_path()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n\nAnd why?\n/new\nAnd why?\n"))
    said = sera(*chat("tiny:0", "--store", store))
    first = greedy(policy, QUESTION)
    second, alone = greedy(policy, QUESTION, first, "And why?"), greedy(policy, "And why?")
    assert said.out == f"{first}\n{second}\n{alone}\n"
    assert "Ctrl-D ends" in said.err


def test_the_same_seed_samples_the_same_answer(sera, made):
    words = ("chat", "tiny:0", "--prompt", QUESTION, "--store", made[0], "--max-tokens", "20", "--json")
    one, same, other = (sera(*words, "--seed", seed).json["answers"] for seed in (1, 1, 2))
    assert one == same != other


def test_an_adapter_answers_beside_its_base(sera, tmp_path):
    config = tinyrun.config(tmp_path, limits={"rounds": 1}, train={"method": "lora", "learning_rate": 3e-2})
    tinyrun.work(config, tmp_path / "store")
    found = sera(*chat("tiny", "--prompt", QUESTION, "--store", tmp_path / "store", "--json")).json
    sera("export", "tiny", "--to", tmp_path / "out", "--store", tmp_path / "store")
    assert found["answers"] == {"round 0": greedy(tmp_path / "out", QUESTION)}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tiny:7"], "rounds 0 to 1"),
        (["tiny:last"], "'last' is no number of a round"),
        (["other"], "other"),
        (["tiny", "--against", "begin"], "'begin' is no number of a round"),
        (["tiny", "--temperature", "-1"], "--temperature -1.0"),
        (["tiny", "--max-tokens", "0"], "--max-tokens 0"),
        (["tiny", "--json"], "only with --prompt"),
        (["tiny:0", "--prompt", "long " * 600], "begin another one"),
    ],
)
def test_bad_input_gets_one_message(sera, made, words, said):
    told = sera("chat", *words, "--store", made[0], code=2)
    assert said in told.err and not told.out
