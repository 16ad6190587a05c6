"""Preference rows to pairs: every form TRL reads, checked, in one shape.

A pair's prompt is all messages before the last assistant turn (a system message included), which chosen and
rejected must share. A malformed row refuses its file, naming the row; a pair that is well formed but teaches
nothing (equal answers, a repetition) is counted and dropped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sera_core.artifacts import canonical
from sera_core.errors import InputError
from sera_core.sources import Row

Message = dict[str, str]
_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TOOLS = ("tools", "tool_calls", "function_call", "tool_call_id", "functions")


@dataclass(frozen=True)
class Prompt:
    """A prompt without answers."""

    prompt: list[Message]
    where: str = field(default="", compare=False)
    pair_id: None = None

    @cached_property
    def prompt_id(self) -> str:
        """First 16 hex digits of the hash of the prompt (DESIGN, section 4)."""
        return canonical.prompt_id(self.prompt)


@dataclass(frozen=True)
class Pair:
    """A prompt with a chosen and a rejected answer, each one assistant message.

    Attributes:
        format: `standard` if the row was plain text, else `conversational`; not part of the pair's identity.
        where: file and row, for messages.
    """

    format: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    where: str = field(default="", compare=False)

    @cached_property
    def pair_id(self) -> str:
        """First 16 hex digits of the hash of prompt, chosen and rejected."""
        return canonical.pair_id(self.prompt, self.chosen, self.rejected)

    @cached_property
    def prompt_id(self) -> str:
        """First 16 hex digits of the hash of the prompt."""
        return canonical.prompt_id(self.prompt)

    @property
    def turned(self) -> "Pair":
        """The same pair under the other label."""
        return Pair(self.format, self.prompt, self.rejected, self.chosen, self.where)


@dataclass(frozen=True)
class Drop:
    """A well-formed pair or prompt that is not used, and why.

    Attributes:
        side: `train`, `heldout`, `test` or `prompts`: where it was given, or where it had been put.
        reason: `equal`, `duplicate`, `not_drawn`, `overlap` or `over_limit`.
    """

    side: str
    item: Pair | Prompt
    reason: str


# ---------------------------------------------------------------------------------------------------- parsing


def parse_pair(row: Row, on_diverge: str = "refuse") -> Pair:
    """Read a preference row: standard or conversational, explicit or implicit prompt, any number of turns.

    Args:
        row: fields `chosen`, `rejected` and, unless it is their common beginning, `prompt`.
        on_diverge: what becomes of conversations that differ before the last turn: `refuse`, or `split` at
            the first difference (the first differing assistant turn is the answer, later turns are cut).

    Raises:
        InputError: the row is malformed; the message names the row and what to do.
    """
    _refuse_unsupported(row.where, row.data)
    form, chosen, rejected = _conversations(row)
    _check_turns(row.where, "chosen", chosen)
    _check_turns(row.where, "rejected", rejected)
    if chosen[:-1] != rejected[:-1]:
        chosen, rejected = _split_at_difference(row.where, chosen, rejected, on_diverge)
    return Pair(form, chosen[:-1], chosen[-1:], rejected[-1:], row.where)


def parse_prompt(row: Row) -> Prompt:
    """Read a prompt-only row: `prompt` is text, or messages that end with a user turn."""
    _refuse_unsupported(row.where, row.data)
    prompt = _messages(row.where, "prompt", _value(row, "prompt"), role="user")
    _check_order(row.where, "prompt", prompt)
    if prompt[-1]["role"] != "user":
        raise InputError(
            f"{row.where}: the last message of prompt is from {prompt[-1]['role']}; it must be from user"
        )
    return Prompt(prompt, row.where)


def _conversations(row: Row) -> tuple[str, list[Message], list[Message]]:
    """Format and both whole conversations of a row."""
    chosen, rejected = _value(row, "chosen"), _value(row, "rejected")
    prompt = _value(row, "prompt") if row.data.get("prompt") is not None else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise InputError(
            f"{row.where}: one of chosen and rejected is text and the other is not; give both in one form"
        )
    standard = isinstance(chosen, str) and not isinstance(prompt, list)
    if isinstance(chosen, str) and prompt is None:
        prompt, chosen, rejected = _extract_prompt(row.where, chosen, rejected)
    answers = [
        _messages(row.where, name, value, role="assistant")
        for name, value in (("chosen", chosen), ("rejected", rejected))
    ]
    # As in TRL, a text prompt beside whole conversations only repeats what they say.
    whole = prompt is None or (isinstance(prompt, str) and all(a[0]["role"] != "assistant" for a in answers))
    start = [] if whole else _messages(row.where, "prompt", prompt, role="user")
    return "standard" if standard else "conversational", start + answers[0], start + answers[1]


def _extract_prompt(where: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common beginning of two texts, cut back so that no word is divided and no answer is left empty.

    White space at the cut goes with the answers, as in TRL's `extract_prompt`, which also cuts inside words.
    """
    shorter = min(len(chosen), len(rejected))
    end = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    one_ended = end == shorter
    inside_word = one_ended or chosen[end].isalnum() or rejected[end].isalnum()
    while one_ended and end > 0 and not chosen[end - 1].isalnum():
        end -= 1
    while inside_word and end > 0 and chosen[end - 1].isalnum():
        end -= 1
    end = len(chosen[:end].rstrip())
    if end == 0:
        raise InputError(
            f'{where}: no field "prompt", and chosen and rejected have no common beginning that could be it; '
            "add the field"
        )
    return chosen[:end], chosen[end:], rejected[end:]


def _value(row: Row, name: str) -> Any:
    """A field that must be there and hold something."""
    value = row.data.get(name)
    if value is None:
        found = ", ".join(sorted(key for key, held in row.data.items() if held is not None)) or "none"
        raise InputError(f'{row.where}: no field "{name}" (found: {found}); rename or add it')
    if not value or (isinstance(value, str) and not value.strip()):
        raise InputError(f"{row.where}: {name} is empty; remove the row, or give it text")
    return value


def _messages(where: str, name: str, value: Any, role: str) -> list[Message]:
    """Messages of role and content; plain text is one message from `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": _content(where, name, value)}]
    if not isinstance(value, list):
        raise InputError(f"{where}: {name} is neither text nor a list of messages; correct the row")
    return [_message(where, f"{name} message {number}", message) for number, message in enumerate(value, 1)]


def _message(where: str, name: str, message: Any) -> Message:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise InputError(f"{where}: {name} has no role and content; write {{'role': …, 'content': …}}")
    _refuse_unsupported(f"{where}: {name}", message)
    if message["role"] not in ("system", "user", "assistant"):
        what = "tool calls are not supported" if message["role"] in ("tool", "function") else "unknown role"
        raise InputError(f"{where}: {name} has role {message['role']!r}: {what}; remove the row")
    content = _content(where, name, message["content"])
    if not content.strip() and message["role"] != "system":
        raise InputError(f"{where}: {name} ({message['role']}) is empty; remove the row, or give it text")
    return {"role": message["role"], "content": content} | _reasoning(where, name, message)


def _reasoning(where: str, name: str, message: dict[str, Any]) -> Message:
    """The reasoning that a message has apart from its content, under the first name of `_REASONING`."""
    held = {key: message[key] for key in _REASONING if message.get(key)}
    texts = {_content(where, f"{key} of {name}", value) for key, value in held.items()}
    if len(texts) > 1:
        raise InputError(f"{where}: {name} has {' and '.join(held)}, which differ; leave one of them out")
    text = "".join(texts)
    if text.strip() and message["role"] != "assistant":
        raise InputError(
            f"{where}: {name} (from {message['role']}) has {next(iter(held))}, which only an assistant has; "
            "remove it"
        )
    return {_REASONING[0]: text} if text.strip() else {}


def _content(where: str, name: str, content: Any) -> str:
    if not isinstance(content, str):
        raise InputError(
            f"{where}: the content of {name} is not text (images and other parts are not supported); "
            "remove the row"
        )
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {name} holds half a surrogate pair, which is no character; correct the text"
        ) from error
    return content


def _refuse_unsupported(where: str, data: dict[str, Any]) -> None:
    for names, what in ((_TOOLS, "tool calls"), (_MEDIA, "images, video and audio")):
        held = [name for name in names if data.get(name)]
        if held:
            raise InputError(
                f"{where}: has {held[0]!r}; {what} are not supported: remove the row or the field"
            )


def _check_turns(where: str, name: str, messages: Sequence[Message]) -> None:
    """A whole conversation: turns in order, the last one the assistant's, and at least one before it."""
    if messages[-1]["role"] != "assistant":
        raise InputError(
            f"{where}: the last message of {name} is from {messages[-1]['role']}; it must be from assistant"
        )
    _check_order(where, f"prompt and {name}", messages)


def _check_order(where: str, name: str, messages: Sequence[Message]) -> None:
    roles = [message["role"] for message in messages]
    first = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise InputError(
                f"{where}: roles out of order: message {first + number + 1} of {name} is from {role} where "
                f"{expected} was expected (a system message first, if any, then user and assistant in turn); "
                "correct the row"
            )


def _split_at_difference(
    where: str, chosen: list[Message], rejected: list[Message], on_diverge: str
) -> tuple[list[Message], list[Message]]:
    """Both conversations up to and including the first differing assistant turn."""
    shorter = min(len(chosen), len(rejected))
    first = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if first is None:
        raise InputError(
            f"{where}: diverges_before_last_turn: one conversation is the beginning of the other, so no two "
            "answers can be compared; remove the row"
        )
    roles = {chosen[first]["role"], rejected[first]["role"]}
    if roles != {"assistant"}:
        raise InputError(
            f"{where}: diverges_before_last_turn: chosen and rejected first differ in message {first + 1} "
            f"(from {' and '.join(sorted(roles))}), so they answer different prompts; remove the row"
        )
    if on_diverge == "refuse":
        raise InputError(
            f"{where}: diverges_before_last_turn: chosen and rejected differ in message {first + 1}, before "
            'the last answer; make them share all earlier messages, or set data.on_diverge = "split"'
        )
    return chosen[: first + 1], rejected[: first + 1]


# ------------------------------------------------------------------------------------------- degenerate pairs


def drop_degenerate(
    side: str, pairs: Iterable[Pair], on_equal: str = "drop"
) -> tuple[list[Pair], list[Drop]]:
    """Take out pairs with equal answers, and every repetition of a pair but the first.

    Returns:
        the pairs kept in the order of (prompt_id, pair_id), and what was dropped.

    Raises:
        InputError: equal answers with on_equal = "refuse".
    """
    dropped, different = [], []
    for pair in pairs:
        if pair.chosen != pair.rejected:
            different.append(pair)
        elif on_equal == "refuse":
            raise InputError(
                f"{pair.where} (pair {pair.pair_id}): chosen and rejected are the same text; remove the row, "
                'or set data.on_equal = "drop"'
            )
        else:
            dropped.append(Drop(side, pair, "equal"))
    kept, repeated = _first_of_each(side, sorted(different, key=lambda pair: (*order(pair), pair.format)))
    return kept, dropped + repeated


def drop_repeated_prompts(prompts: Iterable[Prompt]) -> tuple[list[Prompt], list[Drop]]:
    """Prompts in the order of prompt_id, each once, and the repetitions."""
    return _first_of_each("prompts", sorted(prompts, key=order))


def _first_of_each(side: str, items: Sequence[Any]) -> tuple[list[Any], list[Drop]]:
    kept, dropped, seen = [], [], set()
    for item in items:
        if order(item) in seen:
            dropped.append(Drop(side, item, "duplicate"))
        else:
            seen.add(order(item))
            kept.append(item)
    return kept, dropped


def order(item: Pair | Prompt) -> tuple[str, str]:
    """The order of rows in every file, so that content decides it: (prompt_id, pair_id)."""
    return item.prompt_id, item.pair_id or ""


def under_both_labels(pairs: Sequence[Pair]) -> set[str]:
    """pair_ids of the pairs whose turned pair is there too."""
    ids = {pair.pair_id for pair in pairs}
    return {pair.pair_id for pair in pairs if pair.turned.pair_id in ids}
