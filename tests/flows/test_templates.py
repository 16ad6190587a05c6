"""Chat templates as the commands meet them: a row that one cuts is named, with the flag that helps."""

import json

import tiny
import tinyrun

from flows.cli import main

CUTTING = tiny.CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
OPENING = tiny.CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}")


def said_of(capsys, *argv: object) -> str:
    """What a refused command says."""
    assert main([str(part) for part in argv]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    return said.err


def score(folder, *flags: object) -> list[object]:
    given = ["score", "--policy", folder / "policy", "--score", "simpo", "--pairs", folder / "pairs.jsonl"]
    return [*given, "--out", folder / "scored.parquet", *flags]


def test_scoring_names_the_row_whose_answer_the_template_cuts(capsys, tmp_path):
    tiny.tiny_policy(tmp_path / "policy", template=CUTTING)
    rows = tinyrun.pairs(4)
    rows[2]["rejected"][0]["content"] = "<think>hm</think>no"
    tinyrun.write_rows(tmp_path / "pairs.jsonl", rows)
    said = said_of(capsys, *score(tmp_path))
    assert "pairs.jsonl line 3" in said and "reasoning" in said and "--chat-template" in said
    assert not list(tmp_path.glob("*.parquet"))
    assert main([str(part) for part in score(tmp_path, "--chat-template", "chatml")]) == 0


def test_sampling_names_the_row_whose_prompt_the_template_cuts(capsys, tmp_path):
    cut = tiny.CHATML.replace("message['content']", "message['content'][:30]")
    tiny.tiny_policy(tmp_path / "policy", template=cut)
    tinyrun.write_rows(tmp_path / "prompts.jsonl", [{"prompt": "short"}, {"prompt": "long " * 7}])
    given = ["sample", "--policy", tmp_path / "policy", "--prompts", tmp_path / "prompts.jsonl"]
    said = said_of(capsys, *given, "--n", 1, "--max-tokens", 8, "--out", tmp_path / "out.parquet")
    assert "prompts.jsonl line 2" in said and "message 1 (role user" in said


def test_template_arguments_of_a_command_are_a_json_object_that_the_template_takes(capsys, tmp_path):
    tiny.tiny_policy(
        tmp_path / "policy", template="{% if brief %}{{ 'Be brief. ' }}{% endif %}" + tiny.CHATML
    )
    tinyrun.write_rows(tmp_path / "pairs.jsonl", tinyrun.pairs(4))
    for given, words in (
        ("{brief", "not JSON"),
        ("[1]", "not an object"),
        ('{"breif": 1}', "'breif' changes"),
    ):
        said = said_of(capsys, *score(tmp_path, "--template-kwargs", given))
        assert "--template-kwargs" in said and words in said
    tokens = []
    for flags in ((), ("--template-kwargs", '{"brief": true}')):
        assert main([str(part) for part in (*score(tmp_path, *flags), "--json", "--force")]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    assert tokens[0] < tokens[1]
