"""The shards of a step: what a step function gives to whoever does them, here or in several workers."""

from collections.abc import Sequence
from typing import Literal, Protocol

from tasks.engines.sampler import Finished

Checked = Literal["early", "at the end"] | None
"""When the first shard is checked: once it is finished, once all are and the engine is closed, or never."""


class Shards(Protocol):
    """The shards of a step, and the policy, which is loaded on first use."""

    unit: str
    """What `sizes` counts."""

    @property
    def sizes(self) -> list[int]:
        """Size of each shard, for the progress."""
        ...

    @property
    def checked(self) -> Checked:
        """When to call `check`."""
        ...

    @property
    def ahead(self) -> int:
        """Shards that one of several workers knows of at once: 1, or more for an engine that looks ahead."""
        ...

    def do(self, number: int, following: Sequence[int], finished: Finished) -> None:
        """Do a shard and commit it as the part of this number.

        Args:
            number: the shard.
            following: those that will be asked for next; an engine may begin with them.
            finished: called with how much of the shard is done.
        """
        ...

    def check(self) -> None:
        """Check the first shard, which is finished; what is measured is among the attempt's metrics."""
        ...

    def close(self) -> None:
        """Free the engine, also before a check at the end; a later `do` opens it again."""
        ...
