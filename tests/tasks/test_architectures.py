"""The architectures people use most: scorer and trainer give what a plain loop gives (all of them: the sweep
`python -m tests.benchmarks.architectures`).
"""

import pytest

from tests.benchmarks.architectures import NATS, answer

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
