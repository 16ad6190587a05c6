"""A text classifier fitted on the laboratory's review sentences: a judge of what its labels are about.

Multinomial naive Bayes over words (Manning, Raghavan and Schütze 2008, chapter 13). It is fitted on sentences
that are in no pair, so what it says of an answer owes nothing to the pairs' labels or lengths.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from sera_core.data.sources import read_rows, source_digest
from sera_core.method.features import words_of

SENTENCES = "bundled:review_sentences.jsonl.gz"
SMOOTHING = 1.0
LogOdds = dict[str, float]


def identity() -> dict[str, str]:
    """What decides its ratings."""
    return {"sentences_sha256": source_digest(SENTENCES), "smoothing": str(SMOOTHING)}


def positive(prompt: str, response: str) -> float:
    """How positive a review is: the mean over its words of log P(word | positive) − log P(word | negative).

    The mean, not the sum, so that a longer answer is not rated further from 0. 0 without a known word.
    """
    return rated(_fitted(), response)


def rated(odds: LogOdds, response: str) -> float:
    """Mean log-odds of the response's known words, in nats."""
    known = [odds[word] for word in words_of(response) if word in odds]
    return math.fsum(known) / len(known) if known else 0.0


def fit(texts: Sequence[str], labels: Sequence[bool]) -> LogOdds:
    """Log-odds in nats of each word, with add-one smoothing.

    Args:
        texts: sentences.
        labels: whether each is positive.
    """
    counts: dict[bool, Counter[str]] = {True: Counter(), False: Counter()}
    for text, label in zip(texts, labels, strict=True):
        counts[label].update(words_of(text))
    vocabulary = counts[True].keys() | counts[False].keys()
    total = {label: found.total() + SMOOTHING * len(vocabulary) for label, found in counts.items()}
    return {
        word: math.log((counts[True][word] + SMOOTHING) / total[True])
        - math.log((counts[False][word] + SMOOTHING) / total[False])
        for word in vocabulary
    }


@lru_cache(maxsize=1)
def _fitted() -> LogOdds:
    rows = [row.data for row in read_rows(SENTENCES)]
    return fit([row["text"] for row in rows], [row["label"] == "pos" for row in rows])
