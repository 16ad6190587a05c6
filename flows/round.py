"""One round of SeRA: start reading here. It is the algorithm box, in plain Python, a step a line.

`do` takes what a step is to do and returns a pointer to what it made. The Prefect flow (flows/sera.py) does
the steps; `sera plan` (flows/planning/plan.py) walks the same lines and only looks up what exists, so an
unknown result is None. Nothing here imports Prefect, torch or a trainer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sera_core import steps
from sera_core.artifacts.manifest import StepRef, StepSpec
from sera_core.config import SeraConfig
from sera_core.method.mixing import share_for_round
from sera_core.method.rewards import ensemble_weights

Ref = StepRef | None
Do = Callable[[StepSpec], Ref]
Steps = dict[str, Ref]
"""Steps of a round by role."""


@dataclass(frozen=True)
class Sides:
    """What every round shares: the pairs (train, held-out, test) as token ids, and the start policy."""

    data: Ref
    model: Ref
    pairs: Ref


@dataclass(frozen=True)
class Past:
    """The heads so far, oldest first, each the steps of its round by role."""

    heads: Sequence[Mapping[str, Ref]] = field(default_factory=tuple)

    def policies(self) -> list[Ref]:
        """Policies of the heads, newest first."""
        return [head["policy"] for head in reversed(self.heads)]


@dataclass(frozen=True)
class Reviewers:
    """Who judges a response: policies and their references, newest first, and the weight of each."""

    weights: list[float]
    policies: list[Ref]
    references: list[Ref]


def prepare(config: SeraConfig, sources: Mapping[str, Any], do: Do) -> Sides:
    """Preferences and a start policy become token ids. `sources`: content digests, see `flows.sources`."""
    data = do(steps.data(config, sources["data"]))
    model = do(steps.model(config, sources["model"]))
    return Sides(data, model, do(steps.render(config, data, model)))


def self_review(config: SeraConfig, sides: Sides, past: Past, round: int, do: Do) -> Steps:
    """Review the human pairs, bootstrap pairs from the policy's own answers, mix both (METHOD, the loop).

    Round 0 has nothing to review by (every margin is 0): it keeps every human pair and generates none.
    """
    judges = judges_of(config, sides.model, past)
    share = generated_share(config, round)
    rules = steps.human_rules(config, round)

    def logps(policy: Ref, texts: Ref, file: str) -> Ref:
        return do(steps.logps(config, policy, sides.model, texts, file, sides.pairs))

    def judged(
        texts: Ref, file: str, policies: Sequence[Ref]
    ) -> tuple[list[Ref], list[Ref], Mapping[str, Ref]]:
        probes = {} if round == 0 else noise_probes(config, sides, judges, texts, file, do)
        return (
            [logps(p, texts, file) for p in policies],
            [logps(r, texts, file) for r in judges.references],
            probes,
        )

    scored = do(
        steps.review(
            config,
            sides.pairs,
            "train.parquet",
            judges.weights,
            *judged(sides.pairs, "train.parquet", judges.policies),
        )
    )
    kept = do(steps.select(config, rules, scored, sides.pairs, "human", round))
    made: Steps = {"scored": scored, "human": kept}
    inputs = {"rendered": sides.pairs, "scored": scored, "human_ledger": kept}
    source = "none"
    if share > 0:
        head = judges.policies[0]
        samples = do(steps.sample(config, head, sides.model, sides.pairs, round))
        # The sampler's own log-probabilities serve when it used the scorer's arithmetic (probed in the step).
        unscored = judges.policies if config.scores_samples_again else judges.policies[1:]
        judgement = judged(samples, "responses.parquet", unscored)
        responses = do(steps.pair(config, samples, sides.pairs, judges.weights, *judgement, round))
        generated = do(
            steps.select(config, config.select_generated, responses, responses, "generated", round)
        )
        made |= {"samples": samples, "responses": responses, "generated": generated}
        inputs |= {"samples": samples, "responses": responses, "generated_ledger": generated}
    reference = training_reference(config, sides, past)
    if steps.needs_reference(config):
        inputs["human_reference"] = logps(reference, sides.pairs, "train.parquet")
        source = generated_reference(judges, reference)
        if share > 0 and source == "logps":
            inputs["generated_reference"] = logps(reference, made["responses"], "pairs.parquet")
    made["mixture"] = do(steps.mix(config, round, share, source, inputs))
    return made


def noise_probes(
    config: SeraConfig, sides: Sides, judges: Reviewers, texts: Ref, file: str, do: Do
) -> Mapping[str, Ref]:
    """A few of the responses under every judge once more, in float32: the noise of the margins."""

    def probe(policy: Ref) -> Ref:
        return do(steps.logps(config, policy, sides.model, texts, file, sides.pairs, probe=True))

    named = {f"exact-policy-{n:03d}": probe(policy) for n, policy in enumerate(judges.policies)}
    return named | {f"exact-ref-{n:03d}": probe(ref) for n, ref in enumerate(judges.references)}


def align(config: SeraConfig, sides: Sides, past: Past, round: int, mixture: Ref, do: Do) -> Ref:
    """Train the round's policy on the mix."""
    start = past.policies()[0] if past.heads and config.train.start == "previous" else sides.model
    same = start == training_reference(config, sides, past)
    return do(steps.train(config, round, start, sides.model, mixture, start_is_reference=same))


def gather_evidence(
    config: SeraConfig, sides: Sides, past: Past, round: int, mixture: Ref, policy: Ref, do: Do
) -> Ref:
    """Held-out margins and lengths, KL and diversity of held-out answers, each with an interval."""
    previous = past.policies()[0] if past.heads else sides.model

    def logps(judge: Ref, texts: Ref, file: str) -> Ref:
        return do(steps.logps(config, judge, sides.model, texts, file, sides.pairs, side="heldout"))

    inputs = {
        "rendered": sides.pairs,
        "mixture": mixture,
        "policy_heldout": logps(policy, sides.pairs, "heldout.parquet"),
        "policy_train": logps(policy, sides.pairs, "train.parquet"),
        "previous_heldout": logps(previous, sides.pairs, "heldout.parquet"),
        "reference_heldout": logps(sides.model, sides.pairs, "heldout.parquet"),
        "reference_train": logps(sides.model, sides.pairs, "train.parquet"),
    }
    if config.evaluate.prompts:
        samples = do(steps.sample_heldout(config, policy, sides.model, sides.pairs, round))
        inputs["samples"] = samples
        inputs["reference_samples"] = logps(sides.model, samples, "responses.parquet")
        inputs["previous_samples"] = logps(previous, samples, "responses.parquet")
        if config.scores_samples_again:
            inputs["policy_samples"] = logps(policy, samples, "responses.parquet")
    return do(steps.evaluate(config, round, inputs))


def test_evidence(config: SeraConfig, sides: Sides, policy: Ref, do: Do) -> Ref:
    """The test side under one policy: reported once, decides nothing."""
    inputs = {
        "rendered": sides.pairs,
        "policy_test": do(steps.logps(config, policy, sides.model, sides.pairs, "test.parquet")),
        "reference_test": do(steps.logps(config, sides.model, sides.model, sides.pairs, "test.parquet")),
    }
    return do(steps.test(config, inputs))


def judge(
    config: SeraConfig,
    past: Past,
    round: int,
    made: Mapping[str, Ref],
    history: Sequence[Mapping[str, Any]],
    head_accuracy: float | None,
    answer: Mapping[str, Any] | None,
    do: Do,
) -> Ref:
    """Promote, hold, roll back or stop: with the evidence of this round and of the head's."""
    inputs = {role: made[role] for role in ("evidence", "scored", "human")}
    if past.heads:
        inputs["rendered"] = made["pairs"]
        inputs |= {f"past-{number:03d}": head["evidence"] for number, head in enumerate(past.heads)}
        head = past.heads[-1]
        inputs |= {f"head_{role}": head[role] for role in ("evidence", "scored", "human")}
    return do(steps.decide(config, round, history, head_accuracy, answer, inputs))


def generated_share(config: SeraConfig, round: int) -> float:
    """Share of generated pairs asked for in a round: the list's, or the ramp's when the list is empty."""
    part = config.mix
    if part.shares:
        return share_for_round(round, part.shares, None)
    return share_for_round(round, None, (part.ramp_start, part.ramp_end, part.ramp_rounds))


def judges_of(config: SeraConfig, model: Ref, past: Past) -> Reviewers:
    """The head and the past heads the ensemble names, each with the judging reference of its own round."""
    policies = past.policies() or [model]
    weights = [float(w) for w in ensemble_weights(config.review.ensemble, config.review.gamma, len(policies))]
    policies = policies[: len(weights)]
    if config.score == "simpo":
        return Reviewers(weights, policies, [])
    before = [*past.policies()[1:], model] if past.heads else [model]
    references = [model] * len(policies) if config.review.reference == "initial" else before[: len(policies)]
    return Reviewers(weights, policies, references)


def training_reference(config: SeraConfig, sides: Sides, past: Past) -> Ref:
    """The policy the loss compares with: the start of the run, or the head."""
    return past.policies()[0] if past.heads and config.train.reference == "previous" else sides.model


def generated_reference(judges: Reviewers, reference: Ref) -> str:
    """Where the reference's log-probabilities of generated responses stand already (DESIGN, law 7)."""
    if judges.references and reference == judges.references[0]:
        return "ref_logps"
    return "policy_logps" if reference == judges.policies[0] else "logps"
