"""What the stand-alone commands are given: policies, and pairs and prompts as token ids."""

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

from flows.commands.output import say
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
from sera_core.models.model_sources import Source, materialise, resolve_source
from sera_core.models.policies import check_settings
from sera_core.models.weights import wrapper_of

if TYPE_CHECKING:
    from sera_core.data.rendering import Renderer

_ID_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
Ids = Sequence[int]
"""Token ids, packed at four bytes each: a list of Python integers takes nine times that."""
PairIds = tuple[Ids, Ids, Ids]
"""Prompt, chosen, rejected."""
ROWS_AT_ONCE = 256
"""Pairs rendered at a time: what the tokenizer makes of them is large until it is packed."""


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens. `positions` is what the model can hold, prompt and response together."""

    prompt: int
    response: int
    on_long: str = "drop"
    positions: int | None = None

    def room(self, prompt: int) -> int:
        """Tokens a response to a prompt of this length may have."""
        return self.response if self.positions is None else min(self.response, self.positions - prompt)


@dataclass(frozen=True)
class GivenPair:
    """A valid pair, and its token ids where the file is one of ours and holds them."""

    pair: Pair
    ids: PairIds | None


@dataclass(frozen=True)
class RenderedPair:
    """A pair as the policy reads it."""

    pair: Pair
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids


# ------------------------------------------------------------------------------------------------- policies


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn the core's ValueError about something given into an error that names the flag (exit code 2)."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{what}: {error}") from error


def find_policy(flag: str, source: str) -> Source:
    """The model source, checked as far as that needs no network.

    Raises:
        InputError: no such folder or package, or not a model.
    """
    with refusing(flag):
        return resolve_source(source)


def policy_folder(flag: str, source: Source, scratch: Path) -> Path:
    """The policy as a plain folder: a local one where it lies, any other source written out to `scratch`."""
    with refusing(flag):
        prefix = wrapper_of(Path(source.location)) if source.kind == "folder" else ""
        if source.kind == "folder" and not prefix:
            check_settings(Path(source.location))
            return Path(source.location)
        if prefix:
            say(f"{flag}: {prefix!r} stands before every tensor's name and is stripped")
        return materialise(source, scratch)


def open_renderer(flag: str, folder: Path, template: str | None, arguments: str | None = None) -> "Renderer":
    """The policy's chat template (or the one given with --chat-template) and tokenizer.

    Args:
        flag: the flag that names the policy, for messages.
        folder: the policy folder.
        template: what --chat-template gives.
        arguments: what --template-kwargs gives, a JSON object.

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


def check_same_ids(policy: "Renderer", reference: "Renderer", given: Sequence[GivenPair]) -> None:
    """Refuse a reference that reads a pair as other tokens than the policy does.

    Renderers of one hash are one; two hashes may still mean the same (a file saved in another layout).
    """
    if policy.hash == reference.hash:
        return
    with refusing("--reference"):
        theirs = text_ids(reference, given)
    for g, ours, other in zip(given, text_ids(policy, given), theirs, strict=True):
        if ours != other:
            raise InputError(
                f"--reference: its tokenizer or chat template reads {g.pair.where} (pair {g.pair.pair_id}) "
                "as other tokens than the policy's does, so their log-probabilities cannot be compared; give "
                "the model the policy was trained from"
            )


def open_policy(flag: str, folder: Path, dtype: Any, device: str) -> Any:
    """The policy's model, in eval mode.

    Raises:
        InputError: transformers cannot open the folder.
    """
    from sera_core.models.policies import load_policy

    try:
        return load_policy(folder, dtype, device)
    except (ValueError, OSError) as error:
        raise InputError(f"{flag}: {folder} cannot be opened as a model: {error}") from error


def check_device(device: str) -> str:
    """The torch device to use.

    Raises:
        InputError: `cuda` on a machine that has none.
    """
    import torch

    from sera_core.models.devices import device_of

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "--device cuda: torch sees no accelerator here; leave the flag out, or see `sera doctor`"
        )
    return device_of(device)


# ---------------------------------------------------------------------------------------------------- pairs


def reading_of(args: argparse.Namespace) -> Reading:
    """The flags that say how rows are read.

    Raises:
        InputError: --columns is not of the form ours=theirs.
    """
    columns: dict[str, str] = {}
    for entry in args.columns:
        ours, equals, theirs = entry.partition("=")
        if not (equals and theirs) or ours not in COLUMNS:
            raise InputError(
                f"--columns {entry}: write {' or '.join(COLUMNS)}, then = and the file's own name for it"
            )
        columns[ours] = theirs
    return Reading(
        format=args.format,
        columns=columns,
        completions=args.completions,
        on_diverge=args.on_diverge,
        on_bad_row=args.on_bad_row,
    )


def read_pairs(path: str, reading: Reading) -> tuple[list[GivenPair], list[Drop]]:
    """Every valid pair of a file in the file's order, and what was dropped (`equal`, `duplicate`, …).

    Raises:
        InputError: no such file, a malformed row (named), or no pair left.
    """
    rows = read_rows(path)
    read = loading.read_pairs(path, rows, reading)
    _tell(read, reading)
    kept, dropped = drop_degenerate("train", read.items)
    wanted = {id(pair) for pair in kept}
    refuse_empty(path, kept, [*read.dropped, *dropped])
    by_place = {row.where: row for row in rows}
    pairs = [pair for pair in read.items if id(pair) in wanted]
    return [GivenPair(pair, _own_ids(by_place[pair.where], pair)) for pair in pairs], [
        *read.dropped,
        *dropped,
    ]


def _tell(read: loading.Read, reading: Reading) -> None:
    """Say what the rows were read as, unless it is the plain form, and what is probably not meant."""
    loading.refuse_unmapped("--columns", reading.columns, read.unmapped)
    if set(read.formats) - {"preference"}:
        say(f"read {loading.format_counts(read.formats)}")
    if read.repeated_prompts:
        say(loading.repeated_prompts_warning(read.repeated_prompts))


def _own_ids(row: Row, pair: Pair) -> PairIds | None:
    """Token ids of a row that this project wrote: they are the record, text is only a view of them.

    Raises:
        InputError: what stands there are no token ids.
    """
    held = [row.data.get(name) for name in _ID_COLUMNS]
    if row.data.get("pair_id") != pair.pair_id or not all(held):
        return None
    for name, ids in zip(_ID_COLUMNS, held, strict=True):
        if not _are_ids(ids):
            raise InputError(
                f"{row.where}: {name} holds no list of token ids; leave out {', '.join(_ID_COLUMNS)}, or "
                "give the parquet file as it was written"
            )
    prompt, chosen, rejected = (_packed(ids) for ids in held if ids)
    return prompt, chosen, rejected


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(one) is int and 0 <= one < 2**31 for one in ids)


def render_pairs(
    renderer: "Renderer", given: Sequence[GivenPair], limits: Limits
) -> tuple[list[RenderedPair], list[Drop]]:
    """The pairs as token ids, in order, and what was dropped (`prompt_too_long`, `too_long`, `empty`, …).

    Raises:
        InputError: the policy has no chat template for conversations, or no pair is left.
    """
    with refusing("--pairs"):
        ids = _token_ids(renderer, given)
    tell_special_tokens(renderer, [[*g.pair.prompt, *g.pair.chosen, *g.pair.rejected] for g in given])
    rendered, dropped = [], []
    for pair, (prompt, chosen, rejected) in zip((g.pair for g in given), ids, strict=True):
        room = limits.room(len(prompt))
        fitted = RenderedPair(pair, prompt, chosen[: max(room, 0)], rejected[: max(room, 0)])
        if (reason := _unfit(prompt, chosen, rejected, fitted, limits)) is not None:
            dropped.append(Drop("train", pair, reason))
        else:
            rendered.append(fitted)
    refuse_empty("--pairs", rendered, dropped)
    return rendered, dropped


def _token_ids(renderer: "Renderer", given: Sequence[GivenPair]) -> list[PairIds]:
    """The file's own token ids if all are of this tokenizer and template, else those of the text."""
    fresh = text_ids(renderer, given)
    strange = sum(g.ids is not None and g.ids[0] != ids[0] for g, ids in zip(given, fresh, strict=True))
    if strange:
        say(f"{strange} prompts have token ids of another tokenizer or template: every text is rendered anew")
        return fresh
    for g in given:
        with _of_row(g.pair.where):
            renderer.refuse_unknown([one for ids in g.ids or () for one in ids])
    return [g.ids or ids for g, ids in zip(given, fresh, strict=True)]


def text_ids(renderer: "Renderer", given: Sequence[GivenPair]) -> list[PairIds]:
    """Token ids of the pairs' texts: prompt, chosen, rejected.

    Raises:
        InputError: the chat template does not write a pair; the message names its row.
    """
    rows = [{name: getattr(g.pair, name) for name in ("prompt", "chosen", "rejected")} for g in given]
    ids: list[PairIds] = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        try:
            columns = renderer.render_pairs(some)
        except InputError:
            for row, g in zip(some, given[start:], strict=False):
                with _of_row(g.pair.where):
                    renderer.render_pairs([row])
            raise
        ids += [(_packed(x), _packed(w), _packed(z)) for x, w, z in zip(*columns, strict=True)]
    return ids


def tell_special_tokens(renderer: "Renderer", conversations: Iterable[Sequence[Message]]) -> None:
    """Say how many rows spell special tokens: probably the chat template was applied to them already."""
    count = sum(map(renderer.spells_special_tokens, conversations))
    if count:
        say(loading.special_tokens_warning(count))


def _packed(ids: Sequence[int]) -> Ids:
    return array("i", ids)


@contextmanager
def _of_row(where: str) -> Iterator[None]:
    """Name the row that the chat template does not write, and the flag that sets another template."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {_with_flags(str(error))}") from error


def _with_flags(said: str) -> str:
    """A message of the core that names a setting, with the flag that is the same here."""
    flags = {"model.chat_template": "--chat-template", "model.template_kwargs": "--template-kwargs"}
    return said + "".join(f" Here that is {flag}." for name, flag in flags.items() if name in said)


def _unfit(prompt: Ids, chosen: Ids, rejected: Ids, fitted: RenderedPair, limits: Limits) -> str | None:
    """Why a pair cannot be scored, None if it can."""
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
    """The prompts of a file in the file's order, each once: of prompt-only rows, or of preference pairs.

    Raises:
        InputError: no such file, or a malformed row (named).
    """
    read = loading.read_prompts(path, read_rows(path), reading)
    _tell(read, reading)
    kept, dropped = drop_repeated_prompts(read.items)
    wanted = {id(prompt) for prompt in kept}
    return [prompt for prompt in read.items if id(prompt) in wanted], [*read.dropped, *dropped]


def render_prompts(
    renderer: "Renderer", prompts: Sequence[Prompt], limits: Limits
) -> tuple[list[tuple[Prompt, Ids]], list[Drop]]:
    """The prompts as token ids, in order, and those dropped because no response of full length would fit.

    Raises:
        InputError: the policy has no chat template, or no prompt is left.
    """
    rendered = []
    for prompt in prompts:
        with refusing("--prompts"), _of_row(prompt.where):
            rendered.append((prompt, _packed(renderer.prompt_ids(prompt.prompt))))
    tell_special_tokens(renderer, [prompt.prompt for prompt in prompts])
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
    """Refuse an input of which nothing is left, with the counts of why."""
    if not kept:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(count_reasons(dropped).items()))
        raise InputError(f"{where}: no row is left ({reasons}); give rows that can be used, or other limits")


def count_reasons(dropped: Sequence[Drop]) -> dict[str, int]:
    """Number dropped, by reason."""
    return dict(sorted(Counter(drop.reason for drop in dropped).items()))


def dropped_table(stages: dict[str, Sequence[Drop]]) -> pa.Table:
    """Ledger rows of what was dropped, by the stage that dropped it."""
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
