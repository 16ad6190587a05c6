"""Run several arms of one experiment, each as an ordinary run, with the first arm's training tokens.

The arms are configurations of the one loop (`sera_core.arms`). For each seed the first arm runs as it is
configured. Every other arm then does as many rounds and trains in each for as many tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flows.experiments import merged, parse_config, without_idle
from flows.running.rounds import PAUSED
from sera_core.arms import ARMS, SERA, refuse_unknown_arms
from sera_core.artifacts.canonical import sha256_json
from sera_core.artifacts.run_records import RoundManifest, check_name
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.config import SeraConfig
from sera_core.errors import InputError, SeraError
from sera_core.judges.names import IMPLICIT

Finish = Callable[[SeraConfig, str], bool]
"""Does all rounds of a run by its name; whether there was anything to do."""
FinishAll = Callable[[Sequence[tuple[SeraConfig, str]]], None]
"""Does several runs."""
Runs = dict[str, dict[int, RunStore]]
"""Finished runs: arm -> seed -> run."""


def check_comparison(config: SeraConfig, arms: Sequence[str], seeds: Sequence[int], name: str) -> None:
    """Refuse what cannot be compared, before any work.

    Raises:
        InputError: an unknown or repeated arm or seed, arms that are the same under this experiment, or an
            experiment whose runs may end before all rounds are done.
    """
    refuse_unknown_arms(arms)
    if not seeds or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {','.join(map(str, seeds))}: give at least one seed, each once")
    for arm in arms:
        if ARMS[arm].needs_rater and config.pairing.by == IMPLICIT:
            raise InputError(
                f"the arm {arm} is about a rater, but the experiment has none; set pairing.by (a reward "
                "model, a chat model or a function of your own)"
            )
        if config.limits.rounds <= (first := ARMS[arm].first_round):
            raise InputError(
                f"limits.rounds = {config.limits.rounds}: the arm {arm} differs from round {first} on; set "
                f"limits.rounds to {first + 1} or more"
            )
    if config.limits.tokens is not None or config.limits.hours is not None:
        raise InputError(
            "limits.tokens and limits.hours end arms at different points; leave them out, and set "
            "train.tokens to limit the first arm's training"
        )
    if config.decide.review != "never":
        raise InputError(
            f'decide.review = "{config.decide.review}": a comparison cannot wait for a review; '
            'set it to "never"'
        )
    _refuse_equal(config, arms)
    for arm in arms:
        for seed in seeds:
            check_name(run_of(name, arm, seed))


def _refuse_equal(config: SeraConfig, arms: Sequence[str]) -> None:
    known: dict[str, str] = {}
    for arm in dict.fromkeys((SERA, *arms)):
        fields = arm_config(config, arm, config.seed).result_fields()
        other = known.setdefault(sha256_json([fields, ARMS[arm].one_round]), arm)
        if other != arm:
            raise InputError(
                f"--arms: {arm} has the same settings as {other} under this experiment, so there is nothing "
                "to compare; name only one of the two"
            )


def run_of(name: str, arm: str, seed: int) -> str:
    """Name of the run of one arm and seed."""
    return f"{name}-{arm}-{seed}"


def in_order(finish: Finish) -> FinishAll:
    """Does one run after another."""

    def finish_all(runs: Sequence[tuple[SeraConfig, str]]) -> None:
        for config, run in runs:
            finish(config, run)

    return finish_all


def run_arms(
    config: SeraConfig,
    arms: Sequence[str],
    seeds: Sequence[int],
    name: str,
    store: str,
    finish_all: FinishAll,
) -> Runs:
    """Run every arm with every seed: the first arm, which the budgets of the others follow, with all seeds.

    Args:
        config: the experiment.
        arms: names of `ARMS`; the first sets rounds and training tokens.
        seeds: take the place of the experiment's seed.
        name: beginning of the runs' names.
        store: folder or URL of the store.
        finish_all: does runs.

    Raises:
        InputError: as `check_comparison`.
        SeraError: the first arm trained in fewer than two rounds.
    """
    check_comparison(config, arms, seeds, name)
    opened, first = open_store(store), arms[0]
    runs = {arm: {seed: RunStore(opened, run_of(name, arm, seed)) for seed in seeds} for arm in arms}
    finish_all([(arm_config(config, first, seed), runs[first][seed].run) for seed in seeds])
    tokens = {seed: _tokens_by_round(runs[first][seed]) for seed in seeds}

    def budgeted(arm: str, seed: int) -> SeraConfig:
        return with_budget(arm_config(config, arm, seed), arm, tokens[seed])

    finish_all([(budgeted(arm, seed), runs[arm][seed].run) for seed in seeds for arm in arms[1:]])
    return runs


def arm_config(config: SeraConfig, arm: str, seed: int) -> SeraConfig:
    """The experiment as an arm runs it when it is the first, without settings that have no effect in it."""
    return _changed(config, {**ARMS[arm].settings, "seed": seed}, arm)


def with_budget(config: SeraConfig, arm: str, tokens: Sequence[int]) -> SeraConfig:
    """The same for any other arm: as many rounds and training tokens as the first arm had.

    Round 0 keeps its own setting. It trains on the same pairs in every arm, so all share one training step.
    `decide.max_ks = 0` lets no run converge while its margins move at all.

    Args:
        tokens: training tokens of the first arm, by round.
    """
    if ARMS[arm].one_round:
        return _changed(config, {"train": {"tokens": [sum(tokens)]}, "limits": {"rounds": 1}}, arm)
    by_round = [config.token_budget(0) or 0, *tokens[1:]]
    changes = {"train": {"tokens": by_round}, "limits": {"rounds": len(tokens)}, "decide": {"max_ks": 0.0}}
    return _changed(config, changes, arm)


def _changed(config: SeraConfig, changes: Mapping[str, Any], arm: str) -> SeraConfig:
    return parse_config(without_idle(merged(config.model_dump(), changes), {}), f"arm {arm}")


def trained_rounds(records: RunStore) -> list[RoundManifest]:
    """The rounds that trained a policy."""
    return [manifest for manifest in records.rounds() if "policy" in manifest.steps]


def tokens_of(rounds: Sequence[RoundManifest], kind: str = "trained") -> list[int]:
    """Tokens of each round: `trained`, `sampled` or `scored`."""
    return [int(manifest.metrics.get(f"tokens/{kind}", 0)) for manifest in rounds]


def _tokens_by_round(records: RunStore) -> list[int]:
    rounds, state = trained_rounds(records), records.state()
    if state in PAUSED or len(rounds) < 2:
        raise SeraError(
            f"run {records.run!r} stopped with `{state}` after {len(rounds)} trained rounds, so there is no "
            f"reviewed round to compare; `sera show {records.run}` says why"
        )
    return tokens_of(rounds)
