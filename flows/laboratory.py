"""The laboratory's start policy: a small chat model trained from scratch on the bundled review sentences."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.display.progress import reporter
from sera_core.artifacts.canonical import sha256_json
from sera_core.artifacts.manifest import Artifact, StepSpec
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.data.sources import read_rows

FILES = {
    "flip": "a length-biased annotator: 30 % of pairs whose better answer is shorter have the wrong label",
    "noise": "15 % of the pairs are equally good and labelled by length alone",
    "corr": "all labels are right, but the better answer is longer in 70 % of the pairs of unequal length",
}
"""Bundled train files `review_<name>.jsonl.gz`, and what is planted in each."""
FLIPPED = {f"flipped-{percent}": percent / 100 for percent in (10, 20, 30, 40)}
"""The file corr with this fraction of its labels flipped at random: does the selection find them?"""
FILES |= {
    name: f"corr, with {fraction:.0%} of its labels flipped at random" for name, fraction in FLIPPED.items()
}
VERSION = 1
"""Of the step `base`; raise it when the training changes."""


def train_file(name: str) -> str:
    """The source of one of FILES."""
    return f"bundled:review_{'corr' if name in FLIPPED else name}.jsonl.gz"


def settings_of(name: str) -> list[str]:
    """The settings of one of FILES, as for `--set`."""
    flipped = [f"data.flip_fraction={FLIPPED[name]}"] if name in FLIPPED else []
    return [f"data.train={train_file(name)}", *flipped]


def base_policy(store_url: str, recipe: dict[str, Any] | None = None) -> Path:
    """Folder of the start policy, from the store or trained now.

    Args:
        store_url: folder or URL of the store.
        recipe: fields of `tasks.base_model.Recipe` that differ from its defaults.
    """
    from tasks.base_model import Recipe, base_model

    prompts, texts = _texts()
    fields = {"recipe": asdict(Recipe(**(recipe or {}))), "texts_sha256": sha256_json([prompts, texts])}
    spec = StepSpec(step="base", version=VERSION, fields=fields, inputs={})
    store = open_store(store_url)
    with reporter("train the laboratory's start policy") as progress:
        record = run_step(store, spec, base_model(prompts, texts), ExecutionConfig(), progress)
    return Artifact(store, record.ref).folder("model")


def _texts() -> tuple[list[str], list[str]]:
    """Prompts and answers of the noise file, without labels, and the review sentences of no pair."""
    pairs = [row.data for row in read_rows(train_file("noise"))]
    prompts = sorted({row["prompt"][-1]["content"] for row in pairs})
    answers = [row[side][0]["content"] for row in pairs for side in ("chosen", "rejected")]
    sentences = [row.data["text"] for row in read_rows("bundled:review_sentences.jsonl.gz")]
    return prompts, answers + sentences
