"""Parse and validate rows into pairs: every form that TRL reads.

A pair's prompt is all messages before the last assistant turn (including a system message), which chosen and
rejected must share. A malformed row is an error that names the row, or is dropped and counted (`on_bad_row`).
"""

from collections.abc import Sequence
from typing import Any

from sera_core.data.chat_templates import REASONING_NAMES
from sera_core.data.formats import holds_prompt
from sera_core.data.preferences import Message, Pair, Prompt
from sera_core.data.sources import Row
from sera_core.errors import InputError

_MEDIA = ("images", "image", "videos", "video", "audios", "audio")
_TOOLS = ("tools", "tool_calls", "function_call", "tool_call_id", "functions")
KINDS = {
    "empty_answer": "an answer without text",
    "empty_turn": "an earlier message without text",
    "no_user_turn": "no prompt",
    "roles_out_of_order": "turns that are not user and assistant in alternation",
    "system_not_first": "a system message that is not the first",
    "diverges": "conversations that differ before the last turn",
    "no_answer": "no turn of an assistant",
}
"""Kinds of malformed rows that data.on_bad_row may drop."""


class BadRowError(InputError):
    """An unusable row; `kind` is one of KINDS."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def parse_pair(row: Row, on_diverge: str = "refuse", implicit: bool = True) -> Pair:
    """Read a preference row: standard or conversational, explicit or implicit prompt, any number of turns.

    Args:
        row: fields `chosen`, `rejected` and, unless it is their common beginning, `prompt`; `system` becomes
            the first message.
        on_diverge: for conversations that differ before the last turn: `refuse`, or `split` at the first
            difference (the first differing assistant turn is the answer, later turns are dropped).
        implicit: whether the common beginning of two texts may be the prompt; false if other rows of the
            source have a prompt.

    Raises:
        BadRowError: the row is malformed in a way that data.on_bad_row may drop.
        InputError: it is malformed in another way; the message names the row and the remedy.
    """
    _refuse_unsupported(row.where, row.data)
    form, chosen, rejected = _conversations(row, implicit)
    _check_turns(row.where, "chosen", chosen)
    _check_turns(row.where, "rejected", rejected)
    if chosen[:-1] != rejected[:-1]:
        chosen, rejected = _split_at_difference(row.where, chosen, rejected, on_diverge)
    return Pair(form, chosen[:-1], chosen[-1:], rejected[-1:], row.where)


def parse_prompt(row: Row) -> Prompt:
    """Read a prompt-only row: `prompt` is text, or messages that end with a user turn.

    Raises:
        BadRowError: the row is malformed in a way that data.on_bad_row may drop.
        InputError: it is malformed in another way.
    """
    _refuse_unsupported(row.where, row.data)
    if "prompt" in row.data and _absent(row.data["prompt"]):
        raise BadRowError("no_user_turn", f"{row.where}: prompt is empty; add text or remove the row")
    prompt = _with_system(row, _messages(row.where, "prompt", _value(row, "prompt"), role="user"))
    _check_order(row.where, "prompt", prompt)
    if prompt[-1]["role"] != "user":
        kind = "no_user_turn" if len(prompt) == 1 else "roles_out_of_order"
        raise BadRowError(
            kind,
            f"{row.where}: the last message of prompt is from {prompt[-1]['role']}; it must be from user",
        )
    return Prompt(prompt, row.where)


def parse_conversation(row: Row) -> Prompt:
    """Read a row of conversations: `messages`, or `prompt` and `completion`; any number of turns.

    Returns:
        All messages up to the last answer, as one `Prompt`.

    Raises:
        BadRowError: the row is malformed in a way that data.on_bad_row may drop.
        InputError: it is malformed in another way; the message names the row and the remedy.
    """
    _refuse_unsupported(row.where, row.data)
    messages = _with_system(row, _said(row))
    last = max((at for at, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise BadRowError(
            "no_answer",
            f"{row.where}: no message is from assistant, so there is nothing to learn; remove the row",
        )
    messages = messages[: last + 1]
    _check_order(row.where, "the conversation", messages)
    return Prompt(messages, row.where)


def _said(row: Row) -> list[Message]:
    """All messages of a row of conversations, at least one."""
    if not _absent(row.data.get("messages")):
        return _messages(row.where, "messages", row.data["messages"], role="user")
    if "messages" in row.data and "completion" not in row.data:
        raise BadRowError("no_answer", f"{row.where}: messages is empty; remove the row")
    if "completion" not in row.data:
        found = ", ".join(sorted(key for key, held in row.data.items() if not _absent(held))) or "none"
        raise InputError(
            f"{row.where}: neither messages, nor prompt and completion (found: {found}); start.sft needs "
            "conversations: rename the fields"
        )
    for name, kind in (("prompt", "no_user_turn"), ("completion", "empty_answer")):
        if _absent(row.data.get(name)):
            raise BadRowError(kind, f"{row.where}: {name} is empty; add text or remove the row")
    return [
        *_messages(row.where, "prompt", row.data["prompt"], role="user"),
        *_messages(row.where, "completion", row.data["completion"], role="assistant"),
    ]


def _conversations(row: Row, implicit: bool) -> tuple[str, list[Message], list[Message]]:
    """Format and both complete conversations of a row."""
    chosen, rejected = _value(row, "chosen"), _value(row, "rejected")
    prompt = row.data.get("prompt")
    prompt = None if _absent(prompt) else prompt
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise InputError(
            f"{row.where}: one of chosen and rejected is text and the other is not; use one form for both"
        )
    standard = isinstance(chosen, str) and not isinstance(prompt, list)
    if isinstance(chosen, str) and prompt is None:
        _refuse_invention(row, implicit)
        prompt, chosen, rejected = _extract_prompt(row.where, chosen, rejected)
    answers = [
        _messages(row.where, name, value, role="assistant")
        for name, value in (("chosen", chosen), ("rejected", rejected))
    ]
    start = [] if prompt is None else _messages(row.where, "prompt", prompt, role="user")
    if start and all(answer[0]["role"] != "assistant" for answer in answers):
        start = _not_repeated(row.where, isinstance(prompt, str), start, answers)
    whole = [_with_system(row, start + answer) for answer in answers]
    return "standard" if standard else "conversational", whole[0], whole[1]


def _absent(value: Any) -> bool:
    """Whether a value is null, blank text or an empty list."""
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


def _refuse_invention(row: Row, implicit: bool) -> None:
    """Refuse to derive the prompt from the answers if the row or its source has a prompt elsewhere."""
    if holds_prompt(row.data):
        found = ", ".join(sorted(key for key, held in row.data.items() if not _absent(held)))
        raise InputError(
            f'{row.where}: no field "prompt" (found: {found}); say which column contains it: '
            '[data.columns] prompt = "…" (--columns prompt=…)'
        )
    if not implicit:
        raise BadRowError(
            "no_user_turn",
            f"{row.where}: prompt is empty, but other rows have one; add text or remove the row",
        )


def _not_repeated(
    where: str, text: bool, start: list[Message], answers: Sequence[list[Message]]
) -> list[Message]:
    """The prompt messages to put before complete conversations; none if they already contain them.

    As in TRL, a text prompt beside complete conversations must occur in them.
    """
    said = start[0]["content"].strip()
    repeated = all(
        any(said in message["content"] for message in answer) if text else answer[: len(start)] == start
        for answer in answers
    )
    if repeated:
        return []
    if text:
        raise InputError(
            f"{where}: chosen and rejected are complete conversations but do not contain the prompt's text; "
            "remove prompt, or keep only the answers in chosen and rejected"
        )
    return start


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """The messages after the row's `system` column, unless they already begin with it."""
    system = row.data.get("system")
    if _absent(system):
        return messages
    first = {"role": "system", "content": _content(row.where, "system", system)}
    if messages[0]["role"] != "system":
        return [first, *messages]
    if messages[0] != first:
        raise InputError(
            f"{row.where}: the column system and the first message of the conversation differ; keep one"
        )
    return messages


def _extract_prompt(where: str, chosen: str, rejected: str) -> tuple[str, str, str]:
    """The common beginning of two texts, shortened so that no word is split and no answer is empty.

    White space at the cut goes to the answers, as in TRL's `extract_prompt`, which also cuts inside words.
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
        raise BadRowError(
            "no_user_turn",
            f'{where}: no field "prompt", and chosen and rejected have no common beginning that could be it; '
            "add the field",
        )
    return chosen[:end], chosen[end:], rejected[end:]


def _value(row: Row, name: str) -> Any:
    """A required, non-empty field."""
    value = row.data.get(name)
    if name not in row.data or (value is None and name == "prompt"):
        found = ", ".join(sorted(key for key, held in row.data.items() if not _absent(held))) or "none"
        raise InputError(
            f'{row.where}: no field "{name}" (found: {found}); rename or add it, or map the columns: '
            f'[data.columns] {name} = "…" (--columns {name}=…)'
        )
    if _absent(value):
        raise BadRowError("empty_answer", f"{row.where}: {name} is empty; add text or remove the row")
    return value


def _messages(where: str, name: str, value: Any, role: str) -> list[Message]:
    """Messages of role and content; plain text is one message from `role`."""
    if isinstance(value, str):
        return [{"role": role, "content": _content(where, name, value)}]
    if not isinstance(value, list):
        raise InputError(f"{where}: {name} must be text or a list of messages; correct the row")
    return [_message(where, f"{name} message {number}", message) for number, message in enumerate(value, 1)]


def _message(where: str, name: str, message: Any) -> Message:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise InputError(f"{where}: {name} has no role and content; write {{'role': …, 'content': …}}")
    _refuse_unsupported(f"{where}: {name}", message)
    if message["role"] not in ("system", "user", "assistant"):
        what = "tool calls are not supported" if message["role"] in ("tool", "function") else "unknown role"
        raise InputError(f"{where}: {name} has role {message['role']!r}: {what}; remove the row")
    content = _content(where, name, message["content"])
    return {"role": message["role"], "content": content} | _reasoning(where, name, message)


def _reasoning(where: str, name: str, message: dict[str, Any]) -> Message:
    """A message's separate reasoning, under the first name of `REASONING_NAMES`."""
    held = {key: message[key] for key in REASONING_NAMES if message.get(key)}
    texts = {_content(where, f"{key} of {name}", value) for key, value in held.items()}
    if len(texts) > 1:
        raise InputError(f"{where}: {name} has {' and '.join(held)} with different texts; remove one of them")
    text = "".join(texts)
    if text.strip() and message["role"] != "assistant":
        raise InputError(
            f"{where}: {name} (from {message['role']}) has {next(iter(held))}, which only an assistant has; "
            "remove it"
        )
    return {REASONING_NAMES[0]: text} if text.strip() else {}


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
            f"{where}: {name} contains a lone surrogate, which is not a character; correct the text"
        ) from error
    return content


def _refuse_unsupported(where: str, data: dict[str, Any]) -> None:
    for names, what in ((_TOOLS, "tool calls"), (_MEDIA, "images, video and audio")):
        held = [name for name in names if _holds(data.get(name))]
        if held:
            raise InputError(
                f"{where}: has {held[0]!r}; {what} are not supported: remove the row or the field"
            )


def _holds(value: Any) -> bool:
    """Whether a field is non-empty; a list or object may be given as text."""
    return bool(value.strip(" []{}\n") not in ("", "null") if isinstance(value, str) else value)


def _check_turns(where: str, name: str, messages: Sequence[Message]) -> None:
    """Check a complete conversation: turns in order, the last from the assistant, and one before it."""
    if messages[-1]["role"] != "assistant":
        raise BadRowError(
            "roles_out_of_order",
            f"{where}: the last message of {name} is from {messages[-1]['role']}; it must be from assistant",
        )
    if not messages[-1]["content"].strip():
        raise BadRowError(
            "empty_answer", f"{where}: the answer of {name} is empty; add text or remove the row"
        )
    _check_order(where, f"prompt and {name}", messages)


def _check_order(where: str, name: str, messages: Sequence[Message]) -> None:
    """Check the order: an optional system message, then user and assistant alternating, each with text."""
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise BadRowError(
            "no_user_turn", f"{where}: {name} has no message from user, so there is no prompt; add one"
        )
    first = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise BadRowError(
                "system_not_first" if role == "system" else "roles_out_of_order",
                f"{where}: roles out of order: message {first + number + 1} of {name} is from {role}, not "
                f"{expected} (an optional system message, then user and assistant in turn); correct the row",
            )
    for number, message in enumerate(messages, 1):
        if not message["content"].strip() and message["role"] != "system":
            raise BadRowError(
                "empty_turn",
                f"{where}: message {number} of {name} ({message['role']}) is empty; remove the row, or give "
                "it text",
            )


def _split_at_difference(
    where: str, chosen: list[Message], rejected: list[Message], on_diverge: str
) -> tuple[list[Message], list[Message]]:
    """Both conversations up to and including the first assistant turn that differs."""
    shorter = min(len(chosen), len(rejected))
    first = next((i for i in range(shorter) if chosen[i] != rejected[i]), None)
    if first is None:
        raise BadRowError(
            "diverges",
            f"{where}: diverges_before_last_turn: one conversation is the beginning of the other, so no two "
            "answers can be compared; remove the row",
        )
    roles = {chosen[first]["role"], rejected[first]["role"]}
    if roles != {"assistant"}:
        raise BadRowError(
            "diverges",
            f"{where}: diverges_before_last_turn: chosen and rejected first differ in message {first + 1} "
            f"(from {' and '.join(sorted(roles))}), so they answer different prompts; remove the row",
        )
    if on_diverge == "refuse":
        raise BadRowError(
            "diverges",
            f"{where}: diverges_before_last_turn: chosen and rejected differ in message {first + 1}, before "
            'the last answer; make them share all earlier messages, or set data.on_diverge = "split" '
            "(--on-diverge split)",
        )
    return chosen[: first + 1], rejected[: first + 1]
