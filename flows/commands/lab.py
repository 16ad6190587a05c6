"""`sera lab`: does the method rely less on a planted feature than plain DPO and a random selection?"""

import argparse
import json
from pathlib import Path
from typing import Any

from flows.commands.compare import as_words, print_comparison, refuse_set, seeds_of
from flows.commands.run import add_set, finishing
from flows.commands.tables import print_text
from flows.compare import check_comparison, run_arms
from flows.display.compare_page import check_page, write_page
from flows.display.compared import Compared, as_json, compared
from flows.experiments import load_experiment
from flows.laboratory import FILES, base_policy, train_file
from flows.length_only import Preferred, in_words, longer_preferred
from sera_core.config import SeraConfig
from sera_core.errors import InputError

ARM_NAMES, SEEDS = "sera,random,dpo", "0,1,2"
EXPERIMENT = "bundled:lab"
ELSEWHERE = {
    "seed": "the seeds are given with --seeds",
    "data.train": "the train files are given with --files; `sera compare` takes your own",
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
    sub.add_argument("--out", metavar="FOLDER", help="also write FOLDER/<file>/compare.html")
    add_set(sub)
    sub.set_defaults(command=lab_command)


def lab_command(args: argparse.Namespace) -> int:
    """Train the start policy if the store has none, run what is not done yet, and print the comparisons."""
    files, arms, seeds = as_words(args.files), as_words(args.arms), seeds_of(args.seeds)
    refuse_set(args.set, ELSEWHERE)
    for file in files:
        _check(file, args, arms, seeds)
    policy = base_policy(args.store)
    found: dict[str, Compared] = {}
    longer: dict[str, Preferred] = {}
    with finishing(args) as finish:  # one server for all files: Prefect keeps the first one's address
        for file in files:
            config = _config(file, args.set, policy)
            runs = run_arms(config, arms, seeds, _name(file), args.store, finish)
            found[file], longer[file] = compared(runs), longer_preferred(runs)
            folder = _folder(args.out, file)
            page = None if folder is None else write_page(found[file], _name(file), folder)
            if not args.json:
                print_text(f"{file}: {FILES[file]}.")
                print_comparison(found[file], _name(file), args.seeds, page)
                print_text(in_words(longer[file]))
    if args.json:
        print(json.dumps({"arms": {file: _arms(found[file], longer[file]) for file in files}}))
    return 0


def _arms(found: Compared, longer: Preferred) -> dict[str, Any]:
    """Each run as in `sera compare --json`, with the pairs that differ in length only."""
    arms = as_json(found)["arms"]
    for arm, by_seed in longer.items():
        for seed, shares in by_seed.items():
            shown = {"length_only": shares[max(shares)], "length_only_round_0": shares[min(shares)]}
            arms[arm][str(seed)] |= shown
    return arms


def _check(file: str, args: argparse.Namespace, arms: list[str], seeds: list[int]) -> None:
    if file not in FILES:
        raise InputError(f"--files {file!r}: no such file; choose from {', '.join(FILES)}")
    check_comparison(_config(file, args.set), arms, seeds, _name(file))
    if (folder := _folder(args.out, file)) is not None:
        check_page(folder)


def _config(file: str, sets: list[str], policy: Path | None = None) -> SeraConfig:
    source = [] if policy is None else [f"model.source={policy}"]
    return load_experiment(EXPERIMENT, [f"data.train={train_file(file)}", *source, *sets])


def _name(file: str) -> str:
    return f"lab-{file}"


def _folder(out: str | None, file: str) -> Path | None:
    return None if out is None else Path(out) / file
