"""What supervised fine-tuning trains on: which conversations, apart from which prompts, as which tokens."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import tiny
import tinyrun

from flows.running.open_run import source_digests
from sera_core import steps
from sera_core.artifacts.manifest import Artifact, StepRecord
from sera_core.artifacts.schema import IGNORED
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.data.rendering import Renderer
from sera_core.errors import InputError
from tasks.conversations import rendered
from tasks.step_functions import work_of


def said(*texts: str) -> list[dict[str, str]]:
    """Turns of user and assistant."""
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny policy of 64 positions and pairs."""
    folder = tmp_path_factory.mktemp("conversations")
    tiny.tiny_policy(folder / "policy", layers=1, hidden=32, positions=64)
    tinyrun.write_rows(folder / "pairs.jsonl", tinyrun.pairs(32))
    return folder


class Steps:
    """The steps up to the examples, in a store of their own."""

    def __init__(self, place: Path, folder: Path, rows: list[dict] | None, **data: Any) -> None:
        sft = "chosen" if rows is None else str(tinyrun.write_rows(folder / "chats.jsonl", rows))
        self.config = tinyrun.config(place, start={"sft": sft}, data=data)
        self.store, digests = open_store(str(folder / "store")), source_digests(self.config)
        self.data = self.do(steps.data(self.config, digests["data"]))
        self.model = self.do(steps.model(self.config, digests["model"]))
        self.sft = digests.get("sft")

    def do(self, spec: Any) -> StepRecord:
        return run_step(self.store, spec, work_of(spec.step), self.config.execution)

    def messages(self) -> StepRecord:
        return self.do(steps.messages(self.config, self.data.ref, self.sft))

    def examples(self) -> StepRecord:
        if self.sft is None:
            pairs = self.do(steps.render(self.config, self.data.ref, self.model.ref)).ref
            return self.do(steps.examples(self.config, self.model.ref, pairs, None))
        return self.do(steps.examples(self.config, self.model.ref, None, self.messages().ref))

    def rows(self, record: StepRecord, name: str) -> list[dict]:
        return pq.read_table(Artifact(self.store, record.ref).path(name)).to_pylist()


GOOD = {"messages": said("Where is the boat?", "on the lake")}
FORMS = [
    GOOD,
    {"prompt": "And the tea?", "completion": "in the film"},
    {"prompt": said("Why?"), "completion": said("", "because")[1:], "system": "Be short."},
    {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "the person"}]},
    {"messages": json.dumps(said("Is it?", "yes", "Really?"))},
]


def test_conversations_are_read_in_every_form(place: Path, tmp_path: Path) -> None:
    """The last has a question without an answer at its end, which is left off."""
    done = Steps(place, tmp_path, [*FORMS, GOOD])
    record = done.messages()
    found = {row["messages"][-2]["content"]: row["messages"] for row in done.rows(record, "messages.parquet")}
    assert dict(record.counts) == {"read": 6, "kept": 5, "duplicate": 1}
    assert {text: messages[-1]["content"] for text, messages in found.items()} == {
        "Where is the boat?": "on the lake",
        "And the tea?": "in the film",
        "Why?": "because",
        "Who?": "the person",
        "Is it?": "yes",
    }
    assert found["Why?"][0] == {"role": "system", "content": "Be short."}


BAD = [
    {"messages": said("alone")},
    {"messages": []},
    {"prompt": "Why?", "completion": " "},
    {"messages": [*said("one"), *said("two", "three")]},
]


def test_bad_rows_are_refused_by_name_or_dropped_and_counted(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"(?s)4 rows cannot be used.*no_answer: .* 2 rows.*chats.jsonl line 2"
    ):
        Steps(place, tmp_path / "a", [GOOD, *BAD]).messages()
    record = Steps(place, tmp_path / "b", [GOOD, *BAD], on_bad_row="drop").messages()
    assert dict(record.counts) == {
        "read": 5, "kept": 1, "no_answer": 2, "empty_answer": 1, "roles_out_of_order": 1,
    }  # fmt: skip
    with pytest.raises(InputError, match="neither messages, nor prompt and completion"):
        Steps(place, tmp_path / "c", [{"text": "x"}], on_bad_row="drop").messages()


def test_prompts_kept_apart_are_refused_with_counts_or_dropped(place: Path, tmp_path: Path) -> None:
    """The file repeats every prompt of the pairs; 8 of 32 are held out."""
    rows = [{"prompt": row["prompt"], "completion": "no"} for row in tinyrun.pairs(32)]
    shared = r"data\.heldout shares 8 of its 8 different prompts with start\.sft, where 8 conversations"
    with pytest.raises(InputError, match=shared):
        Steps(place, tmp_path / "a", rows).messages()
    done = Steps(place, tmp_path / "b", rows, on_overlap="drop")
    record = done.messages()
    assert dict(record.counts) == {"read": 32, "kept": 24, "overlap": 8}
    heldout = {row["prompt"][0]["content"] for row in done.rows(done.data, "heldout.parquet")}
    kept = {row["messages"][0]["content"] for row in done.rows(record, "messages.parquet")}
    assert len(heldout) == 8 and not heldout & kept
    assert dict(Steps(place, tmp_path / "c", rows, on_overlap="keep").messages().counts)["kept"] == 32


def test_labels_are_the_ids_that_are_scored(place: Path) -> None:
    """Of every answer the renderer's ids, after the ids of its prompt, in one sequence."""
    renderer, messages = Renderer(place / "policy"), said("Where?", "on the lake", "And now?", "a boat")
    (example,) = rendered(renderer, "x", messages)
    first, second = (
        (renderer.prompt_ids(messages[:at]), renderer.response_ids(messages[:at], messages[at : at + 1]))
        for at in (1, 3)
    )
    assert example.ids == second[0] + second[1]
    answers = [label for label in example.labels if label != IGNORED]
    assert answers == first[1] + second[1]
    assert example.labels[len(first[0]) : len(first[0]) + len(first[1])] == first[1]
    assert example.labels[len(second[0]) :] == second[1]


CUTTING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_where_the_template_cuts_earlier_reasoning_each_answer_has_a_sequence(tmp_path: Path) -> None:
    """The first answer is learnt with its reasoning, the second after a prompt without it."""
    folder = tiny.tiny_policy(tmp_path / "p", layers=1, hidden=32, template=CUTTING)
    renderer, messages = Renderer(folder), said("Where?", "<think>hm</think>a lake", "And now?", "a boat")
    found = rendered(renderer, "x", messages)
    assert [one.ids for one in found] == [
        renderer.prompt_ids(messages[:at]) + renderer.response_ids(messages[:at], messages[at : at + 1])
        for at in (1, 3)
    ]
    assert [renderer.text([label for label in one.labels if label != IGNORED]) for one in found] == [
        "<think>hm</think>a lake",
        "a boat",
    ]


def test_what_cannot_be_rendered_or_placed_is_refused_or_dropped(place: Path, tmp_path: Path) -> None:
    long = {"messages": said("Tell me", " ".join(tinyrun.WORDS * 4))}
    with pytest.raises(InputError, match=r"1 over_positions.*\d+ tokens, but the model has 64 positions"):
        Steps(place, tmp_path / "a", [GOOD, long]).examples()
    dropped = Steps(place, tmp_path / "b", [GOOD, long], on_bad_row="drop").examples()
    assert dict(dropped.counts) == {"read": 2, "kept": 1, "over_positions": 1}
    limited = {"max_prompt_tokens": 20, "max_response_tokens": 20}
    done = Steps(place, tmp_path / "c", [GOOD, long], **limited).examples()
    assert dict(done.counts) == {"read": 2, "kept": 1, "too_long": 1}
    with pytest.raises(InputError, match=r"no conversation is left \(1 too_long\)"):
        Steps(place, tmp_path / "d", [long], **limited).examples()


def test_a_template_that_rejects_a_conversation_counts_it(place: Path, tmp_path: Path) -> None:
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"

    def made(name: str, **data: Any) -> Steps:
        done = Steps(place, tmp_path / name, FORMS[1:3], **data)
        chatml = {"chat_template": strict + tiny.CHATML}
        model = done.config.model.model_copy(update=chatml)
        done.config = done.config.model_copy(update={"model": model})
        done.model = done.do(steps.model(done.config, source_digests(done.config)["model"]))
        return done

    with pytest.raises(
        InputError, match=r"1 not_rendered.*rejects a conversation with the roles system, user"
    ):
        made("a").examples()
    record = made("b", on_bad_row="drop").examples()
    assert dict(record.counts) == {"read": 2, "kept": 1, "not_rendered": 1}


def test_the_chosen_answers_are_those_of_the_train_side_each_once(place: Path, tmp_path: Path) -> None:
    """One pair comes again with another rejected answer."""
    rows = tinyrun.pairs(32)
    more = [row | {"rejected": said("", f"other {n}")[1:]} for n, row in enumerate(rows[:32])]
    file = tinyrun.write_rows(tmp_path / "twice.jsonl", [*rows, *more])
    done = Steps(place, tmp_path, None, train=[{"path": str(file)}])
    record = done.examples()
    assert dict(record.counts) == {"read": 48, "kept": 24, "duplicate": 24}
    renderer = Renderer(place / "policy")
    expected = sorted(
        renderer.prompt_ids(row["prompt"]) + renderer.response_ids(row["prompt"], row["chosen"])
        for row in done.rows(done.data, "train.parquet")[::2]
    )
    assert sorted(row["ids"] for row in done.rows(record, "examples.parquet")) == expected
