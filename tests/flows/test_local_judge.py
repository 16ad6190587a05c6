"""`local:<folder>`: a chat model that is loaded, as a judge and as a rater, without a server."""

import json
from pathlib import Path

import pytest
import tiny
import tinyrun
import torch
from judgeserver import labelled

from sera_core.data.rendering import Renderer
from sera_core.judges.comparison import Comparison
from sera_core.judges.local import Generated
from sera_core.judges.named import Asking, find_rater
from sera_core.judges.prompts import PAIRWISE, compared_text, read_template
from sera_core.models.policies import load_policy, save_policy

PAIRS = 4


def questions() -> list[str]:
    """What a judge is asked about the pairs below, in both orders."""
    template, asked = read_template(None, PAIRWISE), []
    for row in labelled(PAIRS):
        answers = (row["chosen"], row["rejected"])
        turn = [{"role": "user", "content": row["prompt"]}]
        asked += [compared_text(template, Comparison(turn, *both)) for both in (answers, answers[::-1])]
    return asked


def taught(folder: Path, says: str) -> Path:
    """A tiny model that answers every question with the same text: trained on it for a few seconds."""
    tiny.tiny_policy(folder, positions=4096, scale=0.05)
    renderer, policy = Renderer(folder), load_policy(folder, dtype="float32", device="cpu")
    rows = []
    for text in questions():
        prompt = renderer.prompt_ids([{"role": "user", "content": text}])
        rows.append((prompt, renderer.response_ids([{"role": "user", "content": text}], says)))
    optimiser = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    policy.train()
    for _ in range(60):
        for prompt, answer in rows:
            ids = torch.tensor([[*prompt, *answer]])
            labels = torch.tensor([[*[-100] * len(prompt), *answer]])
            policy(input_ids=ids, labels=labels).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    return save_policy(policy.eval(), folder, folder.with_name(f"{folder.name}-taught"))


@pytest.fixture(scope="module")
def says_a(tmp_path_factory):
    return taught(tmp_path_factory.mktemp("a") / "model", '{"better": "A"}')


def evaluate(sera, tmp_path, folder, *flags, code=0):
    pairs = tinyrun.write_rows(tmp_path / "pairs.jsonl", labelled(PAIRS))
    command = ("evaluate", "--judge", f"local:{folder}", "--calibrate", pairs, "--store", tmp_path / "store")
    return sera(*command, *flags, *(["--json"] if code == 0 else []), code=code)


def test_a_local_model_judges_by_what_it_says(sera, tmp_path, says_a):
    """One that always prefers the first place is found out; its answers are read as any judge's."""
    found = evaluate(sera, tmp_path, says_a).json
    assert (found["answered"], found["failed"]) == (PAIRS, {})
    assert found["measures"]["order_flips"]["value"] == 1 and found["status"] == "uncalibrated"
    assert found["tokens"]["answer"] >= 2 * PAIRS and found["tokens"]["prompt"] > 2 * PAIRS * 200


def test_a_local_model_that_answers_in_another_form_says_nothing(sera, tmp_path, says_a):
    """Asked for ratings it still says A: no rating, so nothing is reported."""
    refused = evaluate(sera, tmp_path, says_a, "--mode", "single", code=1)
    assert f"{PAIRS} nonsense" in refused.err and "Nothing is reported" in refused.err


@pytest.mark.slow
@pytest.mark.flow
def test_a_local_model_rates_the_responses_of_a_run(sera, tmp_path, monkeypatch, prefect_server):
    """A model that rates by length takes the place of one that can read; all else is the product's."""

    def opened(folder, device):
        def generate(texts):
            lengths = [len(text.split("<answer>")[1]) % 10 + 1 for text in texts]
            return [Generated(f'Hm. {{"rating": {length}}}', 300, 9) for length in lengths]

        assert (Path(folder).name, device) == ("policy", "cpu")
        return generate

    monkeypatch.setattr("tasks.rating.open_generate", opened)
    by = {"by": "local:policy"}
    experiment = tinyrun.experiment(tmp_path, pairing=by, limits={"rounds": 2}, sampling={"prompts": 4})
    sera("run", experiment, "--store", tmp_path / "store")
    (record,) = (tmp_path / "store").glob("steps/rate/*/done.json")
    told = json.loads(record.read_text())
    assert told["counts"]["rated"] > 0 and told["fields"]["rater"]["rater"] == "local"
    assert find_rater(f"local:{tmp_path}/policy", Asking()).identity == told["fields"]["rater"]
    assert told["metrics"]["rater/prompt_tokens"] % 300 == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--judge-url", "http://127.0.0.1:1/v1"), "--judge-url: only openai:<model> takes it"),
        (("--template", "{tmp}/none.txt"), "no such file"),
    ],
)
def test_what_a_local_model_cannot_take_is_refused(sera, tmp_path, says_a, flags, said):
    given = [flag.format(tmp=tmp_path) for flag in flags]
    assert said in evaluate(sera, tmp_path, says_a, *given, code=2).err


def test_a_folder_that_is_no_model_is_refused(sera, tmp_path):
    assert "no folder with a config.json" in evaluate(sera, tmp_path, tmp_path / "none", code=2).err
    folder = tiny.tiny_policy(tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    assert "has no *.safetensors" in evaluate(sera, tmp_path, folder, code=2).err


def test_a_question_beyond_the_context_is_a_failure(sera, tmp_path):
    folder = tiny.tiny_policy(tmp_path / "short")  # 512 positions; the bundled question alone has more
    refused = evaluate(sera, tmp_path, folder, code=1)
    assert "too_long" in refused.err
