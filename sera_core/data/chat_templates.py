"""Chat templates: resolve the setting, and detect text that a template drops from a conversation.

A template may silently drop text (DeepSeek-R1's drops the reasoning of every answer); training and scoring
would then see a different answer from the one in the data.

Imports neither torch nor transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sera_core.data.file_checks import refuse_special
from sera_core.errors import InputError

Message = Mapping[str, str]
"""role, content and, for an assistant, optionally reasoning_content (missing or None: no reasoning)."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
"""Keys under which templates read an assistant's reasoning."""
MAX_CHARACTERS = 2**20
"""Maximum characters of a template; real ones have up to about ten thousand."""
NAMES = ("chatml", "deepseek-r1")
"""Templates that ship with the package."""
# Llama 3's templates print the date; this is their own default.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%d %B %Y': '26 July 2024', '%B %d, %Y': 'July 26, 2024', '%Y': '2024'}"
    ".get(format, '26 Jul 2024') }}"
    "{% endmacro %}"
)
# Arguments that transformers' apply_chat_template sets itself.
_RESERVED = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
_THINK = re.compile(r"\s*(</?think>)\s*")


# ------------------------------------------------------------------------------------------------- settings


def template_text(template: str) -> str:
    """The Jinja text of a template setting: a name in `NAMES`, a path, or the text itself.

    Raises:
        InputError: it is none of these.
    """
    if template == "chatml":
        return CHATML
    if template in NAMES:
        return (Path(__file__).parent / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    if "{{" in template or "{%" in template:
        return template
    path = Path(template).expanduser()
    if not refuse_special(path).is_file():
        names = ", ".join(f'"{name}"' for name in NAMES)
        raise InputError(
            f"chat template {template!r} is not one of {names}, a file or Jinja text: correct the name or "
            "path."
        )
    refuse_long(f"chat template {path}", path.stat().st_size)
    return path.read_text(encoding="utf-8")


def refuse_long(what: str, size: int) -> None:
    """Refuse a template of more than `MAX_CHARACTERS` characters (or bytes).

    Raises:
        InputError: it is longer.
    """
    if size > MAX_CHARACTERS:
        raise InputError(
            f"{what} has {size:,} characters, more than the limit of {MAX_CHARACTERS:,}: use another one."
        )


def default_template(where: Path | str, held: Any) -> str | None:
    """A tokenizer's default template; a tokenizer may have several named ones.

    Args:
        where: the model, for the message.
        held: a tokenizer's `chat_template`: text, name -> text, a list of {name, template}, or None.

    Raises:
        InputError: there are named templates, but none is called `default`.
    """
    if isinstance(held, list):
        held = {entry.get("name"): entry.get("template") for entry in held if isinstance(entry, dict)}
    if isinstance(held, dict):
        if not isinstance(held.get("default"), str):
            names = ", ".join(sorted(map(str, held))) or "none"
            raise InputError(
                f'model {where} has named chat templates ({names}), but none called "default": set '
                "model.chat_template to the Jinja text of one, or to a file with it."
            )
        return held["default"]
    return held if isinstance(held, str) else None


def refuse_unused(template: str, arguments: Mapping[str, Any]) -> None:
    """Refuse template arguments that have no effect or are reserved.

    Raises:
        InputError: the template does not use the argument, or the renderer sets it; the message names it.
    """
    first, *rest = template.split("{#")
    code = first + "".join(part.partition("#}")[2] for part in rest)  # without comments
    for name in arguments:
        if name in _RESERVED:
            raise InputError(f"template argument {name!r} is set by the renderer: remove it.")
        if not re.search(rf"\b{re.escape(name)}\b", code):
            raise InputError(
                f"template argument {name!r} has no effect: the chat template does not use it. Correct its "
                "name, or remove it from model.template_kwargs."
            )


def with_fixed_date(template: str) -> str:
    """The template with a fixed date instead of today's, so that token ids do not change from day to day."""
    return _FIXED_DATE + template if "strftime_now" in template else template


def reasoning_name(template: str) -> str:
    """The key under which a template reads an assistant's reasoning: the first one it mentions."""
    found = (name for name in REASONING_NAMES if re.search(rf"\b{name}\b", template))
    return next(found, REASONING_NAMES[0])


def with_reasoning(message: Message) -> dict[str, str]:
    """A message with its reasoning under the keys that transformers' `apply_chat_template` adds."""
    found = (message[name] for name in REASONING_NAMES if message.get(name) is not None)
    if (reasoning := next(found, None)) is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def remedy(template: str) -> str:
    """What to do about a template that drops part of a conversation."""
    if "</think>" in template and "<｜Assistant｜>" in template:
        return (
            'set model.chat_template = "deepseek-r1", the training template that ships with the package and '
            "keeps the answer as it is given."
        )
    return "set model.chat_template to a template that does not."


# -------------------------------------------------------------------------------------------------- losses


def missing_from_prompt(messages: Sequence[Message], text: str) -> str | None:
    """Description of the text that a template dropped from a prompt; None if every message is complete.

    White space around a message may be trimmed. The reasoning of earlier assistant turns may be missing: many
    templates drop it from all but the last turn, as in serving.

    Args:
        messages: the prompt.
        text: the template's output.
    """
    position = 0
    for number, message in enumerate(messages, 1):
        content, role = message["content"].strip(), message["role"]
        if role == "system":  # some templates write it into another turn
            found = 0 if content in text else -1
        else:
            found = text.find(content, position)
            if found < 0 and role == "assistant":
                content = content.rpartition("</think>")[2].strip()
                found = text.find(content, position)
        if found < 0:
            return f"the text of message {number} (role {role}, {len(content):,} characters)"
        position = position if role == "system" else found + len(content)
    return None


def missing_from_answer(answer: Message, prompt: str, written: str) -> str | None:
    """Description of the text that a template dropped from an answer; None if the answer is complete.

    White space around the answer and around `<think>` and `</think>` may differ, and the generation prompt
    may already contain the answer's opening `<think>`.

    Args:
        answer: an assistant message.
        prompt: the rendered prompt, including the generation prompt.
        written: the template's output after the prompt.
    """
    content, reasoning = answer["content"], answer.get("reasoning_content") or ""
    if not _holds(written, reasoning):
        return f"reasoning_content ({len(reasoning):,} characters)"
    if _holds(written, content):
        return None
    opened = prompt.rstrip().endswith("<think>") and content.lstrip().startswith("<think>")
    if opened and _holds(written, content.lstrip().removeprefix("<think>")):
        return None
    before, _, after = content.rpartition("</think>")
    if before and _holds(written, after):
        return f"the answer's reasoning (up to </think>, {len(before):,} of {len(content):,} characters)"
    return f"text of the answer (of {len(content):,} characters)"


def _holds(written: str, given: str) -> bool:
    given = given.strip()
    return given in written or ("think>" in given and _THINK.sub(r"\1", given) in _THINK.sub(r"\1", written))
