"""The laboratory: its start policy is trained once, and its arms run on the bundled review sentences."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import tiny

from flows import laboratory
from flows.cli import main
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.data.sources import read_rows
from sera_core.judges.reviews import positive
from sera_core.method.features import sentences
from sera_core.models.policies import load_policy

SMALL = {
    "vocabulary": 320,
    "hidden": 32,
    "layers": 1,
    "heads": 2,
    "intermediate": 64,
    "epochs": 2,
    "batch": 8,
}


def run(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=600)


def words_of(row: dict, side: str) -> str:
    return row[side][0]["content"]


@pytest.mark.parametrize("file", list(laboratory.FILES))
def test_each_file_holds_pairs_whose_prompts_the_held_out_pairs_share(file):
    rows = [row.data for row in read_rows(laboratory.train_file(file))]
    assert len(rows) == 2000
    assert all(words_of(row, "chosen") != words_of(row, "rejected") for row in rows)
    heldout = [row.data for row in read_rows("bundled:review_heldout.jsonl.gz")]
    assert {row["cell"] for row in heldout} == {"counter", "aligned", "equal"}


def test_the_start_policy_is_trained_once_and_the_same_every_time(tmp_path, monkeypatch):
    texts = (["Write a review."], [f"A film with {n} good scenes. I liked it." for n in range(24)])
    monkeypatch.setattr(laboratory, "_texts", lambda: texts)
    first = laboratory.base_policy(str(tmp_path / "a"), SMALL)
    before = (first / "model.safetensors").stat().st_mtime_ns
    assert laboratory.base_policy(str(tmp_path / "a"), SMALL) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == before
    again = laboratory.base_policy(str(tmp_path / "b"), SMALL)
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    other = laboratory.base_policy(str(tmp_path / "a"), {**SMALL, "seed": 1})
    assert (other / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()
    assert load_policy(first, dtype="float32", device="cpu") is not None


def test_training_lowers_the_loss(tmp_path, monkeypatch):
    losses = []
    for epochs in (1, 8):
        monkeypatch.setattr(laboratory, "_texts", lambda: (["Hi?"], ["The very same answer."] * 32))
        folder = laboratory.base_policy(str(tmp_path / "store"), {**SMALL, "epochs": epochs})
        record = json.loads(next(folder.parent.parent.glob("done.json")).read_text())
        losses.append(record["metrics"]["train_loss"])
    assert losses[1] < losses[0] - 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--files", "flop"], "no such file; choose from flip, noise, corr"),
        (["--arms", "sera,rnadom"], "did you mean random?"),
        (["--seeds", "a"], "give whole numbers"),
        (["--set", "limits.hours=1"], "limits.tokens and limits.hours"),
        (["--set", "seed=3"], "given with --seeds"),
        (["--set", "data.train=mine.jsonl"], "given with --files"),
        (["--set", "model.source=mine"], "trains its start policy"),
    ],
)
def test_what_the_laboratory_cannot_do_is_refused_before_the_policy_is_trained(
    tmp_path, capfd, given, message
):
    assert main(["lab", "--store", str(tmp_path / "store"), *given]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "store").exists()


@pytest.mark.slow
@pytest.mark.flow
def test_the_arms_run_on_the_bundled_pairs(tmp_path, monkeypatch):
    """The tiny policy instead of a trained one, and few pairs: the command from its start to its table."""
    tiny.tiny_policy(tmp_path / "policy")
    code = (
        "import flows.commands.lab as lab; from pathlib import Path; from flows.cli import main; import sys; "
    )
    code += (
        f"lab.base_policy = lambda store: Path({str(tmp_path / 'policy')!r}); sys.exit(main(sys.argv[1:]))"
    )
    few = [
        "--set",
        "data.test_fraction=0.1",
        "--set",
        "data.train_pairs=24",
        "--set",
        "data.heldout_pairs=24",
        "--set",
        "train.batch=8",
    ]
    files = ["--files", "flip,flipped-40", "--seeds", "0", "--arms", "sera,random"]
    command = ["lab", *files, "--store", str(tmp_path / "store"), *few]
    done = run(code, *command, "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert "a length-biased annotator" in done.stdout and "random against sera" in done.stdout
    assert (tmp_path / "out" / "flip" / "compare.html").is_file()
    assert "Longer answer preferred" in done.stdout
    found = json.loads(run(code, *command, "--json").stdout)
    assert set(found["arms"]) == {"flip", "flipped-40"}
    assert "flipped" not in found["arms"]["flip"]["sera"]["0"]
    flips = found["arms"]["flipped-40"]["sera"]["0"]["flipped"]
    records = RunStore(open_store(str(tmp_path / "store")), "lab-flipped-40-sera-0")
    steps = {role: Artifact(records.store, ref) for role, ref in records.rounds()[1].steps.items()}
    turned = set(json.loads(steps["pairs"].path("flipped.json").read_text()))
    ledger = pq.read_table(steps["mixture"].path("ledger.parquet")).to_pylist()
    judged = [row for row in ledger if row["origin"] == "human" and row["stage"] in ("select", "mix")]
    dropped = [row["pair_id"] for row in judged if not row["kept"]]
    assert flips["flipped"] == len(turned) == 10 and flips["dropped_in_all"] == len(dropped)
    assert flips["dropped"] == len(turned & set(dropped))
    assert flips["dropped_by_chance"] == pytest.approx(len(dropped) * len(turned) / len(judged), abs=1e-3)
    assert "sera, flipped labels:" in done.stdout and "flip, flipped" not in done.stdout
    assert set(found["arms"]["flip"]) == {"sera", "random"}
    assert {"balanced", "reliance", "counter", "aligned", "equal"} <= set(found["arms"]["flip"]["sera"]["0"])
    check_length_only(tmp_path / "store", found["arms"]["flip"]["sera"]["0"])
    judged = ["--judge", "reviews", "--set", "evaluate.prompts=5", "--set", "evaluate.max_tokens=12"]
    asked = run(code, *command, *judged, "--files", "flip", "--json")
    assert asked.returncode == 0, asked.stderr
    check_answers(tmp_path / "store", json.loads(asked.stdout))


def check_answers(url, found):
    """Sentences, positive answers and the win rate, counted again from the answers."""
    store, texts = open_store(str(url)), {}
    for arm in ("sera", "random"):
        records = RunStore(store, f"lab-flip-answers-{arm}-0")
        evidence = Artifact(store, records.rounds()[-1].steps["evidence"]).record
        rows = pq.read_table(
            Artifact(store, evidence.inputs["samples"]).path("responses.parquet")
        ).to_pylist()
        texts[arm] = {(row["prompt_id"], row["sample"]): row["response"] for row in rows}
        told = found["arms"]["flip"][arm]["0"]["answers"]
        assert told["sentences"]["value"] == pytest.approx(
            sum(sentences("", t) for t in texts[arm].values()) / 20
        )
        assert told["positive"]["value"] == pytest.approx(
            sum(positive("", t) > 0 for t in texts[arm].values()) / 20
        )
    wins = [
        0.5 + 0.5 * ((mine := positive("", texts["sera"][key])) > other) - 0.5 * (mine < other)
        for key in texts["sera"]
        for other in [positive("", texts["random"][key])]
    ]
    (pair,) = found["judged"]["flip"]["pairs"]
    assert pair["win_rate"]["value"] == pytest.approx(sum(wins) / 20)


def check_length_only(url, found):
    """The shares are those of `sera score` on the same pairs."""
    records = RunStore(store := open_store(str(url)), "lab-flip-sera-0")
    start = url.parent / "policy"
    for manifest, name in zip(records.rounds(), ("length_only_round_0", "length_only"), strict=True):
        policy, out = (
            Artifact(store, manifest.steps["policy"]).folder("policy"),
            url.parent / f"{name}.parquet",
        )
        command = ["score", "--pairs", "bundled:review_length_only.jsonl.gz", "--out", str(out)]
        command += ["--policy", str(policy), "--reference", str(start)]
        done = run("import sys; from flows.cli import main; sys.exit(main(sys.argv[1:]))", *command)
        assert done.returncode == 0, done.stderr
        margins = pq.read_table(out)["margin"].to_numpy()
        assert len(margins) == 250
        assert found[name] == pytest.approx(float(((margins > 0) + (margins == 0) / 2).mean()))
