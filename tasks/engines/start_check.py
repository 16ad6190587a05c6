"""Check at step 0: if start policy and reference have the same weights, every margin is zero up to noise.

The noise is measured: the scorer computes a few pairs of the first batch, whose values differ from the
trainer's only by noise. A much larger margin means that the mixture's reference log-probabilities belong to
another policy, dtype or text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sera_core.errors import SeraError
from tasks.engines.training_data import Mixture

MARGIN_BOUND = 1e-3
"""Minimum bound of a margin at step 0 in bfloat16, in nats."""
TOKEN_BOUND = 1e-5
"""Minimum bound in float32, in nats per response token of the longest pair of the first batch."""
PROBE_PAIRS = 8
"""Number of pairs (the longest of the first batch) on which scorer and trainer are compared."""

Pairs = Sequence[dict[str, Any]]
"""`ReviewedDPOTrainer.pairs` of the first batch."""
Probe = dict[int, tuple[float, float]]
"""The scorer's log π(y|x) of the chosen and the rejected response, in nats, by the mixture's row."""


class StartDiffersError(SeraError):
    """Policy and reference should be equal at step 0 but differ; `margin` in nats."""

    def __init__(self, message: str, margin: float = math.nan) -> None:  # nan: told by another process
        super().__init__(message)
        self.margin = margin


@dataclass(frozen=True)
class StartCheck:
    """Checks the first batch of a training."""

    mixture: Mixture
    rows: Sequence[int]
    """Rows of the first batch."""
    beta: float
    bf16: bool
    """Whether the computation is in bfloat16."""
    first_margin: float | None = None
    """The margin, in nats, with which an earlier try was refused; else None."""

    def score(self, policy: Any, tokens_per_batch: int) -> Probe:
        """The scorer's values for the longest pairs, under the start policy in the dtype of training."""
        from sera_core.models.logprobs import sequence_logps

        rows = sorted(self.rows, key=lambda row: -self.mixture.tokens[row])[:PROBE_PAIRS]
        pairs = self.mixture.take(rows)
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
        """Compare every margin with the bound; returns the metrics of probe and bound, in nats.

        Raises:
            StartDiffersError: the largest margin is above the bound.
        """
        noise = _probe_difference(pairs, probe)
        bound = max(self._least_bound(), 4 * noise)
        worst = max(pairs, key=lambda pair: abs(_margin(pair)))
        margin = _margin(worst)
        if abs(margin) > bound:
            first = "" if self.first_margin is None else f" ({self.first_margin:.4g} in the first try)"
            raise StartDiffersError(
                f"pair {self.mixture.pair_id(worst['row'])}: margin {margin:.4g} nats at step 0{first}, "
                f"although start policy and reference are the same (at most {bound:.2g}; scorer and trainer "
                f"differ by {noise:.2g}): the reference log-probabilities "
                "in the mixture belong to another policy, dtype or text; score the reference again",
                margin,
            )
        return {"step0/probe": noise, "step0/bound": bound}

    def _least_bound(self) -> float:
        """Minimum bound of a margin, in nats."""
        if self.bf16:
            return MARGIN_BOUND
        longest = max(self.rows, key=lambda row: self.mixture.tokens[row])
        return TOKEN_BOUND * int(self.mixture.lengths[longest, 1:].sum())


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
