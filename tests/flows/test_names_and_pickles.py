"""Nothing leaves the store by a name, and nothing that is read can run code."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import tiny
import tinyrun
from marks import Marks

from flows.store_tools.verify import verify
from sera_core.artifacts.manifest import StepSpec, check_file_name
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.step import run_step
from sera_core.artifacts.store import open_store
from sera_core.config import ExecutionConfig
from sera_core.errors import InputError, StoreError
from sera_core.models.model_sources import materialise, resolve_source
from sera_core.models.policies import load_policy, load_tokenizer

ROOT = Path(__file__).parents[2]
FOREIGN = [
    "../x", "..", ".", "", "/etc/passwd", "a/../../x", "a//b", "a/", "a\\..\\b", "C:\\x", "~/x", "a\0b",
    "a\nb",
    "．．/x",  # fullwidth dots
    "a／b",  # a fullwidth slash
    "a∕b", "a⁄b",  # division and fraction slashes
    "‥", "…",  # leaders that read as dots
    "а", "ａ", "é", "²", "٣",  # letters and digits of other alphabets
    "a\u202eb", "a\u200bb", "a\ufeff",  # turned, invisible
    "a b", "-x", "a" * 101,
]  # fmt: skip
"""What is no run's name."""


@pytest.mark.parametrize("name", FOREIGN)
def test_a_run_cannot_be_named_so_that_it_leaves_the_store(tmp_path, sera, name):
    store = tmp_path / "deep" / "store"
    store.mkdir(parents=True)
    with pytest.raises(InputError, match="run name"):
        RunStore(open_store(str(store)), name)
    commands = [["run", "bundled:demo", f"--name={name}"]]
    if name[:1] != "-":
        commands += [["show", name], ["verify", name], ["advance", name]]
    for command in commands:
        assert "run name" in sera(*command, "--store", store, code=2).err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_run_cannot_be_named_with_a_dot_at_its_end(kept_store, tmp_path, sera):
    """No path of a store ends so; what others put there is no run."""
    (kept_store / "runs" / "a.").mkdir()
    for command in (
        ["run", str(tinyrun.experiment(tmp_path)), "--name", "a."],
        ["show", "a."],
        ["verify", "a."],
    ):
        assert "does not end with '.'" in sera(*command, "--store", kept_store, code=2).err
    assert "a." not in sera("list", "--store", kept_store).out.split()


ODD_FILES = [name for name in FOREIGN if name not in ("a" * 101,)]


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_record_that_names_a_file_outside_its_step_is_refused(kept_store, name):
    with pytest.raises(StoreError):
        check_file_name(name)
    if name == "":
        return
    step = next(kept_store.glob("steps/decide/*/done.json"))
    record = json.loads(step.read_text())
    record["files"][name] = next(iter(record["files"].values()))
    step.write_text(json.dumps(record))
    with pytest.raises(StoreError, match=r"done\.json"):
        verify_both(kept_store)


def verify_both(store: Path) -> None:
    for run in ("first", "second"):
        verify(RunStore(open_store(str(store)), run))


@pytest.mark.parametrize("attempt", ["../../../x", "/tmp", "..", "ａ" * 16, "²" * 16, "A" * 16, "a" * 15, ""])
def test_an_attempt_cannot_be_a_path(kept_store, attempt):
    step = next(kept_store.glob("steps/data/*/done.json"))
    record = json.loads(step.read_text())
    for file in record["files"].values():
        file["attempt"] = attempt
    step.write_text(json.dumps(record))
    with pytest.raises(StoreError, match=r"done\.json: invalid StepRecord \(files\."):
        verify(RunStore(open_store(str(kept_store)), "first"))


@pytest.mark.parametrize(
    ("step", "key"), [("../../x", "k"), ("train", "../../../x"), ("/etc", "a"), ("ｔ", "a")]
)
def test_a_manifest_cannot_name_a_step_outside_the_store(kept_store, step, key, tmp_path):
    (tmp_path / "x").mkdir()
    path = kept_store / "runs" / "first" / "round-001.json"
    manifest = json.loads(path.read_text())
    manifest["used"].append({"step": step, "key": key, "digest": "0" * 64})
    path.write_text(json.dumps(manifest))
    with pytest.raises(StoreError):
        verify(RunStore(open_store(str(kept_store)), "first"))


def test_a_run_behind_a_link_that_leads_out_of_the_store_is_refused(kept_store, tmp_path, sera):
    outside = tmp_path / "outside"
    shutil.move(kept_store / "runs" / "second", outside)
    (kept_store / "runs" / "linked").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    assert "a link leads out of the store" in sera("show", "linked", "--store", kept_store, code=1).err
    with pytest.raises(StoreError, match="a link leads out of the store"):
        RunStore(open_store(str(kept_store)), "linked").record_stop("budget", "")
    assert sorted(outside.rglob("*")) == before


def test_a_file_behind_a_link_that_leads_out_of_the_store_is_refused(kept_store, tmp_path):
    """Even one that holds the right bytes."""
    file = next(kept_store.glob("steps/data/*/*/train.parquet"))
    shutil.move(file, tmp_path / "train.parquet")
    file.symlink_to(tmp_path / "train.parquet")
    with pytest.raises(StoreError, match="a link leads out of the store"):
        verify(RunStore(open_store(str(kept_store)), "first"))


# ------------------------------------------------------------------------------------------------ remote code


@pytest.fixture
def policy(tmp_path):
    return tiny.tiny_policy(tmp_path / "policy", layers=1, hidden=32)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_model_that_asks_for_its_own_code_is_refused_and_the_code_not_run(policy, tmp_path, sera, name):
    mark = tmp_path / "mark"
    (policy / "modeling.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Mine: pass\n")
    wanted = {
        "AutoConfig": "modeling.Mine",
        "AutoModelForCausalLM": "modeling.Mine",
        "AutoTokenizer": "modeling.Mine",
    }
    settings = json.loads((policy / name).read_text())
    (policy / name).write_text(json.dumps({**settings, "auto_map": wanted}))
    opened = [
        resolve_source,
        lambda folder: materialise(folder, tmp_path / "out"),
        load_policy,
        load_tokenizer,
    ]
    for open_it in opened:
        with pytest.raises(InputError, match=r"needs code from its own repository \(auto_map"):
            open_it(str(policy))
    experiment = tinyrun.experiment(tmp_path)
    assert "never run here" in sera("run", experiment, "--store", tmp_path / "store", code=2).err
    pairs = ["--pairs", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "scored.parquet")]
    assert "never run here" in sera("score", "--policy", policy, "--score", "simpo", *pairs, code=2).err
    assert not mark.exists() and not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.PKL", "model.ckpt", "model.pickle"],
)
def test_a_model_whose_weights_are_a_pickle_is_refused(policy, tmp_path, name):
    (policy / "model.safetensors").unlink()
    (policy / name).write_bytes(pickle.dumps(Marks(tmp_path / "mark")))
    for open_it in (resolve_source, lambda f: materialise(f, tmp_path / "out")):
        with pytest.raises(InputError, match=f"only as a pickle .{name}., which can run code"):
            open_it(str(policy))
    with pytest.raises(Exception, match=r"(?i)safetensors"):
        load_policy(policy)
    assert not (tmp_path / "mark").exists()


def test_a_pickle_beside_safetensors_is_never_opened_and_not_taken_along(policy, tmp_path):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (policy / name).write_bytes(pickle.dumps(Marks(tmp_path / "mark")))
    made = materialise(str(policy), tmp_path / "out")
    load_policy(made)
    load_policy(policy)
    assert not (tmp_path / "mark").exists()
    assert not [path for path in made.iterdir() if path.suffix in (".bin", ".pt")]


def test_an_adapter_in_a_pickle_is_refused(policy, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}'
    )
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Marks(tmp_path / "mark")))
    with pytest.raises(InputError, match=r"without adapter_model\.safetensors"):
        load_policy(adapter, base=policy)
    assert not (tmp_path / "mark").exists()


def test_preferences_in_a_pickle_are_refused(tmp_path, sera, policy):
    data = tmp_path / "pairs.pkl"
    data.write_bytes(pickle.dumps(Marks(tmp_path / "mark")))
    experiment = tinyrun.experiment(tmp_path, data={"train": [{"path": str(data)}]})
    assert ".pkl files are not read" in sera("run", experiment, "--store", tmp_path / "store", code=2).err
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["policy/pytorch_model.bin", "state.pt", "x.PTH", "rng.pickle", "a/b.pkl"])
def test_no_step_can_commit_a_pickle_and_none_is_read(kept_store, tmp_path, name):
    def work(attempt):
        attempt.write(name).write_bytes(b"x")
        return [name]

    spec = StepSpec(step="train", version=1, fields={}, inputs={})
    with pytest.raises(StoreError, match="can run code when it is opened"):
        run_step(open_store(str(tmp_path / "other")), spec, work, ExecutionConfig())
    step = next(kept_store.glob("steps/data/*/done.json"))
    record = json.loads(step.read_text())
    record["files"][name] = next(iter(record["files"].values()))
    step.write_text(json.dumps(record))
    with pytest.raises(StoreError, match="can run code when it is opened"):
        verify(RunStore(open_store(str(kept_store)), "first"))


def test_the_code_trusts_no_remote_code_and_opens_no_pickle():
    """Names and arguments that would, anywhere in the packages."""
    found = []
    for file in (path for room in ("flows", "tasks", "sera_core") for path in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_pickle"):
                if not (isinstance(node.value, ast.Constant) and node.value.value is False):
                    found.append(f"{where} {node.arg}")
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                found += [
                    f"{where} {n}"
                    for n in names
                    if n.split(".")[0] in ("pickle", "joblib", "dill", "marshal")
                ]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "eval", "exec"):
                found.append(f"{where} {ast.unparse(node.func)}")
    assert found == []
