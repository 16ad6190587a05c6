"""`sera lab`: does the method rely less on a planted feature than plain DPO and a random selection?"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flows.commands.compare import (
    add_jobs,
    as_words,
    finishing_all,
    print_comparison,
    refuse_set,
    seeds_of,
)
from flows.commands.output import print_note
from flows.commands.run import add_set
from flows.commands.tables import print_text
from flows.compare import Runs, check_comparison, run_arms
from flows.display.compare_page import check_page, write_page
from flows.display.compared import Compared, as_json, compared
from flows.display.judged_arms import judged_json
from flows.experiments import load_experiment
from flows.flipped_labels import Found, flipped_found, flips_in_words
from flows.judged_arms import JudgedArms, check_judged, judge_arms
from flows.lab_answers import SETTINGS, LabAnswers, answers_in_words, lab_answers
from flows.laboratory import FILES, base_policy, settings_of
from flows.length_only import Preferred, in_words, longer_preferred
from sera_core.artifacts.canonical import finite
from sera_core.config import SeraConfig
from sera_core.errors import InputError
from sera_core.judges.named import Asking, NamedJudge, find_judge

ARM_NAMES, SEEDS = "sera,random,dpo", "0,1,2"
EXPERIMENT = "bundled:lab"
ELSEWHERE = {
    "seed": "the seeds are given with --seeds",
    "data.train": "the train files are given with --files; `sera compare` takes your own",
    "data.flip_fraction": "--files has files with flipped labels",
    "model.source": "the laboratory trains its start policy; `sera compare bundled:lab` takes another one",
}
"""Settings that the laboratory sets itself."""


def add_lab(commands: Any, common: argparse.ArgumentParser) -> None:
    """`sera lab [--files flip,noise,corr] [--arms a,b] [--seeds 0,1]`."""
    sub = commands.add_parser(
        "lab",
        parents=[common],
        help="compare arms on review sentences in which the labels favour longer answers; rerunning resumes",
        epilog="; ".join(f"{name}: {planted}" for name, planted in FILES.items()) + ".",
    )
    sub.add_argument("--files", default="flip", help=f"train files, of {', '.join(FILES)} (default: flip)")
    sub.add_argument("--arms", default=ARM_NAMES, help=f"as in `sera compare` (default: {ARM_NAMES})")
    sub.add_argument("--seeds", default=SEEDS, help=f"as in `sera compare` (default: {SEEDS})")
    sub.add_argument(
        "--judge",
        metavar="J",
        help="also sample answers to held-out prompts, count their sentences and positive ones, and compare "
        "them by a judge, as in `sera compare`: reviews (a classifier of review sentences), word-count, …",
    )
    sub.add_argument("--out", metavar="FOLDER", help="also write FOLDER/<file>/compare.html")
    add_jobs(sub)
    add_set(sub)
    sub.set_defaults(command=lab_command)


@dataclass(frozen=True)
class Measured:
    """What was found on one file."""

    arms: Compared
    longer: Preferred
    flipped: Found
    answers: LabAnswers | None
    judged: JudgedArms | None
    """What the judge says of the answers; None without one."""


def lab_command(args: argparse.Namespace) -> int:
    """Train the start policy if the store has none, run what is not done yet, and print the comparisons."""
    files, arms, seeds = as_words(args.files), as_words(args.arms), seeds_of(args.seeds)
    refuse_set(args.set, ELSEWHERE)
    judge = None if args.judge is None else find_judge(args.judge, Asking())
    for file in files:
        _check(file, args, arms, seeds)
    policy = base_policy(args.store)
    found: dict[str, Measured] = {}
    with finishing_all(args) as finish_all:  # one server for all files: Prefect keeps the first one's address
        for file in files:
            config, name = _config(file, args, policy), _name(file, args)
            found[file] = _measured(run_arms(config, arms, seeds, name, args.store, finish_all), judge)
            folder = _folder(args.out, file)
            page = None
            if folder is not None:
                page = write_page(found[file].arms, name, folder, found[file].judged)
            if not args.json:
                print_text(f"{file}: {FILES[file]}.")
                print_comparison(found[file].arms, name, args.seeds, page, found[file].judged)
                for line in _lines(found[file]):
                    print_text(line)
    if args.json:
        told: dict[str, Any] = {"arms": {file: _arms(measured) for file, measured in found.items()}}
        if judge is not None:
            told["judged"] = {file: judged_json(m.judged) for file, m in found.items() if m.judged}
        print(json.dumps(told))
    return 0


def _measured(runs: Runs, judge: NamedJudge | None) -> Measured:
    answers = None if judge is None else lab_answers(runs)
    judged = None if judge is None else judge_arms(runs, judge, None, print_note)
    return Measured(compared(runs), longer_preferred(runs), flipped_found(runs), answers, judged)


def _lines(measured: Measured) -> Iterator[str]:
    """The lines below the table."""
    yield in_words(measured.longer)
    yield from flips_in_words(measured.flipped)
    if measured.answers is not None:
        yield from answers_in_words(measured.answers)


def _arms(measured: Measured) -> dict[str, Any]:
    """Each run as in `sera compare --json`, with what only the laboratory measures."""
    arms = as_json(measured.arms)["arms"]
    for arm, by_seed in measured.longer.items():
        for seed, shares in by_seed.items():
            shown = {"length_only": shares[max(shares)], "length_only_round_0": shares[min(shares)]}
            arms[arm][str(seed)] |= shown
    for arm, by_seed in measured.flipped.items():
        for seed, counted in by_seed.items():
            arms[arm][str(seed)]["flipped"] = asdict(counted)
    for arm, by_seed in ({} if measured.answers is None else measured.answers.last).items():
        for seed, rates in by_seed.items():
            arms[arm][str(seed)]["answers"] = {name: finite(asdict(rate)) for name, rate in rates.items()}
    return arms


def _check(file: str, args: argparse.Namespace, arms: list[str], seeds: list[int]) -> None:
    if file not in FILES:
        raise InputError(f"--files {file!r}: no such file; choose from {', '.join(FILES)}")
    check_comparison(_config(file, args), arms, seeds, _name(file, args))
    if args.judge is not None:
        check_judged(_config(file, args))
    if (folder := _folder(args.out, file)) is not None:
        check_page(folder)


def _config(file: str, args: argparse.Namespace, policy: Path | None = None) -> SeraConfig:
    source = [] if policy is None else [f"model.source={policy}"]
    sampled = [] if args.judge is None else SETTINGS
    return load_experiment(EXPERIMENT, [*settings_of(file), *source, *sampled, *args.set])


def _name(file: str, args: argparse.Namespace) -> str:
    """Beginning of the runs' names; runs that sample answers are others."""
    return f"lab-{file}" if args.judge is None else f"lab-{file}-answers"


def _folder(out: str | None, file: str) -> Path | None:
    return None if out is None else Path(out) / file
