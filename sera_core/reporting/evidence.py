"""The evidence of a round as a table: numbers with intervals, sample sizes, and whether they suffice."""

from dataclasses import dataclass
from typing import Any

from sera_core.method.panel import NAMES
from sera_core.method.sides import QUANTITY_WORDS
from sera_core.reporting import words
from sera_core.reporting.words import Rate

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """One number of the table, written out."""

    name: str
    value: str
    n: int | None
    note: str = ""


HELD = (
    ("held-out reward accuracy", "heldout/rewards/accuracies", 3, False),
    ("its change since the policy before", "heldout/accuracy_change", 3, True),
    ("mean held-out margin, nats", "heldout/margin", 3, False),
    ("its change since the policy before, nats", "heldout/margin_change", 3, True),
)
RELIANCE = (
    ("reliance", "reliance", True),
    ("balanced accuracy", "balanced", False),
    ("worst side", "worst_side", False),
    ("chosen has more of it", "aligned", False),
    ("chosen has less of it", "counter", False),
    ("equal", "equal", False),
    ("rank correlation", "correlation", True),
    ("after length", "after_length", True),
)
"""Columns of the reliance table: heading, quantity, whether a sign is shown."""
ANSWERS = (
    ("tokens of an answer", "samples/tokens", 1, False),
    ("share cut by the length limit", "samples/cut_by_limit", 3, False),
    ("KL to the start policy, nats an answer", "samples/kl_reference", 3, False),
    ("KL to the policy before, nats an answer", "samples/kl_previous", 3, False),
)
PLAIN = (
    ("share of held-out margins that changed sign", "heldout/sign_changes"),
    ("held-out pairs without a finite margin", "heldout/non_finite"),
    ("distinct bigrams among the answers", "samples/distinct_2"),
    ("overlap of a prompt's answers with each other", "samples/self_overlap"),
)


def lines(evidence: Metrics, decision: Metrics | None) -> list[Line]:
    """The table's rows, what was measured only."""
    rows = [_rate(evidence, *held, "pairs", _undecided(key, decision)) for held in HELD for key in [held[1]]]
    by_length = evidence.get("heldout/accuracy_by_length") or {}
    for key, name in (("chosen_longer", "longer"), ("chosen_shorter", "shorter")):
        rows.append(_rate(by_length, f"accuracy where the chosen answer is {name}", key, 3, False, "pairs"))
    rows += [_rate(evidence, *answer, "answers") for answer in ANSWERS]
    rows += [
        rate_line(f"score on {task}, less the start policy's", _counted(change), signed=True)
        for task, change in ((decision or {}).get("capabilities") or {}).items()
    ]
    rows += [
        Line(name, words.number(evidence[key], 0 if key.endswith("non_finite") else 3), None)
        for name, key in PLAIN
        if evidence.get(key) is not None
    ]
    return [row for row in rows if row is not None]


@dataclass(frozen=True)
class RelianceRow:
    """A row of the reliance table: a feature, with a cell for each column of RELIANCE."""

    feature: str
    cells: list[Line]


def features_of(metrics: Metrics, side: str = "heldout") -> list[str]:
    """Features whose reliance was measured on a side, built-in ones first; none in older records."""
    start, end = f"{side}/reliance/", "/balanced"
    names = [key[len(start) : -len(end)] for key in metrics if key.startswith(start) and key.endswith(end)]
    return sorted(names, key=_place)


def _place(name: str) -> tuple[int, str]:
    """Sorts built-in features first, in the panel's order."""
    return (NAMES.index(name) if name in NAMES else len(NAMES), name)


def reliance_rows(metrics: Metrics, side: str = "heldout") -> list[RelianceRow]:
    """A row for each feature in which any pair of the side differs; each number with its interval and n."""
    found = []
    for name in features_of(metrics, side):
        rates = {key: metrics.get(f"{side}/reliance/{name}/{key}") for _, key, _ in RELIANCE}
        if not _is_equal(metrics, side, name):
            cells = [rate_line(head, rates[key], signed=signed) for head, key, signed in RELIANCE]
            found.append(RelianceRow(words.feature(name), cells))
    return found


def equal_features(metrics: Metrics, side: str = "heldout") -> list[str]:
    """The other features: they are equal in both answers of every pair."""
    names = features_of(metrics, side)
    return [words.feature(name) for name in names if _is_equal(metrics, side, name)]


def _is_equal(metrics: Metrics, side: str, name: str) -> bool:
    rates = (metrics.get(f"{side}/reliance/{name}/{key}") for key in ("aligned", "counter"))
    return not any(rate and rate["n"] for rate in rates)


def selection_rows(decision: Metrics | None) -> list[RelianceRow]:
    """What the selection did to each feature in which pairs differ; none in round 0 and in older records."""
    found: Metrics = (decision or {}).get("selection") or {}
    rows = []
    for name in sorted(found, key=_place):
        feature = found[name]
        before, after = feature["before"], feature["after"]
        if before["correlation"]["value"] is None:
            continue
        cells = [
            rate_line("all pairs", _counted(before["more"])),
            rate_line("selected pairs", _counted(after["more"])),
            rate_line("difference", _counted(feature["excess"]), signed=True),
            rate_line("correlation, all pairs", _counted(before["correlation"]), signed=True),
            rate_line("selected pairs", _counted(after["correlation"]), signed=True),
            rate_line("after length, all pairs", _counted(before["after_length"]), signed=True),
            rate_line("selected pairs", _counted(after["after_length"]), signed=True),
        ]
        rows.append(RelianceRow(words.feature(name), cells))
    return rows


def against(decision: Metrics | None) -> list[Line]:
    """The change of the score against each promoted round; none in round 0 and in older records."""
    changes = ((decision or {}).get("against") or {}).items()
    return [
        rate_line(f"round {number}", _counted(change), signed=True)
        for number, change in sorted(changes, key=lambda item: int(item[0]))
    ]


def score(decision: Metrics | None) -> list[Line]:
    """This round's score; none in older records."""
    if not decision or not decision.get("score"):
        return []
    return [rate_line("this round", _counted(decision["score"])), *_judge(decision.get("judge"))]


def _judge(judge: Metrics | None) -> list[Line]:
    """How well the judge of the win rate agrees with the labels of the held-out pairs; none without one."""
    if judge is None:
        return []
    measured = judge["calibration"]
    status = "calibrated" if measured["calibrated"] else "uncalibrated"
    return [
        rate_line(
            f"agreement of the judge {judge['judge']} with the labels ({status})", measured["agreement"]
        ),
        rate_line("agreement of a word count with them", measured["agreement/word-count"]),
    ]


def reliance_change_rows(decision: Metrics | None) -> tuple[list[str], list[RelianceRow]]:
    """Headings, and the change of each feature's reliance against the first, the best and the last promoted
    round; none in round 0 and in older records."""
    changes: Metrics = (decision or {}).get("changes") or {}
    numbers = sorted({int(n) for feature in changes.values() for n in feature["reliance"]})
    best = ((decision or {}).get("best") or {}).get("round")
    shown = [n for n in numbers if n in (numbers[0], best, numbers[-1])]
    rows = [
        RelianceRow(
            words.feature(name),
            [
                rate_line(f"round {n}", _counted(changes[name]["reliance"][str(n)]), signed=True)
                for n in shown
            ],
        )
        for name in sorted(changes, key=_place)
        if any(changes[name]["reliance"][str(n)]["value"] is not None for n in shown)
    ]
    return [f"against round {n}" for n in shown], rows


def compared_by(decision: Metrics | None) -> str:
    """What the rounds were compared by, in words."""
    return QUANTITY_WORDS.get((decision or {}).get("quantity", ""), "")


def _counted(estimate: Metrics) -> Metrics:
    return {**estimate, "n": estimate["pairs"]}


def signals(decision: Metrics | None) -> list[Line]:
    """What else the decision looked at: the selection and the margins against the last head's."""
    found = (decision or {}).get("signals") or {}
    thresholds = ((decision or {}).get("verdict") or {}).get("thresholds") or {}
    rows = (
        (
            "overlap of the human pairs selected (Jaccard)",
            "overlap",
            "at least",
            thresholds.get("min_overlap"),
        ),
        ("shift of the train margins (KS distance)", "ks", "at most", thresholds.get("max_ks")),
    )
    return [
        Line(
            name,
            words.number(found[key]),
            None,
            f"{what} {limit} counts as unmoved" if limit is not None else "",
        )
        for name, key, what, limit in rows
        if found.get(key) is not None
    ]


def margin_notes(evidence: Metrics) -> list[str]:
    """Sentences that compare margins with accuracies."""
    grew, better = evidence["heldout/margin_change"], evidence["heldout/accuracy_change"]
    trained, heldout = evidence["trained/margin"], evidence["heldout/margin"]
    said = []
    if words.above_zero(grew):
        start = f"The mean held-out margin grew by {words.interval(grew, signed=True)} nats"
        change = words.interval(better, signed=True)
        if words.too_few(better):
            said.append(
                f"{start}; {better['n']} held-out pairs are too few pairs to tell whether accuracy grew too."
            )
        elif words.above_zero(better):
            said.append(f"{start}, and held-out accuracy grew with it ({change}).")
        else:
            said.append(
                f"{start}, held-out accuracy did not ({change}): growing margins are not growing accuracy."
            )
    else:
        said.append(
            f"The mean held-out margin did not clearly grow ({words.interval(grew, signed=True)} nats)."
        )
    if _apart(trained, heldout):
        said.append(
            "Pairs trained on have larger margins than held-out ones: margins on pairs just trained on are "
            "partly memorised."
        )
    return said


def rate_line(
    name: str, rate: Rate | None, digits: int = 3, signed: bool = False, unit: str = "pairs"
) -> Line:
    """One rate as a row; a dash where it was not measured."""
    note = f"too few {unit} to tell" if words.too_few(rate) else ""
    return Line(name, words.interval(rate, digits, signed), rate["n"] if rate else None, note)


def _rate(
    metrics: Metrics, name: str, key: str, digits: int, signed: bool, unit: str, note: str = ""
) -> Line | None:
    if metrics.get(key) is None:
        return None
    line = rate_line(name, metrics[key], digits, signed, unit)
    return line if line.note or not note else Line(line.name, line.value, line.n, note)


def _undecided(key: str, decision: Metrics | None) -> str:
    """What is said beside the change of accuracy: whether the verdict could use it."""
    if decision is None or key != "heldout/accuracy_change":
        return ""
    if decision["signals"]["accuracy_change"] is None:
        return "since the start policy: there is no head before"
    if "against" in decision:  # the verdict is about the metric, which has its own table
        return ""
    return "too few pairs to tell" if decision["verdict"]["name"] == "not_enough_evidence" else ""


def _apart(larger: Rate, smaller: Rate) -> bool:
    if words.too_few(larger) or words.too_few(smaller):
        return False
    if larger.get("low") is None or smaller.get("high") is None:
        return False
    return larger["low"] > smaller["high"]
