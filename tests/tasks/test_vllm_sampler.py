"""The vLLM engine on CPU: the real engine, in a process of its own since it does not give memory back."""

import json
import multiprocessing
from importlib.util import find_spec

import numpy as np
import pytest
from tiny import tiny_policy

from sera_core.errors import InputError
from sera_core.models.logprobs import plain_sequence_logps
from sera_core.models.policies import load_policy, load_tokenizer, save_policy
from tasks.engines import vllm_sampler
from tasks.engines.choose import open_sampler
from tasks.engines.sampler import Request, Settings

END = 2
PROMPTS = [tuple(range(3, 3 + n)) for n in (5, 90, 17)]


def test_a_missing_vllm_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_sampler, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'sera-flow\[vllm\]'"):
        open_sampler("vllm", tmp_path)


def sample_in_child(queue, policy, base, requests, settings):
    """Run in a process of its own."""
    sampler = open_sampler("vllm", policy, base=base, max_length=128)
    sampler.enqueue([request for part in requests[:2] for request in part], settings)
    heard = []
    found = [sampler.sample(part, settings, heard.append) for part in requests]
    queue.put([(sampler.adapter is not None, heard), *found])
    sampler.close()


def sample(policy, base, requests, settings):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=sample_in_child, args=(queue, policy, base, requests, settings))
    child.start()
    try:
        return queue.get(timeout=300)
    finally:
        child.join(60)
        if child.is_alive():
            child.kill()


def requests() -> list[Request]:
    return [Request(prompt, 2**62 + 100 * i + j) for i, prompt in enumerate(PROMPTS) for j in range(4)]


def items(asked, found):
    return [(request.prompt_ids, response.ids) for request, response in zip(asked, found, strict=True)]


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_agrees_with_the_scorer_and_repeats_itself(tmp_path):
    folder = tiny_policy(tmp_path / "policy")
    ends = tuple(range(2, 40))
    asked = requests()
    parts = [asked[4:], asked[:4], asked, asked[:1]]
    (_, heard), *ahead, found, alone = sample(folder, None, parts, Settings(0.8, 0.95, 24, ends))
    assert [response.ids for part in ahead for response in part] == [
        response.ids for response in (*found[4:], *found[:4])
    ]
    assert heard[0] < 8 <= max(heard) == len(asked) and len(heard) > 8  # not only at the end of a part
    expected = plain_sequence_logps(load_policy(folder), items(asked, found))
    np.testing.assert_allclose([response.logps for response in found], expected, atol=1e-3)
    assert alone[0].ids == found[0].ids
    assert len({response.ids for response in found}) > len(PROMPTS)
    for response in found:
        inside = [token in ends for token in response.ids]
        assert not any(inside[:-1])
        assert inside[-1] == (response.finish_reason == "stop")
        assert response.finish_reason == "stop" or len(response.ids) == 24


def test_vllm_applies_the_adapters_that_it_knows(tmp_path):
    def rank(**config: object) -> int | None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return vllm_sampler.lora_rank(tmp_path)

    assert [rank(r=4), rank(r=16), rank(r=17), rank(r=512), rank(r=513)] == [8, 16, 32, 512, None]
    assert rank(r=8, use_dora=True) is None and rank(r=8, use_dora=False) == 8


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("kind", [{"use_rslora": True}, {"use_dora": True}], ids=["applied", "merged"])
def test_vllm_samples_from_an_adapter_beside_its_base_or_merged(tmp_path, kind):
    import torch
    from peft import LoraConfig, get_peft_model

    base = tiny_policy(tmp_path / "base")
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **kind)
    adapter = save_policy(get_peft_model(load_policy(base), lora), base, tmp_path / "adapter")
    assert load_tokenizer(base)
    (beside, _), found = sample(adapter, base, [requests()], Settings(1.0, 1.0, 8, (END,)))
    assert beside == ("use_dora" not in kind)
    expected = plain_sequence_logps(load_policy(adapter, base=base), items(requests(), found))
    np.testing.assert_allclose([response.logps for response in found], expected, atol=1e-3)
    of_base = plain_sequence_logps(load_policy(base), items(requests(), found))
    assert np.abs(of_base - expected).max() > 0.1
