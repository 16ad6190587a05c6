"""Response log-probabilities: the fast engine against the plain loop, on a tiny model and on the demo's."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import VOCAB_SIZE, tiny_policy
from transformers import BertConfig, BertLMHeadModel

from sera_core.errors import InputError
from sera_core.models import logprobs
from sera_core.models.logprobs import (
    Item,
    _is_causal,
    plain_sequence_logps,
    response_token_logps,
    score_tokens,
    scoring_mode,
    sequence_logps,
)
from sera_core.models.policies import load_policy
from sera_core.models.response_batches import batch_logps

DEMO_PAIRS = Path(__file__).parents[2] / "deployments" / "data" / "ultrafeedback_short.jsonl"
LIKE = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

ids = st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=24)
groups = st.lists(st.tuples(ids, st.lists(ids, min_size=1, max_size=3)), min_size=1, max_size=5)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices are slower on several threads, much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    return load_policy(tiny_policy(tmp_path_factory.mktemp("tiny") / "policy"))


def flat(groups):
    return [Item(prompt, response) for prompt, responses in groups for response in responses]


def from_config(config_class, **kwargs):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = config_class(vocab_size=VOCAB_SIZE, initializer_range=0.2, **shape, **special, **kwargs)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_model_that_always_predicts_the_uniform_distribution_gives_log_of_the_vocabulary(tmp_path):
    """Zero embeddings give zero logits, so three tokens have 3 · −ln 512 = −18.714974 nats."""
    uniform = load_policy(tiny_policy(tmp_path / "uniform"))
    with torch.no_grad():
        uniform.get_output_embeddings().weight.zero_()
    assert sequence_logps(uniform, [([5, 6], [7, 8, 9])]) == pytest.approx([-18.714974], abs=1e-5)


@LIKE
@given(groups)
def test_the_fast_engine_equals_the_plain_loop(policy, groups):
    items = flat(groups)
    assert scoring_mode(policy) == "packed"
    np.testing.assert_allclose(sequence_logps(policy, items), plain_sequence_logps(policy, items), atol=1e-4)


@LIKE
@given(groups, st.randoms(use_true_random=False))
def test_the_order_of_the_items_changes_no_bit(policy, groups, draw):
    items = flat(groups)
    order = list(range(len(items)))
    draw.shuffle(order)
    shuffled = sequence_logps(policy, [items[index] for index in order])
    np.testing.assert_array_equal(shuffled, sequence_logps(policy, items)[order])


@LIKE
@given(groups, st.integers(1, 100))
def test_the_batch_size_changes_values_by_float_noise_only(policy, groups, tokens_per_batch):
    items = flat(groups)
    cut = sequence_logps(policy, items, tokens_per_batch=tokens_per_batch)
    np.testing.assert_allclose(cut, sequence_logps(policy, items), atol=1e-4)


@pytest.mark.parametrize("room", [30, 60])
def test_out_of_memory_halves_the_batches_until_they_fit(policy, monkeypatch, caplog, room):
    """A device that holds so many tokens at a time; the longest item has 30."""
    draw = random.Random(0)
    groups = [
        (
            [draw.randrange(VOCAB_SIZE) for _ in range(6)],
            [[draw.randrange(VOCAB_SIZE) for _ in range(draw.randint(1, 24))] for _ in range(4)],
        )
        for _ in range(9)
    ]
    sizes = []

    def short_of_memory(model, batch, mode):
        sizes.append(sum(group.tokens for group in batch))
        if sizes[-1] > room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return batch_logps(model, batch, mode)

    items, seen = flat(groups), []
    expected = sequence_logps(policy, items)
    monkeypatch.setattr(logprobs, "batch_logps", short_of_memory)
    found = sequence_logps(policy, items, progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    failed = [size for size in sizes if size > room]
    assert 0 < len(failed) < 7 and "out of memory" in caplog.text  # it goes on with what fits
    assert seen[-1] == (len(items), len(items)) and seen == sorted(seen)


def test_an_item_that_does_not_fit_by_itself_is_out_of_memory(policy, monkeypatch):
    def always(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(logprobs, "batch_logps", always)
    with pytest.raises(torch.OutOfMemoryError):
        sequence_logps(policy, [([3, 4], [5, 6]), ([3, 4], [7, 8, 9])])


def test_a_response_does_not_see_the_others_of_its_prompt(policy):
    alone = sequence_logps(policy, [([1, 40, 41], [50, 51, 52])])
    among = sequence_logps(policy, [([1, 40, 41], [60] * 30), ([1, 40, 41], [50, 51, 52]), ([9], [3, 4])])
    assert among[1] == pytest.approx(alone[0], abs=1e-4)


def test_the_first_response_token_is_predicted_by_the_last_prompt_token(policy):
    """By hand from one forward pass: position 2 of (11, 12, 13) predicts 14, position 3 predicts 15."""
    with torch.no_grad():
        logps = policy(torch.tensor([[11, 12, 13, 14, 15]])).logits[0].double().log_softmax(-1)
    tokens = response_token_logps(policy, [([11, 12, 13], [14, 15])])
    assert tokens[0] == pytest.approx([logps[2, 14].item(), logps[3, 15].item()], abs=1e-4)


def test_values_are_sums_of_the_token_values(policy):
    items = [([1, 2, 3], [4, 5, 6]), ([1, 2, 3], [7]), ([8], [9, 10])]
    tokens = response_token_logps(policy, items)
    assert [len(values) for values in tokens] == [3, 1, 2]
    np.testing.assert_allclose([values.sum() for values in tokens], sequence_logps(policy, items))


def test_a_prompt_counts_once_and_every_response_counts():
    """Prompts (1,2,3) and (1,2) hold 5 tokens, responses 2 + 1 + 4."""
    assert score_tokens([([1, 2, 3], [4, 5]), ([1, 2, 3], [6]), ([1, 2], [3, 4, 5, 6])]) == 12


def test_progress_ends_with_all_items(policy):
    seen = []
    items = [([1, 2], [3] * length) for length in range(1, 9)]
    sequence_logps(
        policy, items, tokens_per_batch=10, progress=lambda done, total: seen.append((done, total))
    )
    assert seen == sorted(seen)
    assert len(seen) > 2
    assert seen[-1] == (8, 8)


def test_no_items_give_no_values(policy):
    assert sequence_logps(policy, []).shape == (0,)


def test_scoring_leaves_the_model_as_it_was(policy):
    before = policy.config._attn_implementation
    generated = policy.generate(torch.tensor([[1, 50, 60]]), do_sample=False, max_new_tokens=8)
    sequence_logps(policy, [([1, 50, 60], [70, 71])])
    assert policy.config._attn_implementation == before
    again = policy.generate(torch.tensor([[1, 50, 60]]), do_sample=False, max_new_tokens=8)
    assert torch.equal(generated, again)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (([1], []), r"item 1: the response is empty"),
        (([], [1]), r"item 1: the prompt is empty"),
        (([1], [VOCAB_SIZE]), r"item 1: token id 512 is outside the model's vocabulary"),
        (([1], [-1]), r"item 1: token id -1"),
        (([1] * 500, [2] * 13), r"item 1: 500 prompt and 13 response tokens exceed the model's 512"),
    ],
)
def test_an_item_without_a_log_probability_is_refused_by_its_index(policy, item, message):
    with pytest.raises(InputError, match=message):
        sequence_logps(policy, [([1], [2]), item])


def test_a_model_in_training_mode_is_refused(tmp_path):
    policy = load_policy(tiny_policy(tmp_path / "policy")).train()
    with pytest.raises(InputError, match=r"model\.eval\(\)"):
        sequence_logps(policy, [([1], [2])])


def test_every_architecture_is_scored_as_its_own_plain_forward_scores():
    from transformers import CohereConfig, Gemma2Config, GPTNeoXConfig, MistralConfig, Qwen2Config

    grouped = {"num_key_value_heads": 1}
    models = {
        "packed": [from_config(Qwen2Config, **grouped), from_config(GPTNeoXConfig)],
        "padded": [from_config(MistralConfig, sliding_window=8, head_dim=32, **grouped)],
        "full": [from_config(CohereConfig, **grouped), from_config(Gemma2Config, head_dim=32, **grouped)],
    }
    items = [(list(range(3, 12)), [20, 21, 22, 23]), (list(range(3, 12)), [30, 31]), ([5, 6], [40] * 9)]
    for mode, members in models.items():
        for model in members:
            assert scoring_mode(model, longest=13) == mode, type(model)
            np.testing.assert_allclose(
                sequence_logps(model, items), plain_sequence_logps(model, items), atol=1e-4
            )


def test_bfloat16_weights_stay_within_their_noise(tmp_path):
    folder = tiny_policy(tmp_path / "policy")
    items = [([1, 2, 3], [40, 50, 60, 70]), ([1, 2, 3], [80, 90])]
    exact = sequence_logps(load_policy(folder), items)
    rough = sequence_logps(load_policy(folder, dtype="bfloat16"), items)
    np.testing.assert_allclose(rough, exact, rtol=0.03)
    assert not np.array_equal(rough, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_sees_later_tokens_is_refused(dtype):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
    )
    encoder = BertLMHeadModel(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(3)  # attention as sharp as a trained model's
    with pytest.raises(InputError, match="not causal"):
        scoring_mode(encoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_change_with_the_number_of_tokens_are_rounding_in_16_bits_only(tmp_path, dtype):
    """Matrix products of other sizes round otherwise: SmolLM2 in bfloat16 on a CPU without AMX, 2 %."""
    model = load_policy(tiny_policy(tmp_path / "policy")).to(dtype)

    def round_by_length(_, args, kwargs, output):
        output.logits = output.logits * (1 + 0.05 * (kwargs["input_ids"].shape[1] % 7))
        return output

    model.register_forward_hook(round_by_length, with_kwargs=True)
    items = [Item([1, 2, 3], [40, 50, 60, 70])]
    assert _is_causal(model, items[0]) == (dtype == torch.bfloat16)
