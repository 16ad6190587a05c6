"""Weights in several files: an index names plain safetensors of its own folder, or the model is refused."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import tinyrun
import torch
from marks import Marks
from safetensors.torch import load_file, save_file
from tiny import tiny_policy

from sera_core.errors import InputError
from sera_core.models.model_sources import materialise, resolve_source
from sera_core.models.policies import load_policy

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A policy whose weights are in two files."""
    made = tiny_policy(tmp_path / "policy", layers=1, hidden=32)
    tensors = load_file(made / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, made / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (made / "model.safetensors").unlink()
    (made / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return made


def rename_shard(folder: Path, name: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = {n: name if file == SHARD else file for n, file in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))


def openings(folder: Path, out: Path) -> list:
    return [
        lambda: load_policy(folder),
        lambda: resolve_source(str(folder)),
        lambda: materialise(str(folder), out),
    ]


def test_a_policy_in_two_files_is_imported_and_opened(folder, tmp_path):
    made = materialise(str(folder), tmp_path / "out")
    ours, theirs = load_policy(made).state_dict(), load_policy(folder).state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model-00001.bin", "../other/x.safetensors", "{tmp}/other/x.safetensors", "sub/x.safetensors",
        ".x.safetensors", "x.safetensors\n", "",
    ],
)  # fmt: skip
def test_an_index_that_names_another_file_is_refused_with_both_names(folder, tmp_path, name):
    name = name.format(tmp=tmp_path)
    for place in ("other", "policy/sub"):
        (tmp_path / place).mkdir()
        shutil.copy(folder / SHARD, tmp_path / place / "x.safetensors")
    (folder / "pytorch_model-00001.bin").write_bytes(pickle.dumps(Marks(tmp_path / "mark")))
    rename_shard(folder, name)
    for open_it in openings(folder, tmp_path / "out"):
        with pytest.raises(InputError, match=r"not a \*\.safetensors file in the same folder") as refused:
            open_it()
        assert INDEX in str(refused.value) and repr(name) in str(refused.value)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "../other.safetensors", "a/x.safetensors.index.json"])
def test_a_configuration_that_names_other_weights_is_refused(folder, tmp_path, name):
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Marks(tmp_path / "mark")))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": name}))
    for open_it in openings(folder, tmp_path / "out"):
        with pytest.raises(InputError, match=r"names '.*' as weights"):
            open_it()
    assert not (tmp_path / "mark").exists()


def test_a_shard_that_is_not_there_is_named(folder, tmp_path):
    (folder / SHARD).unlink()
    for open_it in openings(folder, tmp_path / "out"):
        with pytest.raises(InputError, match=f"names {SHARD}, which is not in its folder"):
            open_it()


@pytest.mark.parametrize("text", ["{}", '{"weight_map": ["x"]}'])
def test_an_index_without_a_map_is_refused(folder, tmp_path, text):
    (folder / INDEX).write_text(text)
    for open_it in openings(folder, tmp_path / "out"):
        with pytest.raises(InputError, match="has no weight_map"):
            open_it()


def test_an_old_index_beside_whole_weights_is_no_trouble(tmp_path):
    folder = tiny_policy(tmp_path / "policy", layers=1, hidden=32)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"x": SHARD}}))
    load_policy(materialise(str(folder), tmp_path / "out"))


def test_a_folder_of_ones_own_may_hold_links_as_the_hubs_cache_does(folder, tmp_path):
    (tmp_path / "blobs").mkdir()
    for file in list(folder.iterdir()):
        file.rename(tmp_path / "blobs" / file.name)
        file.symlink_to(Path("..") / "blobs" / file.name)
    made = materialise(str(folder), tmp_path / "out")
    assert not any(path.is_symlink() for path in made.iterdir())
    load_policy(folder)


def test_scoring_refuses_it_before_anything_is_read(folder, tmp_path, sera):
    rename_shard(folder, "pytorch_model-00001.bin")
    pairs = tinyrun.write_rows(tmp_path / "pairs.jsonl", tinyrun.pairs(4))
    command = ["score", "--policy", str(folder), "--score", "simpo", "--pairs", str(pairs)]
    assert "pytorch_model-00001.bin" in sera(*command, "--out", tmp_path / "scored.parquet", code=2).err
