"""The classifier of review sentences, against its formula and on sentences and pairs it has not seen."""

import math

import numpy as np
import pytest

from sera_core.data.sources import read_rows
from sera_core.errors import InputError
from sera_core.judges import reviews
from sera_core.judges.comparison import Comparison
from sera_core.judges.named import Asking, Opening, find_judge, find_rater
from sera_core.judges.rating import Question


def opened(named):
    return named.open(Opening(None))


def test_the_log_odds_are_those_of_naive_bayes_by_hand():
    """good: 2 of 3 positive and 0 of 2 negative words; four words known, so (2+1)/(3+4) over (0+1)/(2+4)."""
    odds = reviews.fit(["Good, good fun", "bad story"], [True, False])
    assert odds["good"] == pytest.approx(math.log(3 / 7) - math.log(1 / 6))
    assert odds["bad"] == pytest.approx(math.log(1 / 7) - math.log(2 / 6))
    assert reviews.rated(odds, "good bad unknown") == pytest.approx((odds["good"] + odds["bad"]) / 2)
    assert reviews.rated(odds, "unknown") == 0 == reviews.rated(odds, "")


def test_half_of_the_sentences_tell_the_polarity_of_the_other_half():
    rows = [row.data for row in read_rows(reviews.SENTENCES)]
    texts, labels = [row["text"] for row in rows], [row["label"] == "pos" for row in rows]
    odds = reviews.fit(texts[::2], labels[::2])
    right = [
        (reviews.rated(odds, text) > 0) == label
        for text, label in zip(texts[1::2], labels[1::2], strict=True)
    ]
    assert np.mean(right) > 0.65


def test_it_prefers_the_better_answer_of_held_out_pairs_whatever_their_length():
    judge = opened(find_judge("reviews", Asking()))
    rows = [row.data for row in read_rows("bundled:review_heldout.jsonl.gz")]
    by_cell = {}
    for row in rows:
        texts = (row["chosen"][0]["content"], row["rejected"][0]["content"])
        (verdict,) = judge.judge([Comparison(row["prompt"], *texts)])
        by_cell.setdefault(row["cell"], []).append(verdict.better == "A")
    shares = {cell: np.mean(right) for cell, right in by_cell.items()}
    assert min(shares.values()) > 0.7
    assert abs(shares["aligned"] - shares["counter"]) < 0.1  # it does not look at length


def test_it_rates_too_and_is_named_by_what_it_was_fitted_on():
    named = find_rater("reviews", Asking())
    good, bad = opened(named).rate(
        [Question([], "A moving, funny and wonderful film."), Question([], "Dull.")]
    )
    assert good.value > bad.value
    assert named.identity["rater"] == "reviews" and len(named.identity["sentences_sha256"]) == 64
    with pytest.raises(InputError, match="did you mean"):
        find_judge("review", Asking())
