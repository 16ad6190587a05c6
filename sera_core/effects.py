"""Refuse settings that would have no effect in combination with the other settings.

The user expects a setting to do something, so an ineffective one is an error. Only values other than the
default are checked. Limits are not considered, because they can be raised later.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sera_core.extensions import is_own
from sera_core.judges.names import IMPLICIT

if TYPE_CHECKING:
    from sera_core.config import SelectConfig, SeraConfig


@dataclass(frozen=True)
class Row:
    """A field (dotted), the condition under which it has an effect, and that condition in words."""

    field: str
    when: "Callable[[SeraConfig], bool]"
    words: str


def _generates(config: "SeraConfig") -> bool:
    """Whether any round uses generated pairs."""
    mix = config.mix
    return any(share > 0 for share in mix.shares or (mix.ramp_start, mix.ramp_end))


def _samples_train(config: "SeraConfig") -> bool:
    """Whether train prompts are sampled: not where candidates come from a file."""
    return _generates(config) and config.candidates is None


def samples(config: "SeraConfig") -> bool:
    """Whether anything is sampled: train prompts, or answers to held-out prompts."""
    return _samples_train(config) or config.evaluate.prompts > 0


def _smooths(config: "SeraConfig") -> bool:
    """Whether there are two heads' rewards of responses that they order, for smoothing by consistency."""
    if not config.train.smooths_by_consistency:
        return True
    ordered_by_heads = config.pairing.by == IMPLICIT and _generates(config)
    return "sigmoid" in config.train.losses and ordered_by_heads and config.review.gamma > 0


def _selects_by_margin(config: "SeraConfig") -> bool:
    """Whether the selection of human pairs reads their margins; `random` only with a floor."""
    part = config.select
    return part.rule != "none" and not (part.rule == "random" and part.min_margin == -math.inf)


def _draws(config: "SeraConfig") -> bool:
    """Whether a split, held-out halves, a subset, a completion or flipped labels are drawn at random."""
    data = config.data
    splits = bool(data.heldout) or data.heldout_fraction > 0 or (not data.test and data.test_fraction > 0)
    limits = data.train_pairs is not None or data.heldout_pairs is not None or data.flip_fraction > 0
    return (
        splits
        or limits
        or data.completions == "random"
        or any(s.weight < 1 for side in (data.train, data.heldout, data.test, data.prompts) for s in side)
    )


GENERATED = "only if generated pairs are mixed in (a share above 0 in `mix`)"
SAMPLED = "only if something is sampled (a share above 0 in `mix`, or evaluate.prompts above 0)"


SUMMED = {"sigmoid", "hinge", "robust", "sppo_hard"}
"""Losses that compare sums over tokens; the others divide by the number of tokens."""
OWN_READS = ("fraction", "min_margin", "direction")
"""Settings that have an effect with a selection rule of the user's own."""


def _selecting(section: str, name: str, rules: tuple[str, ...]) -> Row:
    def when(config: "SeraConfig") -> bool:
        part: SelectConfig = getattr(config, section)
        reads = part.rule in rules or (is_own(part.rule) and name in OWN_READS)
        return reads and (section == "select" or _generates(config))

    more = " and generated pairs are mixed in" if section == "select_generated" else ""
    return Row(f"{section}.{name}", when, f"only if {section}.rule is {' or '.join(rules)}{more}")


def _selection_rows(section: str) -> list[Row]:
    preferring = ("top-fraction", "top-k", "threshold")
    return [
        _selecting(section, "fraction", ("top-fraction", "middle", "prompt-variance", "random", "bottom")),
        _selecting(section, "k", ("top-k",)),
        _selecting(section, "threshold", ("threshold",)),
        _selecting(section, "min_margin", (*preferring, "middle", "prompt-variance", "random", "bottom")),
        _selecting(section, "direction", (*preferring, "bottom")),
    ]


EFFECTS: tuple[Row, ...] = (
    Row(
        "data.heldout_fraction",
        lambda c: not (c.data.heldout and c.data.heldout_fraction),
        "only if data.heldout is not given",
    ),
    Row("data.test_fraction", lambda c: not c.data.test, "only if data.test is not given"),
    Row("data.prompts", _generates, GENERATED),
    Row(
        "data.completions",
        lambda c: c.data.format in ("auto", "ultrafeedback"),
        'only where data.format is "auto" or "ultrafeedback"',
    ),
    Row(
        "data.split_seed",
        _draws,
        "only if a split, held-out halves, a subset, a completion or flipped labels are drawn",
    ),
    *(
        Row(f"start.{name}", lambda c: c.start.tunes, 'only with start.sft: "chosen", or conversations')
        for name in ("sft_learning_rate", "sft_epochs", "sft_batch")
    ),
    Row(
        "start.sft_split",
        lambda c: c.start.sft.startswith("hub:"),
        "only for a hub data set (hub:<id>); files have no splits",
    ),
    Row(
        "data.on_overlap",
        lambda c: bool(c.data.heldout or c.data.test or c.data.prompts or c.start.file),
        "only if data.heldout, data.test, data.prompts or a file of conversations (start.sft) is given",
    ),
    Row(
        "review.reference",
        lambda c: c.score != "simpo",
        "except with the score simpo, which has no reference",
    ),
    Row("review.ensemble", lambda c: c.review.gamma > 0, "only if review.gamma is above 0"),
    Row("review.crossfit", _selects_by_margin, "only if select.rule reads the margins of human pairs"),
    *_selection_rows("select"),
    Row("select_generated.rule", _generates, GENERATED),
    *_selection_rows("select_generated"),
    *(
        Row(f"sampling.{name}", _samples_train, f"{GENERATED}, and not from a file (`pairing.by`)")
        for name in ("responses", "temperature", "top_p", "max_tokens", "prompts")
    ),
    Row("sampling.engine", samples, SAMPLED),
    Row("sampling.dtype", samples, SAMPLED),
    Row(
        "sampling.max_parity_nats",
        lambda c: samples(c) and c.sampling.dtype in (None, c.model.dtype),
        f"{SAMPLED}, in the model's own dtype (sampling.dtype = model.dtype)",
    ),
    Row(
        "pairing.rule",
        lambda c: _generates(c) and (_samples_train(c) or not c.anchored),
        f"{GENERATED}; best-anchored rejects samples of the start policy, so not with a file (`pairing.by`)",
    ),
    Row("pairing.by", _generates, GENERATED),
    Row("pairing.allow_cut", _samples_train, f"{GENERATED}, and not from a file (`pairing.by`)"),
    Row(
        "mix.ramp_start",
        lambda c: not c.mix.shares and c.mix.ramp_rounds > 1,
        "only if mix.shares is empty and the ramp takes more than one round",
    ),
    Row("mix.ramp_end", lambda c: not c.mix.shares, "only if mix.shares is empty"),
    Row("mix.ramp_rounds", lambda c: not c.mix.shares, "only if mix.shares is empty"),
    Row("mix.on_short", _generates, GENERATED),
    Row(
        "train.label_smoothing",
        lambda c: bool({"sigmoid", "robust"} & set(c.train.losses)) and _smooths(c),
        "only with the losses sigmoid (conservative DPO) and robust; consistency only with sigmoid, if "
        "review.gamma is above 0 and generated pairs are mixed in whose order the implicit reward decides",
    ),
    Row(
        "train.ld_alpha",
        lambda c: all(name in SUMMED or is_own(name) for name in c.train.ranking_losses),
        "only where every loss compares sums over tokens (sigmoid, hinge, robust, sppo_hard, beside sft)",
    ),
    Row(
        "train.epochs",
        lambda c: not c.train.tokens or 0 in c.train.tokens,
        "only in a round without a number of tokens (train.tokens is empty, or 0 for that round)",
    ),
    Row("train.target_margin", lambda c: "simpo" in c.train.losses, 'only with the loss "simpo"'),
    *(
        Row(f"train.{name}", lambda c: c.train.method == "lora", 'only with train.method = "lora"')
        for name in ("lora_rank", "lora_alpha", "lora_targets", "use_rslora", "use_dora")
    ),
    Row(
        "train.reference",
        lambda c: c.train.needs_reference,
        "except with the loss simpo (alone, or with sft), which has no reference",
    ),
    Row("evaluate.responses", lambda c: c.evaluate.prompts > 0, "only if evaluate.prompts is above 0"),
    Row("evaluate.max_tokens", lambda c: c.evaluate.prompts > 0, "only if evaluate.prompts is above 0"),
    Row("evaluate.harness_items", lambda c: bool(c.evaluate.harness), "only with evaluate.harness"),
    Row(
        "decide.feature",
        lambda c: c.decide.uses_feature,
        'only if decide.metric is "balanced" or "worst-side"',
    ),
    Row("decide.judge", lambda c: c.decide.metric == "win-rate", 'only with decide.metric = "win-rate"'),
    Row(
        "decide.uncalibrated", lambda c: c.decide.metric == "win-rate", 'only with decide.metric = "win-rate"'
    ),
    Row("decide.review_hours", lambda c: c.decide.review != "never", "only if decide.review asks a person"),
    Row(
        "decide.review_default",
        lambda c: c.decide.review != "never",
        "only if decide.review asks a person",
    ),
    Row(
        "execution.shard_weights",
        lambda c: c.execution.processes != 1,
        "only with several execution.processes",
    ),
    Row(
        "execution.sampling_batch",
        lambda c: c.sampling.engine in ("auto", "transformers") and samples(c),
        f'with sampling.engine = "transformers", and {SAMPLED}',
    ),
    Row(
        "execution.replicas",
        lambda c: c.execution.distribute != "none",
        'only with execution.distribute = "processes" or "ray"',
    ),
    Row(
        "execution.gpus_per_replica",
        lambda c: c.execution.distribute == "ray" and c.execution.device != "cpu",
        'only with execution.distribute = "ray", and not with execution.device = "cpu"',
    ),
    Row(
        "execution.address",
        lambda c: c.execution.distribute == "ray",
        'only with execution.distribute = "ray"',
    ),
)
"""Fields that can be ineffective. A field without a row always has an effect."""


def ineffective_settings(config: "SeraConfig") -> list[tuple[str, Any, str]]:
    """(field, value, when it has an effect) of every changed setting that has no effect."""
    found = []
    for row in EFFECTS:
        section, name = row.field.split(".")
        part = getattr(config, section)
        value = getattr(part, name)
        if value != type(part).model_fields[name].default and not row.when(config):
            found.append((row.field, value, row.words))
    for side in ("train", "heldout", "test", "prompts"):
        for number, source in enumerate(getattr(config.data, side)):
            if source.split != "train" and not source.path.startswith("hub:"):
                words = "only for a hub data set (hub:<id>); files have no splits"
                found.append((f"data.{side}.{number}.split", source.split, words))
    return found


def refuse_ineffective(config: "SeraConfig") -> None:
    """Refuse settings without effect.

    Raises:
        ValueError: lists each of them, and when it would have an effect.
    """
    lines = [
        f"{field} = {_said(value)} has no effect here: it has one {words}. Remove it, or change that"
        for field, value, words in ineffective_settings(config)
    ]
    if lines:
        raise ValueError("\n".join(lines))


def _said(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
