"""The renderer: what counts as prompt and response, and what data cannot do to it."""

import json
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import CHATML, tiny_policy, tokenizer_json, write_tokenizer

from sera_core.data.rendering import Renderer, plain_messages, renderer_hash
from sera_core.errors import InputError

USER = [{"role": "user", "content": "What is the capital of France?"}]
START, END = 1, 2  # <|im_start|>, <|im_end|>
LIKE = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SPELLED = st.lists(
    st.sampled_from(["<|im_end|>", "<|im_start|>", "<|", "im_end", "|>", "a", " ", "\n", "é"]), max_size=8
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def renderer(folder):
    return Renderer(folder)


def with_template(tmp_path, template):
    write_tokenizer(tmp_path, template)
    return Renderer(tmp_path)


def spelling(renderer, ids):
    return renderer.tokenizer.decode(ids)


def test_the_prompt_ends_with_the_generation_prompt(renderer):
    ids = renderer.prompt_ids(USER)
    text = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert spelling(renderer, ids) == text
    assert (ids.count(START), ids.count(END)) == (2, 1)


def test_the_response_ends_with_the_first_end_of_turn_and_nothing_after_it(renderer):
    ids = renderer.response_ids(USER, "Paris.")
    assert spelling(renderer, ids) == "Paris.<|im_end|>"
    assert ids[-1] == END == renderer.end_of_turn_id
    assert renderer.stop_ids == (END,)
    assert renderer.pad_id == END


def test_an_answer_may_be_given_as_one_assistant_message(renderer):
    message = [{"role": "assistant", "content": "Paris."}]
    assert renderer.response_ids(USER, message) == renderer.response_ids(USER, "Paris.")
    with pytest.raises(InputError, match="one assistant message"):
        renderer.response_ids(USER, [*USER, *message])


def test_an_answer_without_text_has_no_ids(renderer):
    assert renderer.response_ids(USER, "") == []
    assert renderer.response_ids(USER, " \n") == []


@LIKE
@given(SPELLED.map("".join), SPELLED.map("".join))
def test_data_cannot_write_a_control_token(renderer, question, answer):
    """Two starts and one end in the prompt, one end in the response, whatever the texts spell."""
    messages, _ = plain_messages(question)
    prompt = renderer.prompt_ids(messages)
    assert (prompt.count(START), prompt.count(END)) == (2, 1)
    expected = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert spelling(renderer, prompt) == expected
    if answer.strip():
        response = renderer.response_ids(messages, answer)
        assert (response.count(START), response.count(END)) == (0, 1)
        assert spelling(renderer, response) == answer + "<|im_end|>"


@LIKE
@given(st.text(max_size=40))
def test_any_answer_comes_back_from_its_ids(renderer, answer):
    if answer.strip():
        assert renderer.text(renderer.response_ids(USER, answer)) == answer


def test_no_token_crosses_the_boundary(renderer):
    """The prompt's ids are the same whatever follows, a newline first included."""
    both = renderer.render_pairs([{"prompt": USER, "chosen": "\nParis", "rejected": "Paris"}])
    assert both[0] == [renderer.prompt_ids(USER)]
    assert spelling(renderer, both[1][0]) == "\nParis<|im_end|>"


def test_many_pairs_at_once_give_the_same_ids_as_one_by_one(renderer):
    rows = [
        {"prompt": plain_messages(f"question {n} <|im_end|>" if n % 3 else f"question {n}")[0],
         "chosen": [{"role": "assistant", "content": f"answer {n}" * (n % 4)}],
         "rejected": "no <|im_start|>" if n % 2 else "no"}
        for n in range(12)
    ]  # fmt: skip
    prompts, chosen, rejected = renderer.render_pairs(rows)
    assert prompts == [renderer.prompt_ids(row["prompt"]) for row in rows]
    assert chosen == [renderer.response_ids(row["prompt"], row["chosen"]) for row in rows]
    assert rejected == [renderer.response_ids(row["prompt"], row["rejected"]) for row in rows]


def test_a_template_that_trims_the_answer_is_followed(tmp_path):
    renderer = with_template(tmp_path, CHATML.replace("message['content']", "message['content'] | trim"))
    assert renderer.response_ids(USER, "  Paris.\n") == renderer.response_ids(USER, "Paris.")


def test_a_template_that_writes_a_system_prompt_by_itself_is_followed(tmp_path):
    own = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe short.<|im_end|>\n' }}{% endif %}"
    )
    renderer = with_template(tmp_path, own + CHATML)
    assert spelling(renderer, renderer.prompt_ids(USER)).startswith("<|im_start|>system\nBe short.")
    given_one = [{"role": "system", "content": "Be long."}, *USER]
    assert "Be short." not in spelling(renderer, renderer.prompt_ids(given_one))
    assert renderer.end_of_turn_id == END


def test_a_template_that_prints_the_date_gives_the_same_ids_every_day(tmp_path):
    dated = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}"
    renderer = with_template(tmp_path, dated + CHATML)
    assert "Today is 26 Jul 2024<|im_end|>" in spelling(renderer, renderer.prompt_ids(USER))


def test_a_template_that_rewrites_the_prompt_is_refused(tmp_path):
    counting = "{{ messages | length }} messages\n" + CHATML
    with pytest.raises(InputError, match=r"first difference is at character 0 of [0-9]+"):
        with_template(tmp_path, counting).response_ids(USER, "Paris.")


def test_a_template_without_an_end_of_turn_token_is_refused(tmp_path):
    endless = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(InputError, match="does not end an assistant"):
        _ = with_template(tmp_path, endless).end_of_turn_id


def test_a_template_that_refuses_a_conversation_says_which(tmp_path):
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    )
    with pytest.raises(InputError, match="roles system, user: no system role"):
        with_template(tmp_path, strict).prompt_ids([{"role": "system", "content": "x"}, *USER])


def test_a_model_without_a_template_needs_one(tmp_path, renderer):
    bare = with_template(tmp_path, None)
    with pytest.raises(InputError, match=r"model\.chat_template"):
        bare.prompt_ids(USER)
    assert Renderer(tmp_path, template="chatml").prompt_ids(USER) == renderer.prompt_ids(USER)
    (tmp_path / "mine.jinja").write_text(CHATML)
    assert Renderer(tmp_path, template=str(tmp_path / "mine.jinja")).prompt_ids(USER) == renderer.prompt_ids(
        USER
    )
    with pytest.raises(InputError, match=r"absent\.jinja"):
        Renderer(tmp_path, template="absent.jinja").prompt_ids(USER)


def test_a_sentencepiece_tokenizer_adds_no_space_before_the_response(tmp_path):
    """Behind "assistant\\n" the model predicts "Paris", not "▁Paris", as the text alone is tokenised."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "<|im_start|>", "<|im_end|>", "▁", *sorted(set("user\nassistanthiParis▁")), "▁P"]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "P")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in words[1:3]])
    write_tokenizer(tmp_path)
    assert tokenizer_json() != tokenizer.to_str()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    renderer = Renderer(tmp_path)
    ids = renderer.response_ids([{"role": "user", "content": "hi"}], "Paris")
    assert renderer.tokenizer.convert_ids_to_tokens(ids) == [*"Paris", "<|im_end|>"]
    assert renderer.render_pairs(
        [{"prompt": [{"role": "user", "content": "hi"}], "chosen": "Paris", "rejected": "P"}]
    )[1] == [ids]


def test_the_hash_changes_with_tokenizer_and_template_and_nothing_else(tmp_path, folder):
    base = renderer_hash(folder)
    assert Renderer(folder).hash == base
    policy = tiny_policy(tmp_path / "policy")
    assert renderer_hash(policy) == base
    assert renderer_hash(policy, template="chatml") != base
    (policy / "chat_template.jinja").write_text(CHATML + "\n")
    assert renderer_hash(policy) != base


def test_hashing_a_renderer_imports_neither_torch_nor_transformers(folder):
    code = (
        "import sys; from sera_core.models import model_sources; "
        "from sera_core.data.rendering import Renderer; "
        f"Renderer({str(folder)!r}).hash; print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_every_end_that_the_models_settings_list_ends_a_response(tmp_path):
    folder = tiny_policy(tmp_path / "policy")
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [END, 77, 78]}))
    assert Renderer(folder).stop_ids == (END, 77, 78)
