"""Model card of an exported policy: what it is, how it was made, whether the method helped. No Prefect.

It is meant for publication: it contains no local path, and it says so if there is no evidence that the
reviewed rounds helped.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict

from flows.display.markdown import escape, table
from flows.display.round_card import alarm_words, with_interval
from flows.display.run_view import Since, since_round_0, verdict_words
from flows.exports.gguf import GgufReport
from flows.exports.lineage import Lineage
from flows.running.open_run import test_record
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.config import CHOSEN
from sera_core.guards.shown import shown_line
from sera_core.reporting import words
from sera_core.reporting.evidence import RELIANCE, reliance_rows

ROUND_METRICS = ("heldout/rewards/accuracies", "heldout/accuracy_change", "samples/kl_reference")
LIMITS = (
    "Held-out accuracy is the share of held-out pairs that the policy's own implicit reward ranks as the "
    "labels do. It is not a human judgement of its answers, and says nothing about safety or facts.",
    "The policy may inherit errors and biases of the preference data, and self-review can amplify them.",
)


def model_card(
    records: RunStore,
    manifest: RoundManifest,
    chain: Lineage,
    adapter: bool = False,
    gguf: GgufReport | None = None,
) -> str:
    """Write README.md of an exported policy.

    Args:
        records: of the run.
        manifest: of the round.
        chain: of the policy.
        adapter: whether the folder holds an adapter without its base.
        gguf: the GGUF file in the folder, if there is one.
    """
    parts = [
        _front_matter(chain, adapter),
        f"# {escape(records.run)}, round {manifest.round}",
        "A policy aligned by self-review (SeRA, self-reviewing and alignment): direct alignment on "
        "preference pairs reviewed by the policy itself, and on pairs of its own answers. Made with "
        "sera-flow "
        f"{_code(chain.code[-1].version)}.",
        "## Did it help?",
        "\n".join(f"* {line}" for line in _verdict(records, manifest)),
        "## Rounds",
        _rounds(records, manifest),
        "Values with 95 % intervals and the number of pairs or answers. KL is to the start policy, in nats "
        "per answer.",
        "\n".join(f"* {line}" for line in _decisions(records, manifest)),
        *_reliance(manifest),
        "## Sources",
        "\n".join(f"* {line}" for line in _sources(chain)),
        "## Settings",
        table(["setting", "value"], _settings(records)),
        "## Use",
        _use(adapter),
        *([] if gguf is None else [f"`{gguf.file}` is the policy for llama.cpp: {gguf.words()}."]),
        "## Limits",
        "\n".join(f"* {line}" for line in LIMITS),
        "## Licence",
        "Not stated: it follows from the licences of the start policy and of the data. Whoever publishes "
        "this policy has to check them and set `license:` in the metadata above.",
        "## Provenance",
        "\n".join(f"* {line}" for line in _provenance(chain)),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(chain: Lineage, adapter: bool) -> str:
    """Metadata for the hub. Names are JSON strings, which are valid YAML."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if chain.start.is_on_hub:
        lines += [
            f"base_model: {json.dumps(chain.start.name)}",
            f"base_model_relation: {'adapter' if adapter else 'finetune'}",
        ]
    tuned = [chain.fine_tuned_on] if chain.fine_tuned_on is not None else []
    hub = sorted({s.name.removeprefix("hub:").split("@")[0] for s in (*chain.data, *tuned) if s.is_on_hub})
    lines += ["datasets:", *(f"  - {json.dumps(name)}" for name in hub)] if hub else []
    return "\n".join([*lines, "tags:", "  - sera-flow", "  - sera", "  - preference-optimization", "---"])


def _verdict(records: RunStore, manifest: RoundManifest) -> Iterator[str]:
    """The evidence on this round, good or bad."""
    accuracy = with_interval(manifest.metrics.get("heldout/rewards/accuracies"))
    found = since_round_0(records, manifest)
    if found is None:
        yield "This is round 0: direct alignment on all human pairs, before any self-review."
        if (later := verdict_words(records)) is not None:
            yield later
    else:
        yield _since(found)
    yield f"Held-out accuracy: {accuracy}."
    final = test_record(records)
    if final is not None and final["round"] == manifest.round:
        test = with_interval(final["metrics"].get("test/rewards/accuracies"))
        yield f"Accuracy on the test set (used for no decision): {test}."
    alarm: str | None = manifest.metrics.get("alarm")
    if alarm is not None:
        yield f"Reliance on spurious features: {escape(alarm_words(manifest))}"
    yield f"Decision: **{manifest.decision}**. {escape(manifest.reason)}."


def _since(found: Since) -> str:
    measure, change = found.measure, asdict(found.change)
    numbers = f"{words.interval(change, signed=True)} on the same {change['n']:,} held-out {found.unit}"
    if not (words.finite(change["low"]) and words.finite(change["high"])):
        return "No comparison with round 0 (the same training without self-review) was possible."
    if change["low"] > 0:
        return f"Against round 0 (before any self-review) {measure} rose: {numbers}."
    if change["high"] < 0:
        return f"**The self-reviewed rounds did harm**: {measure} against round 0 {numbers}."
    few = f" There are too few {found.unit} to tell." if words.too_few(change) else ""
    return f"**No evidence that the self-reviewed rounds helped**: {measure} against round 0 {numbers}.{few}"


def _rounds(records: RunStore, manifest: RoundManifest) -> str:
    rows = []
    for r in records.rounds()[: manifest.round + 1]:
        shown = [with_interval(r.metrics.get(name)) for name in ROUND_METRICS]
        pairs = [f"{r.pairs['human']:,}", f"{r.pairs['generated']:,}"]
        rows.append([str(r.round), r.decision, *pairs, *shown])
    header = ["round", "decision", "human pairs", "generated pairs", "held-out accuracy"]
    return table([*header, "change since the previous head", "KL"], rows)


def _decisions(records: RunStore, manifest: RoundManifest) -> Iterator[str]:
    """Why each round was decided as it was."""
    for r in records.rounds()[: manifest.round + 1]:
        yield f"Round {r.round}, {r.decision}: {escape(r.reason)}."


def _reliance(manifest: RoundManifest) -> list[str]:
    """How far the policy goes by each feature; nothing where it was not measured."""
    found = [row for row in reliance_rows(manifest.metrics) if row.cells]
    if not found:
        return []
    heads = ["feature", *(head for head, *_ in RELIANCE[:2]), "pairs"]
    rows = [
        [escape(row.feature), *(cell.value for cell in row.cells[:2]), words.count(row.cells[0].n)]
        for row in found
    ]
    return [
        "## Reliance",
        "Accuracy on held-out pairs whose chosen answer has more of the feature, minus accuracy where it has "
        "less: 0 if the policy does not go by it. Balanced accuracy is the mean of both.",
        table(heads, rows),
    ]


def _sources(chain: Lineage) -> Iterator[str]:
    yield f"start policy: {_code(chain.start.name)}, digest {_code(chain.start.digest)}"
    if (tuned := chain.fine_tuned_on) is not None:
        what = "the chosen answers of the train data" if tuned.name == CHOSEN else _code(tuned.name)
        yield f"fine-tuned before round 0 on {what}, digest {_code(tuned.digest)}"
    for source in chain.data:
        share = "" if source.weight == 1.0 else f", weight {source.weight:g}"
        yield f"{source.side} data: {_code(source.name)}{share}, digest {_code(source.digest)}"


def _settings(records: RunStore) -> list[list[str]]:
    config = records.configs()[0].settings
    train = config.train
    rows = [
        ("losses", ", ".join(train.losses)),
        ("β", f"{train.beta:g}"),
        ("method", f"LoRA, rank {train.lora_rank}" if train.method == "lora" else "all weights"),
        ("learning rate", f"{config.learning_rate:g}"),
        ("batch, epochs per round", f"{train.batch}, {train.epochs}"),
        *([("training tokens by round", ", ".join(map(str, train.tokens)))] if train.tokens else []),
        ("arithmetic", config.model.dtype),
        ("review", f"score {config.score}, ensemble {config.review.ensemble}"),
        ("selection", f"{config.select.rule} ({config.select.fraction:g})"),
        ("sampling", f"{config.sampling.engine}, temperature {config.sampling.temperature:g}"),
        ("seed", str(config.seed)),
    ]
    return [list(row) for row in rows]


def _use(adapter: bool) -> str:
    kind, package = (
        ("AutoPeftModelForCausalLM", "peft") if adapter else ("AutoModelForCausalLM", "transformers")
    )
    imports = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if adapter:
        imports = [f"from {package} import {kind}", "from transformers import AutoTokenizer"]
    return "\n".join(
        [
            "```python",
            *imports,
            "",
            'folder = "."  # or the name of this repository',
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            f"policy = {kind}.from_pretrained(folder)",
            "```",
        ]
    )


def _provenance(chain: Lineage) -> Iterator[str]:
    yield (
        "`lineage.json` lists every step from the data and the start policy to these weights: settings, "
        "inputs, sha256 of every file, code, environment and seed"
    )
    yield f"policy: {_code(chain.policy.sha256)}; its weights: {_code(chain.policy.weights)}"
    yield f"configuration: {_code(chain.config_sha256)}"
    for code in chain.code:
        yield f"code: sera-flow {_code(code.version)}, source files {_code(code.digest or 'not recorded')}"


def _code(text: str) -> str:
    """Text as a code span; backticks are removed."""
    plain = re.sub(r"[`\s]+", " ", shown_line(text))
    return f"`{plain}`"
