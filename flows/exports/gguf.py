"""A round's policy as a GGUF file for llama.cpp, checked against the policy on texts of the run."""

import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.models.gguf_writing import FileType

PAIRS = 4
"""Pairs of the run whose chosen answers a file is checked on."""
TOKENS = 256
"""Tokens of an answer that are compared."""


@dataclass(frozen=True)
class GgufReport:
    """What was written, and how far it is from the policy."""

    file: str
    type: FileType
    mean_nats: float
    """Mean absolute difference of a token's log-probability from the policy's, in float32."""
    largest_nats: float
    tokens: int
    """Tokens of real answers that were compared."""
    texts: int
    """Texts to which the file's tokenizer gave the policy's ids."""

    def record(self) -> dict[str, Any]:
        """The same for --json."""
        return asdict(self)

    def words(self) -> str:
        """The check in a sentence."""
        return (
            f"log-probabilities differ from the policy's by {self.mean_nats:.2g} nats a token on average, "
            f"{self.largest_nats:.2g} at most ({self.tokens:,} tokens of the run's answers); the token ids "
            f"of {self.texts} texts are the same"
        )


def check_gguf(folder: Path) -> None:
    """Refuse a policy that llama.cpp cannot read as it is, before anything is written.

    Args:
        folder: the policy, or the base of its adapter.

    Raises:
        InputError: its architecture, settings, tensors or tokenizer; the message names what is in the way.
    """
    from sera_core.models.gguf_tokenizer import vocabulary_of
    from sera_core.models.gguf_writing import layout_of
    from sera_core.models.policies import load_tokenizer

    vocabulary_of(load_tokenizer(folder), layout_of(folder).config.vocab_size)


def write_checked(
    records: RunStore, manifest: RoundManifest, folder: Path, path: Path, file_type: FileType
) -> GgufReport:
    """Write a policy folder as a GGUF file, read it back and compare it with the policy.

    The file appears at `path` only after the check.

    Raises:
        InputError: the policy cannot be written (see `check_gguf`), or a weight is too large for f16.
        Refused: the file is not the policy.
    """
    from sera_core.data.chat_templates import default_template
    from sera_core.data.rendering import Renderer
    from sera_core.models.gguf_tokenizer import vocabulary_of
    from sera_core.models.gguf_writing import layout_of, write_gguf

    renderer = Renderer(folder, None, records.configs()[0].settings.model.template_kwargs)
    size = layout_of(folder).config.vocab_size
    vocabulary = vocabulary_of(renderer.tokenizer, size, renderer.stop_ids)
    template = default_template(folder, renderer.tokenizer.chat_template)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".gguf-") as scratch:
        made = Path(scratch) / path.name
        write_gguf(folder, made, file_type, vocabulary, template or renderer.template, _about(manifest))
        report = _check(records, manifest, folder, made, file_type)
        made.chmod(0o644)
        made.rename(path)
    return report


def _about(manifest: RoundManifest) -> dict[str, str]:
    return {
        "general.name": f"{manifest.run} round {manifest.round}",
        "general.description": "A policy aligned by self-review (SeRA), made with sera-flow",
        "sera.policy_sha256": manifest.artifacts["policy"]["sha256"],
    }


def _check(
    records: RunStore, manifest: RoundManifest, folder: Path, path: Path, file_type: FileType
) -> GgufReport:
    from sera_core.models.devices import device_of
    from sera_core.models.gguf_check import check_tokenizer, compare_logps, load_gguf
    from sera_core.models.logprobs import response_token_logps
    from sera_core.models.policies import load_policy, load_tokenizer

    rows = list(_rows(records, manifest))
    tokenizer = load_tokenizer(folder)
    texts = check_tokenizer(path, tokenizer, list(_texts(rows, tokenizer)))
    items = [(row["prompt_ids"], row["chosen_ids"][:TOKENS]) for row in rows]
    device = device_of("auto")
    expected = response_token_logps(load_policy(folder, device=device), items)  # freed before the next
    found = response_token_logps(load_gguf(path).to(device=device), items)  # pyright: ignore
    apart = compare_logps(expected, found, file_type)
    return GgufReport(path.name, file_type, apart.mean, apart.largest, apart.tokens, texts)


def _rows(records: RunStore, manifest: RoundManifest) -> Iterator[dict[str, Any]]:
    """A few of the run's pairs: held-out ones, else pairs to train on."""
    pairs, wanted = Artifact(records.store, manifest.steps["pairs"]), PAIRS
    for file in ("heldout.parquet", "train.parquet"):
        columns = ["prompt", "chosen", "prompt_ids", "chosen_ids"]
        rows = pq.read_table(pairs.path(file), columns=columns).slice(0, wanted).to_pylist()
        yield from rows
        wanted -= len(rows)


def _texts(rows: list[dict[str, Any]], tokenizer: Any) -> Iterator[str]:
    """Whole conversations with their special tokens, and the messages alone."""
    for row in rows:
        yield tokenizer.decode([*row["prompt_ids"], *row["chosen_ids"]], clean_up_tokenization_spaces=False)
        yield from (message["content"] for message in (*row["prompt"], *row["chosen"]))
