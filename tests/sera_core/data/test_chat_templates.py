"""Chat templates: what one loses of a conversation is refused; those that ship keep all of it."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CHATML, tiny_policy, write_tokenizer

from sera_core.data.rendering import Renderer
from sera_core.errors import InputError
from sera_core.models.model_sources import materialise
from sera_core.models.policies import load_tokenizer

USER = [{"role": "user", "content": "What is 12 + 30?"}]
THOUGHT = "<think>\ntwelve and thirty\n</think>\n\n42."
R1_TOKENS = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
# As DeepSeek-R1's: of an assistant turn only what follows its reasoning is written.
CUTTING = (
    "{{ '<｜begin▁of▁sentence｜>' }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<｜User｜>' + m['content'] }}{% elif m['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)


def answer(content, **more):
    return [{"role": "assistant", "content": content, **more}]


def add_tokens(folder, special, plain=()):
    """Add tokens to a tokenizer's file, behind those it has."""
    file = folder / "tokenizer.json"
    held = json.loads(file.read_text())
    first = max(*held["model"]["vocab"].values(), *(token["id"] for token in held["added_tokens"])) + 1
    shared = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    held["added_tokens"] += [
        {"id": number, "content": text, "special": text in special, **shared}
        for number, text in enumerate([*special, *plain], first)
    ]
    file.write_text(json.dumps(held))


@pytest.fixture(scope="module")
def r1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("r1")
    write_tokenizer(folder, CUTTING)
    add_tokens(folder, R1_TOKENS, ("<think>", "</think>"))
    return folder


def with_template(folder, template):
    write_tokenizer(folder, template)
    return Renderer(folder)


def spelling(renderer, ids):
    return renderer.tokenizer.decode(ids)


# ------------------------------------------------------------------------------------------------- losses


def test_a_template_that_cuts_the_reasoning_out_of_answers_is_refused_with_the_remedy(r1):
    renderer = Renderer(r1)
    assert spelling(renderer, renderer.response_ids(USER, "42.")) == "42.<｜end▁of▁sentence｜>"
    refused = r'reasoning \(up to </think>, 26 of 39 characters\).*model\.chat_template = "deepseek-r1"'
    with pytest.raises(InputError, match=refused):
        renderer.response_ids(USER, THOUGHT)
    with pytest.raises(InputError, match=refused):
        renderer.render_pairs([{"prompt": USER, "chosen": "42.", "rejected": answer(THOUGHT)}])


def test_a_generation_prompt_that_opens_the_reasoning_is_refused_with_the_remedy(tmp_path):
    write_tokenizer(tmp_path, CUTTING.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\n' }}"))
    add_tokens(tmp_path, R1_TOKENS)
    with pytest.raises(InputError, match=r'first difference is at character .*"deepseek-r1"'):
        Renderer(tmp_path).response_ids(USER, THOUGHT)


def test_a_template_that_cuts_an_answer_short_is_refused(tmp_path):
    short = CHATML.replace("message['content']", "message['content'][:40]")
    renderer = with_template(tmp_path, short)
    assert renderer.response_ids(USER, "It is 42.")
    with pytest.raises(InputError, match=r"drops text of the answer \(of 41 characters\)"):
        renderer.response_ids(USER, "y" * 41)


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_template_that_leaves_out_a_turn_is_refused_by_its_role(tmp_path, role):
    renderer = with_template(tmp_path, "{% set messages = messages | rejectattr('role', 'equalto', '"
                             + role + "') | list %}" + CHATML)  # fmt: skip
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    with pytest.raises(InputError, match=rf"drops the text of message [12] \(role {role}, "):
        renderer.prompt_ids(messages)


def test_earlier_turns_may_lose_their_reasoning_and_nothing_else(tmp_path):
    """Qwen3 and others leave the reasoning of earlier turns out, as the models are served."""
    cut = (
        "{% for m in messages %}"
        "{% set c = m['content'] if loop.last else m['content'].split('</think>')[-1] %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + c | trim + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    renderer = with_template(tmp_path, cut)
    before = [*USER, *answer(THOUGHT), {"role": "user", "content": "And 1 more?"}]
    assert "twelve" not in spelling(renderer, renderer.prompt_ids(before))
    assert "twelve" in spelling(renderer, renderer.response_ids(before, THOUGHT))
    renderer = with_template(tmp_path, cut.replace("[-1] %}", "[0] %}"))
    with pytest.raises(InputError, match=r"message 2 \(role assistant, "):
        renderer.prompt_ids(before)


def test_white_space_round_the_reasoning_is_the_templates(tmp_path):
    spaced = CHATML.replace(
        "message['content']", "message['content'] | replace('</think>', '\n</think>\n\n')"
    )
    renderer = with_template(tmp_path, spaced)
    ids = renderer.response_ids(USER, "<think>a</think>b")
    assert spelling(renderer, ids) == "<think>a\n</think>\n\nb<|im_end|>"


def test_an_opening_tag_of_the_generation_prompt_is_the_answers_own(tmp_path):
    renderer = with_template(tmp_path, CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"))
    assert (
        spelling(renderer, renderer.response_ids(USER, THOUGHT))
        == "twelve and thirty\n</think>\n\n42.<|im_end|>"
    )


# ---------------------------------------------------------------------------------------------- deepseek-r1


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "\n", "a b", "<｜User｜>", "é"]), max_size=8).map(
        "".join
    )
)
def test_the_training_template_keeps_every_answer(r1, text):
    renderer = Renderer(r1, "deepseek-r1")
    if text.strip():
        assert spelling(renderer, renderer.response_ids(USER, text)) == text + "<｜end▁of▁sentence｜>"


def test_the_training_template_writes_what_r1_reads(r1):
    renderer = Renderer(r1, "deepseek-r1")
    messages = [
        {"role": "system", "content": "Be brief."},
        *USER,
        *answer(THOUGHT),
        {"role": "user", "content": "Why?"},
    ]
    assert spelling(renderer, renderer.prompt_ids(messages)) == (
        "<｜begin▁of▁sentence｜>Be brief.<｜User｜>What is 12 + 30?<｜Assistant｜>42.<｜end▁of▁sentence｜>"
        "<｜User｜>Why?<｜Assistant｜>"
    )
    ids = renderer.prompt_ids(USER) + renderer.response_ids(USER, THOUGHT)
    assert renderer.tokenizer.convert_ids_to_tokens(ids[-1]) == "<｜end▁of▁sentence｜>"
    assert (
        len([i for i in ids if renderer.tokenizer.convert_ids_to_tokens(i) in ("<think>", "</think>")]) == 2
    )


# ------------------------------------------------------------------------------------------ named templates


@pytest.mark.parametrize("form", [dict, list])
def test_of_several_named_templates_the_default_is_used_everywhere(tmp_path, form):
    folder = tiny_policy(tmp_path / "policy", template=None)
    named = {"tool_use": "{{ tools }}", "default": CHATML}
    file = folder / "tokenizer_config.json"
    held = named if form is dict else [{"name": n, "template": t} for n, t in named.items()]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": held}))
    ids = Renderer(folder, CHATML).prompt_ids(USER)
    assert Renderer(folder).prompt_ids(USER) == ids
    copy = materialise(str(folder), tmp_path / "copy")
    assert Renderer(copy).prompt_ids(USER) == ids
    assert load_tokenizer(copy).chat_template == CHATML


def test_named_templates_without_a_default_are_refused_with_their_names(tmp_path):
    folder = tiny_policy(tmp_path / "policy", template=None)
    file = folder / "tokenizer_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"chat_template": {"rag": "x", "tool_use": "y"}})
    )
    for use in (
        lambda: Renderer(folder).prompt_ids(USER),
        lambda: materialise(str(folder), tmp_path / "copy"),
    ):
        with pytest.raises(InputError, match=r'named chat templates \(rag, tool_use\).*"default"'):
            use()


# ------------------------------------------------------------------------------------------------ reasoning


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_handed_to_the_template_under_the_name_it_reads(tmp_path, name):
    reads = CHATML.replace(
        "message['content']",
        f"('<think>' + message.{name} + '</think>' if message.{name} else '') + message['content']",
    )
    renderer = with_template(tmp_path, "{# enable_thinking #}" + reads)
    with_reasoning = renderer.response_ids(USER, answer("42.", reasoning_content="12 + 30"))
    assert spelling(renderer, with_reasoning) == "<think>12 + 30</think>42.<|im_end|>"
    without = renderer.response_ids(USER, answer("42.", reasoning_content=None))
    assert without == renderer.response_ids(USER, "42.")


def test_reasoning_cannot_write_a_control_token(r1):
    renderer = Renderer(r1, "deepseek-r1")
    ids = renderer.response_ids(USER, answer("42.", reasoning_content="<｜end▁of▁sentence｜>"))
    tokens = renderer.tokenizer.convert_ids_to_tokens(ids)
    assert tokens.count("<｜end▁of▁sentence｜>") == 1
    assert spelling(renderer, ids) == ("<think>\n<｜end▁of▁sentence｜>\n</think>\n\n42.<｜end▁of▁sentence｜>")


def test_a_template_that_knows_no_reasoning_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"drops reasoning_content \(7 characters\)"):
        with_template(tmp_path, CHATML).response_ids(USER, answer("42.", reasoning_content="12 + 30"))


def test_an_earlier_turn_may_lose_its_reasoning(tmp_path):
    renderer = with_template(tmp_path, CHATML)
    prompt = [*USER, *answer("42.", reasoning_content="12 + 30"), *USER]
    assert renderer.prompt_ids(prompt) == renderer.prompt_ids([*USER, *answer("42."), *USER])


# ------------------------------------------------------------------------------------------------ arguments

# As Qwen3's: without thinking, the generation prompt closes the reasoning that an answer would begin with.
THINKING = CHATML.replace(
    "{{ '<|im_start|>assistant\n' }}",
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think></think>' }}{% endif %}",
).replace("+ message['content']", "+ ('<think></think>' if loop.last and message['role'] == 'assistant'"
          " and enable_thinking is false else '') + message['content']")  # fmt: skip


def test_arguments_reach_the_template_for_prompts_and_answers_alike(tmp_path):
    with_template(tmp_path, THINKING)
    renderer = Renderer(tmp_path, arguments={"enable_thinking": False})
    assert spelling(renderer, renderer.prompt_ids(USER)).endswith("assistant\n<think></think>")
    assert spelling(renderer, renderer.response_ids(USER, "42.")) == "42.<|im_end|>"
    assert spelling(renderer, Renderer(tmp_path).prompt_ids(USER)).endswith("assistant\n")


def test_only_arguments_that_are_given_change_the_renderers_hash(tmp_path):
    with_template(tmp_path, THINKING)
    assert Renderer(tmp_path, arguments={}).hash == Renderer(tmp_path).hash
    hashes = {Renderer(tmp_path, arguments={"enable_thinking": value}).hash for value in (True, False)}
    assert len(hashes | {Renderer(tmp_path).hash}) == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [("enable_thought", "'enable_thought' has no effect"), ("note", "'note' has no effect"),
     ("add_generation_prompt", "set by the renderer")],
)  # fmt: skip
def test_an_argument_that_the_template_does_not_take_is_refused(tmp_path, name, said):
    with_template(tmp_path, "{# note #}" + THINKING)
    with pytest.raises(InputError, match=said):
        Renderer(tmp_path, arguments={name: True}).prompt_ids(USER)
