"""A prompt's pairs share a fold, in every round and file; folds that are not all filled are refused."""

from pathlib import Path

import numpy as np
import pytest

from sera_core.artifacts import schema
from sera_core.data.folds import Fold, fold_of, refuse_empty_folds
from sera_core.errors import InputError


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def file_of(path: Path, prompts: list[str]) -> Path:
    rows = [{"pair_id": f"{n:016x}", "prompt": said(text)} for n, text in enumerate(prompts)]
    schema.write_table(schema.from_rows(schema.PAIRS, rows), path)
    return path


PROMPTS = [f"question {n % 40}" for n in range(100)]


@pytest.mark.parametrize("of", [2, 3, 5])
def test_each_pair_is_in_one_fold_and_a_prompt_in_one_with_all_its_pairs(tmp_path, of):
    path = file_of(tmp_path / "pairs.parquet", PROMPTS)
    rows = [fold.rows(path) for fold in Fold.every(of, 0)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(100))
    for n, text in enumerate(PROMPTS):
        assert {int(n in held) for held in rows} == {0, 1}
        same = [m for m, other in enumerate(PROMPTS) if other == text]
        assert any(set(same) <= set(held.tolist()) for held in rows)


def test_the_fold_depends_on_the_prompt_and_the_seed_alone(tmp_path):
    """Not on the other rows: a generated pair of the prompt, in another file, is in the same fold."""
    fold = Fold(2, 0, 7)
    held = {PROMPTS[row] for row in fold.rows(file_of(tmp_path / "all.parquet", PROMPTS))}
    few = file_of(tmp_path / "few.parquet", PROMPTS[30:35])
    assert {PROMPTS[30 + row] for row in fold.rows(few)} == held & set(PROMPTS[30:35])
    assert fold.holds(said("  QUESTION 3 ")) == fold.holds(said("question 3"))  # one prompt group
    other = {PROMPTS[row] for row in Fold(2, 0, 8).rows(tmp_path / "all.parquet")}
    assert other != held


def test_a_step_names_its_fold():
    assert fold_of({"fold": {"of": 3, "out": 1, "seed": 5}, "round": 0}) == Fold(3, 1, 5)
    assert fold_of({"round": 0}) is None


@pytest.mark.parametrize(
    ("prompts", "of", "counts"),
    [
        (["a", "a", "b"], 3, "3 train pairs left have 2 different prompts"),
        (["a"] * 9, 2, "folds of 9, 0 pairs"),
    ],
)
def test_folds_without_pairs_are_refused_with_the_counts(tmp_path, prompts, of, counts):
    path = file_of(tmp_path / "pairs.parquet", prompts)
    seed = next(seed for seed in range(9) if Fold(of, 0, seed).holds(said("a")))
    with pytest.raises(InputError, match=counts):
        refuse_empty_folds(path, of, seed, "left")
    refuse_empty_folds(file_of(tmp_path / "enough.parquet", PROMPTS), of, seed, "left")
