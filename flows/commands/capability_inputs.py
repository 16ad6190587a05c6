"""Inputs of the stand-alone commands: policies, and pairs and prompts as token ids."""

import argparse
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from flows.commands.output import print_note
from sera_core.artifacts import schema
from sera_core.data import loading
from sera_core.data.formats import COLUMNS, Reading
from sera_core.data.preferences import (
    Drop,
    Message,
    Pair,
    Prompt,
    drop_degenerate,
    drop_repeated_prompts,
)
from sera_core.data.sources import Row, read_rows
from sera_core.errors import InputError
from sera_core.guards.shown import one_line
from sera_core.models.model_sources import Source, materialise, resolve_source
from sera_core.models.policies import check_settings
from sera_core.models.weights import wrapper_of

if TYPE_CHECKING:
    from sera_core.data.rendering import Renderer

_ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
Ids = Sequence[int]
"""Token ids, packed at four bytes each; a list of Python integers takes nine times as much."""
PairIds = tuple[Ids, Ids, Ids]
"""Prompt, chosen, rejected."""
RENDER_BATCH = 256
"""Pairs rendered per call; bounds the tokenizer's unpacked output."""


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens. `positions` is the model's context length, prompt and response together."""

    prompt: int
    response: int
    on_long: str = "drop"
    positions: int | None = None

    def room(self, prompt: int) -> int:
        """Longest response allowed after a prompt of this length, in tokens."""
        return self.response if self.positions is None else min(self.response, self.positions - prompt)


@dataclass(frozen=True)
class InputPair:
    """A valid pair, and its token ids if the file has them (parquet files that sera-flow wrote)."""

    pair: Pair
    ids: PairIds | None


@dataclass(frozen=True)
class RenderedPair:
    """A pair as token ids."""

    pair: Pair
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids


# ------------------------------------------------------------------------------------------------- policies


@contextmanager
def flag_errors(what: str) -> Iterator[None]:
    """Turn a ValueError into an InputError that names the flag (exit code 2)."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{what}: {error}") from error


def find_policy(flag: str, source: str) -> Source:
    """Resolve the model source and check what can be checked offline.

    Raises:
        InputError: no such folder or package, or not a model.
    """
    with flag_errors(flag):
        return resolve_source(source)


def policy_folder(flag: str, source: Source, scratch: Path) -> Path:
    """Folder of the policy: a local one in place, any other source written to `scratch`."""
    with flag_errors(flag):
        prefix = wrapper_of(Path(source.location)) if source.kind == "folder" else ""
        if source.kind == "folder" and not prefix:
            check_settings(Path(source.location))
            return Path(source.location)
        if prefix:
            print_note(f"{flag}: stripping the prefix {prefix!r} from all tensor names")
        return materialise(source, scratch)


def open_renderer(flag: str, folder: Path, template: str | None, arguments: str | None = None) -> "Renderer":
    """Open the policy's tokenizer and chat template (or the one from --chat-template).

    Args:
        flag: the policy's flag, for messages.
        folder: the policy folder.
        template: value of --chat-template.
        arguments: value of --template-kwargs, a JSON object.

    Raises:
        InputError: there is no chat template, or it does not take these arguments.
    """
    from sera_core.data.rendering import Renderer

    renderer = Renderer(folder, template, _template_arguments(arguments))
    try:
        _ = renderer.end_of_turn_id
    except InputError as error:
        raise InputError(f"{flag}: {_with_flags(str(error))}") from error
    return renderer


def _template_arguments(given: str | None) -> dict[str, Any]:
    try:
        value = json.loads(given or "{}")
    except ValueError as error:
        raise InputError(f"--template-kwargs: not JSON ({error}); write a JSON object") from error
    if not isinstance(value, dict):
        raise InputError(
            "--template-kwargs: not an object; write one, such as '{\"enable_thinking\": false}'"
        )
    return value


def check_same_tokens(policy: "Renderer", reference: "Renderer", given: Sequence[InputPair]) -> None:
    """Refuse a reference that tokenizes a pair differently from the policy.

    Renderers with equal hashes are equal. Different hashes may still tokenize alike, so the token ids decide.
    """
    if policy.hash == reference.hash:
        return
    with flag_errors("--reference"):
        theirs = tokenize_pairs(reference, given)
    for g, ours, other in zip(given, tokenize_pairs(policy, given), theirs, strict=True):
        if ours != other:
            raise InputError(
                f"--reference: its tokenizer or chat template renders {g.pair.where} (pair {g.pair.pair_id}) "
                "to other tokens than the policy's, so their log-probabilities cannot be compared; give "
                "the model the policy was trained from"
            )


def open_policy(flag: str, folder: Path, dtype: Any, device: str) -> Any:
    """Load the policy's model in eval mode.

    Raises:
        InputError: transformers cannot open the folder.
    """
    from sera_core.models.policies import load_policy

    try:
        return load_policy(folder, dtype, device)
    except (ValueError, OSError) as error:
        raise InputError(f"{flag}: {folder} cannot be opened as a model: {one_line(error)}") from error


def check_device(device: str) -> str:
    """The torch device to use.

    Raises:
        InputError: `cuda` on a machine without an accelerator.
    """
    import torch

    from sera_core.models.devices import device_of

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: torch sees no accelerator here; leave the flag out, or see `sera doctor`"
        )
    return device_of(device)


# ---------------------------------------------------------------------------------------------------- pairs


def reading_from_flags(args: argparse.Namespace) -> Reading:
    """How rows are read, from the flags.

    Raises:
        InputError: --columns is not of the form ours=theirs.
    """
    columns: dict[str, str] = {}
    for entry in args.columns:
        ours, equals, theirs = entry.partition("=")
        if not (equals and theirs) or ours not in COLUMNS:
            raise InputError(
                f"--columns {entry}: write {' or '.join(COLUMNS)}, then = and the file's column name"
            )
        columns[ours] = theirs
    return Reading(
        format=args.format,
        columns=columns,
        completions=args.completions,
        on_diverge=args.on_diverge,
        on_bad_row=args.on_bad_row,
    )


def read_pairs(path: str, reading: Reading) -> tuple[list[InputPair], list[Drop]]:
    """Read the valid pairs of a file in file order, and what was dropped (`equal`, `duplicate`, …).

    Raises:
        InputError: no such file, a malformed row (named), or no pair left.
    """
    rows = read_rows(path)
    read = loading.read_pairs(path, rows, reading)
    _report_formats(read, reading)
    kept, dropped = drop_degenerate("train", read.items)
    wanted = {id(pair) for pair in kept}
    refuse_empty(path, kept, [*read.dropped, *dropped])
    by_place = {row.where: row for row in rows}
    pairs = [pair for pair in read.items if id(pair) in wanted]
    return [InputPair(pair, _recorded_ids(by_place[pair.where], pair)) for pair in pairs], [
        *read.dropped,
        *dropped,
    ]


def _report_formats(read: loading.Read, reading: Reading) -> None:
    """Report the detected row formats and warn about repeated prompts."""
    loading.refuse_unmapped("--columns", reading.columns, read.unmapped)
    if set(read.formats) - {"preference"}:
        print_note(f"read {loading.format_counts(read.formats)}")
    if read.repeated_prompts:
        print_note(loading.repeated_prompts_warning(read.repeated_prompts))


def _recorded_ids(row: Row, pair: Pair) -> PairIds | None:
    """Token ids of a row that sera-flow wrote. They take precedence over the text.

    Raises:
        InputError: the id columns do not hold token ids.
    """
    held = [row.data.get(name) for name in _ID_COLUMNS]
    if row.data.get("pair_id") != pair.pair_id or not all(held):
        return None
    for name, ids in zip(_ID_COLUMNS, held, strict=True):
        if not _is_id_list(ids):
            raise InputError(
                f"{row.where}: {name} is not a list of token ids; leave out {', '.join(_ID_COLUMNS)}, or "
                "give the parquet file unchanged"
            )
    prompt, chosen, rejected = (_pack(ids) for ids in held if ids)
    return prompt, chosen, rejected


def _is_id_list(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(one) is int and 0 <= one < 2**31 for one in ids)


def render_pairs(
    renderer: "Renderer", given: Sequence[InputPair], limits: Limits
) -> tuple[list[RenderedPair], list[Drop]]:
    """Render the pairs to token ids, in order; also what was dropped (`prompt_too_long`, `empty`, …).

    Raises:
        InputError: the policy has no chat template, or no pair is left.
    """
    with flag_errors("--pairs"):
        ids = _token_ids(renderer, given)
    warn_special_tokens(renderer, [[*g.pair.prompt, *g.pair.chosen, *g.pair.rejected] for g in given])
    rendered, dropped = [], []
    for pair, (prompt, chosen, rejected) in zip((g.pair for g in given), ids, strict=True):
        room = limits.room(len(prompt))
        fitted = RenderedPair(pair, prompt, chosen[: max(room, 0)], rejected[: max(room, 0)])
        if (reason := _drop_reason(prompt, chosen, rejected, fitted, limits)) is not None:
            dropped.append(Drop("train", pair, reason))
        else:
            rendered.append(fitted)
    refuse_empty("--pairs", rendered, dropped)
    return rendered, dropped


def _token_ids(renderer: "Renderer", given: Sequence[InputPair]) -> list[PairIds]:
    """The file's own token ids if this tokenizer and template made them all, else ids of the text."""
    fresh = tokenize_pairs(renderer, given)
    foreign = sum(g.ids is not None and g.ids[0] != ids[0] for g, ids in zip(given, fresh, strict=True))
    if foreign:
        print_note(
            f"{foreign} prompts have token ids from another tokenizer or template: rendering all texts again"
        )
        return fresh
    for g in given:
        with _row_errors(g.pair.where):
            renderer.refuse_unknown([one for ids in g.ids or () for one in ids])
    return [g.ids or ids for g, ids in zip(given, fresh, strict=True)]


def tokenize_pairs(renderer: "Renderer", given: Sequence[InputPair]) -> list[PairIds]:
    """Token ids of the pairs' texts: prompt, chosen, rejected.

    Raises:
        InputError: the chat template cannot render a pair; the message names its row.
    """
    rows = [{name: getattr(g.pair, name) for name in ("prompt", "chosen", "rejected")} for g in given]
    ids: list[PairIds] = []
    for start in range(0, len(rows), RENDER_BATCH):
        some = rows[start : start + RENDER_BATCH]
        try:
            columns = renderer.render_pairs(some)
        except InputError:
            for row, g in zip(some, given[start:], strict=False):
                with _row_errors(g.pair.where):
                    renderer.render_pairs([row])
            raise
        ids += [(_pack(x), _pack(w), _pack(z)) for x, w, z in zip(*columns, strict=True)]
    return ids


def warn_special_tokens(renderer: "Renderer", conversations: Iterable[Sequence[Message]]) -> None:
    """Warn if rows contain special tokens: the chat template was probably applied to them already."""
    count = sum(map(renderer.spells_special_tokens, conversations))
    if count:
        print_note(loading.special_tokens_warning(count))


def _pack(ids: Sequence[int]) -> Ids:
    return array("i", ids)


@contextmanager
def _row_errors(where: str) -> Iterator[None]:
    """Name the row that cannot be rendered, and the flag that sets another template."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {_with_flags(str(error))}") from error


def _with_flags(message: str) -> str:
    """The message with the flag that corresponds to the setting it names."""
    flags = {"model.chat_template": "--chat-template", "model.template_kwargs": "--template-kwargs"}
    return message + "".join(
        f" On the command line: {flag}." for name, flag in flags.items() if name in message
    )


def _drop_reason(prompt: Ids, chosen: Ids, rejected: Ids, fitted: RenderedPair, limits: Limits) -> str | None:
    """Why a pair cannot be scored; None if it can."""
    if len(prompt) > limits.prompt or limits.room(len(prompt)) < 1:
        return "prompt_too_long"
    if not chosen or not rejected:
        return "empty"
    cut = (fitted.chosen_ids, fitted.rejected_ids) != (chosen, rejected)
    if cut and limits.on_long == "drop":
        return "too_long"
    return "equal" if fitted.chosen_ids == fitted.rejected_ids else None


# -------------------------------------------------------------------------------------------------- prompts


def read_prompts(path: str, reading: Reading) -> tuple[list[Prompt], list[Drop]]:
    """Read the distinct prompts of a file in file order, from prompt-only rows or preference pairs.

    Raises:
        InputError: no such file, or a malformed row (named).
    """
    read = loading.read_prompts(path, read_rows(path), reading)
    _report_formats(read, reading)
    kept, dropped = drop_repeated_prompts(read.items)
    wanted = {id(prompt) for prompt in kept}
    return [prompt for prompt in read.items if id(prompt) in wanted], [*read.dropped, *dropped]


def render_prompts(
    renderer: "Renderer", prompts: Sequence[Prompt], limits: Limits
) -> tuple[list[tuple[Prompt, Ids]], list[Drop]]:
    """Render the prompts to token ids, in order; drop those that leave no room for a full response.

    Raises:
        InputError: the policy has no chat template, or no prompt is left.
    """
    rendered = []
    for prompt in prompts:
        with flag_errors("--prompts"), _row_errors(prompt.where):
            rendered.append((prompt, _pack(renderer.prompt_ids(prompt.prompt))))
    warn_special_tokens(renderer, [prompt.prompt for prompt in prompts])
    fits = [len(ids) <= limits.prompt and limits.room(len(ids)) == limits.response for _, ids in rendered]
    kept = [pair for pair, fit in zip(rendered, fits, strict=True) if fit]
    dropped = [
        Drop("prompts", prompt, "prompt_too_long")
        for (prompt, _), fit in zip(rendered, fits, strict=True)
        if not fit
    ]
    refuse_empty("--prompts", kept, dropped)
    return kept, dropped


# -------------------------------------------------------------------------------------------------- dropped


def refuse_empty(where: str, kept: Sequence[Any], dropped: Sequence[Drop]) -> None:
    """Refuse an input with no usable row, with counts by reason."""
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(count_reasons(dropped).items()))
        raise InputError(f"{where}: no row is left ({reasons}); give usable rows, or other limits")


def count_reasons(dropped: Sequence[Drop]) -> dict[str, int]:
    """Number of dropped items by reason."""
    return dict(sorted(Counter(drop.reason for drop in dropped).items()))


def dropped_table(stages: dict[str, Sequence[Drop]]) -> pa.Table:
    """Ledger rows of the dropped items; `stages` holds them by the stage that dropped them."""
    rows = [
        {
            "pair_id": drop.item.pair_id,
            "prompt_id": drop.item.prompt_id,
            "origin": "human",
            "round": 0,
            "stage": stage,
            "kept": False,
            "reason": drop.reason,
        }
        for stage, drops in stages.items()
        for drop in drops
    ]
    return schema.from_rows(schema.LEDGER, rows)
