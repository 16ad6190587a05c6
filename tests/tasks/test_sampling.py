"""The sampling step: which prompts, which rows, what survives an interruption, and the parity probe."""

from types import SimpleNamespace

import numpy as np
import pytest
from tiny import tiny_policy

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.artifacts.manifest import Artifact, StepSpec
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.errors import SeraError
from sera_core.models.logprobs import plain_sequence_logps
from sera_core.models.policies import load_policy
from tasks import sampling
from tasks.engines.sampler import Sampled

EXECUTION = ExecutionConfig(device="cpu", sampling_batch=8)
FIELDS = {
    "engine": "transformers",
    "dtype": "float32",
    "model_dtype": "float32",
    "scored_again": False,
    "responses": 2,
    "temperature": 0.8,
    "top_p": 1.0,
    "max_tokens": 6,
    "prompts": None,
    "max_parity_nats": 0.01,
    "seed": 7,
    "round": 1,
    "side": "train",
}


class World:
    """A store with a policy, and with prompts of these lengths."""

    def __init__(self, root, lengths=(5, 40, 12, 5, 9), order=1):
        self.store = open_store(str(root))
        self.model = self.put("model", lambda attempt: self._policy(attempt))
        self.lengths, self.order = lengths, order
        self.rendered = self.put("render", lambda attempt: self._prompts(attempt))

    def put(self, step, work, **fields):
        spec = StepSpec(step=step, version=1, fields=fields, inputs={})
        return run_step(self.store, spec, work, EXECUTION).ref

    def _policy(self, attempt):
        folder = tiny_policy(attempt.folder / "policy")
        return [f"policy/{path.name}" for path in folder.iterdir()]

    def _prompts(self, attempt):
        rows = [
            {"prompt_id": f"{n:04x}", "prompt_ids": [3 + (n + i) % 400 for i in range(length)]}
            for n, length in enumerate(self.lengths)
        ]
        schema.write_table(
            schema.from_rows(schema.PROMPTS, rows[:: self.order]), attempt.write("prompts.parquet")
        )
        pairs = [row | {"pair_id": f"{row['prompt_id']}-{k}"} for row in rows[:3] for k in range(2)]
        schema.write_table(schema.from_rows(schema.PAIRS, pairs), attempt.write("heldout.parquet"))
        return ["prompts.parquet", "heldout.parquet"]

    def sample(self, progress=lambda *_: None, **changes):
        inputs = {"policy": self.model, "model": self.model, "rendered": self.rendered}
        spec = StepSpec(step="sample", version=1, fields=FIELDS | changes, inputs=inputs)
        return run_step(self.store, spec, sampling.sample_responses, EXECUTION, progress)

    def rows(self, record, name="responses.parquet"):
        return list(schema.iter_rows(Artifact(self.store, record.ref).path(name)))


@pytest.fixture
def world(tmp_path):
    return World(tmp_path / "store")


def test_every_prompt_gets_its_responses_in_order_with_seeds_of_their_own(world):
    record = world.sample()
    rows = world.rows(record)
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [
        (f"{n:04x}", k) for n in range(5) for k in (0, 1)
    ]
    assert all(row["seed"] == derived_seed(7, 1, row["prompt_id"], row["sample"]) for row in rows)
    assert all(len(row["response_ids"]) == row["tokens"] for row in rows)
    assert all(row["past_logps"] == [] and row["ref_logps"] is None and row["reward"] is None for row in rows)
    assert record.counts["prompts"] == 5
    assert record.counts["responses"] == 10
    assert record.metrics["tokens/sampled"] == sum(row["tokens"] for row in rows)
    assert world.rows(record, "dropped.parquet") == []


def test_the_kept_logps_are_the_policys(world):
    rows = world.rows(world.sample())
    policy = load_policy(Artifact(world.store, world.model).folder("policy"))
    prompts = {
        row["prompt_id"]: row["prompt_ids"]
        for row in schema.iter_rows(Artifact(world.store, world.rendered).path("prompts.parquet"))
    }
    expected = plain_sequence_logps(policy, [(prompts[r["prompt_id"]], r["response_ids"]) for r in rows])
    np.testing.assert_allclose([row["policy_logps"] for row in rows], expected, atol=1e-4)


@pytest.mark.parametrize("fills", [False, True])
def test_the_probe_waits_for_an_engine_that_leaves_no_room_beside_it(world, monkeypatch, fills):
    order = []

    def noted(name, function):
        return lambda *args: (order.append(name), function(*args))

    monkeypatch.setattr(sampling._Work, "fills_device", fills)
    monkeypatch.setattr(sampling._Work, "close", noted("close", sampling._Work.close))
    monkeypatch.setattr(sampling, "_probe", noted("probe", sampling._probe))
    record = world.sample()
    assert order == (["close", "probe"] if fills else ["probe", "close"])
    assert "parity/max_nats" in record.metrics


@pytest.mark.parametrize(
    ("engine", "device", "fills"),
    [("vllm", "cuda", True), ("vllm", "cpu", False), ("transformers", "cuda", False)],
)
def test_only_vllm_on_an_accelerator_leaves_no_room(engine, device, fills):
    attempt = SimpleNamespace(fields={"engine": engine}, execution=ExecutionConfig(device=device))
    assert sampling._Work.fills_device.fget(SimpleNamespace(attempt=attempt)) is fills


def test_reruns_and_other_file_orders_give_the_same_bytes(tmp_path):
    digests = {
        World(tmp_path / name, order=order).sample().digest for name, order in [("a", 1), ("b", 1), ("c", -1)]
    }
    assert len(digests) == 1


def test_a_killed_run_goes_on_after_its_last_shard_and_gives_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "SHARD_PROMPTS", 2)
    whole = World(tmp_path / "whole").sample()
    world = World(tmp_path / "killed")

    def kill(done, total, unit):
        assert (total, unit) == (10, "responses")
        if done > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        world.sample(progress=kill)
    seen = []
    resumed = world.sample(progress=lambda done, total, unit: seen.append(done))
    assert resumed.digest == whole.digest
    assert resumed.metrics == whole.metrics
    assert resumed.counts == whole.counts
    assert resumed.parts == ["part-00000.json", "part-00001.json", "part-00002.json"]
    assert min(seen) > 4


def test_heldout_prompts_are_the_same_in_every_round_and_their_responses_are_not(world):
    """Three held-out prompts, one or two of them drawn: by chance alone five rounds would not agree."""
    for seed in range(4):
        rounds = [
            world.rows(world.sample(side="heldout", prompts=1 + seed % 2, round=n, seed=seed))
            for n in range(5)
        ]
        assert len({tuple(row["prompt_id"] for row in rows) for rows in rounds}) == 1
        assert len({row["seed"] for rows in rounds for row in rows}) == sum(map(len, rounds))


def test_a_subset_is_drawn_anew_each_round_whatever_the_order_of_the_file(tmp_path):
    lengths = (5,) * 12
    first, turned = World(tmp_path / "a", lengths), World(tmp_path / "b", lengths, order=-1)
    drawn = {
        (name, number): {row["prompt_id"] for row in world.rows(world.sample(prompts=4, round=number))}
        for name, world in (("first", first), ("turned", turned))
        for number in (1, 2)
    }
    assert len(drawn["first", 1]) == 4
    assert drawn["first", 1] == drawn["turned", 1]
    assert drawn["first", 1] != drawn["first", 2]
    record = first.sample(prompts=4)
    left_out = {
        row["prompt_id"] for row in first.rows(record, "dropped.parquet") if row["reason"] == "not_drawn"
    }
    assert len(left_out) == record.counts["not_drawn"] == 8
    assert not left_out & drawn["first", 1]


def test_a_prompt_without_room_for_a_response_is_in_the_ledger(tmp_path):
    world = World(tmp_path, lengths=(5, 507, 506))
    record = world.sample()
    assert {row["prompt_id"] for row in world.rows(record)} == {"0000", "0002"}
    (row,) = world.rows(record, "dropped.parquet")
    assert (row["prompt_id"], row["stage"], row["reason"]) == ("0001", "sample", "prompt_too_long")
    assert (row["kept"], row["origin"], row["round"], row["pair_id"]) == (False, "generated", 1, None)
    assert record.counts["prompt_too_long"] == 1


def test_the_heldout_side_answers_each_distinct_prompt_of_its_pairs(world):
    rows = world.rows(world.sample(side="heldout"))
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [
        (f"{n:04x}", k) for n in range(3) for k in (0, 1)
    ]


def test_nothing_to_sample_from_gives_an_empty_file(world):
    record = world.sample(prompts=0)
    assert world.rows(record) == []
    assert record.counts["prompts"] == 0
    assert record.counts["not_drawn"] == 5


def test_cut_and_empty_responses_are_kept_and_counted(world, monkeypatch):
    answers = [Sampled((9, 2), -1.0, "stop"), Sampled((2,), -1.0, "stop"), Sampled((9,) * 6, -1.0, "length")]

    def sample(requests, settings, finished):
        return [answers[i % 3] for i in range(len(requests))]

    fake = SimpleNamespace(sample=sample, close=lambda: None)
    monkeypatch.setattr(sampling, "open_sampler", lambda *args, **kwargs: fake)
    record = world.sample(max_parity_nats=1e9)
    assert (record.counts["responses"], record.counts["empty"], record.counts["cut_by_limit"]) == (10, 3, 3)
    assert record.metrics["samples/mean_tokens"] == (4 * 2 + 3 * 1 + 3 * 6) / 10
    assert record.metrics["samples/share_cut"] == 0.3


def test_an_engine_that_looks_ahead_gets_all_shards_that_are_left_at_once(world, monkeypatch):
    monkeypatch.setattr(sampling, "SHARD_PROMPTS", 2)
    begun, asked = [], []

    class Ahead:
        def enqueue(self, requests, settings):
            begun.append(requests)

        def sample(self, requests, settings, finished):
            if len(asked) == 1 and len(begun) == 3:  # three shards of two, two and one prompts
                raise KeyboardInterrupt
            asked.append(requests)
            return [Sampled((request.seed % 97, 2), -1.0, "stop") for request in requests]

        def close(self):
            pass

    monkeypatch.setattr(sampling, "open_sampler", lambda *args, **kwargs: Ahead())
    with pytest.raises(KeyboardInterrupt):
        world.sample(max_parity_nats=1e9)
    assert sum(map(len, begun)) == 10 and len(asked[0]) == 4
    record = world.sample(max_parity_nats=1e9)  # the first shard is kept
    assert [len(requests) for requests in begun] == [4, 4, 2, 4, 2] == [4, 4, 2, *map(len, asked[1:])]
    seeds = [request.seed for requests in asked for request in requests]
    assert [row["seed"] for row in world.rows(record)] == seeds
    assert [row["response_ids"][0] for row in world.rows(record)] == [seed % 97 for seed in seeds]


def wrong_by(nats):
    """The real engine, its log-probability of one response wrong by so many nats."""
    real = sampling.open_sampler

    def opened(*args, **kwargs):
        sampler = real(*args, **kwargs)
        sample = sampler.sample

        def shifted(*call):
            found = sample(*call)
            found[3] = Sampled(found[3].ids, found[3].logps + nats, found[3].finish_reason)
            return found

        sampler.sample = shifted
        return sampler

    return opened


def test_a_sampler_that_disagrees_with_the_scorer_is_refused_by_prompt_and_sample(world, monkeypatch):
    monkeypatch.setattr(sampling, "open_sampler", wrong_by(0.02))
    with pytest.raises(SeraError, match="prompt 0001, sample 1: the transformers engine computes"):
        world.sample()


def test_a_small_difference_is_recorded(world, monkeypatch):
    monkeypatch.setattr(sampling, "open_sampler", wrong_by(0.005))
    record = world.sample()
    assert record.metrics["parity/max_nats"] == pytest.approx(0.005, abs=1e-4)
    assert record.metrics["tokens/probe"] > record.metrics["tokens/sampled"]


def test_logps_in_another_arithmetic_are_recorded_and_left_out(world):
    record = world.sample(dtype="bfloat16", scored_again=True, max_parity_nats=1e-9)
    assert all(row["policy_logps"] is None for row in world.rows(record))
    assert record.metrics["parity/max_nats"] > 1e-3
