"""Conversations to token ids, the same for training, scoring and sampling.

    prompt    ids of the chat template's text up to and including the generation prompt
    response  ids of the rest, up to and including the first end-of-turn token

Prompt and response are tokenised separately, so that no token crosses the boundary and human and sampled
responses are scored the same way. Special tokens in the data ("<|im_end|>" in an answer) become plain text,
never control tokens. A template that prints today's date gets a fixed one, so that ids do not change.

transformers is imported on first use, because `renderer_hash` does not need it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sera_core.data.chat_templates import (
    Message,
    default_template,
    missing_from_answer,
    missing_from_prompt,
    reasoning_name,
    refuse_long,
    refuse_unused,
    remedy,
    template_text,
    with_fixed_date,
    with_reasoning,
)
from sera_core.data.encoding import Encoder, Rendered, unmarked
from sera_core.data.template_process import Limits, TemplateError, TemplateLimitError, render
from sera_core.errors import InputError
from sera_core.models.policies import TOKENIZER_FILES, read_settings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDERING_VERSION = 1
TEMPLATE_LIMITS = Limits()
"""Limits of a chat template for one conversation."""


def renderer_hash(
    folder: Path | str, template: str | None = None, arguments: Mapping[str, Any] | None = None
) -> str:
    """sha256 of everything that determines token ids: tokenizer files, chat template, our version.

    Args:
        folder: a policy folder.
        template: overrides the folder's chat template, as in `Renderer`.
        arguments: template arguments, as in `Renderer`.
    """
    folder = Path(folder)
    files = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
        for name in TOKENIZER_FILES
        if (folder / name).is_file()
    }
    chosen = None if template is None else template_text(template)
    parts: dict[str, Any] = {"version": RENDERING_VERSION, "files": files, "template": chosen}
    if arguments:
        parts["arguments"] = dict(arguments)
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def plain_messages(
    prompt: str, answer: str | None = None
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Standard (non-conversational) data as messages: one user message and, if given, one answer."""
    user = [{"role": "user", "content": prompt}]
    return user, [] if answer is None else [{"role": "assistant", "content": answer}]


class Renderer:
    """Chat template and tokenizer of one policy folder.

    Args:
        folder: a policy folder, of which only tokenizer files and chat template are read.
        template: replaces the folder's chat template: `chatml`, `deepseek-r1`, a path, or Jinja text.
        arguments: keyword arguments of the template (`enable_thinking`), for prompts and answers.
    """

    def __init__(
        self,
        folder: Path | str,
        template: str | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._template_setting = template
        self._arguments = dict(arguments or {})
        self._last_prompt: tuple[list[Message], Rendered] | None = None

    # ---------------------------------------------------------------------------------------- facts

    @cached_property
    def hash(self) -> str:
        """`renderer_hash` of this renderer."""
        return renderer_hash(self.folder, self._template_setting, self._arguments)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer."""
        from sera_core.models.policies import load_tokenizer

        return load_tokenizer(self.folder)

    @cached_property
    def template(self) -> str:
        """The Jinja text that is rendered.

        Raises:
            InputError: the folder has no template and none is given, or several without a default; or the
                template does not use a given argument.
        """
        if self._template_setting is not None:
            text = template_text(self._template_setting)
        else:
            text = default_template(self.folder, self.tokenizer.chat_template)
        if text is None:
            raise InputError(
                f"model folder {self.folder} has no chat template to render conversations with: set "
                'model.chat_template to "chatml" (if the tokenizer has its tokens), to a Jinja file, or to '
                "Jinja text."
            )
        refuse_long(f"the chat template of {self.folder}", len(text))
        refuse_unused(text, self._arguments)
        return with_fixed_date(text)

    @cached_property
    def _reasoning_name(self) -> str:
        return reasoning_name(self.template)

    @cached_property
    def end_of_turn_id(self) -> int:
        """The special token with which the template ends an assistant's turn.

        Raises:
            InputError: the template does not end it with a special token.
        """
        user, answer = plain_messages("question", "answer")
        text = self._render([*user, *answer], False).text
        tail = Rendered(text[text.rfind("answer") + len("answer") :])
        found = [token for token in self._encoder.encode(tail) if token in self._encoder.specials.values()]
        if not found:
            raise InputError(
                f"the chat template of {self.folder} does not end an assistant's turn with a special token, "
                "so a policy cannot learn where to stop: add {{ eos_token }} after the assistant's content."
            )
        return found[0]

    @cached_property
    def pad_id(self) -> int:
        """Id of the padding token, else of the end-of-turn token."""
        pad: Any = self.tokenizer.pad_token_id
        return self.end_of_turn_id if pad is None else pad

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end a sampled response: end of turn, end of text, and every `eos_token_id` of the model.

        `eos_token_id` may be a list (Qwen2.5 and Llama 3 Instruct have several): a model may end its turn
        with any of them.
        """
        ends: list[Any] = [self.end_of_turn_id, self.tokenizer.eos_token_id]
        config = read_settings(self.folder / "config.json")
        for part in (
            read_settings(self.folder / "generation_config.json"),
            config,
            config.get("text_config"),
        ):
            listed = (part or {}).get("eos_token_id")
            ends += listed if isinstance(listed, list) else [listed]
        return tuple(dict.fromkeys(token for token in ends if token is not None))

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.tokenizer)

    # ------------------------------------------------------------------------------------------- use

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation followed by the generation prompt.

        Raises:
            InputError: the template rejects the conversation or drops text of a message, or the model has no
                embedding for a token.
        """
        return self._checked(self._encoder.encode(self._prompt(messages)))

    def response_ids(self, messages: Sequence[Message], answer: str | Sequence[Message]) -> list[int]:
        """Ids of an answer to a conversation, up to and including its end-of-turn token.

        Args:
            messages: the prompt.
            answer: the answer's text, or one assistant message.

        Returns:
            The ids; empty if the answer has no text.

        Raises:
            InputError: the template does not write the answer after the prompt, drops some of its text, or
                does not end its turn.
        """
        message = _answer_message(answer)
        if not message["content"].strip():
            return []
        prompt, response = self._response(messages, message)
        if self._encoder.marks_starts:
            return self._turn(self._encoder.encode_behind(prompt, response))
        return self._turn(self._encoder.encode(response))

    def render_pairs(
        self, rows: Sequence[Mapping[str, Any]]
    ) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
        """Ids of many pairs (`prompt`, `chosen`, `rejected`) at once, as three lists in the rows' order.

        The same ids as `prompt_ids` and `response_ids`, computed with the tokenizer's parallel batch method.
        """
        rendered: list[Rendered] = []
        for row in rows:
            rendered.append(self._prompt(row["prompt"]))
            rendered += [
                self._response(row["prompt"], _answer_message(row[name]))[1]
                for name in ("chosen", "rejected")
            ]
        ids = self._encoder.encode_many(rendered)
        prompts = [self._checked(prompt) for prompt in ids[0::3]]
        sides: dict[str, list[list[int]]] = {}
        for offset, name in ((1, "chosen"), (2, "rejected")):
            sides[name] = [
                self.response_ids(row["prompt"], row[name])
                if self._encoder.marks_starts or not _answer_message(row[name])["content"].strip()
                else self._turn(response)
                for row, response in zip(rows, ids[offset::3], strict=True)
            ]
        return prompts, sides["chosen"], sides["rejected"]

    def spells_special_tokens(self, messages: Sequence[Message]) -> bool:
        """Whether the text of any message contains a special token of the tokenizer."""
        return self._encoder.spell_special_tokens(message["content"] for message in messages)

    def refuse_unknown(self, ids: Sequence[int]) -> None:
        """Refuse token ids that the model has no embedding for.

        Raises:
            InputError: there is one; the message names the largest id and both sizes.
        """
        self._checked(list(ids))

    def text(self, ids: Sequence[int]) -> str:
        """Decoded text for display, without special tokens."""
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    # --------------------------------------------------------------------------------------- template

    def _prompt(self, messages: Sequence[Message]) -> Rendered:
        messages = list(messages)
        if self._last_prompt is None or self._last_prompt[0] != messages:
            rendered = self._render(messages, True)
            self._refuse_loss(missing_from_prompt(messages, rendered.text))
            self._last_prompt = (messages, rendered)
        return self._last_prompt[1]

    def _response(self, messages: Sequence[Message], answer: Message) -> tuple[Rendered, Rendered]:
        """The rendered prompt, and the template's output after it for this answer (which may be empty)."""
        prompt = self._prompt(messages)
        whole = self._render([*messages, answer], False)
        if not whole.text.startswith(prompt.text):
            raise InputError(
                f"the chat template of {self.folder} renders the prompt differently when an answer follows "
                f"(the first difference is at character {_shared(whole.text, prompt.text)} of "
                f"{len(prompt.text)}): {remedy(self.template)}"
            )
        response = whole.after(len(prompt.text))
        self._refuse_loss(missing_from_answer(answer, prompt.text, response.text))
        return prompt, response

    def _refuse_loss(self, lost: str | None) -> None:
        if lost is not None:
            raise InputError(
                f"the chat template of {self.folder} drops {lost}, so training and scoring would not use the "
                f"text in the data: {remedy(self.template)}"
            )

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> Rendered:
        """The template's output, and the spans where special tokens come from the data."""
        mark = self._encoder.mark_for([text for message in messages for text in _texts(message)])
        chat = [self._as_read(message, mark) for message in messages]
        try:
            text = self.chat_text(chat, add_generation_prompt)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"the chat template of {self.folder} rejects a conversation with the roles {roles}: {error}. "
                "Drop or rewrite the row, or set model.chat_template."
            ) from error
        return Rendered(text) if mark is None else unmarked(text, mark)

    def chat_text(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """The template's output for messages, equal to that of transformers' `apply_chat_template`.

        Raises:
            TemplateError: the template rejects them.
            InputError: it exceeds `TEMPLATE_LIMITS`.
        """
        variables = {
            "messages": [with_reasoning(message) for message in messages],
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.tokenizer.special_tokens_map,
            **self._arguments,
        }
        try:
            return render(self.template, variables, TEMPLATE_LIMITS)
        except TemplateLimitError as error:
            raise InputError(
                f"the chat template of {self.folder} {error} for one conversation, so it probably has an "
                "endless loop: set model.chat_template to another."
            ) from error

    def _as_read(self, message: Message, mark: str | None) -> dict[str, str]:
        """A message with the keys that the template reads, and special tokens in the data between marks."""
        names = {"content": "content", "reasoning_content": self._reasoning_name}
        texts = {to: message[name] for name, to in names.items() if message.get(name) is not None}
        marked = (
            texts if mark is None else {to: self._encoder.marked(text, mark) for to, text in texts.items()}
        )
        return {"role": message["role"], **marked}

    def _turn(self, ids: list[int]) -> list[int]:
        """The ids up to and including the first end-of-turn token."""
        if self.end_of_turn_id not in ids:
            raise InputError(
                f"the chat template of {self.folder} does not end this answer with its end-of-turn token: "
                "set model.chat_template to one that does."
            )
        return self._checked(ids[: ids.index(self.end_of_turn_id) + 1])

    @cached_property
    def _embeddings(self) -> int | None:
        """Number of token embeddings in the model's configuration; None without one."""
        config = read_settings(self.folder / "config.json")
        return (config.get("text_config") or config).get("vocab_size")

    def _checked(self, ids: list[int]) -> list[int]:
        """Return the ids if the model has embeddings for all of them.

        A tokenizer may have more ids than the model has embeddings, as long as no text uses them.
        """
        if self._embeddings is not None and ids and max(ids) >= self._embeddings:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise InputError(
                f"the text has the token {token!r} with id {max(ids)}, but the model in {self.folder} has "
                f"{self._embeddings} embeddings and its tokenizer {len(self.tokenizer)} ids: resize the "
                "embeddings (model.resize_token_embeddings), or use the model's own tokenizer."
            )
        return ids


def _texts(message: Message) -> Iterator[str]:
    """The texts of a message: its content, and its reasoning if it has any."""
    yield message["content"]
    yield message.get("reasoning_content") or ""


def _answer_message(answer: str | Sequence[Message]) -> Message:
    if isinstance(answer, str):
        return {"role": "assistant", "content": answer}
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in answer) or "no message"
        raise InputError(
            f"an answer must be one assistant message, but this one is {roles}: split the conversation first."
        )
    return answer[0]


def _shared(left: str, right: str) -> int:
    """Length of the common beginning of two texts."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(left), len(right)))
