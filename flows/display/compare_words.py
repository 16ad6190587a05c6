"""A comparison in words and table rows, for the terminal and the page."""

from collections.abc import Iterator
from typing import Any

from flows.display.compared import Compared, means
from sera_core.arms import ARMS
from sera_core.method.comparison import DIFFERENCES, VALUES, Difference, is_apart
from sera_core.reporting import words

COLUMNS = ("arm", "rounds", "tokens trained", "tokens sampled", "last decision", *VALUES)
NAMES = {"balanced": "balanced accuracy", "reliance": "reliance"}


def rows(found: Compared) -> list[list[Any]]:
    """A row of COLUMNS for each arm: means over seeds."""
    told = []
    for arm in found.arms:
        mean = means(found, arm)
        decisions = ", ".join(f"{decision} ({count})" for decision, count in mean["decisions"].items())
        spent = [f"{mean['rounds']:g}", round(mean["tokens"]), round(mean["sampled"])]
        told.append([arm, *spent, decisions, *(mean[name] for name in VALUES)])
    return told


def cell(value: Any) -> str:
    """A value of a row as text."""
    return words.count(value) if isinstance(value, int) else words.number(value)


def measured_on(found: Compared) -> str:
    """What the values are of."""
    feature = words.feature(found.feature)
    return (
        f"Measured on {len(found.pairs.ids)} held-out pairs under the policy of each run's last round. "
        f"aligned, counter, equal: accuracy where the chosen answer has more, less, as much of {feature}; "
        "balanced: the mean of aligned and counter; reliance: aligned − counter."
    )


def differences(found: Compared) -> list[str]:
    """Each arm against the first, and whether it can be told apart."""
    return [
        f"{arm} against {found.first}: {difference(change, found.first)}"
        for arm, change in found.differences.items()
    ]


def difference(change: Difference, first: str) -> str:
    """An arm's difference from the first arm."""
    numbers = "; ".join(
        f"{NAMES[name]} {getattr(change, name).in_words(signed=True)}" for name in DIFFERENCES
    )
    apart = [NAMES[name] for name in DIFFERENCES if is_apart(getattr(change, name))]
    if not apart:
        return f"{numbers}. Not distinguishable from {first}."
    return f"{numbers}. It differs in {' and '.join(apart)}."


def unequal(found: Compared) -> Iterator[str]:
    """Runs that ended before all rounds: they trained for fewer tokens."""
    for arm, by_seed in list(found.arms.items())[1:]:
        for seed, run in by_seed.items():
            wanted = 1 if ARMS[arm].one_round else len(found.arms[found.first][seed].rounds)
            if len(run.rounds) < wanted:
                yield (
                    f"Unequal budgets: {run.run} stopped with `{run.stop_reason}` after {len(run.rounds)} of "
                    f"{wanted} rounds."
                )


def run_names(found: Compared) -> list[str]:
    """Names of all runs."""
    return [run.run for by_seed in found.arms.values() for run in by_seed.values()]
