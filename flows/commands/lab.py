"""`sera lab`: does the method rely less on a planted feature than plain DPO and a random selection?"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.commands.compare import as_words, print_comparison, refuse_set, seeds_of
from flows.commands.run import add_set, finishing
from flows.commands.tables import print_text
from flows.compare import check_comparison, run_arms
from flows.display.compare_page import check_page, write_page
from flows.display.compared import Compared, as_json, compared
from flows.experiments import load_experiment
from flows.flipped_labels import Found, flipped_found, flips_in_words
from flows.laboratory import FILES, base_policy, settings_of
from flows.length_only import Preferred, in_words, longer_preferred
from sera_core.config import SeraConfig
from sera_core.errors import InputError

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
    flipped: dict[str, Found] = {}
    with finishing(args) as finish:  # one server for all files: Prefect keeps the first one's address
        for file in files:
            config = _config(file, args.set, policy)
            runs = run_arms(config, arms, seeds, _name(file), args.store, finish)
            found[file], longer[file] = compared(runs), longer_preferred(runs)
            flipped[file] = flipped_found(runs)
            folder = _folder(args.out, file)
            page = None if folder is None else write_page(found[file], _name(file), folder)
            if not args.json:
                print_text(f"{file}: {FILES[file]}.")
                print_comparison(found[file], _name(file), args.seeds, page)
                print_text(in_words(longer[file]))
                for line in flips_in_words(flipped[file]):
                    print_text(line)
    if args.json:
        arms_of = {file: _arms(found[file], longer[file], flipped[file]) for file in files}
        print(json.dumps({"arms": arms_of}))
    return 0


def _arms(found: Compared, longer: Preferred, flipped: Found) -> dict[str, Any]:
    """Each run as in `sera compare --json`, with the pairs that differ in length only, and flipped labels."""
    arms = as_json(found)["arms"]
    for arm, by_seed in longer.items():
        for seed, shares in by_seed.items():
            shown = {"length_only": shares[max(shares)], "length_only_round_0": shares[min(shares)]}
            arms[arm][str(seed)] |= shown
    for arm, by_seed in flipped.items():
        for seed, counted in by_seed.items():
            arms[arm][str(seed)]["flipped"] = asdict(counted)
    return arms


def _check(file: str, args: argparse.Namespace, arms: list[str], seeds: list[int]) -> None:
    if file not in FILES:
        raise InputError(f"--files {file!r}: no such file; choose from {', '.join(FILES)}")
    check_comparison(_config(file, args.set), arms, seeds, _name(file))
    if (folder := _folder(args.out, file)) is not None:
        check_page(folder)


def _config(file: str, sets: list[str], policy: Path | None = None) -> SeraConfig:
    source = [] if policy is None else [f"model.source={policy}"]
    return load_experiment(EXPERIMENT, [*settings_of(file), *source, *sets])


def _name(file: str) -> str:
    return f"lab-{file}"


def _folder(out: str | None, file: str) -> Path | None:
    return None if out is None else Path(out) / file
