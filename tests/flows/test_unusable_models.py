"""Models and chat templates that cannot be used: one message with the row or file, and the remedy."""

import json

import pytest
import tiny
import tinyrun

from sera_core.errors import InputError
from sera_core.models.model_sources import materialise

CUTTING = tiny.CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
OPENING = tiny.CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")


def said_of(sera, *argv: object) -> str:
    """What a refused command says."""
    said = sera(*argv, code=2)
    assert said.out == "" and "Traceback" not in said.err
    return said.err


def score(folder, *flags: object) -> list[object]:
    given = ["score", "--policy", folder / "policy", "--score", "simpo", "--pairs", folder / "pairs.jsonl"]
    return [*given, "--out", folder / "scored.parquet", *flags]


def test_scoring_names_the_row_whose_answer_the_template_cuts(sera, tmp_path):
    tiny.tiny_policy(tmp_path / "policy", template=CUTTING)
    rows = tinyrun.pairs(4)
    rows[2]["rejected"][0]["content"] = "<think>hm</think>no"
    tinyrun.write_rows(tmp_path / "pairs.jsonl", rows)
    said = said_of(sera, *score(tmp_path))
    assert "pairs.jsonl line 3" in said and "reasoning" in said and "--chat-template" in said
    assert not list(tmp_path.glob("*.parquet"))
    sera(*score(tmp_path, "--chat-template", "chatml"))


def test_sampling_names_the_row_whose_prompt_the_template_cuts(sera, tmp_path):
    cut = tiny.CHATML.replace("message['content']", "message['content'][:30]")
    tiny.tiny_policy(tmp_path / "policy", template=cut)
    tinyrun.write_rows(tmp_path / "prompts.jsonl", [{"prompt": "short"}, {"prompt": "long " * 7}])
    given = ["sample", "--policy", tmp_path / "policy", "--prompts", tmp_path / "prompts.jsonl"]
    said = said_of(sera, *given, "--n", 1, "--max-tokens", 8, "--out", tmp_path / "out.parquet")
    assert "prompts.jsonl line 2" in said and "message 1 (role user" in said


def test_template_arguments_of_a_command_are_a_json_object_that_the_template_takes(sera, tmp_path):
    tiny.tiny_policy(
        tmp_path / "policy", template="{% if brief %}{{ 'Be brief. ' }}{% endif %}" + tiny.CHATML
    )
    tinyrun.write_rows(tmp_path / "pairs.jsonl", tinyrun.pairs(4))
    for given, words in (
        ("{brief", "not JSON"),
        ("[1]", "not an object"),
        ('{"breif": 1}', "'breif' has no"),
    ):
        said = said_of(sera, *score(tmp_path, "--template-kwargs", given))
        assert "--template-kwargs" in said and words in said
    plain, brief = (
        sera(*score(tmp_path, *flags), "--json", "--force").json["tokens"]
        for flags in ((), ("--template-kwargs", '{"brief": true}'))
    )
    assert plain < brief


# ------------------------------------------------------------------------------------- what cannot be used


def test_whatever_a_template_raises_is_refused_with_the_row(sera, tmp_path):
    adding = tiny.CHATML.replace("message['role'] +", "message['role'] + 1 +")
    tiny.tiny_policy(tmp_path / "policy", template="{% if messages[0]['content'] == 'x' %}" + adding
                     + "{% else %}" + tiny.CHATML + "{% endif %}")  # fmt: skip
    tinyrun.write_rows(
        tmp_path / "pairs.jsonl", [*tinyrun.pairs(2), {"prompt": "x", "chosen": "y", "rejected": "z"}]
    )
    said = said_of(sera, *score(tmp_path))
    assert "pairs.jsonl line 3" in said and "rejects a conversation with the roles user" in said


def test_a_token_without_an_embedding_is_refused_with_both_sizes(sera, tmp_path):
    folder = tiny.tiny_policy(tmp_path / "policy")
    held = json.loads((folder / "tokenizer.json").read_text())
    first = max(held["model"]["vocab"].values()) + 1
    shared = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    held["added_tokens"] += [{"id": first + n, "content": f"extra{n:03d}", **shared} for n in range(200)]
    (folder / "tokenizer.json").write_text(json.dumps(held))
    rows = tinyrun.pairs(3)
    tinyrun.write_rows(tmp_path / "pairs.jsonl", rows)
    sera(*score(tmp_path))  # no text comes to the ids beyond
    rows[1]["chosen"][0]["content"] += " extra199"
    tinyrun.write_rows(tmp_path / "pairs.jsonl", rows)
    said = said_of(sera, *score(tmp_path, "--force"))
    assert "pairs.jsonl line 2" in said and "'extra199'" in said and "resize" in said
    assert f"has {tiny.VOCAB_SIZE} embeddings and its tokenizer {first + 200}" in said


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "model.safetensors.index.json",
    ],
)
@pytest.mark.parametrize("text", ["{", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
def test_a_damaged_settings_file_of_a_model_is_named(sera, tmp_path, name, text):
    (tiny.tiny_policy(tmp_path / "policy") / name).write_text(text)
    tinyrun.write_rows(tmp_path / "pairs.jsonl", tinyrun.pairs(3))
    said = said_of(sera, *score(tmp_path))
    assert f"policy/{name}" in said and ("git lfs pull" in said) == (text != "{")
    with pytest.raises(InputError, match=name):
        materialise(str(tmp_path / "policy"), tmp_path / "copy")


def test_json_that_is_no_tokenizer_is_refused_before_the_model_step_is_written(sera, tmp_path):
    tinyrun.settings(tmp_path)
    (tmp_path / "policy" / "tokenizer.json").write_text("{}")
    assert "tokenizer" in said_of(sera, *score(tmp_path))
    with pytest.raises(InputError, match=r"cannot load the tokenizer in"):
        tinyrun.work(tinyrun.config(tmp_path), tmp_path / "store")
    assert not list((tmp_path / "store" / "steps" / "model").rglob("done.json"))


@pytest.mark.parametrize("weights", [True, False])
def test_an_adapter_beside_a_configuration_is_refused_as_a_bare_one(sera, tmp_path, weights):
    folder = tiny.tiny_policy(tmp_path / "policy")
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    if not weights:
        (folder / "model.safetensors").unlink()
    tinyrun.write_rows(tmp_path / "pairs.jsonl", tinyrun.pairs(3))
    said = said_of(sera, *score(tmp_path))
    assert "merge_and_unload" in said and "PEFT adapter" in said


# ------------------------------------------------------------------------------------------------- lengths


def test_a_response_without_a_length_is_cut_where_the_model_is_too_small_for_the_default(sera, tmp_path):
    tiny.tiny_policy(tmp_path / "policy", positions=64)
    tinyrun.write_rows(tmp_path / "prompts.jsonl", [{"prompt": "short"}])
    given = ["sample", "--policy", tmp_path / "policy", "--prompts", tmp_path / "prompts.jsonl", "--n", 1]
    given += ["--out", tmp_path / "out.parquet"]
    said = sera(*given, "--json")
    assert "at 32 tokens" in said.err and said.json["mean_tokens"] <= 32
    assert "--max-tokens 64" in said_of(sera, *given, "--force", "--max-tokens", 64)
