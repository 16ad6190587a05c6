"""The steps of the loop, one builder each: which configuration and which inputs decide a step's result.

A builder names everything that changes the result, and nothing else, so its key is right by construction: the
work sees no other configuration. Raise a step's version when its work changes what it writes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sera_core.artifacts.manifest import StepRef, StepSpec
from sera_core.config import SelectConfig, SeraConfig
from sera_core.data.folds import Fold
from sera_core.extensions import is_own, sources
from sera_core.method.mixing import SHUFFLED
from sera_core.method.panel import column_of, columns_of
from sera_core.method.selection import BY_VARIANCE, UNORDERED_RULES

Ref = StepRef | None
VERSIONS = {
    "data": 2,
    "model": 2,
    "render": 2,
    "messages": 1,
    "examples": 1,
    "sft": 1,
    "features": 1,
    "logps": 3,
    "review": 2,
    "select": 2,
    "sample": 3,
    "candidates": 1,
    "rate": 1,
    "pair": 2,
    "mix": 2,
    "train": 4,
    "capabilities": 2,
    "calibrate": 1,
    "judge": 1,
    "evaluate": 3,
    "test": 3,
    "decide": 4,
    "report": 7,
}
PARITY_NATS = {"float32": 0.01, "bfloat16": 4.0, "nf4": 4.0}
"""Default bound of the sampler's parity probe: rounding alone stays below it."""
PROBED_ROWS = {"train.parquet": 6, "responses.parquet": 12}
"""Rows of a file that its noise is measured on: twelve responses either way, for a pair has two."""
SIDES = ("train", "heldout", "test", "prompts")
FOLD = "-fold-"
"""Between an input's name and the number of its fold."""
FOLD_TOKENS = "tokens/trained_folds"
"""Metric: tokens that a fold policy trained on; `tokens/trained` counts those of the rounds' policies."""


def _spec(step: str, fields: Mapping[str, Any], inputs: Mapping[str, Ref], **where: Any) -> StepSpec:
    return StepSpec(step=step, version=VERSIONS[step], fields=dict(fields), inputs=dict(inputs), where=where)


def data(config: SeraConfig, digests: Mapping[str, Sequence[str]]) -> StepSpec:
    """Read, check and split the preference pairs. `digests`: content digest of each source, by side."""
    part = config.data.model_dump(mode="json")
    fields: dict[str, Any] = {
        side: [
            {"digest": digest, "split": source["split"], "weight": source["weight"]}
            for source, digest in zip(part[side], digests[side], strict=True)
        ]
        for side in SIDES
    }
    names = ("heldout_fraction", "test_fraction", "train_pairs", "heldout_pairs", "split_seed")
    names += ("on_equal", "on_diverge", "on_overlap", "on_bad_row", "flip_fraction")
    names += ("format", "columns", "completions")
    fields |= {name: part[name] for name in names}
    if columns := columns_of(config.decide.panel):
        fields["values"] = columns
    paths = {side: [source["path"] for source in part[side]] for side in SIDES}
    return _spec("data", fields, {}, sources=paths)


def model(config: SeraConfig, digest: str) -> StepSpec:
    """Bring the start policy into the store as a plain folder. `digest`: content digest of the source."""
    fields = {"source_digest": digest, "chat_template": config.model.chat_template}
    return _spec("model", fields, {}, source=config.model.source, revision=config.model.revision)


def render(config: SeraConfig, data: Ref, model: Ref) -> StepSpec:
    """Pairs to token ids."""
    names = ("max_prompt_tokens", "max_response_tokens", "on_long", "on_equal")
    fields = {name: getattr(config.data, name) for name in names}
    if config.model.template_kwargs:
        fields["template_kwargs"] = config.model.template_kwargs
    return _spec("render", fields, {"data": data, "model": model})


def messages(config: SeraConfig, data: Ref, digest: str) -> StepSpec:
    """Read and check the conversations of `start.sft`, apart from held-out and test prompts.

    `digest`: content digest of the source.
    """
    start, columns = config.start, config.data.columns
    fields = {
        "digest": digest,
        "split": start.sft_split,
        "columns": {ours: theirs for ours, theirs in columns.items() if ours in ("prompt", "system")},
        "on_bad_row": config.data.on_bad_row,
        "on_overlap": config.data.on_overlap,
    }
    return _spec("messages", fields, {"data": data}, source=start.sft)


def examples(config: SeraConfig, model: Ref, pairs: Ref, messages: Ref) -> StepSpec:
    """What `start.sft` trains on, as token ids: conversations, or (None) the chosen answers of the pairs."""
    fields: dict[str, Any] = {"on_bad_row": config.data.on_bad_row}
    if messages is None:
        return _spec("examples", fields, {"model": model, "pairs": pairs})
    fields["max_tokens"] = config.data.max_prompt_tokens + config.data.max_response_tokens
    if config.model.template_kwargs:
        fields["template_kwargs"] = config.model.template_kwargs
    return _spec("examples", fields, {"model": model, "messages": messages})


def sft(config: SeraConfig, model: Ref, examples: Ref) -> StepSpec:
    """Supervised fine-tuning of the model: its result is the start policy."""
    settings, names = config.result_fields()["train"], ["method", "optimizer", "warmup", "max_grad_norm"]
    if config.train.method == "lora":
        names += ["lora_rank", "lora_alpha", "lora_targets", "use_rslora", "use_dora"]
    fields = {
        "train": {name: settings[name] for name in names if name in settings},
        "learning_rate": config.sft_learning_rate,
        "epochs": config.start.sft_epochs,
        "batch": config.start.sft_batch,
        "dtype": config.model.dtype,
        "seed": config.seed,
    }
    return _spec("sft", fields, {"model": model, "examples": examples})


def features(config: SeraConfig, rendered: Ref, data: Ref) -> StepSpec:
    """Measure the panel's features on every pair. Only columns of the user's are read from the data."""
    panel = config.decide.panel
    code = sources("feature", *(name for name in panel if column_of(name) is None))
    columns = {"data": data} if columns_of(panel) else {}
    return _spec("features", {"panel": list(panel), **code}, {"rendered": rendered, **columns})


def logps(
    config: SeraConfig,
    policy: Ref,
    model: Ref,
    texts: Ref,
    file: str,
    rendered: Ref = None,
    side: str = "train",
    probe: bool = False,
    fold: Fold | None = None,
    ld_alpha: float = 1.0,
) -> StepSpec:
    """Log-probabilities of every response in one file of `texts` under one policy.

    As a `probe` only of a few, each computed by itself in float32: what the noise of the others is measured
    against. With a `fold` only of the pairs in it.

    Of pairs, tokens beyond the length of the shorter response can count less (`ld_alpha`, for LD-DPO).

    Samples name their prompts by id only: `rendered` holds the prompts' token ids. `side` says whose prompts
    they answer, for a plan's estimate.
    """
    fields: dict[str, Any] = {"file": file, "dtype": config.model.dtype}
    if probe:
        fields |= {"dtype": "float32", "probe": PROBED_ROWS[file]}
    fields |= _fold_field(fold) | ({} if ld_alpha == 1 else {"ld_alpha": ld_alpha})
    inputs = {"policy": policy, "model": model, "texts": texts}
    return _spec(
        "logps", fields, inputs | ({"rendered": rendered} if file == "responses.parquet" else {}), side=side
    )


def review(
    config: SeraConfig,
    pairs: Ref,
    file: str,
    weights: Sequence[float],
    inputs: Mapping[str, Ref],
) -> StepSpec:
    """Rewards and margins of human pairs from stored log-probabilities.

    Args:
        inputs: `scores` of the kinds policy and reference, and of exact-policy and exact-ref for probes; with
            folds also `head_policy`, `head_reference` (unless the score has none) and `head_mixture`: the
            head's own scores and the pairs that it trained on.
    """
    fields = {**_score_fields(config, weights), "file": file}
    if config.review.length_penalty == "dice":
        fields["rules"] = _rule_fields(config.select)
    return _spec("review", fields, {"pairs": pairs, **inputs})


def select(
    config: SeraConfig, rules: SelectConfig, review: Ref, pairs: Ref, origin: str, round: int
) -> StepSpec:
    """Which pairs stay. Only a rule that draws at random sees the seed."""
    fields: dict[str, Any] = {**_rule_fields(rules), "origin": origin, "round": round}
    if rules.rule == "random" or is_own(rules.rule):
        fields["seed"] = config.seed
    return _spec("select", fields, {"review": review, "pairs": pairs})


def sample(
    config: SeraConfig,
    policy: Ref,
    model: Ref,
    rendered: Ref,
    round: int,
    prompts: int | str | None,
    anchors: Ref = None,
) -> StepSpec:
    """R responses a prompt from the train side.

    `prompts`: how many prompts, None for all; `auto` while a plan cannot tell. `anchors`: the start policy's
    responses to the same prompts, which come along as samples R … 2R − 1, all without log-probabilities.
    """
    part = config.sampling
    fields = _sampling_fields(config, round) | {
        "responses": part.responses,
        "temperature": part.temperature,
        "top_p": part.top_p,
        "max_tokens": part.max_tokens,
        "prompts": prompts,
        "side": "train",
    }
    inputs = {"policy": policy, "model": model, "rendered": rendered}
    return _spec("sample", fields, inputs if anchors is None else inputs | {"anchors": anchors})


def sample_prompt_set(config: SeraConfig, policy: Ref, model: Ref, prompts: Ref) -> StepSpec:
    """One answer to each prompt of a set, by the run's sampling settings, for a judge.

    Every policy answers under the same seeds (those of round 0), so that two can be compared by prompt.
    """
    fields = _sampling_fields(config, 0) | {
        "responses": 1,
        "temperature": config.sampling.temperature,
        "top_p": config.sampling.top_p,
        "max_tokens": config.evaluate.max_tokens,
        "prompts": None,
        "side": "train",
    }
    return _spec("sample", fields, {"policy": policy, "model": model, "rendered": prompts})


def sample_heldout(config: SeraConfig, policy: Ref, model: Ref, rendered: Ref, round: int) -> StepSpec:
    """Answers to held-out prompts, at temperature 1 so that KL estimates are those of the policy itself."""
    part = config.evaluate
    fields = _sampling_fields(config, round) | {
        "responses": part.responses,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": part.max_tokens,
        "prompts": part.prompts,
        "side": "heldout",
    }
    return _spec("sample", fields, {"policy": policy, "model": model, "rendered": rendered})


def candidates(config: SeraConfig, rendered: Ref, model: Ref, rater: Mapping[str, Any]) -> StepSpec:
    """Rated responses from a file, in place of samples. `rater`: the file's digest."""
    fields = {"rater": dict(rater), "max_response_tokens": config.data.max_response_tokens}
    return _spec("candidates", fields, {"rendered": rendered, "model": model}, file=config.candidates)


def rate(config: SeraConfig, samples: Ref, rendered: Ref, rater: Mapping[str, Any]) -> StepSpec:
    """Ratings of the samples by whatever `pairing.by` names. `rater`: what decides its ratings."""
    fields = {"rater": dict(rater), "allow_cut": config.pairing.allow_cut}
    return _spec("rate", fields, {"samples": samples, "rendered": rendered}, rater=config.pairing.by)


def pair(
    config: SeraConfig,
    samples: Ref,
    rendered: Ref,
    weights: Sequence[float],
    inputs: Mapping[str, Ref],
    round: int,
) -> StepSpec:
    """Rewards of the samples, and pairs of each prompt's responses.

    `inputs`: as of `review`, no folds; with `ratings`, those order the responses instead of the rewards.
    """
    fields = {
        **_score_fields(config, weights),
        "rule": config.pairing.rule,
        "allow_cut": config.pairing.allow_cut,
        "responses": config.sampling.responses,
        "round": round,
    }
    if config.pairing.rule == "best-random":
        fields["seed"] = config.seed
    fields |= sources("pairing rule", config.pairing.rule)
    return _spec("pair", fields, {"samples": samples, "rendered": rendered, **inputs})


def mix(
    config: SeraConfig, round: int, share: float, generated_reference: str, inputs: Mapping[str, Ref]
) -> StepSpec:
    """The pairs trained on, in order, and the round's whole ledger."""
    sides = {"human": human_rules(config, round), "generated": config.select_generated}
    fields = {
        "round": round,
        "seed": config.seed,
        "share": share,
        "generated_reference": generated_reference,
        "size": None if round == 0 else config.mix.size,
        "on_short": config.mix.on_short,
        "by_rank": [origin for origin, rules in sides.items() if rules.rule not in UNORDERED_RULES],
        **({} if round == 0 or config.mix.order == SHUFFLED else {"order": config.mix.order}),
    }
    return _spec("mix", fields, inputs)


def human_rules(config: SeraConfig, round: int) -> SelectConfig:
    """How human pairs are selected: round 0 has nothing to select by and keeps them all."""
    return SelectConfig(rule="none") if round == 0 else config.select


def train(
    config: SeraConfig,
    round: int,
    start: Ref,
    model: Ref,
    mixture: Ref,
    start_is_reference: bool,
    fold: Fold | None = None,
    responses: Ref = None,
) -> StepSpec:
    """One round of direct alignment.

    With a `fold` the same without its prompts, for its part of the round's training tokens. `responses`: the
    responses that generated pairs were made of, None in a round without; read only where the heads' rewards
    of them smooth the labels.
    """
    excluded = {"learning_rate", "start", "reference", "tokens"}
    settings = config.result_fields()["train"]  # without later ones at their default: no new keys
    budget, inputs = config.token_budget(round), {"start": start, "model": model, "mixture": mixture}
    by_consistency = config.train.smooths_by_consistency and responses is not None
    fields = {
        "train": {name: value for name, value in settings.items() if name not in excluded},
        "learning_rate": config.learning_rate,
        "dtype": config.model.dtype,
        "seed": config.seed,
        "round": round,
        "start_is_reference": start_is_reference,
        **({} if budget is None else {"token_budget": budget}),
        **_fold_field(fold),
        **sources("loss", *config.train.losses),
        **({"score": config.score} if by_consistency else {}),
    }
    return _spec("train", fields, inputs | ({"responses": responses} if by_consistency else {}))


def evaluate(config: SeraConfig, round: int, inputs: Mapping[str, Ref]) -> StepSpec:
    """Evidence about one round's policy on the held-out side."""
    return _spec("evaluate", {"round": round, **_evidence_fields(config)}, inputs)


def test(config: SeraConfig, inputs: Mapping[str, Ref]) -> StepSpec:
    """Evidence about a policy on the test side."""
    return _spec("test", _evidence_fields(config), inputs)


def decide(
    config: SeraConfig,
    round: int,
    history: Sequence[Mapping[str, Any]],
    answer: Mapping[str, Any] | None,
    inputs: Mapping[str, Ref],
) -> StepSpec:
    """Promote, hold, roll back or stop, with the evidence and the reason."""
    names = ("metric", "feature", "min_effect", "min_overlap", "max_ks", "min_pairs", "on_alarm", "review")
    fields = {
        **{name: getattr(config.decide, name) for name in names},
        "round": round,
        "patience": config.limits.patience,
        "history": [dict(entry) for entry in history],
        "answer": None if answer is None else {name: answer[name] for name in ("decision", "note", "who")},
        "seed": config.seed,
        "split_seed": config.data.split_seed,
        "resamples": config.evaluate.resamples,
        "panel": list(config.decide.panel),
    }
    return _spec("decide", fields, inputs)


def capabilities(config: SeraConfig, tasks: Sequence[Mapping[str, str]], policy: Ref, model: Ref) -> StepSpec:
    """Scores of a policy on capability tasks. `tasks`: their names and digests."""
    part = config.evaluate
    fields = {
        "tasks": [dict(task) for task in tasks],
        "items": part.harness_items,
        "dtype": config.model.dtype,
    }
    return _spec("capabilities", fields, {"policy": policy, "model": model}, tasks=list(part.harness))


def calibrate(config: SeraConfig, judge: Mapping[str, Any], rendered: Ref) -> StepSpec:
    """A judge's agreement with the labels of the held-out pairs. `judge`: what decides its answers."""
    return _spec("calibrate", {"judge": dict(judge)}, {"rendered": rendered}, judge=config.decide.judge)


def judge(
    judge: Mapping[str, Any],
    samples: Ref,
    against: Ref,
    rendered: Ref,
    name: str | None,
    limit: int | None = None,
) -> StepSpec:
    """A judge's verdicts on two policies' answers to the same prompts.

    Args:
        judge: what decides its answers.
        samples, against: both policies' answers.
        rendered: the prompts.
        name: the judge's name, to find it by.
        limit: number of prompts; None: all.
    """
    inputs = {"samples": samples, "against": against, "rendered": rendered}
    return _spec("judge", {"judge": dict(judge), "limit": limit}, inputs, judge=name)


def report(round: int, inputs: Mapping[str, Ref]) -> StepSpec:
    """The round's page."""
    return _spec("report", {"round": round}, inputs)


def _score_fields(config: SeraConfig, weights: Sequence[float]) -> dict[str, Any]:
    return {
        "score": config.score,
        "beta": config.train.beta,
        "weights": list(weights),
        "length_penalty": config.review.length_penalty,
    }


def _evidence_fields(config: SeraConfig) -> dict[str, Any]:
    return {
        "seed": config.seed,
        "score": config.score,
        "beta": config.train.beta,
        "resamples": config.evaluate.resamples,
        "panel": list(config.decide.panel),
    }


def _sampling_fields(config: SeraConfig, round: int) -> dict[str, Any]:
    part = config.sampling
    return {
        "engine": part.engine,
        "dtype": part.dtype or config.model.dtype,
        "scored_again": config.scores_samples_again,
        "model_dtype": config.model.dtype,
        "max_parity_nats": part.max_parity_nats or PARITY_NATS[config.model.dtype],
        "seed": config.seed,
        "round": round,
        **sources("sampling engine", part.engine),
    }


def _rule_fields(rules: SelectConfig) -> dict[str, Any]:
    """Only the settings the rule reads, so that a setting it ignores changes no key."""
    sized_by = {"top-k": ("k",), "threshold": ("threshold",), "relabel": (), "none": ()}
    names = sized_by.get(rules.rule, ("fraction",))
    if rules.rule not in ("relabel", "none"):
        names += ("min_margin",) if rules.rule in ("middle", BY_VARIANCE) else ("min_margin", "direction")
    fields = {"rule": rules.rule, **{name: getattr(rules, name) for name in names}}
    return fields | sources("selection rule", rules.rule)


def scores(kind: str, found: Sequence[Ref | Sequence[Ref]]) -> dict[str, Ref]:
    """Inputs `<kind>-000`, … of a step, newest first; `<kind>-000-fold-000`, … where there is one a fold."""
    named: dict[str, Ref] = {}
    for number, ref in enumerate(found):
        name = f"{kind}-{number:03d}"
        if isinstance(ref, Sequence):
            named |= {f"{name}{FOLD}{fold:03d}": one for fold, one in enumerate(ref)}
        else:
            named[name] = ref
    return named


def _fold_field(fold: Fold | None) -> dict[str, Any]:
    return {} if fold is None else {"fold": asdict(fold)}
