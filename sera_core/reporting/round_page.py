"""A round's page: made from the content of the round's files alone, so equal files give equal bytes.

Settings that no file holds (the target share, the rule) stand on the run's page: two runs that differ in them
may share a round's files.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.run_records import CANDIDATES
from sera_core.method.diagnostics import MIN_PAIRS_A_SIDE
from sera_core.method.pairing import ANCHORED
from sera_core.reporting import evidence as evidences
from sera_core.reporting import flow, length, plots, words
from sera_core.reporting.examples import examples
from sera_core.reporting.files import RoundFiles, Row
from sera_core.reporting.pages import render
from sera_core.reporting.plots import Point, Series
from sera_core.reviewers import NOISE
from sera_core.steps import FOLD


def round_page(number: int, artifacts: Mapping[str, Artifact]) -> str:
    """The page of one round, from its steps by role; without pairs there is no policy and no evidence."""
    files = RoundFiles(artifacts)
    ledger = list(files.rows("mixture", "ledger.parquet"))
    evidence, decision = files.json("evidence", "evidence.json"), files.json("decision", "decision.json")
    blocks = flow.blocks(files, ledger)
    alarm = None if decision is None else decision["alarm"]
    shares = length.shares(files, ledger, evidence)
    return render(
        "round.html.j2",
        number=number,
        sentence=_sentence(number, files, blocks),
        notes=[note for note in (said(artifacts) for said in NOTES) if note],
        decision=decision,
        decided=words.DECISIONS,
        verdicts=words.VERDICTS,
        stops=words.STOPS,
        lines=None if evidence is None else evidences.lines(evidence, decision),
        signals=evidences.signals(decision),
        score=evidences.score(decision),
        against=evidences.against(decision),
        reliance_changes=evidences.reliance_change_rows(decision),
        compared_by=evidences.compared_by(decision),
        reliance_rows=[] if evidence is None else evidences.reliance_rows(evidence),
        reliance_headings=[head for head, *_ in evidences.RELIANCE],
        equal_features=[] if evidence is None else evidences.equal_features(evidence),
        selection_rows=evidences.selection_rows(decision),
        increment=_judged_by_increment(files),
        margins=None if evidence is None else _margins(evidence),
        margins_plot=None if evidence is None else _margins_plot(evidence),
        lesson=[] if evidence is None else evidences.margin_notes(evidence),
        blocks=blocks,
        apart=flow.dropped_on_other_sides(ledger),
        histograms=histograms(ledger),
        examples=[(title_of(example), example) for example in examples(files, ledger)],
        reasons=words.REASONS,
        shares=[evidences.rate_line(name, rate) for name, rate in shares],
        shares_plot=_shares_plot(shares),
        correlation=None if evidence is None else evidence["heldout/length_margin_correlation"],
        few=evidence is not None and words.too_few(evidence["heldout/margin"]),
        alarm=alarm,
        alarm_words=length.alarm_words(alarm),
        alarm_parts=length.alarm_parts(alarm),
        alarm_pairs=MIN_PAIRS_A_SIDE,
        curves=_curves(files.lines("policy", "log.jsonl")),
        steps=len(files.lines("policy", "log.jsonl")),
        flips=_flips(files, ledger),
        inputs=_inputs(artifacts),
    )


EXAMPLES = {
    "kept": "Trained on: the human pair with the largest margin",
    "dropped": "Dropped: of the human pairs left out, the one with the lowest margin",
    "suspicious": "Dropped as suspicious: the human pair with the lowest margin",
    "unclear": "Dropped as not clearly preferred: the human pair with the lowest margin",
    "generated": "Generated: the policy's own answers, the pair with the largest margin",
}


def title_of(example: Row) -> str:
    """What an example is an example of. A margin above 0 that noise can make is unclear, not suspicious."""
    if example["reason"] != "not_preferred":
        return EXAMPLES[example["kind"]]
    return EXAMPLES["suspicious" if example["ensemble_margin"] < 0 else "unclear"]


def _sentence(number: int, files: RoundFiles, blocks: Sequence[flow.Block]) -> str:
    """What the round did, in one plain sentence."""
    human = blocks[0]
    judged = files.size("scored", "scored.parquet")
    pairs = words.plural(judged, "human pair")
    if number == 0:
        did = f"Round 0 took {pairs} as they came, with no trained policy yet to review them by"
    else:
        selected = sum(row["kept"] for row in files.rows("human", "ledger.parquet", ["kept"]))
        crossfit = "head_mixture" in files.artifacts["scored"].record.inputs
        margins = "the margins of fold policies" if crossfit else "the head's own margins"
        did = f"Round {number} reviewed {pairs} by {margins} and selected {selected:,}"
    if len(blocks) == 3:
        answers = files.size("responses", "responses.parquet")
        asked = {row["prompt_id"] for row in files.rows("responses", "responses.parquet", ["prompt_id"])}
        did += (
            f", made {words.plural(blocks[2].given, 'pair')} from {words.plural(answers, 'answer')} "
            f"{_given_by(files)} to {words.plural(len(asked), 'prompt')}{_ordered_by(files)}"
        )
    total = files.size("mixture", "mixture.parquet")
    if "policy" not in files:
        return f"{did}, and ended there, because no pairs were left to train on."
    if len(blocks) < 3:
        return f"{did}, and trained the policy on {total:,}."
    mix = f"{human.kept:,} human and {blocks[2].kept:,} generated pairs"
    return f"{did}, and trained the policy on {mix} ({words.percent(blocks[2].kept / total)} generated)."


def _given_by(files: RoundFiles) -> str:
    """Whose answers they are."""
    made = files.artifacts["responses"]
    given = made.record.inputs["samples"]
    if given is not None and given.step == CANDIDATES:
        return "of a file"
    return "of the head and the start policy" if made.record.fields["rule"] == ANCHORED else "of the head"


def _ordered_by(files: RoundFiles) -> str:
    """Who ordered the answers, where it was not the implicit reward, and how often that agrees."""
    if "ratings" not in files.artifacts:
        return ""
    rater = files.artifacts["ratings"].record.fields["rater"]["rater"]
    agrees = files.artifacts["responses"].record.metrics.get("pairs/implicit_agrees")
    also = "" if agrees is None else f", with which the implicit reward agrees in {words.percent(agrees)}"
    return f" (ordered by the rater {rater}{also})"


def noise_sentence(artifacts: Mapping[str, Artifact]) -> str | None:
    """The margin that noise of the arithmetic alone stays below, where it was measured."""
    measured = [
        (kind, value)
        for role, kind in (("scored", "human"), ("responses", "generated"))
        if role in artifacts
        for name, value in artifacts[role].record.metrics.items()
        if name.startswith(NOISE)
        and any(given.startswith("exact-policy-000") for given in artifacts[role].record.inputs)
    ]
    if not measured:
        return None
    floors = " and ".join(f"{value:.2g} nats for {kind} pairs" for kind, value in measured)
    return f"Noise of the arithmetic alone stays below a margin of {floors} (in 95 % of pairs)."


def memory_sentence(artifacts: Mapping[str, Artifact]) -> str | None:
    """How far the head's margins are memories, where human pairs were reviewed by fold policies."""
    metrics = artifacts["scored"].record.metrics if "scored" in artifacts else {}
    head, fitted = metrics.get("review/head_mean"), metrics.get("review/crossfit_mean")
    if head is None or fitted is None:
        return None
    return (
        f"The {words.plural(metrics['review/pairs'], 'human pair')} that the head was trained on have a mean "
        f"margin of {words.number(head)} nats under the head, and {words.number(fitted)} under the fold "
        "policies, which were not trained on them."
    )


def smoothing_sentence(artifacts: Mapping[str, Artifact]) -> str | None:
    """How far labels of generated pairs were smoothed, where two heads' agreement decided it."""
    metrics = artifacts["policy"].record.metrics if "policy" in artifacts else {}
    if "consistency" not in metrics:
        return None
    if (agree := metrics["consistency"]) is None:
        return "Labels were not smoothed: there are no two heads yet whose rankings could be compared."
    return (
        f"The last two heads rank {words.percent(agree)} of the pairs of answers to a prompt alike, so "
        f"labels of generated pairs were smoothed by {1 - agree:.2f}."
    )


NOTES = (noise_sentence, memory_sentence, smoothing_sentence)
"""What is said of a round below its first sentence, where there is something to say."""


def _judged_by_increment(files: RoundFiles) -> bool:
    """Whether rewards were measured against a past policy: then each is only the last increment."""
    if "scored" not in files:
        return False
    scored = files.artifacts["scored"]
    given = scored.record.inputs
    reference = given.get("reference-000", given.get(f"reference-000{FOLD}000"))
    if reference is None:
        return False
    inputs = Artifact(scored.store, reference).record.inputs
    return inputs.get("policy") != inputs.get("model")


def _margins(evidence: dict[str, Any]) -> list[tuple[str, list[evidences.Line]]]:
    """Trained and held-out pairs side by side."""
    pairs = (("mean margin, nats", "margin"), ("reward accuracy", "rewards/accuracies"))
    return [
        (name, [evidences.rate_line(side, evidence[f"{side}/{key}"]) for side in ("trained", "heldout")])
        for name, key in pairs
    ]


def _margins_plot(evidence: dict[str, Any]) -> Markup | None:
    rows = [
        ("human pairs trained on", "b", evidence["trained/margin"]),
        ("held-out pairs", "a", evidence["heldout/margin"]),
    ]
    measured = [(name, style, _point(rate)) for name, style, rate in rows if rate["value"] is not None]
    return plots.intervals(measured, "mean margin, nats", mark=0.0)


def _shares_plot(shares: Sequence[tuple[str, dict[str, Any]]]) -> Markup | None:
    rows = [
        (name, "b" if name.endswith("trained on") else "a" if name.startswith("held") else "c", _point(rate))
        for name, rate in shares
        if rate["value"] is not None
    ]
    return plots.intervals(rows, "share of pairs whose longer answer is chosen", mark=0.5)


def _point(rate: dict[str, Any], x: float = 0.0) -> Point:
    return Point(x, rate["value"], rate["low"], rate["high"])


def histograms(ledger: Sequence[Row]) -> list[tuple[str, Markup]]:
    """Margins of the pairs that were judged: trained on, or dropped."""
    made = []
    for origin in ("human", "generated"):
        sides: dict[bool, list[float]] = {True: [], False: []}
        for row in ledger:
            if row["origin"] == origin and row["pair_id"] and words.finite(row["ensemble_margin"]):
                sides[row["kept"]].append(row["ensemble_margin"])
        plot = plots.histogram(sides[True], sides[False], f"ensemble margin of {origin} pairs, nats")
        made += [] if plot is None else [(origin, plot)]
    return made


CURVES = (
    ("loss", "loss", "c"),
    ("rewards/margins", "reward margin of the batch (β times nats)", "b"),
    ("rewards/accuracies", "reward accuracy of the batch", "a"),
)


def _curves(log: Sequence[Row]) -> list[Markup]:
    """A plot a quantity, over optimizer steps."""
    made = []
    for key, name, style in CURVES:
        points = [Point(line["step"] + 1, line[key]) for line in log if words.finite(line.get(key))]
        plot = plots.lines([Series(name, style, points)], "optimizer step", f"training: {name}")
        made += [] if plot is None else [plot]
    return made


def _flips(files: RoundFiles, ledger: Sequence[Row]) -> dict[str, Any] | None:
    """Turned labels (data.flip_fraction) among the judged and the dropped human pairs; None without any."""
    flipped = set(files.json("pairs", "flipped.json") or [])
    if not flipped:
        return None
    judged = [row for row in ledger if row["origin"] == "human" and row["stage"] in ("select", "mix")]
    counts = Counter((row["pair_id"] in flipped, row["kept"]) for row in judged)
    turned, dropped = counts[True, True] + counts[True, False], counts[True, False] + counts[False, False]
    return {
        "judged": len(judged),
        "flipped": turned,
        "dropped": dropped,
        "flipped_dropped": counts[True, False],
        "by_chance": turned / max(1, len(judged)) * dropped,
    }


def _inputs(artifacts: Mapping[str, Artifact]) -> list[tuple[str, str, int | None, int, str]]:
    """Every file the page rests on: role, path, rows, bytes, sha256."""
    return [
        (role, path, file.rows, file.bytes, file.sha256)
        for role, artifact in sorted(artifacts.items())
        for path, file in sorted(artifact.record.files.items())
    ]
