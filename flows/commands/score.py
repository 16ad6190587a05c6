"""`sera score`: compute the margins of a preference file."""

import argparse
import gc
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from flows.commands.capability_inputs import (
    InputPair,
    Limits,
    RenderedPair,
    check_device,
    check_same_tokens,
    count_reasons,
    dropped_table,
    find_policy,
    open_policy,
    open_renderer,
    policy_folder,
    read_pairs,
    reading_from_flags,
    render_pairs,
)
from flows.commands.output import (
    check_output,
    check_positive,
    print_result,
    quiet_stdout,
    rate,
    write_output,
)
from flows.display.progress import reporter
from sera_core.data.preferences import Drop
from sera_core.errors import InputError
from sera_core.method.diagnostics import reward_accuracy
from sera_core.method.rewards import quantise
from sera_core.models.model_sources import Source
from sera_core.reporting import words
from sera_core.reviewers import judge_responses, rounding, scored_table
from tasks.engines.sampler import position_limit


def score(args: argparse.Namespace) -> int:
    """Score every pair of a file."""
    _check_score(args)
    beside = args.out.with_name(f"{args.out.stem}.dropped.parquet")
    for path in (args.out, beside):
        check_output(path, args.force)
    named = {"--policy": args.policy} | ({"--reference": args.reference} if args.reference else {})
    sources = {flag: find_policy(flag, source) for flag, source in named.items()}
    given, degenerate = read_pairs(args.pairs, reading_from_flags(args))
    with quiet_stdout(), tempfile.TemporaryDirectory(prefix="sera-") as scratch:
        folders = _policy_folders(sources, Path(scratch))
        pairs, unfit = _render(args, folders, given)
        scores = [_score_under(args, flag, folder, pairs) for flag, folder in folders.items()]
    scored = _judge(args, pairs, scores)
    write_output(dropped_table({"data": degenerate, "render": unfit}), beside)
    write_output(scored, args.out)
    _print_score(args, scored, count_reasons([*degenerate, *unfit]), scores)
    return 0


@dataclass(frozen=True)
class _Scores:
    """Log-probabilities under one policy (chosen and rejected alternating), and their cost."""

    logps: np.ndarray
    tokens: int
    seconds: float


def _check_score(args: argparse.Namespace) -> None:
    if args.score == "simpo" and args.reference is not None:
        raise InputError("--reference: --score simpo has no reference; leave it out, or use --score implicit")
    if args.score != "simpo" and args.reference is None:
        raise InputError(
            f"--score {args.score} needs a reference: give --reference (the model the policy was "
            "trained from), or use --score simpo, which has none"
        )
    if not (args.beta > 0 and math.isfinite(args.beta)):
        raise InputError(f"--beta {args.beta}: must be a number above 0")
    check_positive(args, "max_prompt_tokens", "max_response_tokens", "tokens_per_batch")


def _policy_folders(sources: dict[str, Source], scratch: Path) -> dict[str, Path]:
    return {flag: policy_folder(flag, source, scratch / flag.strip("-")) for flag, source in sources.items()}


def _render(
    args: argparse.Namespace, folders: dict[str, Path], given: Sequence[InputPair]
) -> tuple[list[RenderedPair], list[Drop]]:
    """The pairs as token ids, after checking that policy and reference tokenize them alike."""
    renderers = [
        open_renderer(flag, folder, args.chat_template, args.template_kwargs)
        for flag, folder in folders.items()
    ]
    for reference in renderers[1:]:
        check_same_tokens(renderers[0], reference, given)
    positions = [limit for folder in folders.values() if (limit := position_limit(folder)) is not None]
    limits = Limits(
        args.max_prompt_tokens, args.max_response_tokens, args.on_long, min(positions) if positions else None
    )
    return render_pairs(renderers[0], given, limits)


def _score_under(args: argparse.Namespace, flag: str, folder: Path, pairs: Sequence[RenderedPair]) -> _Scores:
    from sera_core.models.logprobs import score_tokens, sequence_logps

    device = check_device(args.device)
    items = [(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    policy = open_policy(flag, folder, args.dtype, device)
    started = time.monotonic()
    with reporter(f"score under the {flag.strip('-')}") as report:
        logps = sequence_logps(
            policy,
            items,
            tokens_per_batch=args.tokens_per_batch,
            progress=lambda done, total: report(done, total, "responses"),
        )
    seconds = time.monotonic() - started
    del policy
    gc.collect()
    return _Scores(logps, score_tokens(items), seconds)


def _judge(args: argparse.Namespace, pairs: Sequence[RenderedPair], scores: Sequence[_Scores]) -> pa.Table:
    """The scored table. Without past rounds the ensemble is the policy itself."""
    policy, *reference = [quantise(found.logps) for found in scores]
    tokens = np.array([len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)])
    judged = judge_responses(args.score, args.beta, [1.0], [policy], reference, tokens)
    return scored_table(
        [pair.pair.pair_id for pair in pairs],
        (policy[0::2], policy[1::2]),
        (reference[0][0::2], reference[0][1::2]) if reference else None,
        (tokens[0::2], tokens[1::2]),
        (judged.reward[0::2], judged.reward[1::2]),
        (judged.ensemble[0::2], judged.ensemble[1::2]),
        args.beta,
        rounding(args.score),
    )


def _print_score(
    args: argparse.Namespace, scored: pa.Table, dropped: dict[str, int], scores: Sequence[_Scores]
) -> None:
    margins = scored["margin"].to_numpy()
    finite = margins[np.isfinite(margins)]
    tokens, seconds = sum(found.tokens for found in scores), sum(found.seconds for found in scores)
    value = {
        "pairs": scored.num_rows,
        "dropped": dropped,
        "out": str(args.out),
        "accuracy": reward_accuracy(finite),
        "mean_margin": float(finite.mean()) if finite.size else math.nan,
        "tokens": tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": rate(tokens, seconds),
    }
    lines = [
        f"{args.out}: {scored.num_rows:,} pairs scored ({args.score}), {sum(dropped.values()):,} dropped",
        *words.count_lines(dropped),
        f"chosen preferred in {value['accuracy']:.1%}, mean margin {value['mean_margin']:.3f} nats",
        f"{tokens:,} tokens in {seconds:.1f} s ({value['tokens_per_second']:,.0f} tokens/s)",
    ]
    if finite.size < margins.size:
        lines.append(
            f"{margins.size - finite.size:,} margins are not finite; `sera select` drops them as non_finite"
        )
    print_result(args, value, lines)
