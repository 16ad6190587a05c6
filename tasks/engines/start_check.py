"""Step 0: where start policy and reference are the same weights, every margin is zero but for noise.

How much noise there is depends on the arithmetic, so it is measured: the scorer computes a few pairs of the
first batch, and the trainer's values of the same pairs differ from these by noise alone. A margin far above
that says that the reference log-probabilities in the mixture are of another policy, dtype or text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sera_core.errors import SeraError
from tasks.engines.training_data import Mixture

MARGIN_BOUND = 1e-3
"""In bfloat16, the least bound of a margin at step 0, in nats."""
TOKEN_BOUND = 1e-5
"""In float32 the least bound, in nats a response token of the longest pair of the first batch."""
PROBE_PAIRS = 8
"""Pairs (the longest of the first batch) that scorer and trainer are compared on."""

Pairs = Sequence[dict[str, Any]]
"""`ReviewedDPOTrainer.pairs` of the first batch."""
Probe = dict[int, tuple[float, float]]
"""The scorer's log π(y|x) of the chosen and the rejected response, in nats, by the mixture's row."""


class StartDiffersError(SeraError):
    """Policy and reference differ at step 0 where they are the same; `margin` in nats."""

    def __init__(self, message: str, margin: float) -> None:
        super().__init__(message)
        self.margin = margin


@dataclass(frozen=True)
class StartCheck:
    """The check of one training's first batch."""

    mixture: Mixture
    rows: Sequence[int]
    """Rows of the first batch."""
    beta: float
    bf16: bool
    """Whether the arithmetic is in bfloat16."""
    first_margin: float | None = None
    """The margin, in nats, for which an earlier computation was refused."""

    def score(self, policy: Any, tokens_per_batch: int) -> Probe:
        """The scorer's values of the longest pairs, under the start policy in the dtype of training."""
        from sera_core.models.logprobs import sequence_logps

        rows = sorted(self.rows, key=lambda row: -self.mixture.tokens[row])[:PROBE_PAIRS]
        pairs = self.mixture.table.take(rows).to_pylist()
        items = [
            (pair["prompt_ids"], pair[side]) for pair in pairs for side in ("chosen_ids", "rejected_ids")
        ]
        values = sequence_logps(policy, items, tokens_per_batch=tokens_per_batch)
        return {row: (float(values[2 * n]), float(values[2 * n + 1])) for n, row in enumerate(rows)}

    def margins(self, pairs: Pairs) -> dict[str, float]:
        """Metrics of the margins: their mean times β, and the largest in nats."""
        margins = [_margin(pair) for pair in pairs]
        return {
            "step0/rewards/margins": self.beta * sum(margins) / len(margins),
            "step0/largest_margin": max(map(abs, margins)),
        }

    def refuse_other_reference(self, pairs: Pairs, probe: Probe) -> dict[str, float]:
        """Hold every margin against the bound; returns metrics of the probe and the bound, in nats.

        Raises:
            StartDiffersError: the largest margin is above the bound.
        """
        noise = _probe_difference(pairs, probe)
        bound = max(self._least_bound(), 4 * noise)
        worst = max(pairs, key=lambda pair: abs(_margin(pair)))
        margin = _margin(worst)
        if abs(margin) > bound:
            first = "" if self.first_margin is None else f", and {self.first_margin:.4g} when first computed"
            raise StartDiffersError(
                f"pair {self.mixture.pair_ids[worst['row']]}: margin {margin:.4g} nats at step 0{first}, "
                f"where start policy and reference are the same (at most {bound:.2g}; scorer and trainer "
                f"differ by {noise:.2g}): the reference log-probabilities "
                "in the mixture are of another policy, dtype or text; score the reference again",
                margin,
            )
        return {"step0/probe": noise, "step0/bound": bound}

    def _least_bound(self) -> float:
        """What a margin may be, in nats, however well scorer and trainer agree."""
        if self.bf16:
            return MARGIN_BOUND
        longest = max(self.rows, key=lambda row: self.mixture.tokens[row])
        pair = self.mixture.table.slice(longest, 1).to_pylist()[0]
        return TOKEN_BOUND * (len(pair["chosen_ids"]) + len(pair["rejected_ids"]))


def _margin(pair: dict[str, Any]) -> float:
    return pair["chosen_score"] - pair["rejected_score"]


def _probe_difference(pairs: Pairs, probe: Probe) -> float:
    """Largest difference, in nats, between scorer and trainer on the probe's responses."""
    trained = {pair["row"]: (pair["chosen"], pair["rejected"]) for pair in pairs}
    return max(
        abs(scored - computed)
        for row, values in probe.items()
        for scored, computed in zip(values, trained[row], strict=True)
    )
