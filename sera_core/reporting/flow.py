"""Where the pairs of a round went: each ledger row counted once, by stage and reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sera_core.reporting import words
from sera_core.reporting.files import RoundFiles, Row

_ORDER = ("data", "render", "sample", "pair", "select", "mix")


@dataclass(frozen=True)
class Block:
    """What came in, what was kept, and what was dropped where and why."""

    title: str
    noun: str
    given: int
    """Rows of the files that hold what came in; equal to kept + dropped, or the page says that it is not."""
    kept: int
    kept_as: str
    dropped: list[tuple[str, str, str, int]]
    """Stage, reason, its meaning, count."""

    @property
    def lost(self) -> int:
        """How many were dropped."""
        return sum(count for *_, count in self.dropped)

    @property
    def balanced(self) -> bool:
        """Whether kept + dropped = in."""
        return self.kept + self.lost == self.given


def blocks(files: RoundFiles, ledger: Sequence[Row]) -> list[Block]:
    """The flow of a round: human pairs, prompts, generated pairs."""
    human = [row for row in ledger if row["origin"] == "human" and "_" not in row["stage"]]
    generated = [row for row in ledger if row["origin"] == "generated" and row["pair_id"]]
    prompts = [row for row in ledger if row["origin"] == "generated" and not row["pair_id"]]
    trained = "trained on" if "policy" in files else "kept"
    before = sum(row["stage"] in ("data", "render") for row in human)
    origins = Counter(row["origin"] for row in files.rows("mixture", "mixture.parquet", ["origin"]))
    found = [
        Block(
            "Human pairs",
            "pair",
            files.size("pairs", "train.parquet") + before,
            origins["human"],
            trained,
            _dropped(human),
        )
    ]
    if "responses" in files:
        found += [
            _prompts(files, generated, prompts),
            Block(
                "Generated pairs",
                "pair",
                files.size("responses", "pairs.parquet"),
                origins["generated"],
                trained,
                _dropped(generated),
            ),
        ]
    return found


def dropped_on_other_sides(ledger: Sequence[Row]) -> list[tuple[str, str, str, int]]:
    """What was dropped on the sides that are not trained on (held-out, test, prompt-only)."""
    return _dropped([row for row in ledger if row["origin"] == "human" and "_" in row["stage"]])


def _prompts(files: RoundFiles, generated: Sequence[Row], without: Sequence[Row]) -> Block:
    answered = {row["prompt_id"] for row in files.rows("responses", "responses.parquet", ["prompt_id"])}
    lost = {row["prompt_id"] for row in without}
    paired = {row["prompt_id"] for row in generated} - lost
    return Block("Prompts", "prompt", len(answered | lost), len(paired), "gave a pair", _dropped(without))


def _dropped(rows: Sequence[Row]) -> list[tuple[str, str, str, int]]:
    counts = Counter((row["stage"], row["reason"]) for row in rows if not row["kept"])
    ordered: list[tuple[Any, int]] = sorted(counts.items(), key=lambda item: _place(*item[0]))
    return [
        (words.stage(stage), reason, words.REASONS.get(reason, ""), count)
        for (stage, reason), count in ordered
    ]


def _place(stage: str, reason: str) -> tuple[int, str, str]:
    step = stage.partition("_")[0]
    return (_ORDER.index(step) if step in _ORDER else len(_ORDER), stage, reason)
