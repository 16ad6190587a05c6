"""One round of SeRA in plain Python, one step per line: start reading here.

`do` takes the specification of a step and returns a reference to its result. The Prefect flow (flows/sera.py)
runs the steps; `sera plan` (flows/planning/plan.py) calls the same functions but only looks up existing
results. Nothing here imports Prefect, torch or a trainer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sera_core import counts, steps
from sera_core.artifacts.manifest import StepRecord, StepRef, StepSpec
from sera_core.config import AUTO, SeraConfig
from sera_core.data.folds import Fold
from sera_core.method.rewards import ensemble_weights

Ref = StepRef | None
Do = Callable[[StepSpec], Ref]
Look = Callable[[Ref], StepRecord | None]
"""Gives a step's record; None if the step is not done (in a plan)."""
Steps = dict[str, Ref]
"""A round's steps by role."""
Score = Callable[[Ref, bool], Ref | Sequence[Ref]]
"""(policy, whether only a noise probe) -> log-probabilities; with cross-fitting one step for each fold."""


@dataclass(frozen=True)
class Sides:
    """Inputs of every round: the pairs (train, held-out, test) as token ids, their features, and the start
    policy."""

    data: Ref
    model: Ref
    pairs: Ref
    features: Ref
    rater: Mapping[str, Any] | None = None
    """What identifies the rater that orders responses (`pairing.by`); None: the implicit reward does."""
    judge: Mapping[str, Any] | None = None
    """What identifies the judge of the win rate; None unless rounds are decided by it (`decide.metric`)."""
    harness: Sequence[Mapping[str, str]] = ()
    """Name and digest of each capability task."""
    calibration: Ref = None
    """How well that judge agrees with the labels of the held-out pairs."""


@dataclass(frozen=True)
class Past:
    """The heads so far, oldest first; each holds its round's steps by role."""

    heads: Sequence[Mapping[str, Ref]] = field(default_factory=tuple)
    promoted: Mapping[int, Mapping[str, Ref]] = field(default_factory=dict)
    """Steps by role of every promoted round, by its number: those that a roll-back left behind too."""
    rounds: Sequence[int] = field(default_factory=tuple)
    """Number of each head's round."""

    def policies(self) -> list[Ref]:
        """Policies of the heads, newest first."""
        return [head["policy"] for head in reversed(self.heads)]

    def before(self, head: int) -> "Past":
        """The heads that a head was trained after; `head` counts from the oldest."""
        return Past(self.heads[:head], rounds=self.rounds[:head])


@dataclass(frozen=True)
class Reviewers:
    """The ensemble that scores responses: policies, references and weights, newest first."""

    weights: list[float]
    policies: list[Ref]
    references: list[Ref]


def prepare(config: SeraConfig, sources: Mapping[str, Any], do: Do) -> Sides:
    """Load the data and the model, render the pairs to token ids, and fine-tune the model if asked to.

    Args:
        config: the run's configuration.
        sources: content digests of the sources, see `flows.running.open_run.source_digests`.
        do: does a step.
    """
    data = do(steps.data(config, sources["data"]))
    model = do(steps.model(config, sources["model"]))
    pairs = do(steps.render(config, data, model))
    if config.start.tunes:
        model = fine_tuned(config, sources, data, model, pairs, do)
    features, judge = do(steps.features(config, pairs, data)), sources.get("judge")
    calibration = None if judge is None else do(steps.calibrate(config, judge, pairs))
    tasks = sources.get("harness", ())
    return Sides(data, model, pairs, features, sources.get("rater"), judge, tasks, calibration)


def fine_tuned(
    config: SeraConfig, sources: Mapping[str, Any], data: Ref, model: Ref, pairs: Ref, do: Do
) -> Ref:
    """The start policy: the model after supervised fine-tuning on conversations, or on the chosen answers."""
    messages = do(steps.messages(config, data, sources["sft"])) if config.start.file is not None else None
    return do(steps.sft(config, model, do(steps.examples(config, model, pairs, messages))))


def self_review(config: SeraConfig, sides: Sides, past: Past, round: int, do: Do, look: Look) -> Steps:
    """Review the human pairs, build pairs from the policy's own responses, and mix both.

    Round 0 has no reviewer yet (every margin is 0): it keeps every human pair and generates none.
    """
    reviewers = reviewers_of(config, sides.model, past)
    share = counts.generated_share(config, round)
    rules = steps.human_rules(config, round)

    def logps(policy: Ref, texts: Ref, file: str, probe: bool = False) -> Ref:
        return do(steps.logps(config, policy, sides.model, texts, file, sides.pairs, probe=probe))

    scores = human_scores(config, sides, past, reviewers, round, do)
    scored = do(steps.review(config, sides.pairs, "train.parquet", reviewers.weights, scores))
    kept = do(steps.select(config, rules, scored, sides.pairs, "human", round))
    made: Steps = {"scored": scored, "human": kept}
    inputs = {"rendered": sides.pairs, "scored": scored, "human_ledger": kept}
    source = "none"
    if share > 0:
        head = reviewers.policies[0]
        if config.candidates is not None and sides.rater is not None:
            samples = ratings = do(steps.candidates(config, sides.pairs, sides.model, sides.rater))
            unscored = reviewers.policies
        else:
            prompts = prompts_to_sample(config, sides, past, round, kept, look)

            def sample(policy: Ref, anchors: Ref = None) -> Ref:
                return do(steps.sample(config, policy, sides.model, sides.pairs, round, prompts, anchors))

            samples = sample(head, sample(sides.model) if config.anchored else None)
            ratings = None
            # If sampler and scorer use the same precision, the sampler's log-probabilities are reused.
            again = config.scores_samples_again or config.anchored
            unscored = reviewers.policies if again else reviewers.policies[1:]
        scores = scores_under(
            reviewers,
            unscored,
            round,
            lambda scorer, probe: logps(scorer, samples, "responses.parquet", probe),
        )
        if sides.rater is not None:
            ratings = made["ratings"] = ratings or do(steps.rate(config, samples, sides.pairs, sides.rater))
            scores = {**scores, "ratings": ratings}
        responses = do(steps.pair(config, samples, sides.pairs, reviewers.weights, scores, round))
        generated = do(
            steps.select(config, config.select_generated, responses, responses, "generated", round)
        )
        made |= {"samples": samples, "responses": responses, "generated": generated}
        inputs |= {"samples": samples, "responses": responses, "generated_ledger": generated}
    if config.train.needs_reference:
        reference, alpha = training_reference(config, sides, past), config.train.ld_alpha

        def reference_logps(pairs: Ref, file: str) -> Ref:
            return do(steps.logps(config, reference, sides.model, pairs, file, ld_alpha=alpha))

        inputs["human_reference"] = reference_logps(sides.pairs, "train.parquet")
        source = generated_reference(reviewers, reference) if alpha == 1 else "logps"
        if share > 0 and source == "logps":
            inputs["generated_reference"] = reference_logps(made["responses"], "pairs.parquet")
    made["mixture"] = do(steps.mix(config, round, share, source, inputs))
    return made


def scores_under(
    reviewers: Reviewers, policies: Sequence[Ref], round: int, score: Score
) -> Mapping[str, Ref]:
    """Log-probabilities under `policies` and every reference: inputs of a step that computes rewards.

    After round 0 also those of a few responses again in float32, under every reviewer, to measure the
    margins' noise.
    """
    exact: dict[str, Ref] = {}
    if round > 0:
        exact = steps.scores("exact-policy", [score(policy, True) for policy in reviewers.policies])
        exact |= steps.scores("exact-ref", [score(reference, True) for reference in reviewers.references])
    named = steps.scores("policy", [score(policy, False) for policy in policies])
    references = [score(reference, False) for reference in reviewers.references]
    return exact | named | steps.scores("reference", references)


def human_scores(
    config: SeraConfig, sides: Sides, past: Past, reviewers: Reviewers, round: int, do: Do
) -> Mapping[str, Ref]:
    """The same of the human pairs.

    With cross-fitting a head's policy for each fold scores the fold's pairs instead of the head. The newest
    head's own scores come along, to measure how much of its margins is memory.
    """
    fitted = fold_policies(config, sides, past, do)

    def logps(scorer: Ref, probe: bool = False, fold: Fold | None = None) -> Ref:
        spec = steps.logps(config, scorer, sides.model, sides.pairs, "train.parquet", probe=probe, fold=fold)
        return do(spec)

    def score(scorer: Ref, probe: bool) -> Ref | Sequence[Ref]:
        own = next((policies for head, policies in fitted if head == scorer), None)
        if own is None:
            return logps(scorer, probe)
        return [logps(policy, probe, fold) for policy, fold in zip(own, config.folds, strict=True)]

    scores = scores_under(reviewers, reviewers.policies, round, score)
    if not fitted:
        return scores
    own = {"head_policy": logps(reviewers.policies[0]), "head_mixture": past.heads[-1]["mixture"]}
    if reviewers.references:
        own["head_reference"] = logps(reviewers.references[0])
    return {**scores, **own}


def fold_policies(config: SeraConfig, sides: Sides, past: Past, do: Do) -> list[tuple[Ref, list[Ref]]]:
    """(head, its policy for each fold), oldest first; empty without cross-fitting.

    A fold policy is trained as its head was, without the fold's prompts. Where the head started from the head
    before it, which was trained on all folds, it starts from that head's policy for the same fold.
    """
    found: list[tuple[Ref, list[Ref]]] = []
    for number, head in enumerate(past.heads if config.folds else ()):
        before = past.before(number)
        start, reference = start_policy(config, sides, before), training_reference(config, sides, before)
        starts = found[-1][1] if found and start == found[-1][0] else [start] * len(config.folds)
        specs = [
            steps.train(
                config,
                past.rounds[number],
                own,
                sides.model,
                head["mixture"],
                own == reference,
                fold,
                head.get("responses"),
            )
            for own, fold in zip(starts, config.folds, strict=True)
        ]
        found.append((head["policy"], [do(spec) for spec in specs]))
    return found


def align(config: SeraConfig, sides: Sides, past: Past, round: int, made: Mapping[str, Ref], do: Do) -> Ref:
    """Train the round's policy on the mixture."""
    start = start_policy(config, sides, past)
    same = start == training_reference(config, sides, past)
    mixture, responses = made["mixture"], made.get("responses")
    return do(steps.train(config, round, start, sides.model, mixture, same, responses=responses))


def gather_evidence(
    config: SeraConfig, sides: Sides, past: Past, round: int, mixture: Ref, policy: Ref, do: Do
) -> Steps:
    """Evaluate the policy: held-out margins and lengths, KL and diversity of samples, with intervals.

    Where rounds are decided by win rate, also a judge's verdicts on its answers beside the start policy's;
    and with capability tasks its scores beside the start policy's.
    """
    previous = past.policies()[0] if past.heads else sides.model

    def logps(scorer: Ref, texts: Ref, file: str) -> Ref:
        return do(steps.logps(config, scorer, sides.model, texts, file, sides.pairs, side="heldout"))

    inputs = {
        "rendered": sides.pairs,
        "features": sides.features,
        "mixture": mixture,
        "policy_heldout": logps(policy, sides.pairs, "heldout.parquet"),
        "policy_train": logps(policy, sides.pairs, "train.parquet"),
        "previous_heldout": logps(previous, sides.pairs, "heldout.parquet"),
        "reference_heldout": logps(sides.model, sides.pairs, "heldout.parquet"),
        "reference_train": logps(sides.model, sides.pairs, "train.parquet"),
    }
    made: Steps = {}
    if sides.harness:
        for role, scored in (("capabilities", policy), ("start_capabilities", sides.model)):
            made[role] = do(steps.capabilities(config, sides.harness, scored, sides.model))
    if config.evaluate.prompts:
        samples = do(steps.sample_heldout(config, policy, sides.model, sides.pairs, round))
        if sides.judge is not None:
            start = do(steps.sample_heldout(config, sides.model, sides.model, sides.pairs, 0))
            made["verdicts"] = do(steps.judge(sides.judge, samples, start, sides.pairs, config.decide.judge))
        inputs["samples"] = samples
        inputs["reference_samples"] = logps(sides.model, samples, "responses.parquet")
        inputs["previous_samples"] = logps(previous, samples, "responses.parquet")
        if config.scores_samples_again:
            inputs["policy_samples"] = logps(policy, samples, "responses.parquet")
    return {"evidence": do(steps.evaluate(config, round, inputs)), **made}


def test_evidence(config: SeraConfig, sides: Sides, policy: Ref, do: Do) -> Ref:
    """Evaluate one policy on the test set; used for no decision."""
    inputs = {
        "rendered": sides.pairs,
        "features": sides.features,
        "policy_test": do(steps.logps(config, policy, sides.model, sides.pairs, "test.parquet")),
        "reference_test": do(steps.logps(config, sides.model, sides.model, sides.pairs, "test.parquet")),
    }
    return do(steps.test(config, inputs))


def decide(
    config: SeraConfig,
    sides: Sides,
    past: Past,
    round: int,
    made: Mapping[str, Ref],
    history: Sequence[Mapping[str, Any]],
    answer: Mapping[str, Any] | None,
    do: Do,
) -> Ref:
    """Decide to promote, hold, roll back or stop, from the evidence of this round and every promoted one."""
    inputs = {role: made[role] for role in ("evidence", "scored", "human")}
    inputs |= {"rendered": sides.pairs, "features": sides.features}
    if sides.harness:
        inputs |= {role: made[role] for role in ("capabilities", "start_capabilities")}
    if sides.judge is not None:
        inputs |= {"verdicts": made["verdicts"], "calibration": sides.calibration}
    if past.heads:
        for number, before in past.promoted.items():
            inputs[f"promoted-{number:03d}"] = before["evidence"]
            if sides.judge is not None:
                inputs[f"verdicts-{number:03d}"] = before["verdicts"]
        inputs |= {f"head_{role}": past.heads[-1][role] for role in ("scored", "human")}
    return do(steps.decide(config, round, history, answer, inputs))


def prompts_to_sample(
    config: SeraConfig, sides: Sides, past: Past, round: int, human: Ref, look: Look
) -> int | str | None:
    """Number of train prompts to sample, None for all; `auto` while a plan cannot tell.

    With `auto` it follows from the human pairs kept and the yield of the last reviewed round in the lineage.
    """
    if config.sampling.prompts != AUTO:
        return config.sampling.prompts
    kept, rendered = look(human), look(sides.pairs)
    measured = pairs_a_prompt(config, past, look)
    if kept is None or rendered is None or measured is None:
        return AUTO
    available = rendered.metric("sampled_from")
    return counts.prompts_to_sample(config, round, counts.kept_pairs(kept), measured, available)


def pairs_a_prompt(config: SeraConfig, past: Past, look: Look) -> float | None:
    """Generated pairs kept per sampled prompt: as measured last, else as expected; None while unknown."""
    reviewed = next((head for head in reversed(past.heads) if "generated" in head), None)
    if reviewed is None:
        return counts.expected_yield(config)
    samples, generated = look(reviewed["samples"]), look(reviewed["generated"])
    return None if samples is None or generated is None else counts.measured_yield(samples, generated)


def reviewers_of(config: SeraConfig, model: Ref, past: Past) -> Reviewers:
    """The head and the past heads in the ensemble, each with its own reference."""
    policies = past.policies() or [model]
    weights = [float(w) for w in ensemble_weights(config.review.ensemble, config.review.gamma, len(policies))]
    policies = policies[: len(weights)]
    if config.score == "simpo":
        return Reviewers(weights, policies, [])
    before = [*past.policies()[1:], model] if past.heads else [model]
    references = [model] * len(policies) if config.review.reference == "initial" else before[: len(policies)]
    return Reviewers(weights, policies, references)


def start_policy(config: SeraConfig, sides: Sides, past: Past) -> Ref:
    """The policy that a round's training starts from: the head, or the start policy of the run."""
    return past.policies()[0] if past.heads and config.train.start == "previous" else sides.model


def training_reference(config: SeraConfig, sides: Sides, past: Past) -> Ref:
    """The reference policy of the loss: the start policy, or the head."""
    return past.policies()[0] if past.heads and config.train.reference == "previous" else sides.model


def generated_reference(reviewers: Reviewers, reference: Ref) -> str:
    """The column that already holds the reference's log-probabilities of generated responses, or `logps`."""
    if reviewers.references and reference == reviewers.references[0]:
        return "ref_logps"
    return "policy_logps" if reference == reviewers.policies[0] else "logps"
