"""The history of a run, derived from its round manifests: head, lineage and best round."""

from collections.abc import Sequence
from typing import Any

from sera_core.artifacts.run_records import BEST, HEAD, RoundManifest
from sera_core.errors import StoreError


class History:
    """State of a run computed from the manifests of its finished rounds."""

    def __init__(self, rounds: Sequence[RoundManifest]) -> None:
        self.rounds = list(rounds)

    @property
    def next_round(self) -> int:
        """Number of the round to do next."""
        return len(self.rounds)

    @property
    def promoted(self) -> list[RoundManifest]:
        """Rounds whose policy was promoted, in order."""
        return [r for r in self.rounds if r.decision == "promote"]

    @property
    def best(self) -> RoundManifest | None:
        """The best promoted round, as the last decision recorded it.

        In older runs it is the one with the largest held-out reward accuracy, the later one if tied.

        Raises:
            StoreError: the recorded round was not promoted.
        """
        recorded = [r.metrics[BEST] for r in self.rounds if r.metrics.get(BEST) is not None]
        if recorded:
            return self._promoted_round(recorded[-1], BEST)
        return max(
            self.promoted,
            key=lambda r: (r.accuracy if r.accuracy is not None else -1.0, r.round),
            default=None,
        )

    @property
    def lineage(self) -> list[RoundManifest]:
        """The heads in order; a roll-back removes those after the best round so far.

        Raises:
            StoreError: a roll-back went to a round that was not promoted.
        """
        heads: list[RoundManifest] = []
        for number, manifest in enumerate(self.rounds):
            if manifest.decision == "promote":
                heads.append(manifest)
            elif manifest.decision == "roll_back":
                before, after = History(self.rounds[:number]), manifest.metrics.get(HEAD)
                to = before.best if after is None else before._promoted_round(after, HEAD)
                heads = [head for head in heads if to is not None and head.round <= to.round]
        return heads

    @property
    def head(self) -> RoundManifest | None:
        """The promoted round the next one starts from."""
        return self.lineage[-1] if self.lineage else None

    def entries(self) -> list[dict[str, Any]]:
        """The history as a decision sees it: each round's decision, and the number of the head after it."""
        heads = [History(self.rounds[: number + 1]).head for number in range(len(self.rounds))]
        return [
            {"round": r.round, "decision": r.decision, "head": None if head is None else head.round}
            for r, head in zip(self.rounds, heads, strict=True)
        ]

    def _promoted_round(self, number: int, name: str) -> RoundManifest:
        found = next((manifest for manifest in self.promoted if manifest.round == number), None)
        if found is None:
            raise StoreError(
                f"the rounds of run {self.rounds[0].run!r} name round {number} as {name}, which was not "
                "promoted; restore them from a copy of the store"
            )
        return found
