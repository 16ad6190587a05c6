"""Chat templates: the one that a setting means, and what a template has lost of a conversation.

A template may cut text out of a turn without an error (DeepSeek-R1's drop the reasoning of every answer):
what is trained on and scored would then be another answer than the data's.

Neither torch nor transformers is imported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sera_core.data.stand_ins import refuse_special
from sera_core.errors import InputError

Message = Mapping[str, str]
"""role, content and, of an assistant, reasoning_content (absent or None where there is none)."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
"""Under which templates look for an assistant's reasoning."""
LONGEST = 2**20
"""Characters of a template's text; real ones have up to some ten thousand."""
NAMES = ("chatml", "deepseek-r1")
"""Templates that ship with the package."""
# Llama 3's templates ask for the date; theirs when none is given is this one.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}"
    "{{ {'%Y-%m-%d': '2024-07-26', '%d %B %Y': '26 July 2024', '%B %d, %Y': 'July 26, 2024', '%Y': '2024'}"
    ".get(format, '26 Jul 2024') }}"
    "{% endmacro %}"
)
# What transformers' apply_chat_template takes for itself.
_OURS = {
    "messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors",
    "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
}  # fmt: skip
_THINK = re.compile(r"\s*(</?think>)\s*")


# ------------------------------------------------------------------------------------------------- settings


def template_text(template: str) -> str:
    """The Jinja text that a template setting means: a name of `NAMES`, a path, or the text itself.

    Raises:
        InputError: it is none of them.
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
            f"chat template {template!r} is neither one of {names}, nor a file, nor Jinja text: correct the "
            "name or the path."
        )
    refuse_long(f"chat template {path}", path.stat().st_size)
    return path.read_text(encoding="utf-8")


def refuse_long(what: str, size: int) -> None:
    """Refuse a template of more than `LONGEST` characters (or bytes).

    Raises:
        InputError: it has more; the message names it.
    """
    if size > LONGEST:
        raise InputError(
            f"{what} has {size:,} characters, and at most {LONGEST:,} are rendered: give another template."
        )


def default_template(where: Path | str, held: Any) -> str | None:
    """The template that is used when none is named; a tokenizer may hold several, each under a name.

    Args:
        where: the model, for the message.
        held: a tokenizer's `chat_template`: text, name -> text, a list of {name, template}, or None.

    Raises:
        InputError: there are named templates, and none of them is `default`.
    """
    if isinstance(held, list):
        held = {entry.get("name"): entry.get("template") for entry in held if isinstance(entry, dict)}
    if isinstance(held, dict):
        if not isinstance(held.get("default"), str):
            names = ", ".join(sorted(map(str, held))) or "none"
            raise InputError(
                f'model {where} has named chat templates ({names}), but none of the name "default": set '
                "model.chat_template to the Jinja text of one, or to a file that holds it."
            )
        return held["default"]
    return held if isinstance(held, str) else None


def refuse_unused(template: str, arguments: Mapping[str, Any]) -> None:
    """Refuse template arguments that change nothing, or that are not the user's to set.

    Raises:
        InputError: the template does not mention one, or the renderer sets it itself; the message names it.
    """
    first, *rest = template.split("{#")
    code = first + "".join(part.partition("#}")[2] for part in rest)  # without comments
    for name in arguments:
        if name in _OURS:
            raise InputError(f"template argument {name!r} is set by the renderer itself: remove it.")
        if not re.search(rf"\b{re.escape(name)}\b", code):
            raise InputError(
                f"template argument {name!r} changes nothing: the chat template does not mention it. Correct "
                "its name, or remove it from model.template_kwargs."
            )


def with_fixed_date(template: str) -> str:
    """A template that prints today's date prints one and the same, so that ids do not change overnight."""
    return _FIXED_DATE + template if "strftime_now" in template else template


def reasoning_name(template: str) -> str:
    """The name under which a template looks for an assistant's reasoning: the first that it mentions."""
    found = (name for name in REASONING_NAMES if re.search(rf"\b{name}\b", template))
    return next(found, REASONING_NAMES[0])


def with_reasoning(message: Message) -> dict[str, str]:
    """A message with its reasoning under the names that transformers' `apply_chat_template` adds."""
    found = (message[name] for name in REASONING_NAMES if message.get(name) is not None)
    if (reasoning := next(found, None)) is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def remedy(template: str) -> str:
    """What to do about a template that does not render a conversation with its answer."""
    if "</think>" in template and "<｜Assistant｜>" in template:
        return (
            'set model.chat_template = "deepseek-r1", the training template that ships with the package and '
            "keeps the answer as it is given."
        )
    return "set model.chat_template to a template that does not."


# -------------------------------------------------------------------------------------------------- losses


def lost_of_prompt(messages: Sequence[Message], text: str) -> str | None:
    """What a template left out of a prompt, None if every message is there.

    White space round a message may be trimmed. Of an earlier assistant turn only what follows the reasoning
    must be there: many templates leave out the reasoning of all but the last turn, as models are served.

    Args:
        messages: the prompt.
        text: what the template wrote.
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


def lost_of_answer(answer: Message, prompt: str, written: str) -> str | None:
    """What a template left out of an answer, None if all of it is there.

    White space round the answer and round `<think>` and `</think>` may differ, and the generation prompt may
    have written the answer's opening `<think>`.

    Args:
        answer: an assistant message.
        prompt: what the template writes of the prompt, its generation prompt included.
        written: what it writes behind that.
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
