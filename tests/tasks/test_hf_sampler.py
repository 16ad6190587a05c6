"""The transformers engine: what it draws and reports, and that no response depends on its neighbours."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import tiny_policy

from sera_core.errors import InputError
from sera_core.models.logprobs import plain_sequence_logps
from sera_core.models.policies import load_policy
from tasks.engines.hf_sampler import HFSampler, draw, uniforms
from tasks.engines.sampler import Request, Settings

END = 2
PROMPTS = [tuple(range(3, 3 + n)) for n in (5, 90, 17, 5, 40)]
GREEDY = 1e-6


def settings(max_tokens: int = 24, temperature: float = 1.0, top_p: float = 1.0, stop=(END,)) -> Settings:
    return Settings(temperature, top_p, max_tokens, tuple(stop))


def requests(count: int = 3) -> list[Request]:
    return [Request(prompt, 100 * i + j) for i, prompt in enumerate(PROMPTS) for j in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture(scope="module")
def sampler(folder):
    return HFSampler(folder, batch=4)


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(folder)


# ------------------------------------------------------------------------------------------------- drawing


def test_a_token_is_drawn_by_inversion_of_the_running_sum():
    """p = (0.5, 0.25, 0.25): u below 0.5 gives token 0, below 0.75 token 1, else token 2."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().repeat(5, 1)
    u = torch.tensor([0.0, 0.49, 0.5, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    tokens, logps = draw(logits, u, 1.0, 1.0)
    assert tokens.tolist() == [0, 0, 1, 2, 2]
    np.testing.assert_allclose(logps, np.log([0.5, 0.5, 0.25, 0.25, 0.25]), rtol=1e-6)


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_evenly_spaced_numbers_give_each_token_its_share_of_the_tempered_softmax(temperature, top_p):
    """With u = (i + ½)/N a token of probability p is drawn N p times, give or take one."""
    logits = torch.randn(600, generator=torch.Generator().manual_seed(0)) * 2
    p = (logits.double() / temperature).softmax(0).numpy()
    ranked = np.argsort(-p)
    p[ranked[np.searchsorted(np.cumsum(p[ranked]), top_p) + 1 :]] = 0
    p /= p.sum()
    count = 4000
    spaced = torch.from_numpy((np.arange(count) + 0.5) / count)
    drawn, _ = draw(logits.repeat(count, 1), spaced, temperature, top_p)
    assert np.abs(np.bincount(drawn.numpy(), minlength=600) - count * p).max() < 1.01


def test_a_token_without_probability_is_never_drawn():
    logits = torch.full((4096, 600), -torch.inf)
    logits[:, [7, 300, 599]] = 0.0
    tokens, _ = draw(logits, torch.from_numpy(np.linspace(0, 1, 4096, endpoint=False)), 1.0, 1.0)
    assert np.bincount(tokens, minlength=600)[[7, 300, 599]].tolist() == [1366, 1365, 1365]


def test_the_logps_drawn_with_are_before_temperature_and_nucleus():
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(1))
    tokens, logps = draw(logits, torch.from_numpy(uniforms(0, 8)), 0.3, 0.5)
    np.testing.assert_allclose(logps, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0], atol=1e-6)


def test_uniform_numbers_are_a_function_of_the_seed_for_ever():
    assert uniforms(2**63 - 1, 3).tolist() == uniforms(2**63 - 1, 5).tolist()[:3]
    assert np.all((uniforms(5, 1000) >= 0) & (uniforms(5, 1000) < 1))
    assert uniforms(0, 2).tolist() == pytest.approx([0.0115467543, 0.2415491966], abs=1e-9)


# ------------------------------------------------------------------------------------------------ sampling


def test_one_token_responses_follow_the_models_own_distribution(sampler, policy):
    prompt = PROMPTS[0]
    count = 4000
    found = sampler.sample([Request(prompt, seed) for seed in range(count)], settings(1, temperature=0.9))
    with torch.inference_mode():
        logits = policy(input_ids=torch.tensor([prompt])).logits[0, -1].double()
    expected = (logits / 0.9).softmax(0).numpy() * count
    seen = np.bincount([response.ids[0] for response in found], minlength=len(expected))
    often = expected >= 8
    pvalue = stats.chisquare(
        [*seen[often], seen[~often].sum()], [*expected[often], expected[~often].sum()]
    ).pvalue
    assert pvalue > 1e-3


def test_a_response_is_the_same_whatever_shares_its_batch(folder, sampler):
    whole = sampler.sample(requests(), settings())
    alone = [sampler.sample([request], settings())[0] for request in requests()]
    reversed_ = HFSampler(folder, batch=32).sample(requests()[::-1], settings())[::-1]
    for one, other in itertools.chain(zip(whole, alone, strict=True), zip(whole, reversed_, strict=True)):
        assert one.ids == other.ids
        assert one.logps == pytest.approx(other.logps, abs=1e-4)


def test_two_seeds_give_two_responses_and_one_seed_gives_one(sampler):
    same, again, other = sampler.sample([Request(PROMPTS[1], seed) for seed in (1, 1, 2)], settings())
    assert same == again
    assert same.ids != other.ids


def test_near_temperature_zero_it_is_greedy_decoding(sampler, policy):
    found = sampler.sample([Request(prompt, 0) for prompt in PROMPTS], settings(16, GREEDY))
    for prompt, response in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        expected = policy.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, eos_token_id=END
        )
        assert list(response.ids) == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_logps_are_the_scorers(sampler, policy, top_p):
    found = sampler.sample(requests(), settings(temperature=0.8, top_p=top_p))
    items = [(request.prompt_ids, response.ids) for request, response in zip(requests(), found, strict=True)]
    np.testing.assert_allclose([r.logps for r in found], plain_sequence_logps(policy, items), atol=1e-4)


def test_a_response_ends_with_its_first_end_of_turn_and_only_then(sampler):
    ends = tuple(range(2, 60))
    found = sampler.sample(requests(8), settings(40, stop=ends))
    stopped = [response for response in found if response.finish_reason == "stop"]
    assert stopped
    assert len({len(response.ids) for response in stopped}) > 3
    for response in found:
        inside = [token in ends for token in response.ids]
        assert not any(inside[:-1])
        assert inside[-1] == (response.finish_reason == "stop")


def test_a_response_cut_by_the_limit_has_no_end_of_turn(sampler):
    found = sampler.sample(requests(), settings(3, stop=()))
    assert {(len(response.ids), response.finish_reason) for response in found} == {(3, "length")}


def test_every_response_is_told_when_it_is_complete(sampler):
    told = []
    sampler.sample(requests(), settings(), told.append)
    assert told == sorted(told)
    assert told[-1] == len(requests())


@pytest.mark.parametrize("architecture", ["mistral", "gemma", "neox"])
def test_other_architectures_and_sliding_windows_agree_with_the_scorer(architecture, tmp_path):
    """A window of 8 columns, shorter than most prompts; two kinds of layers in one; no grouped heads."""
    import transformers as t

    small = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    small |= {"num_hidden_layers": 2, "max_position_embeddings": 256, "initializer_range": 0.2}
    config = {
        "mistral": lambda: t.MistralConfig(**small, num_key_value_heads=1, head_dim=32, sliding_window=8),
        "gemma": lambda: t.Gemma3TextConfig(
            **small,
            num_key_value_heads=1,
            head_dim=32,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "neox": lambda: t.GPTNeoXConfig(**small),
    }[architecture]()
    torch.manual_seed(0)
    t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    found = HFSampler(tmp_path, batch=4).sample(requests(2), settings())
    items = [(request.prompt_ids, response.ids) for request, response in zip(requests(2), found, strict=True)]
    expected = plain_sequence_logps(load_policy(tmp_path), items)
    np.testing.assert_allclose([response.logps for response in found], expected, atol=2e-4)


def test_a_model_that_is_more_than_keys_and_values_is_refused(tmp_path):
    import transformers as t

    config = t.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r'does not support bloom models .* sampling.engine = "vllm"'):
        HFSampler(tmp_path)


def test_a_prompt_without_room_or_without_tokens_is_refused(sampler):
    with pytest.raises(InputError, match=r"request 1: 500 prompt .* 512 positions"):
        sampler.sample([Request((3,), 0), Request((3,) * 500, 0)], settings(24))
    with pytest.raises(InputError, match="request 0: the prompt has no tokens"):
        sampler.sample([Request((), 0)], settings())
