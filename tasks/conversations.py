"""What supervised fine-tuning trains on: read conversations (`read_messages`), then tokenise them
(`render_examples`).

Every row is either in the result or in dropped.parquet with its reason. Rows are sorted by content, so the
bytes do not depend on the order of the source rows.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from sera_core.artifacts import schema
from sera_core.artifacts.canonical import sha256_json
from sera_core.artifacts.schema import IGNORED
from sera_core.artifacts.step import Attempt
from sera_core.data.formats import Reading
from sera_core.data.loading import read_conversations
from sera_core.data.preferences import Message, Prompt, drop_repeated_prompts
from sera_core.data.sources import read_source
from sera_core.data.splitting import CONVERSATIONS, remove_overlap
from sera_core.errors import InputError

if TYPE_CHECKING:
    from sera_core.data.rendering import Renderer

KEPT_APART = ("heldout", "test")
LEFT_OUT = ("too_long", "duplicate")
"""Reasons that leave a conversation out whatever `data.on_bad_row` says."""
PROGRESS_ROWS = 256


def read_messages(attempt: Attempt) -> list[str]:
    """Write messages.parquet: valid, distinct conversations that share no prompt with the sides kept apart.

    Raises:
        InputError: bad rows or shared prompts (unless they are dropped), or no row is left.
    """
    fields, path = attempt.fields, attempt.spec.where["source"]
    digest, rows = read_source(path, fields["split"])
    if digest != fields["digest"]:
        raise InputError(
            f"start.sft: {path} changed during the run (digest {digest[:12]}…, at the start "
            f"{fields['digest'][:12]}…); do not modify the file, and run again"
        )
    read = read_conversations(path, rows, Reading(columns=fields["columns"], on_bad_row=fields["on_bad_row"]))
    items, repeated = drop_repeated_prompts(read.items)
    kept, overlap = remove_overlap(
        items, _kept_apart(attempt), side=CONVERSATIONS, on_overlap=fields["on_overlap"]
    )
    found = [{"conversation_id": item.prompt_id, "messages": item.prompt} for item in kept]
    schema.write_table(schema.from_rows(schema.CONVERSATIONS, found), attempt.write("messages.parquet"))
    lost = [(drop.item.prompt_id, drop.reason) for drop in (*read.dropped, *repeated, *overlap)]
    _write_dropped(attempt, "messages", "prompt_id", lost)
    _count(attempt, len(rows), len(kept), [reason for _, reason in lost])
    return ["messages.parquet", "dropped.parquet"]


def _kept_apart(attempt: Attempt) -> dict[str, list[Prompt]]:
    """Prompts of the held-out and the test side."""
    data = attempt.input("data")
    return {
        side: [Prompt(row["prompt"]) for row in schema.iter_rows(data.path(f"{side}.parquet"), ["prompt"])]
        for side in KEPT_APART
    }


class Example(NamedTuple):
    """A sequence to train on: its ids, and as labels the ids of the answers' tokens."""

    source: str
    ids: list[int]
    labels: list[int]


def render_examples(attempt: Attempt) -> list[str]:
    """Write examples.parquet: token ids and labels of conversations, or of the chosen answers of pairs.

    Raises:
        InputError: a conversation cannot be rendered or exceeds the model's positions (unless such rows are
            dropped), or none is left.
    """
    of_pairs, positions = "pairs" in attempt.spec.inputs, _positions(attempt.input("model").folder("policy"))
    kept: dict[str, Example] = {}
    lost: list[tuple[str, str]] = []
    problems: list[str] = []
    rows = 0
    for source, examples, problem in _from_pairs(attempt) if of_pairs else _from_messages(attempt):
        rows += 1
        reason = "not_rendered" if problem else _too_long(attempt, examples, positions)
        new = {sha256_json([one.ids, one.labels])[:16]: one for one in examples}
        if reason is None and new.keys() <= kept.keys():
            reason = "duplicate"
        if reason is not None:
            lost.append((source, reason))
            problems += [problem or _beyond(source, examples, positions)] if reason not in LEFT_OUT else []
        else:
            kept |= new
    _refuse(attempt, lost, problems, bool(kept))
    found = [
        {"conversation_id": one.source, "ids": one.ids, "labels": one.labels}
        for _, one in sorted(kept.items())
    ]
    schema.write_table(schema.from_rows(schema.EXAMPLES, found), attempt.write("examples.parquet"))
    _write_dropped(attempt, "examples", "pair_id" if of_pairs else "prompt_id", lost)
    _count(attempt, rows, rows - len(lost), [reason for _, reason in lost])
    attempt.metrics["examples"] = len(found)
    attempt.metrics["answer_tokens"] = sum(label != IGNORED for one in kept.values() for label in one.labels)
    attempt.metrics["tokens"] = sum(len(one.ids) for one in kept.values())
    return ["examples.parquet", "dropped.parquet"]


def _from_pairs(attempt: Attempt) -> Iterator[tuple[str, list[Example], str | None]]:
    """The chosen answers of the train pairs, as they are scored."""
    path = attempt.input("pairs").path("train.parquet")
    for row in schema.iter_rows(path, ["pair_id", "prompt_ids", "chosen_ids"]):
        prompt, answer = row["prompt_ids"], row["chosen_ids"]
        yield (
            row["pair_id"],
            [Example(row["pair_id"], prompt + answer, [IGNORED] * len(prompt) + answer)],
            None,
        )


def _from_messages(attempt: Attempt) -> Iterator[tuple[str, list[Example], str | None]]:
    """Conversations as the renderer of the pairs writes them, or why it cannot."""
    from sera_core.data.rendering import Renderer

    renderer = Renderer(
        attempt.input("model").folder("policy"), arguments=attempt.fields.get("template_kwargs")
    )
    messages = attempt.input("messages")
    path, rows = messages.path("messages.parquet"), messages.record.files["messages.parquet"].rows or 0
    for number, row in enumerate(schema.iter_rows(path)):
        if number % PROGRESS_ROWS == 0:
            attempt.progress(number, rows, "conversations")
        source = row["conversation_id"]
        try:
            yield source, rendered(renderer, source, row["messages"]), None
        except InputError as error:
            yield source, [], f"conversation {source}: {error}"


def rendered(renderer: "Renderer", source: str, messages: Sequence[Message]) -> list[Example]:
    """A conversation as sequences in which each answer has the ids that it would be scored with.

    Where the template writes the beginning of a conversation differently once more turns follow (as templates
    that cut earlier reasoning do), the later answers are in a sequence of their own.

    Raises:
        InputError: the template rejects the conversation or drops some of its text.
    """
    found: list[Example] = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = renderer.prompt_ids(messages[:at])
        answer = renderer.response_ids(messages[:at], [message])
        before = (
            found.pop() if found and prompt[: len(found[-1].ids)] == found[-1].ids else Example("", [], [])
        )
        new = prompt[len(before.ids) :]
        labels = [*before.labels, *[IGNORED] * len(new), *answer]
        found.append(Example(source, [*before.ids, *new, *answer], labels))
    return found


def _positions(policy: Any) -> int | None:
    """The model's number of positions; None if it sets no limit."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(policy, local_files_only=True, trust_remote_code=False)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _longest(examples: Sequence[Example]) -> int:
    return max(len(one.ids) for one in examples)


def _too_long(attempt: Attempt, examples: Sequence[Example], positions: int | None) -> str | None:
    longest, limit = _longest(examples), attempt.fields.get("max_tokens")
    if limit is not None and longest > limit:
        return "too_long"
    return "over_positions" if positions is not None and longest > positions else None


def _beyond(source: str, examples: Sequence[Example], positions: int | None) -> str:
    return f"{source}: {_longest(examples)} tokens, but the model has {positions} positions"


def _refuse(
    attempt: Attempt, lost: Sequence[tuple[str, str]], problems: Sequence[str], any_left: bool
) -> None:
    """Refuse what cannot be trained on, unless such rows are dropped; and refuse that nothing is left."""
    counts = Counter(reason for _, reason in lost)
    said = ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))
    if problems and attempt.fields["on_bad_row"] == "refuse":
        raise InputError(
            f"start.sft: {len(problems):,} conversations cannot be used ({said}); the first: {problems[0]}. "
            'Correct them, or set data.on_bad_row = "drop" to leave them out'
        )
    if not any_left:
        first = f"; the first: {problems[0]}" if problems else ""
        raise InputError(
            f"start.sft: no conversation is left ({said}){first}; correct them, or raise "
            "data.max_prompt_tokens and data.max_response_tokens, which together limit a conversation"
        )


def _write_dropped(attempt: Attempt, stage: str, named: str, lost: Sequence[tuple[str, str]]) -> None:
    """`named`: the ledger's column of the ids."""
    rows: list[Mapping[str, Any]] = [
        {named: source, "stage": stage, "reason": reason, "origin": "human", "round": 0, "kept": False}
        for source, reason in sorted(lost)
    ]
    schema.write_table(schema.from_rows(schema.LEDGER, rows), attempt.write("dropped.parquet"))


def _count(attempt: Attempt, read: int, kept: int, reasons: Sequence[str]) -> None:
    attempt.counts["read"] = read
    attempt.counts["kept"] = kept
    attempt.counts.update(reasons)
