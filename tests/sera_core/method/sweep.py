"""The alarm over planted strengths, on a linear stand-in: how often is it raised, and when should it be?

    python -m tests.sera_core.method.sweep [DRAWS]        20 draws of each unless said otherwise

A pair is the difference of its answers: 50 standard normal contents, of which a fixed direction is what makes
the better answer better, and one spurious feature, as large as a content, that points at the better answer
with probability `correlation` (0.5: it does not help). Then the share `noise` of the labels is turned round.
The policy is logistic regression on all 51 (ridge 10). Round 0 learns from 2,000 pairs; round 1 anew from the
70 % with the largest margins above 0; the random arm from as many drawn at random. The alarm is asked on
1,000 held-out pairs, once with right labels and a feature that does not help (as the planted test file has
them), once drawn as the train pairs are.

The truth is measured on 20,000 fresh pairs of the first kind: the change, against the random arm, of accuracy
where the feature points at the worse answer.
"""

import sys
from dataclasses import dataclass

import numpy as np

from sera_core.method.alarm import PanelAlarm, panel_alarm
from sera_core.method.diagnostics import correctness

CORRELATIONS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
NOISES = (0.0, 0.1, 0.2, 0.3, 0.4)
CONTENTS, RIDGE, TRAIN, HELDOUT, FRESH = 50, 10.0, 2000, 1000, 20_000
IRRELEVANT, REAL = 10, 2
"""Features of the null's panel: that have nothing to do with the pairs, and that are contents."""


def pairs(rng: np.random.Generator, count: int, correlation: float, noise: float) -> np.ndarray:
    """Differences [pair, 51] of chosen less rejected; the last column is the spurious feature."""
    contents = rng.normal(size=(count, CONTENTS))
    better = np.sign(contents @ np.linspace(1, 0, CONTENTS))
    with_it = np.where(rng.random(count) < correlation, 1.0, -1.0)
    spurious = better * with_it * np.abs(rng.normal(size=count))
    turned = np.where(rng.random(count) < noise, -1.0, 1.0)
    return (better * turned)[:, None] * np.column_stack([contents, spurious])


def fitted(differences: np.ndarray) -> np.ndarray:
    """Weights of ridged logistic regression on pairs that are all labelled 1, by Newton's method."""
    weights = np.zeros(differences.shape[1])
    for _ in range(30):
        p = 0.5 * (1 + np.tanh(0.5 * differences @ weights))
        slope = differences.T @ (1 - p) - RIDGE * weights
        curve = (differences * (p * (1 - p))[:, None]).T @ differences + RIDGE * np.eye(len(weights))
        step = np.linalg.solve(curve, slope)
        weights = weights + step
        if np.abs(step).max() < 1e-8:
            break
    return weights


def kept_by_margin(margins: np.ndarray, fraction: float = 0.7) -> np.ndarray:
    """The largest margins above 0, at most the fraction of all pairs."""
    largest = np.argsort(-margins, kind="stable")[: round(fraction * len(margins))]
    kept = np.zeros(len(margins), dtype=bool)
    kept[largest] = True
    return kept & (margins > 0)


@dataclass(frozen=True)
class Arms:
    """One draw, trained: the weights of each policy, and the selection."""

    train: np.ndarray
    kept: np.ndarray
    first: np.ndarray
    reviewed: np.ndarray
    random: np.ndarray


def trained(rng: np.random.Generator, correlation: float, noise: float, blind: bool = False) -> Arms:
    """Round 0, the reviewed round 1 and its random arm; blind: the policy sees no spurious feature."""
    train = pairs(rng, TRAIN, correlation, noise)
    seen = np.delete(train, -1, axis=1) if blind else train

    def learn(rows: np.ndarray) -> np.ndarray:
        weights = fitted(seen[rows])
        return np.append(weights, 0.0) if blind else weights

    first = learn(np.ones(TRAIN, dtype=bool))
    kept = kept_by_margin(train @ first)
    drawn = np.zeros(TRAIN, dtype=bool)
    drawn[rng.permutation(TRAIN)[: kept.sum()]] = True
    return Arms(train, kept, first, learn(kept), learn(drawn))


def asked(
    arms: Arms, heldout: np.ndarray, panel: dict[str, tuple[np.ndarray, np.ndarray]], arm: bool
) -> PanelAlarm:
    """The alarm of round 1 on held-out pairs. panel: (held-out, train) differences of each feature."""
    now, head, other = (correctness(heldout @ w) for w in (arms.reviewed, arms.first, arms.random))
    return panel_alarm(
        heldout={name: of_heldout for name, (of_heldout, _) in panel.items()},
        train={name: of_train for name, (_, of_train) in panel.items()},
        correct_now=now,
        correct_head=head,
        correct_random=other if arm else None,
        kept=arms.kept,
        heldout_groups=None,
        train_groups=None,
        seed=0,
    )


@dataclass(frozen=True)
class Cell:
    """One strength: shares of the draws in which the alarm was raised, and the truth."""

    clean: float
    """On held-out pairs with right labels and a feature that does not help; against the random arm."""
    alike: float
    """On held-out pairs drawn as the train pairs are; against the random arm."""
    head: float
    """On the clean held-out pairs, against the last head: what a run without a random arm sees."""
    truth: float
    """True change of accuracy where the feature points at the worse answer, mean over the draws."""


def cell(correlation: float, noise: float, draws: int) -> Cell:
    """The alarm at one strength."""
    found = []
    for draw in range(draws):
        rng = np.random.default_rng((11, round(100 * correlation), round(100 * noise), draw))
        arms = trained(rng, correlation, noise)
        clean, alike = pairs(rng, HELDOUT, 0.5, 0.0), pairs(rng, HELDOUT, correlation, noise)
        fresh = pairs(rng, FRESH, 0.5, 0.0)
        counter = fresh[fresh[:, -1] < 0]
        truth = float(((counter @ arms.reviewed > 0).mean()) - (counter @ arms.random > 0).mean())
        panels = [{"spurious": (held[:, -1], arms.train[:, -1])} for held in (clean, alike)]
        raised = [
            bool(asked(arms, clean, panels[0], True).raised),
            bool(asked(arms, alike, panels[1], True).raised),
            bool(asked(arms, clean, panels[0], False).raised),
        ]
        found.append([*raised, truth])
    return Cell(*np.mean(found, axis=0).tolist())


def null(noise: float, draws: int) -> tuple[float, float, float]:
    """No spurious feature: shares of features and of draws with a false alarm, and of contents with one."""
    features, panels, real = 0, 0, 0
    for draw in range(draws):
        rng = np.random.default_rng((12, round(100 * noise), draw))
        arms, heldout = trained(rng, 0.5, noise, blind=True), pairs(rng, HELDOUT, 0.5, noise)
        panel = {f"none {k}": (rng.normal(size=HELDOUT), rng.normal(size=TRAIN)) for k in range(IRRELEVANT)}
        panel |= {f"content {k}": (heldout[:, k], arms.train[:, k]) for k in range(REAL)}
        raised = asked(arms, heldout, panel, True).raised
        false = [name for name in raised if name.startswith("none")]
        features, panels, real = features + len(false), panels + bool(false), real + len(raised) - len(false)
    return features / (draws * IRRELEVANT), panels / draws, real / (draws * REAL)


def main(draws: int = 20) -> None:
    """Print both tables as markdown."""
    out = sys.stdout
    out.write(
        f"{draws} draws a cell. Null, by label noise: no spurious feature, {IRRELEVANT} irrelevant ones\n\n"
    )
    heads = ["noise", "false alarms a feature", "draws with any", "raised for a content (a real feature)"]
    out.write(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n")
    for noise in NOISES:
        out.write(f"| {noise} | {' | '.join(f'{share:.3f}' for share in null(noise, draws))} |\n")
    heads = ["correlation", "noise", "raised, clean held-out", "raised, held-out like train"]
    heads += ["raised against the last head", "true change of counter accuracy"]
    out.write(f"\n| {' | '.join(heads)} |\n{'|---' * len(heads)}|\n")
    for noise in NOISES:
        for correlation in CORRELATIONS:
            c = cell(correlation, noise, draws)
            shares = f"{c.clean:.2f} | {c.alike:.2f} | {c.head:.2f}"
            out.write(f"| {correlation} | {noise} | {shares} | {c.truth:+.3f} |\n")
            out.flush()


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
