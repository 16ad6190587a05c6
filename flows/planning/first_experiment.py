"""A first experiment for a model and a preference file: the settings that should differ from the defaults."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sera_core.config import DecideConfig, TrainConfig
from sera_core.errors import InputError
from sera_core.models.memory_estimate import ModelShape, training_memory

ROOM = 0.7
"""Share of the memory that the estimate of training may take."""
LEAST_BATCHES = 8
"""Optimizer steps of a round below which smaller batches are proposed."""
SMALL_BATCH = 8
LARGEST_HELDOUT = 0.35


@dataclass(frozen=True)
class Seen:
    """What was found out about model, data and machine.

    Attributes:
        model: its source, as the experiment names it.
        shape: the model's; None if its files are not on this machine.
        positions: tokens that the model can read at once; None if it does not say.
        has_template: whether the model has a chat template.
        data: the preference file, as the experiment names it.
        formats: in words.
        pairs, prompts: usable pairs, and their different prompts.
        unusable: rows that cannot be used, by kind.
        prompt_tokens, answer_tokens: lengths of prompts, and of chosen and rejected answers.
        device: `cpu` or `cuda`.
        memory: bytes that the device has.
        four_bits: whether the package for four-bit weights is installed.
    """

    model: str
    shape: ModelShape | None
    positions: int | None
    has_template: bool
    data: str
    formats: str
    pairs: int
    prompts: int
    unusable: Mapping[str, int]
    prompt_tokens: Sequence[int]
    answer_tokens: Sequence[int]
    device: str
    memory: int
    four_bits: bool


@dataclass(frozen=True)
class Setting:
    """One line of the experiment, and why it is there."""

    section: str
    name: str
    value: Any
    why: str


@dataclass(frozen=True)
class Way:
    """How to train: `train.method`, `model.dtype`, `execution.gradient_checkpointing`."""

    method: str
    dtype: str
    recompute: bool


def proposed(seen: Seen) -> list[Setting]:
    """The settings of a first experiment, in the order of the file.

    Raises:
        InputError: no way of training fits into the memory.
    """
    return [
        *_model(seen),
        *_data(seen),
        *_sampling(seen),
        *_training(seen),
    ]


def as_toml(settings: Sequence[Setting]) -> str:
    """The settings as a commented TOML file."""
    lines = [
        "# Written by `sera init`. All other settings have their defaults: deployments/experiments/README.md"
    ]
    for section in dict.fromkeys(setting.section for setting in settings):
        lines += ["", f"[{section}]"]
        for setting in settings:
            if setting.section == section:
                lines += [
                    f"# {setting.why}",
                    f"{setting.name} = {json.dumps(setting.value, ensure_ascii=False)}",
                ]
    return "\n".join(lines) + "\n"


def _model(seen: Seen) -> Iterator[Setting]:
    size = "" if seen.shape is None else f"{seen.shape.parameters / 1e9:.3g} billion parameters; "
    yield Setting("model", "source", seen.model, f"{size}the start policy, and the reference")
    if not seen.has_template:
        why = "the model has no chat template of its own, as base models; answers are trained in this one"
        yield Setting("model", "chat_template", "chatml", why)
    if (way := _way_to_train(seen)) is not None and way.dtype != "float32":
        yield Setting("model", "dtype", way.dtype, "so that training fits into the memory; less exact scores")


def _data(seen: Seen) -> Iterator[Setting]:
    least = DecideConfig().min_pairs
    yield Setting(
        "data", "train", seen.data, f"{seen.formats}: {seen.pairs:,} pairs of {seen.prompts:,} prompts"
    )
    if seen.unusable:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(seen.unusable.items()))
        yield Setting("data", "on_bad_row", "drop", f"leaves out rows that cannot be used: {kinds}")
    if 0.1 * seen.prompts < least:
        fraction = min(LARGEST_HELDOUT, math.ceil(100 * least / seen.prompts) / 100)
        why = f"so that decisions rest on {least} held-out prompts or more (default: 0.1)"
        if fraction * seen.prompts < least:
            why = f"of so few prompts; a verdict needs {least} held-out pairs"
        yield Setting("data", "heldout_fraction", fraction, why)
    for name, lengths in (
        ("max_prompt_tokens", seen.prompt_tokens),
        ("max_response_tokens", seen.answer_tokens),
    ):
        if (room := _room(seen)) is not None:
            over = sum(length > room for length in lengths) / len(lengths)
            yield Setting(
                "data", name, room, f"half of the model's positions; {over:.1%} are longer and dropped"
            )


def _room(seen: Seen) -> int | None:
    """Tokens for a prompt, and for an answer, in a model with too few positions for the defaults."""
    return seen.positions // 2 if seen.positions is not None and seen.positions < 2 * 1024 else None


def _sampling(seen: Seen) -> Iterator[Setting]:
    long = sorted(seen.answer_tokens)[int(0.95 * (len(seen.answer_tokens) - 1))]
    tokens = min(32 * math.ceil(long / 32), _room(seen) or 1024)
    if tokens < 1024:
        yield Setting("sampling", "max_tokens", tokens, "19 of 20 answers in the file are not longer")
    yield Setting(
        "sampling", "prompts", "auto", "samples as many prompts as a round's share of generated pairs needs"
    )


def _training(seen: Seen) -> Iterator[Setting]:
    way = _way_to_train(seen)
    if way is not None and way.method != "full":
        full = _needs(seen, Way("full", "float32", False)) / 2**30
        why = (
            f"training all weights would need about {full:,.0f} GiB, and there are {seen.memory / 2**30:,.0f}"
        )
        yield Setting("train", "method", way.method, why)
    if 0.9 * seen.pairs / 32 < LEAST_BATCHES:
        yield Setting("train", "batch", SMALL_BATCH, f"{seen.pairs:,} pairs make few steps of 32")
    if way is not None and way.recompute:
        why = "so that training fits into the memory; activations are computed twice"
        yield Setting("execution", "gradient_checkpointing", True, why)


def _way_to_train(seen: Seen) -> Way | None:
    """The most exact way that fits; None if the model's shape is not known."""
    if seen.shape is None:
        return None
    kinds = [("full", "float32"), ("lora", "float32"), ("lora", "bfloat16")]
    kinds += [("lora", "nf4")] if seen.four_bits else []
    ways = [Way(*kind, recompute) for kind in kinds for recompute in (False, True)]
    for way in ways:
        if _needs(seen, way) <= ROOM * seen.memory:
            return way
    least = _needs(seen, ways[-1]) / 2**30
    raise InputError(
        f"a model of {seen.shape.parameters / 1e9:.3g} billion parameters cannot be trained here: an adapter "
        f"needs about {least:,.1f} GiB, and there are {seen.memory / 2**30:,.1f} GiB; use a smaller model or "
        "a larger machine"
        + ("" if seen.four_bits else ", or pip install 'sera-flow[qlora]' for four-bit weights")
    )


def _needs(seen: Seen, way: Way) -> int:
    """Bytes to train with one pair at a time, the longest."""
    assert seen.shape is not None
    train = TrainConfig.model_validate({"method": way.method})
    room = _room(seen) or 1024
    prompt, answer = (min(max(tokens), room) for tokens in (seen.prompt_tokens, seen.answer_tokens))
    tokens, row = 2 * (prompt + answer), prompt + 2 * answer
    return training_memory(seen.shape, way.dtype, train, tokens, row, way.recompute, seen.device)
