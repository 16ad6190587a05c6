"""A damaged model folder: refused with exit 2 and its name, scored as before, or another model and known so.

Another model gives the same scores each time it is opened, says how many are not finite, and has another
digest than the one it was made from: no run takes one for the other.
"""

import json
import os
import shutil
import struct
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
import tinyrun
from fuzzing.cases import Damage, Told, check_told, damaged_bytes, damaged_json, fuzzed, replaced, sera
from hypothesis import given
from hypothesis import strategies as st

from sera_core.models.model_sources import source_digest

HEADER = 8
"""Bytes of the length that a safetensors file begins with."""


@dataclass(repr=False)
class Model:
    """A model, pairs to score, and their margins under it."""

    folder: Path
    digest: str = ""
    margins: list[float | None] = field(default_factory=list)

    def _repr_pretty_(self, printer, cycle) -> None:
        printer.text(f"Model({self.folder})")

    def damaged(self, name: str, data: bytes) -> Path:
        """The model with another content of one file; the rest are links."""
        folder = self.folder.parent / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in self.folder.iterdir():
            if path.name != name:
                os.link(path, folder / path.name)
        (folder / name).write_bytes(data)
        return folder

    def score(self, folder: Path) -> tuple[Told, list[float | None]]:
        """What `sera score` says of a folder, and the margins."""
        out = self.folder.parent / "scored.parquet"
        out.unlink(missing_ok=True)
        pairs = self.folder.parent / "pairs.jsonl"
        told = sera(
            "score", "--policy", folder, "--pairs", pairs, "--out", out, "--score", "simpo", "--force",
            "--device", "cpu",
        )  # fmt: skip
        return told, pq.read_table(out)["margin"].to_pylist() if out.exists() else []


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Weights in two shards with an index."""
    home = tmp_path_factory.mktemp("model")
    model = Model(sharded(tiny.tiny_policy(home / "whole", layers=1, hidden=32), home / "policy"))
    tinyrun.write_rows(home / "pairs.jsonl", tinyrun.pairs(2))
    told, model.margins = model.score(model.folder)
    model.digest = source_digest(str(model.folder))
    assert told.code == 0 and len(model.margins) == 2
    return model


def sharded(whole: Path, folder: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(whole / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@st.composite
def damages(draw, whole: bytes, name: str) -> Damage:
    """Of JSON a value, of safetensors the header, of any file bytes."""
    if name.endswith(".json") and draw(st.integers(0, 3)):
        return draw(damaged_json(json.loads(whole)))
    if name.endswith(".safetensors") and draw(st.booleans()):
        (length,) = struct.unpack("<Q", whole[:HEADER])
        header = draw(damaged_json(json.loads(whole[HEADER : HEADER + length])))
        told = draw(st.sampled_from([len(header.data), len(header.data), length, 0, 2**63]))
        return Damage(struct.pack("<Q", told) + header.data + whole[HEADER + length :], header.path)
    return draw(damaged_bytes(whole))


def check_folder(model: Model, name: str, data: bytes) -> None:
    """Score under the damaged folder and hold the answer against the property."""
    folder = model.damaged(name, data)
    told, margins = model.score(folder)
    check_told(told)
    if told.code:
        assert told.code == 2 and not margins, told
        unfit = "no row is left" in told.err  # for a model of fewer positions, say
        assert name in told.err or str(folder) in told.err or unfit, told.err
        return
    lost = sum(margin is None or margin != margin for margin in margins)
    assert not lost or f"{lost} margins are not finite" in told.out, (margins, told.out)
    if repr(margins) == repr(model.margins):
        return
    assert source_digest(str(folder)) != model.digest
    assert repr(model.score(folder)[1]) == repr(margins)


@fuzzed
@given(data=st.data())
def test_a_damaged_model_is_refused_by_name_or_is_known_as_another(model, data):
    names = sorted(path.name for path in model.folder.iterdir())
    name = data.draw(st.sampled_from([*names, "config.json", "config.json", "tokenizer_config.json"]))
    damage = data.draw(damages((model.folder / name).read_bytes(), name))
    check_folder(model, name, damage.data)


# --------------------------------------------------------------------------------------------- what was found


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("config.json", ("hidden_act",), " ilu"),
        ("config.json", ("rope_parameters", "rope_theta"), []),
        ("config.json", ("rope_parameters", "rope_type"), {}),
        ("config.json", ("rms_norm_eps",), []),
        ("config.json", ("num_key_value_heads",), 10**6),
        ("config.json", ("num_hidden_layers",), 10**6),
        ("config.json", ("hidden_size",), 10**12),
        ("generation_config.json", ("pad_token_id",), [2]),
        ("tokenizer_config.json", ("model_max_length",), []),
        ("tokenizer_config.json", ("unk_token",), ""),
        ("model.safetensors.index.json", ("metadata",), 3),
    ],
)
def test_settings_that_no_model_can_be_opened_with_are_refused_in_one_line(model, name, place, value):
    whole = json.loads((model.folder / name).read_text())
    folder = model.damaged(name, json.dumps(replaced(whole, place, value)).encode())
    told, _ = model.score(folder)
    check_told(told)
    assert told.code == 2 and (name in told.err or str(folder) in told.err)


def test_a_header_that_safetensors_tells_of_in_lines_is_refused_in_one(model):
    file = "model-00001-of-00002.safetensors"
    whole = (model.folder / file).read_bytes()
    (length,) = struct.unpack("<Q", whole[:HEADER])
    header = json.loads(whole[HEADER : HEADER + length]) | {"model.embed_tokens.weight": ["\n"]}
    text = json.dumps(header).encode()
    told, _ = model.score(model.damaged(file, struct.pack("<Q", len(text)) + text + whole[HEADER + length :]))
    check_told(told)
    assert told.code == 2 and file in told.err


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_with_the_tensors_name(model, number):
    from safetensors.torch import load_file, save_file

    file = "model-00001-of-00002.safetensors"
    tensors = load_file(model.folder / file)
    name = sorted(tensors)[1]
    tensors[name].view(-1)[-1] = number
    save_file(tensors, model.folder.parent / file, metadata={"format": "pt"})
    told, _ = model.score(model.damaged(file, (model.folder.parent / file).read_bytes()))
    check_told(told)
    assert told.code == 2 and f"the tensor {name} holds NaN or infinity" in told.err
