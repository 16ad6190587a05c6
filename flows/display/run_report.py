"""A run as HTML: index.html, pages of each round and of its pairs, the answers. No Prefect, no torch."""

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from flows.display.fine_tuning import FineTuned, fine_tuning
from flows.display.run_view import best_words, verdict_words
from flows.outputs import check_place
from flows.running.open_run import test_record
from sera_core.artifacts.folders import write_whole
from sera_core.artifacts.history import History
from sera_core.artifacts.manifest import Artifact, find_record
from sera_core.artifacts.run_records import RoundManifest, RunRecord, differences, flatten
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.config import SeraConfig
from sera_core.errors import InputError
from sera_core.method.panel import TOKENS
from sera_core.reporting import words
from sera_core.reporting.answers_page import PAGE as ANSWERS
from sera_core.reporting.answers_page import answers_page
from sera_core.reporting.evidence import Line, rate_line, reliance_rows
from sera_core.reporting.files import RoundFiles
from sera_core.reporting.pages import GENERATOR, render
from sera_core.reporting.pair_browser import PAGE, write_pair_browser
from sera_core.reporting.plots import Point, Series, lines

DEFAULT_STORE = "./sera-store"
TEST_RATES = (
    ("reward accuracy", "test/rewards/accuracies", 3),
    ("mean margin, nats", "test/margin", 3),
    ("chosen answer is longer", "test/chosen_longer", 3),
    ("preferred answer is longer", "test/preferred_longer", 3),
)


def write_run_report(store_url: str, run: str, out: Path) -> list[Path]:
    """Write `out`/index.html, `out`/answers.html, `out`/round-000.html, `out`/round-000/pairs.html, ….

    Returns their paths.

    Raises:
        InputError: no such run, `out` is a file, or an existing file with such a name is not a report.
    """
    records = RunStore(open_store(store_url), run)
    if not records.configs():
        raise InputError(f"run {run!r}: not in the store {store_url}; `sera list` names the runs there")
    rounds = records.history().rounds
    evidence = {
        m.round: Artifact(records.store, m.steps["evidence"]) for m in rounds if "evidence" in m.steps
    }
    answers = answers_page(run, evidence)
    pages = {"index.html": _index(records, store_url, answers is not None).encode()}
    if answers is not None:
        pages[ANSWERS] = answers.encode()
    pages |= {_page(m): _round_page(records, m) for m in rounds}
    browsers = [_pairs_page(m) for m in rounds]
    refuse_foreign(out, [*pages, *browsers])
    out.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        write_whole(out / name, page)
    for manifest, name in zip(rounds, browsers, strict=True):
        folder = (out / name).parent
        folder.mkdir(exist_ok=True)
        write_pair_browser(RoundFiles(_artifacts(records, manifest)), manifest.round, folder)
    return [out / name for name in (*pages, *browsers)]


def _page(manifest: RoundManifest) -> str:
    return f"round-{manifest.round:03d}.html"


def _pairs_page(manifest: RoundManifest) -> str:
    return f"round-{manifest.round:03d}/{PAGE}"


def _artifacts(records: RunStore, manifest: RoundManifest) -> dict[str, Artifact]:
    return {role: Artifact(records.store, ref) for role, ref in manifest.steps.items() if ref is not None}


def _round_page(records: RunStore, manifest: RoundManifest) -> bytes:
    return Artifact(records.store, manifest.steps["report"]).path("report.html").read_bytes()


def refuse_foreign(out: Path, names: Sequence[str]) -> None:
    if os.path.lexists(out) and not out.is_dir():
        raise InputError(f"--out {out}: this is a file or a broken link; give a folder")
    check_place(out / "index.html")
    for name in names:
        path = out / name
        if path.parent != out:
            _refuse_foreign_folder(path.parent, path.name)
        if path.is_symlink():
            raise InputError(
                f"{path}: this is a link; remove it, since the report is not written through links"
            )
        if path.exists() and not _is_report(path):
            raise InputError(
                f"{path}: exists and is not a sera-flow report; give --out another folder, or move it away"
            )


def _refuse_foreign_folder(folder: Path, page: str) -> None:
    """Refuse a folder of the report's that is a link or a file, or holds something without the page."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(
            f"{folder}: this is a link or a file, but the report needs a folder there; remove it"
        )
    if folder.exists() and any(folder.iterdir()) and not (folder / page).exists():
        raise InputError(
            f"{folder}: this folder has files of another kind; give --out another folder, or move it away"
        )


def _is_report(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return f'content="{GENERATOR}"' in stream.read(2000).decode(errors="replace")


def _index(records: RunStore, store_url: str, sampled: bool) -> str:
    configs, history = records.configs(), records.history()
    config = configs[-1].settings
    stop_reason, best, test = records.stop_reason(), history.best, test_record(records)
    rounds, tuned = [_row(manifest, best) for manifest in history.rounds], fine_tuning(records)
    return render(
        "run.html.j2",
        run=records.run,
        stop_reason=stop_reason,
        state=records.state(),
        state_words=_state_words(records, config, stop_reason),
        verdict=verdict_words(records),
        tuned=None if tuned is None else tuned.words,
        best=None if best is None else best.round,
        best_words=_best_words(history),
        overlap_words=_overlap_words(history),
        rounds=rounds,
        answers=ANSWERS if sampled else None,
        increment=config.review.reference == "previous",
        plots=trends(history.rounds) + _lengths(history.rounds) + _losses(tuned),
        lesson=_margin_note(history),
        test=None if test is None else _test_lines(test["metrics"]),
        test_round=None if test is None else test["round"],
        export=_export(records.run, store_url),
        heads=[(m.round, m.artifacts["policy"]["sha256"]) for m in history.lineage],
        chain=[(m.round, m.parent_sha256) for m in history.rounds],
        config_sha256=configs[-1].config_sha256,
        changed=differences(configs[0].config, configs[-1].config),
        config=_settings(configs[-1]),
        rerun=_rerun(records, history, stop_reason),
    )


def _row(manifest: RoundManifest, best: RoundManifest | None) -> dict[str, Any]:
    m = manifest.metrics
    accuracy = m.get("heldout/rewards/accuracies")
    return {
        "round": manifest.round,
        "page": _page(manifest),
        "pairs_page": _pairs_page(manifest),
        "best": best is not None and manifest.round == best.round,
        "decision": manifest.decision,
        "reason": manifest.reason,
        "stop_reason": manifest.stop_reason,
        "human": manifest.pairs["human"],
        "generated": manifest.pairs["generated"],
        "share": manifest.generated_share,
        "target": manifest.target_share,
        "accuracy": accuracy,
        "few": words.too_few(accuracy) and "too few" not in manifest.reason,
        "change": m.get("heldout/accuracy_change"),
        "trained": m.get("trained/margin"),
        "heldout": m.get("heldout/margin"),
        "kl": m.get("samples/kl_reference"),
        "answer_tokens": m.get("samples/tokens"),
        "preferred_longer": m.get("heldout/preferred_longer"),
        "alarm": m.get("alarm"),
        "tokens": m.get("tokens"),
        "seconds": m.get("seconds"),
    }


def _state_words(records: RunStore, config: SeraConfig, stop_reason: str | None) -> str:
    done = words.plural(records.history().next_round, "round")
    if stop_reason is not None:
        text = f"Stopped after {done} ({stop_reason}): {words.STOPS.get(stop_reason, stop_reason)}."
        return text + _budget_words(records, stop_reason)
    waiting = records.waiting()
    if waiting is not None:
        until = f"until {waiting['until']}: `sera review {records.run}`"
        return f"Waiting for a review of round {waiting['round']}, {until}."
    return f"Open: {done} of at most {config.limits.rounds} finished; rerun the experiment to continue."


def _budget_words(records: RunStore, stop_reason: str) -> str:
    if stop_reason != "budget":
        return ""
    stop = records.stop()
    return "" if stop is None else f" {stop.after}."


def _best_words(history: History) -> str:
    best = history.best
    if best is None:
        return "No round was promoted, so there is no best round."
    if (reason := best_words(history)).startswith("round "):
        return f"R{reason[1:]}."
    accuracy = best.metrics["heldout/rewards/accuracies"]
    return (
        f"Round {best.round} is the best: of the promoted rounds it has the highest held-out reward "
        f"accuracy, {words.interval(accuracy)} on {words.plural(accuracy['n'], 'pair')} (ties go to the "
        "later round)."
    )


def _overlap_words(history: History) -> str:
    """Promoted rounds whose interval overlaps with that of the best round."""
    best = history.best
    if best is None or best.metrics.get("score_metric", "accuracy") != "accuracy":
        return ""
    low = best.metrics["heldout/rewards/accuracies"]["low"]
    near = [
        str(m.round)
        for m in history.promoted
        if m is not best
        and low is not None
        and (high := m.metrics["heldout/rewards/accuracies"]["high"]) is not None
        and high >= low
    ]
    if not near:
        return ""
    others = f"round{'s' if len(near) > 1 else ''} {', '.join(near)}"
    return f"Its interval overlaps with that of {others}, so their order may be chance."


def _series(rounds: Sequence[RoundManifest], key: str, name: str, style: str) -> list[Series]:
    rates = [(m.round, m.metrics.get(key)) for m in rounds]
    points = [
        Point(number, rate["value"], rate["low"], rate["high"])
        for number, rate in rates
        if rate and rate["value"] is not None
    ]
    return [Series(name, style, points)] if points else []


def trends(rounds: Sequence[RoundManifest]) -> list[tuple[Any, str]]:
    """(plot, caption) of win rate, held-out accuracy, reliance on length and mean margins by round."""
    length = f"heldout/reliance/{TOKENS}"
    margins = _series(rounds, "trained/margin", "trained pairs", "b") + _series(
        rounds, "heldout/margin", "held-out pairs", "a"
    )
    judged = [m for m in rounds if m.metrics.get("score_metric") == "win_rate"]
    wanted = [
        (
            lines(_series(judged, "score", "against the start policy", "a"), "round", "win rate", 0.5),
            "Win rate of the policy's answers to held-out prompts over the start policy's, by the judge that "
            "decides; 0.5 is a draw.",
        ),
        (
            lines(
                _series(rounds, "heldout/rewards/accuracies", "all pairs", "a")
                + _series(rounds, f"{length}/balanced", "balanced by length", "b"),
                "round",
                "accuracy",
                0.5,
            ),
            "Held-out reward accuracy; 0.5 is chance. Balanced: the mean over pairs whose chosen answer is "
            "longer and over those whose chosen answer is shorter.",
        ),
        (
            lines(_series(rounds, f"{length}/reliance", "length in tokens", "c"), "round", "reliance", 0.0),
            "Reliance on length, held-out pairs: accuracy where the chosen answer is longer, minus accuracy "
            "where it is shorter. 0 means that the policy does not use length.",
        ),
        (
            lines(margins, "round", "mean margin", 0.0),
            "Mean margin in nats of trained human pairs and of held-out pairs.",
        ),
    ]
    return [(plot, caption) for plot, caption in wanted if plot is not None]


def _lengths(rounds: Sequence[RoundManifest]) -> list[tuple[Any, str]]:
    """(plot, caption) of response length over the rounds."""
    wanted = [
        (
            lines(_series(rounds, "samples/tokens", "tokens per answer", "c"), "round", "length"),
            "Mean length of sampled answers to held-out prompts.",
        ),
        (
            lines(
                _series(rounds, "heldout/preferred_longer", "policy prefers the longer answer", "a")
                + _series(rounds, "heldout/chosen_longer", "chosen answer is longer", "c"),
                "round",
                "share of longer answers",
                0.5,
            ),
            "Held-out pairs: how often the policy and the labels prefer the longer answer.",
        ),
    ]
    return [(plot, caption) for plot, caption in wanted if plot is not None]


def _losses(tuned: FineTuned | None) -> list[tuple[Any, str]]:
    """(plot, caption) of the loss of the fine-tuning before round 0."""
    points = (
        [] if tuned is None else [Point(step, loss, None, None) for step, loss in enumerate(tuned.losses)]
    )
    series = [Series("conversations", "b", points)] if points else []
    plot = lines(series, "step", "nats a token")
    caption = "Loss of the fine-tuning before round 0, by optimizer step: nats per answer token of the batch."
    return [] if plot is None else [(plot, caption)]


def _margin_note(history: History) -> list[str]:
    """Whether margins grew from the first to the last head without an increase in accuracy."""
    heads = history.lineage
    if len(heads) < 2:
        return []
    first, last = heads[0].metrics, heads[-1].metrics
    margin = [m["heldout/margin"]["value"] for m in (first, last)]
    accuracy = [m["heldout/rewards/accuracies"] for m in (first, last)]
    if None in margin or None in (accuracy[0]["value"], accuracy[1]["low"]) or not margin[1] > margin[0]:
        return []
    growth = f"From round {heads[0].round} to {heads[-1].round} the mean held-out margin grew from "
    growth += f"{words.number(margin[0])} to {words.number(margin[1])} nats"
    if words.too_few(accuracy[1]):
        return [f"{growth}; {accuracy[1]['n']} held-out pairs are too few to tell whether accuracy grew."]
    if accuracy[1]["low"] > accuracy[0]["value"]:
        return [f"{growth}, and held-out accuracy grew with it."]
    return [
        f"{growth}, while held-out accuracy went from {words.number(accuracy[0]['value'])} to "
        f"{words.interval(accuracy[1])}: larger margins do not mean higher accuracy."
    ]


def _test_lines(metrics: dict[str, Any]) -> list[Line]:
    made = [rate_line(name, metrics[key], digits) for name, key, digits in TEST_RATES if metrics.get(key)]
    by_length = metrics.get("test/accuracy_by_length") or {}
    for key, name in (("chosen_longer", "longer"), ("chosen_shorter", "shorter")):
        if key in by_length:
            made.append(rate_line(f"accuracy where the chosen answer is {name}", by_length[key]))
    for row in reliance_rows(metrics, "test"):
        named = {cell.name: cell for cell in row.cells}
        wanted = ("reliance", "balanced accuracy")
        made += [replace(named[head], name=f"{head}, by {row.feature}") for head in wanted]
    return made


def _export(run: str, store_url: str) -> str:
    store = "" if store_url == DEFAULT_STORE else f" --store {shlex.quote(store_url)}"
    return f"sera export {run} --to policy{store}"


def _settings(record: RunRecord) -> list[tuple[str, str]]:
    return [
        (key, json.dumps(value, ensure_ascii=False)) for key, value in sorted(flatten(record.config).items())
    ]


def _rerun(records: RunStore, history: History, stop_reason: str | None) -> str:
    """What a rerun of the experiment would recompute."""
    used = {ref.key: ref for manifest in history.rounds for ref in manifest.used}
    missing = [ref.step for ref in used.values() if _is_missing(records, ref)]
    text = "Rerunning this experiment under this name recomputes no finished round."
    if stop_reason is None:
        text += f" It resumes with round {history.next_round}."
    held = len(used) - len(missing)
    steps = words.plural(len(used), "step")
    text += f" Under another name it would reuse {held:,} of these rounds' {steps} from the store"
    if not missing:
        return f"{text} and recompute none."
    return f"{text} and recompute the others ({', '.join(sorted(set(missing)))}) and their dependents."


def _is_missing(records: RunStore, ref: Any) -> bool:
    record = find_record(records.store, ref.step, ref.key)
    return record is None or record.digest != ref.digest
