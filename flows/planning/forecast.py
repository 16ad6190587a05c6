"""Forecast the pairs of each round before the work, and warn of a mix that drops most human pairs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flows.planning.estimates import Workload
from flows.round import Look, Past, Steps
from sera_core import counts, steps
from sera_core.artifacts.manifest import StepRecord
from sera_core.config import AUTO, SeraConfig
from sera_core.counts import RoundCounts
from sera_core.method.mixing import drops_most, mixed_counts, needed_generated


@dataclass(frozen=True)
class PlannedRound:
    """A round of a plan: its number, the heads before it, and its steps, done or not."""

    round: int
    past: Past
    made: Steps


def forecast(
    config: SeraConfig, rounds: Sequence[PlannedRound], size: Workload, look: Look
) -> list[RoundCounts]:
    """The counts of every round, as recorded where its steps are done, else as expected.

    Expected numbers assume that the margin floor drops no pair, and the yield of the last reviewed round of
    the lineage (before it, that of the settings).
    """
    return [_counts(config, planned, size, look) for planned in rounds]


def _counts(config: SeraConfig, planned: PlannedRound, size: Workload, look: Look) -> RoundCounts:
    made, number = planned.made, planned.round
    rendered, selected, mixture = (look(made[role]) for role in ("pairs", "human", "mixture"))
    pairs = size.train if rendered is None else rendered.counts.get("train", 0)
    available = size.prompts if rendered is None else rendered.metric("sampled_from")
    rules = steps.human_rules(config, number)
    human = counts.expected_pairs_kept(rules, pairs) if selected is None else counts.kept_pairs(selected)
    share = counts.generated_share(config, number)
    prompts, generated = _generated(config, planned, human, available, look) if share > 0 else (0, 0)
    return RoundCounts(
        number,
        mixture is not None,
        share,
        human,
        prompts,
        available,
        generated,
        *_trained(config, number, share, human, generated, mixture),
    )


def _generated(
    config: SeraConfig, planned: PlannedRound, human: int, available: int, look: Look
) -> tuple[int, int]:
    """Prompts sampled, and generated pairs kept."""
    samples, selected = (look(planned.made[role]) for role in ("samples", "generated"))
    measured = _measured_yield(planned.past, look)
    expected = counts.expected_yield(config) if measured is None else measured
    if samples is None:
        asked = counts.prompts_to_sample(config, planned.round, human, expected, available)
        prompts = available if asked is None else min(asked, available)
    else:
        prompts = counts.sampled_prompts(samples)
    if selected is not None:
        return prompts, counts.kept_pairs(selected)
    if measured is None:
        return prompts, counts.expected_generated(config, prompts)
    return prompts, round(measured * prompts)


def _measured_yield(past: Past, look: Look) -> float | None:
    for head in reversed(past.heads):
        samples, selected = look(head.get("samples")), look(head.get("generated"))
        if samples is not None and selected is not None:
            return counts.measured_yield(samples, selected)
    return None


def _trained(
    config: SeraConfig, number: int, share: float, human: int, generated: int, mixture: StepRecord | None
) -> tuple[int, int]:
    """Human and generated pairs trained on."""
    if mixture is not None:
        return mixture.metric("pairs/human"), mixture.metric("pairs/generated")
    size = None if number == 0 else config.mix.size
    return mixed_counts(human, generated, share, size, config.mix.on_short)


# -------------------------------------------------------------------------------------------------- warnings


def warnings_of(config: SeraConfig, rounds: Sequence[RoundCounts]) -> Iterator[str]:
    """Warnings of rounds to come: most human pairs would be dropped, or all prompts are too few."""
    for expected in rounds:
        if expected.recorded:
            continue
        if (warning := dropped_warning(config, expected)) is not None:
            yield warning
        elif config.sampling.prompts == AUTO and _is_short(config, expected):
            yield (
                f"round {expected.round}: all {expected.prompts} train prompts are expected to give "
                f"{expected.generated_kept} generated pairs, but the share of {expected.share:.2f} needs "
                f"{_needed(config, expected)}: the round trains on fewer pairs"
            )


def dropped_warning(config: SeraConfig, found: RoundCounts) -> str | None:
    """Warn if the mix would drop more than half of the selected human pairs; a share of 1 asks for that."""
    if found.share == 1 or not drops_most(found.human_kept, found.human):
        return None
    dropped = found.human_kept - found.human
    return (
        f"round {found.round}: the mix is expected to drop {dropped} of the {found.human_kept} human pairs "
        f"selected and to train on {found.human} human and {found.generated} generated pairs from "
        f"{found.prompts} of {found.prompts_available} prompts, at a share of {found.share:.2f}. To keep "
        f"more, {', or '.join(_remedies(config, found))}"
    )


def _remedies(config: SeraConfig, found: RoundCounts) -> Iterator[str]:
    """The settings that would keep more human pairs, and how to set them."""
    if _is_short(config, found):
        if found.prompts < found.prompts_available and config.sampling.prompts != AUTO:
            yield f'set sampling.prompts = "auto" or a number above {found.prompts}'
        if config.mix.on_short != "fill":
            yield 'set mix.on_short = "fill"'
    enough = max(found.generated_kept, _needed(config, found))
    asked = found.human_kept if config.mix.size is None else config.mix.size
    human, _ = mixed_counts(found.human_kept, enough, found.share, config.mix.size, config.mix.on_short)
    if drops_most(found.human_kept, human):
        yield f"set mix.size above {asked}"
    yield "lower mix.shares" if config.mix.shares else "lower mix.ramp_start and mix.ramp_end"


def _needed(config: SeraConfig, found: RoundCounts) -> int:
    return needed_generated(found.human_kept, found.share, config.mix.size) or 0


def _is_short(config: SeraConfig, found: RoundCounts) -> bool:
    """Whether there are fewer generated pairs than the share needs."""
    return found.generated_kept < _needed(config, found)
