"""The laboratory's pairs that differ in length only: does a policy prefer the longer answer?

Their answers have the same polarity, so neither is better. They are scored as a run's test side, by the same
steps, which the store keeps; no decision sees them.
"""

from collections.abc import Mapping

import numpy as np

from flows.compare import Runs, trained_rounds
from flows.experiments import merged
from flows.round import prepare, test_evidence
from flows.running.aside import doing_aside
from flows.running.open_run import source_digests
from sera_core.artifacts import schema
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.config import SeraConfig
from sera_core.method.diagnostics import correctness_of_all

SOURCE = "bundled:review_length_only.jsonl.gz"
"""The longer answer stands as `chosen`."""
Preferred = dict[str, dict[int, dict[int, float]]]
"""Arm -> seed -> round -> share of the pairs in which the policy prefers the longer answer; a tie is ½, and
0.5 means that it does not use length."""


def longer_preferred(runs: Runs) -> Preferred:
    """The share for the first and last round of each run; scores what is not in the store yet."""
    return {
        arm: {seed: _first_and_last(records) for seed, records in by_seed.items()}
        for arm, by_seed in runs.items()
    }


def means(found: Mapping[int, Mapping[int, float]]) -> tuple[float, float]:
    """Means over an arm's seeds: after round 0, after the last round."""
    first, last = zip(*((shares[min(shares)], shares[max(shares)]) for shares in found.values()), strict=True)
    return float(np.mean(first)), float(np.mean(last))


def in_words(found: Preferred) -> str:
    """The line below the laboratory's table."""
    by_arm = {arm: means(by_seed) for arm, by_seed in found.items()}
    told = [f"round 0 {next(iter(by_arm.values()))[0]:.3f}"]
    told += [f"{arm} {last:.3f}" for arm, (_, last) in by_arm.items()]
    return (
        f"Longer answer preferred where the answers differ in length only (0.5: length is not used): "
        f"{', '.join(told)}."
    )


def _first_and_last(records: RunStore) -> dict[int, float]:
    settings = records.configs()[-1].settings
    test = {"data": {"test": [{"path": SOURCE}], "test_fraction": 0.0}}
    # `stored`: a recorded run names its sampling engine even where it samples nothing.
    config = SeraConfig.stored(merged(settings.model_dump(), test))
    rounds = trained_rounds(records)
    return {manifest.round: _share(records, config, manifest) for manifest in (rounds[0], rounds[-1])}


def _share(records: RunStore, config: SeraConfig, manifest: RoundManifest) -> float:
    what = f"length-only pairs, {records.run}, round {manifest.round}"
    do = doing_aside(records.store, config.execution, what)
    sides = prepare(config, source_digests(config), do)
    evidence = test_evidence(config, sides, manifest.steps["policy"], do)
    assert evidence is not None
    table = schema.read_table(Artifact(records.store, evidence).path("test.parquet"), schema.SCORED)
    return float(correctness_of_all(table["margin"].to_numpy()).mean())
