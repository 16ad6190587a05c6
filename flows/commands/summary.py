"""The summary of a run: rounds, dropped pairs, examples, artifacts and next commands."""

from collections import Counter
from collections.abc import Iterator, Mapping

from flows.commands.tables import print_table
from flows.display.dropped import dropped_human, dropped_on_other_sides, over_share_words, reasons
from flows.display.fine_tuning import fine_tuning
from flows.display.round_card import with_interval
from flows.display.run_view import best_words, verdict_words
from flows.running.open_run import test_record
from sera_core.artifacts.run_records import RoundManifest
from sera_core.artifacts.runs import RunStore
from sera_core.method.sides import QUANTITY_WORDS
from sera_core.reporting import words
from sera_core.reporting.examples import example_pairs
from sera_core.reporting.round_page import title_of


def rounds_table(records: RunStore) -> None:
    """Print one line per round."""
    rounds = records.history().rounds
    measure = next((r.metrics["score_metric"] for r in reversed(rounds) if "score_metric" in r.metrics), None)
    columns = [
        "round", "decision", "human", "generated", "share (target)", "held-out accuracy",
        "change since the head" if measure is None else QUANTITY_WORDS[measure],
        "held-out margin", "margin of trained pairs",
    ]  # fmt: skip
    rows = []
    for r in rounds:
        m = r.metrics
        rows.append(
            [
                r.round,
                r.decision,
                r.pairs["human"],
                r.pairs["generated"],
                f"{r.generated_share:.2f} ({r.target_share:.2f})",
                with_interval(m.get("heldout/rewards/accuracies")),
                _compared(r, measure),
                with_interval(m.get("heldout/margin")),
                with_interval(m.get("trained/margin")),
            ]
        )
    print_table(f"run {records.run}", columns, rows)


def _compared(r: RoundManifest, measure: str | None) -> str:
    """What the round was compared by; older runs compared accuracy with the head's."""
    if measure is not None:
        return with_interval(r.metrics.get("score"))
    return with_interval(r.metrics.get("heldout/accuracy_change")) if r.round else "–"


def closing_lines(records: RunStore) -> Iterator[str]:
    """The run in sentences."""
    history, state = records.history(), records.stop_reason()
    if (tuned := fine_tuning(records)) is not None:
        yield tuned.words
    apart = dropped_on_other_sides(records.store, history.rounds[0]) if history.rounds else {}
    for manifest in history.rounds:
        yield from _round_lines(manifest, apart)
    for side, counts in sorted(apart.items()):
        yield f"Dropped on the {words.SIDES.get(side, side)}, in every round: {reasons(counts)}."
    waiting = records.waiting()
    if waiting:
        yield (
            f"The run is waiting for a review of round {waiting['round']} until {waiting['until']}: "
            f"sera review {records.run} --decision promote"
        )
    elif state:
        yield f"The run stopped with `{state}`: {words.STOPS[state]}."
    if history.best is not None:
        yield f"Best round: {history.best.round} ({best_words(history)})."
        if (verdict := verdict_words(records)) is not None:
            yield verdict
        yield from _examples(records)
    if (final := test_record(records)) is not None:
        accuracy = with_interval(final["metrics"].get("test/rewards/accuracies"))
        yield f"Test set (used for no decision): accuracy {accuracy} for round {final['round']}."
    if history.rounds:
        yield f"Artifacts: {records.store.url}. Next:"
        store = "" if records.store.url in ("./sera-store", "sera-store") else f" --store {records.store.url}"
        yield f"  sera report {records.run} --out report{store}      # then open report/index.html"
        last = history.rounds[-1].round
        yield f"  sera show {records.run} --round {last}{store}      # pairs, reasons, artifacts"
        yield (
            f"  sera export {records.run} --to policy{store}"
            "      # the best round's policy as a Hugging Face folder"
        )


def _round_lines(r: RoundManifest, apart: Mapping[str, Counter[str]]) -> Iterator[str]:
    m = r.metrics
    yield (
        f"Round {r.round}: trained on {r.pairs['human']} human and {r.pairs['generated']} generated pairs; "
        f"{r.decision}: {r.reason}."
    )
    if dropped := dropped_human(m, apart.values()):
        yield f"  human pairs dropped: {reasons(dropped)}."
    if (over := over_share_words(r)) is not None:
        yield f"  {over}."
    prompts = {name.split("/", 1)[1]: count for name, count in m.items() if name.startswith("prompts/")}
    if prompts:
        yield (
            "  prompts sampled: "
            + ", ".join(f"{count} {reason}" for reason, count in sorted(prompts.items()))
            + "."
        )
    if "flipped" in m:
        yield (
            f"  {m['flipped/dropped']} of {m['flipped']} flipped labels were dropped "
            f"({m['flipped/dropped_by_chance']:.1f} expected by chance)."
        )
    if m.get("verdict") == "not_enough_evidence" and r.round and "verdict_reason" not in m:
        yield "  too few pairs to tell whether this round helped."


def _examples(records: RunStore) -> Iterator[str]:
    for manifest in reversed(records.history().rounds):
        found = example_pairs(records.store, manifest)
        if len(found) < 2:
            continue
        yield f"Pairs of round {manifest.round}:"
        for example in found:
            margin = example["ensemble_margin"]
            yield (
                f"  {title_of(example)} "
                f"({example['pair_id']}, margin {margin:+.2f} nats, {example['reason']}): "
                f"{_short(example['prompt'])}"
            )
            yield f"    chosen:   {_short(example['chosen'])}"
            yield f"    rejected: {_short(example['rejected'])}"
        return


def _short(text: str, limit: int = 110) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"
