"""Convert published data formats to the form that `parsing` reads: prompt, system, chosen, rejected.

    preference     TRL's: prompt (or none), chosen, rejected; text or messages
    hh             transcripts in chosen and rejected: "\\n\\nHuman: … \\n\\nAssistant: …" (Anthropic HH-RLHF)
    orca           question (or query, input), chosen, rejected (Intel/orca_dpo_pairs)
    alpaca         instruction with input and history; chosen and rejected, or output as a list of the two
    sharegpt       conversations of from and value; chosen and rejected (LLaMA-Factory's ranking data)
    ultrafeedback  instruction with completions and their ratings (openbmb/UltraFeedback)

In every format, messages may have the keys `from` and `value`, the roles human and gpt, and text parts as
content, or be JSON text (CSV has no lists). A `system` column becomes the first message.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from sera_core.artifacts.canonical import derived_seed
from sera_core.data.sources import Row, is_message_text, json_value
from sera_core.errors import InputError

FormatName = Literal["preference", "hh", "orca", "alpaca", "sharegpt", "ultrafeedback"]
FORMATS: tuple[str, ...] = get_args(FormatName)
COLUMNS = ("prompt", "system", "chosen", "rejected")
"""Columns that `[data.columns]` can map."""
PROMPT_LIKE = (
    *("prompt", "question", "query", "instruction", "input", "conversations", "conversation", "messages"),
    *("history", "context", "problem", "dialogue"),
)
"""Columns that may contain the prompt; if any is non-empty, no prompt is derived from the answers."""
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
_QUESTIONS = ("question", "query", "input")
_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_TRANSCRIPT = re.compile(r"\s*Human:.*\n\nAssistant:", re.DOTALL)
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
Data = dict[str, Any]


@dataclass(frozen=True)
class Reading:
    """How to read a source: the settings of `[data]`, or the flags of `sera score` and `sera sample`.

    Attributes:
        format: one of FORMATS, or `auto`: detected per row from its fields.
        columns: name in COLUMNS -> name in the file.
        completions: UltraFeedback's rejected answer: `worst`, or `random` (drawn from the lower rated ones).
        seed: seed of `random`.
        on_diverge: for conversations that differ before the last turn: `refuse` or `split`.
        on_bad_row: for unusable rows: `refuse` the file, or `drop` and count them.
        values: a user's columns to keep, by name: `<name>_chosen` and `<name>_rejected` of each row.
    """

    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    completions: str = "worst"
    seed: int = 0
    on_diverge: str = "refuse"
    on_bad_row: str = "refuse"
    values: tuple[str, ...] = ()


class TiedCompletionsError(InputError):
    """An UltraFeedback row whose completions all have the same rating."""


def normal_form(row: Row, reading: Reading) -> tuple[str, Row]:
    """The format of a row, and the row with `prompt`, `system`, `chosen`, `rejected` and its other fields.

    Raises:
        InputError: the row lacks a field of the format given in `reading`.
        TiedCompletionsError: no completion is rated lower than the best.
    """
    data = _renamed(row.data, reading.columns)
    name = format_of(data) if reading.format == "auto" else reading.format
    if name != "preference":
        _refuse_other(row.where, name, data)
        data = data | _READERS[name](row.where, data, reading)
    data = _with_history(row.where, data)
    if reading.format == "auto" or name != "preference":
        data = _without_json_text(row.where, data)
    if _held(data, "system_prompt") and not _held(data, "system"):
        data = data | {"system": data["system_prompt"]}
    for side in ("prompt", "chosen", "rejected"):
        if side in data:
            data = data | {side: _in_our_terms(data[side])}
    return name, Row(row.where, data)


def conversation_form(row: Row, reading: Reading) -> tuple[str, Row]:
    """What a row of conversations holds it in, and the row with `messages`, or `prompt` and `completion`.

    Messages may be in the terms of ShareGPT, or JSON text.
    """
    data = _renamed(row.data, reading.columns)
    name = next((name for name in ("messages", "conversations") if _held(data, name)), None)
    if name is not None:
        data = data | {"messages": _in_our_terms(_parsed(row.where, data[name]))}
        return name, Row(row.where, data)
    for side in ("prompt", "completion"):
        if side in data:
            data = data | {side: _in_our_terms(_parsed(row.where, data[side]))}
    return "prompt and completion", Row(row.where, data)


def format_of(data: Mapping[str, Any]) -> str:
    """The format detected from a row's fields."""
    if not _held(data, "chosen") and _held(data, "completions"):
        return "ultrafeedback"
    if any(_is_transcript(data.get(name)) for name in ("prompt", "chosen")):
        return "hh"
    if _held(data, "prompt"):
        return "preference"
    if _held(data, "conversations"):
        return "sharegpt"
    if _held(data, "instruction"):
        return "alpaca"
    return "orca" if any(_held(data, name) for name in _QUESTIONS) else "preference"


def holds_prompt(data: Mapping[str, Any]) -> bool:
    """Whether any usual prompt column is non-empty."""
    return any(_held(data, name) for name in PROMPT_LIKE)


def _held(data: Mapping[str, Any], name: str) -> bool:
    value = data.get(name)
    return bool(value.strip()) if isinstance(value, str) else bool(value)


def _renamed(data: Data, columns: Mapping[str, str]) -> Data:
    """The row with mapped columns renamed; columns that are missing keep their names."""
    found = {ours: theirs for ours, theirs in columns.items() if theirs in data}
    rest = {name: value for name, value in data.items() if name not in found.values()}
    return rest | {ours: data[theirs] for ours, theirs in found.items()}


_NEEDS = {
    "hh": ("chosen", "prompt"),
    "orca": _QUESTIONS,
    "alpaca": ("instruction",),
    "sharegpt": ("conversations",),
    "ultrafeedback": ("completions",),
}
"""Columns of which a row in the format must have at least one."""


def _refuse_other(where: str, name: str, data: Data) -> None:
    if not any(_held(data, column) for column in _NEEDS[name]):
        found = ", ".join(sorted(key for key in data if _held(data, key))) or "none"
        raise InputError(
            f"{where}: not in the format {name!r}, which needs {' or '.join(_NEEDS[name])} (found: {found}; "
            f"this looks like {format_of(data)!r}); correct data.format (--format) or set it to auto"
        )


# ---------------------------------------------------------------------------------------------------- formats


def _hh(where: str, data: Data, reading: Reading) -> Data:
    del where, reading
    prompt = data.get("prompt")
    if not _is_transcript(prompt):
        return {name: _turns(data[name]) for name in ("prompt", "chosen", "rejected") if _held(data, name)}
    sides = {
        side: data[side] if _is_transcript(data[side]) else f"{prompt} {data[side]}"
        for side in ("chosen", "rejected")
        if isinstance(data.get(side), str)
    }
    if not sides:
        return {"prompt": [turn for turn in _turns(prompt) if turn["content"]]}
    return {"prompt": None, **{side: _turns(text) for side, text in sides.items()}}


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and _TRANSCRIPT.match(value) is not None


def _turns(text: Any) -> Any:
    """A transcript as messages; text without labels unchanged."""
    if not isinstance(text, str) or not _TURN.match(text):
        return text
    _, *pieces = _TURN.split(text)
    return [
        {"role": _SPEAKERS[speaker], "content": said.strip()}
        for speaker, said in zip(pieces[0::2], pieces[1::2], strict=True)
    ]


def _orca(where: str, data: Data, reading: Reading) -> Data:
    del where, reading
    return {"prompt": next(data[name] for name in _QUESTIONS if _held(data, name))}


def _alpaca(where: str, data: Data, reading: Reading) -> Data:
    del reading
    prompt = "\n".join(str(data[name]) for name in ("instruction", "input") if _held(data, name))
    read: Data = {"prompt": prompt}
    if not _held(data, "chosen") and (output := _listed(where, "output", data.get("output"))):
        ((chosen, rejected),) = _pairs(where, "output", [output])
        read |= {"chosen": chosen, "rejected": rejected}
    return read


def _with_history(where: str, data: Data) -> Data:
    """The row with its history (pairs of question and answer) added before a text prompt."""
    turns = _pairs(where, "history", _listed(where, "history", data.get("history")))
    if not turns or not isinstance(data.get("prompt"), str):
        return data
    earlier = [
        {"role": role, "content": said}
        for pair in turns
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    return data | {"prompt": [*earlier, {"role": "user", "content": data["prompt"]}]}


def _pairs(where: str, name: str, entries: list[Any]) -> list[Any]:
    """Lists of two texts: question and answer, or better and worse answer."""
    for entry in entries:
        if not isinstance(entry, list) or len(entry) != 2:
            raise InputError(f"{where}: {name} must be two texts; correct the row")
    return entries


def _sharegpt(where: str, data: Data, reading: Reading) -> Data:
    del reading
    return {"prompt": _parsed(where, data["conversations"])}


def _ultrafeedback(where: str, data: Data, reading: Reading) -> Data:
    prompt = data.get("prompt") or data.get("instruction")
    rated = [
        (rating, completion["response"])
        for completion in _listed(where, "completions", data["completions"])
        if isinstance(completion, dict)
        and completion.get("response")
        and (rating := rating_of(completion)) is not None
    ]
    best = max(rated, key=lambda one: one[0], default=None)
    lower = [one for one in rated if best is not None and one[0] < best[0]]
    if best is None or not lower:
        raise TiedCompletionsError(
            f"{where}: no completion is rated lower than another, so none is the better answer"
        )
    worst = min(lower, key=lambda one: one[0])
    if reading.completions == "random":
        worst = lower[derived_seed("completions", reading.seed, str(prompt)) % len(lower)]
    return {"prompt": prompt, "chosen": best[1], "rejected": worst[1]}


def rating_of(completion: Mapping[str, Any]) -> float | None:
    """Mean of the aspect ratings; without them, fine-grained_score, overall_score, rating or score.

    Some of UltraFeedback's overall_score values are known to be wrong (a critique's "1" read as 10); the
    aspect ratings are correct.
    """
    annotations = completion.get("annotations")
    aspects = annotations.values() if isinstance(annotations, dict) else ()
    rated = [_number(aspect.get("Rating")) for aspect in aspects if isinstance(aspect, dict)]
    numbers = [number for number in rated if number is not None]
    if numbers:
        return sum(numbers) / len(numbers)
    names = ("fine-grained_score", "overall_score", "rating", "score")
    return next((number for name in names if (number := _number(completion.get(name))) is not None), None)


def _number(value: Any) -> float | None:
    """A finite number, also if given as text; None for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


_READERS: dict[str, Callable[[str, Data, Reading], Data]] = {
    "hh": _hh,
    "orca": _orca,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "ultrafeedback": _ultrafeedback,
}

# --------------------------------------------------------------------------------------------------- messages


def _parsed(where: str, value: Any) -> Any:
    """Messages parsed from JSON text; anything else unchanged."""
    if not isinstance(value, str) or not is_message_text(value):
        return value
    try:
        return json_value(value)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    except (ValueError, RecursionError):
        return value


def _listed(where: str, name: str, value: Any) -> list[Any]:
    """A list, also if given as JSON text; an empty list for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json_value(value)
        except InputError as error:
            raise InputError(f"{where}: {name}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: {name} looks like a list but is not valid JSON ({error}); write it with json.dumps"
            ) from error
    return value if isinstance(value, list) else []


def _without_json_text(where: str, data: Data) -> Data:
    """Parse JSON text into messages: the prompt, and the answers if both are JSON text."""
    names = [name for name in ("prompt", "chosen", "rejected") if isinstance(data.get(name), str)]
    read = {name: parsed for name in names if (parsed := _parsed(where, data[name])) is not data[name]}
    if ("chosen" in read) != ("rejected" in read):
        read.pop("chosen", None)
        read.pop("rejected", None)
    return data | {name: [value] if isinstance(value, dict) else value for name, value in read.items()}


def _in_our_terms(value: Any) -> Any:
    """Messages with role and content; anything that is not a list of messages unchanged."""
    if isinstance(value, dict):
        value = [value]
    return [_message(entry) for entry in value] if isinstance(value, list) else value


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    if message.get("role") is None and "from" in message and "value" in message:
        rest = {name: value for name, value in message.items() if name not in ("from", "value", "role")}
        message = rest | {"role": message["from"], "content": message["value"]}
    if isinstance(role := message.get("role"), str):
        message = message | {"role": ROLES.get(role, role)}
    return message | {"content": _text_of(message["content"])} if "content" in message else message


def _text_of(content: Any) -> Any:
    """Text parts joined as chat templates do; anything else unchanged."""
    if not isinstance(content, list):
        return content
    if any(isinstance(part, dict) and part.get("type", "text") != "text" for part in content):
        return content
    parts = [part.get("text") if isinstance(part, dict) else part for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else content
