"""Weights that do not fit are refused: nothing is filled at random, nothing left out."""

import json
import logging

import pytest
from safetensors.torch import load_file, save_file
from tiny import tiny_policy

from sera_core.errors import InputError
from sera_core.models.model_sources import materialise
from sera_core.models.policies import load_policy
from sera_core.models.weights import wrapper_of

PROMPT = [1, 30, 31, 32]


@pytest.fixture
def folder(tmp_path):
    return tiny_policy(tmp_path / "policy")


def configure(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def rename(folder, renamed):
    file = folder / "model.safetensors"
    save_file({renamed(name): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})


def test_weights_of_fewer_layers_than_the_config_asks_for_are_refused_by_name(folder):
    configure(folder, num_hidden_layers=4)
    with pytest.raises(InputError, match=r"18 missing: model\.layers\.2\.") as error:
        load_policy(folder)
    assert "save_pretrained" in str(error.value)


def test_weights_of_more_layers_are_refused_by_name(folder):
    configure(folder, num_hidden_layers=1)
    with pytest.raises(InputError, match=r"9 unexpected: model\.layers\.1\."):
        load_policy(folder)


def test_tensors_of_another_shape_are_refused_with_both_shapes(folder):
    configure(folder, vocab_size=600)
    with pytest.raises(InputError, match=r"embed_tokens\.weight \(512×64, expected 600×64\)"):
        load_policy(folder)


def test_the_weights_of_a_reward_model_are_refused(folder):
    configure(folder, tie_word_embeddings=False)
    rename(folder, lambda name: "score.weight" if name == "lm_head.weight" else name)
    with pytest.raises(InputError, match=r"missing: lm_head\.weight"):
        load_policy(folder)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod."])
def test_a_wrappers_prefix_is_stripped_and_said(folder, tmp_path, prefix, caplog):
    import torch

    before = load_policy(folder)
    rename(folder, lambda name: prefix + name)
    assert wrapper_of(folder) == prefix
    with pytest.raises(InputError, match="all tensor names begin with"):
        load_policy(folder)
    with caplog.at_level(logging.WARNING):
        copied = materialise(str(folder), tmp_path / "copy")
    assert repr(prefix) in caplog.text
    after = load_policy(copied)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[name]), name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>" * 4, "a web page"),
        (b"\xff" * 64, "not a safetensors file"),
        (b"", "not a safetensors file"),
    ],
)
def test_a_file_that_is_not_the_weights_is_named(folder, content, message, tmp_path):
    (folder / "model.safetensors").write_bytes(content)
    for use in (load_policy, lambda path: materialise(str(path), tmp_path / "copy")):
        with pytest.raises(InputError, match=message):
            use(folder)


def test_the_command_line_refuses_such_weights_with_exit_code_2(folder, tmp_path, sera):
    configure(folder, num_hidden_layers=3)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "a?", "chosen": "b", "rejected": "c"}) + "\n")
    given = ["score", "--policy", str(folder), "--reference", str(folder), "--pairs", str(pairs)]
    assert "9 missing: model.layers.2." in sera(*given, "--out", tmp_path / "scored.parquet", code=2).err
    assert not (tmp_path / "scored.parquet").exists()


def test_a_file_that_was_cut_off_is_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"model.safetensors: not a safetensors file .*incomplete"):
        load_policy(folder)
