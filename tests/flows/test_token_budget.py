"""`train.tokens`: which number of tokens a round gets, what it changes in a run's keys, and the plan."""

import pytest
import tinyrun
from pydantic import ValidationError

from flows.planning.plan import plan
from flows.running.open_run import resolved
from sera_core import steps
from sera_core.artifacts.manifest import StepRef
from sera_core.config import SeraConfig

REF = StepRef(step="mix", key="a", digest="b")


def train_fields(config: SeraConfig, round: int) -> dict:
    return steps.train(config, round, REF, REF, REF, start_is_reference=True).fields


def test_a_round_has_its_own_number_and_the_last_one_repeats(tmp_path):
    config = tinyrun.config(tmp_path, train={"tokens": [0, 200, 300]})
    assert [config.token_budget(round) for round in range(5)] == [None, 200, 300, 300, 300]
    assert [train_fields(config, round).get("token_budget") for round in range(4)] == [None, 200, 300, 300]


def test_without_it_step_and_configuration_are_those_of_older_versions(tmp_path):
    plain, budget = tinyrun.config(tmp_path), tinyrun.config(tmp_path, train={"tokens": [0, 200]})
    digests = {"data": {side: [] for side in steps.SIDES}, "model": "m"}
    assert "tokens" not in resolved(plain, digests)["train"]
    assert resolved(budget, digests)["train"]["tokens"] == [0, 200]
    assert "tokens" not in train_fields(plain, 1)["train"] and "token_budget" not in train_fields(plain, 1)
    assert train_fields(budget, 0) == train_fields(plain, 0)  # 0: epochs decide, and the step is shared
    assert train_fields(budget, 1) == train_fields(plain, 1) | {"token_budget": 200}


@pytest.mark.parametrize(("tokens", "said"), [([0], "no number above 0"), ([-1], "greater than or equal")])
def test_numbers_that_say_nothing_are_refused(tmp_path, tokens, said):
    with pytest.raises(ValidationError, match=said):
        tinyrun.config(tmp_path, train={"tokens": tokens})


def test_the_plan_knows_the_budget(tmp_path):
    def trained(**train) -> list[int]:
        found = plan(tinyrun.config(tmp_path, train=train), "other", str(tmp_path / "store"))
        return [row["tokens"] for row in found["steps"] if row["step"] == "train"]

    first, *rest = trained()
    assert trained(tokens=[0, 77, 5000]) == [first, 77, 5000] and rest != [77, 5000]
