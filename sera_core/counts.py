"""How many pairs of each kind a round has, as records say or as the settings let expect."""

from dataclasses import dataclass

from sera_core.artifacts.manifest import StepRecord
from sera_core.config import AUTO, SelectConfig, SeraConfig
from sera_core.errors import StoreError
from sera_core.method.mixing import needed_generated, prompts_needed, share_for_round
from sera_core.method.pairing import expected_pairs
from sera_core.method.selection import SIZED_BY_FRACTION, expected_kept


@dataclass(frozen=True)
class RoundCounts:
    """Pairs and prompts of one round."""

    round: int
    recorded: bool
    """Whether the mix is done; otherwise the numbers are expected."""
    share: float
    """Target share of generated pairs."""
    human_kept: int
    """Human pairs that the selection keeps."""
    prompts: int
    """Train prompts sampled."""
    prompts_available: int
    generated_kept: int
    """Generated pairs that the selection keeps."""
    human: int
    """Human pairs trained on."""
    generated: int
    """Generated pairs trained on."""


def generated_share(config: SeraConfig, round: int) -> float:
    """Target share of generated pairs in a round: from the list, or from the ramp if the list is empty."""
    part = config.mix
    if part.shares:
        return share_for_round(round, part.shares, None)
    return share_for_round(round, None, (part.ramp_start, part.ramp_end, part.ramp_rounds))


def kept_pairs(selected: StepRecord) -> int:
    """Pairs that a `select` step kept."""
    return selected.counts.get("kept", 0) + selected.counts.get("relabelled", 0)


def expected_pairs_kept(rules: SelectConfig, pairs: int) -> int:
    """Pairs that a selection keeps of so many, if the margin floor drops none."""
    return expected_kept(rules.rule, pairs, rules.fraction, rules.k)


def expected_yield(config: SeraConfig) -> float:
    """Generated pairs kept per sampled prompt before any round has measured it.

    Every prompt gives its pairs, and a rule sized by a fraction keeps that fraction of them; the others are
    taken to keep all.
    """
    rules = config.select_generated
    kept = rules.fraction if rules.rule in SIZED_BY_FRACTION else 1.0
    return kept * expected_pairs(config.pairing.rule, config.sampling.responses)


def expected_generated(config: SeraConfig, prompts: int) -> int:
    """Generated pairs kept of so many sampled prompts, before any round has measured the yield."""
    pairs = prompts * expected_pairs(config.pairing.rule, config.sampling.responses)
    return expected_pairs_kept(config.select_generated, pairs)


def measured_yield(samples: StepRecord, generated: StepRecord) -> float:
    """Generated pairs kept per sampled prompt in a finished round, from its `sample` and `select` steps."""
    return kept_pairs(generated) / max(1, sampled_prompts(samples))


def sampled_prompts(samples: StepRecord) -> int:
    """Prompts that a `sample` step sampled.

    Raises:
        StoreError: its record lacks the count.
    """
    if "prompts" not in samples.counts:
        raise StoreError(
            f"steps/{samples.step}/{samples.key}/done.json: has no count of prompts; restore it from a copy "
            "of the store"
        )
    return samples.counts["prompts"]


def prompts_to_sample(
    config: SeraConfig, round: int, human: int, pairs_a_prompt: float, available: int
) -> int | None:
    """Train prompts to sample in a round, None for all: as set, or with `auto` as many as the share needs.

    Args:
        config: the run's configuration.
        round: the round.
        human: human pairs that its selection kept.
        pairs_a_prompt: yield: generated pairs kept per sampled prompt.
        available: prompts there are to sample.
    """
    if config.sampling.prompts != AUTO:
        return config.sampling.prompts
    generated = needed_generated(human, generated_share(config, round), config.mix.size)
    prompts = prompts_needed(generated, pairs_a_prompt, available)
    return None if prompts == available else prompts
