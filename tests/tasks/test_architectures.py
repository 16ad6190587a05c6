"""The architectures people use most: scorer and trainer give what a plain loop gives (all of them: the sweep
`python -m tests.benchmarks.architectures`).
"""

import pytest

from sera_core.errors import InputError
from sera_core.models.logprobs import sequence_logps
from tests.benchmarks.architectures import NATS, WINDOW, answer, plain, tiny_model

pytestmark = pytest.mark.slow

MOST_USED = (
    *("bloom", "cohere", "falcon", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama"),
    *("mistral", "mixtral", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"),
)


@pytest.mark.parametrize("name", MOST_USED)
def test_scorer_and_trainer_give_what_a_plain_loop_gives(name):
    found = answer(name)
    assert found["built"], found
    for part in ("scorer", "trainer"):
        assert found[part]["what"] == "agree" and found[part]["nats"] <= NATS, found


def test_sparse_attention_is_computed_where_it_sees_all_and_refused_beyond():
    model = tiny_model("deepseek_v32")  # picks 16 tokens; a run over equal scores picks others
    items = [([31 + n, 40, 50], list(range(60 + n, 73))) for n in range(6)]
    assert max(len(prompt) + len(response) for prompt, response in items) == WINDOW
    right = [plain(model, *item) for item in items]
    assert sequence_logps(model, items) == pytest.approx(right, abs=NATS)
    with pytest.raises(InputError, match=r"16 tokens \(index_topk\).* sequences of 17 tokens"):
        sequence_logps(model, [([31, 40, 50, 51], list(range(60, 73)))])
    found = answer("deepseek_v32")
    assert [found[part]["what"] for part in ("scorer", "trainer")] == ["refused", "refused"]
