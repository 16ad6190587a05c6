"""What others put beside a store's recorded files has no effect: it is not exported, opened or overlooked."""

import json
from pathlib import Path

import pytest

from flows.cli import main
from sera_core import open_run
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.errors import StoreError


def artifact_of(store: Path, role: str = "policy", round: int = 1) -> Artifact:
    records = RunStore(open_store(str(store)), "first")
    return Artifact(records.store, records.rounds()[round].steps[role])


def policy_folder(store: Path) -> Path:
    """The trained policy of round 1, in the store."""
    return artifact_of(store).path("policy/config.json").parent


def plant_file(folder: Path, elsewhere: Path) -> str:
    (folder / "added_tokens.json").write_text('{"<|planted|>": 511}')
    return "added_tokens.json"


def plant_code(folder: Path, elsewhere: Path) -> str:
    (folder / "modeling_x.py").write_text("raise SystemExit")
    return "modeling_x.py"


def plant_pickle(folder: Path, elsewhere: Path) -> str:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return "pytorch_model.bin"


def plant_file_in_a_new_folder(folder: Path, elsewhere: Path) -> str:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "x.jinja").write_text("planted")
    return "additional_chat_templates/x.jinja"


def link_to_a_folder(folder: Path, elsewhere: Path) -> str:
    (folder / "more").symlink_to(elsewhere)
    return "more"


def link_to_a_file(folder: Path, elsewhere: Path) -> str:
    (folder / "special_tokens_map.json").symlink_to(elsewhere / "secret.txt")
    return "special_tokens_map.json"


def link_that_dangles(folder: Path, elsewhere: Path) -> str:
    (folder / "chat_template.json").symlink_to(elsewhere / "nothing")
    return "chat_template.json"


PLANTED = [
    plant_file, plant_code, plant_pickle, plant_file_in_a_new_folder, link_to_a_folder, link_to_a_file,
    link_that_dangles,
]  # fmt: skip


@pytest.fixture
def elsewhere(tmp_path):
    """A private folder of somebody's."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "secret.txt").write_text("secret")
    return folder


@pytest.mark.parametrize("plant", PLANTED)
def test_only_recorded_files_are_exported(kept_store, elsewhere, tmp_path, capsys, plant):
    plant(policy_folder(kept_store), elsewhere)
    target = tmp_path / "out"
    assert main(["export", "first", "--round", "1", "--to", str(target), "--store", str(kept_store)]) == 0
    recorded = {Path(n).name for n in artifact_of(kept_store).record.files if n.startswith("policy/")}
    found = {path.relative_to(target).as_posix() for path in target.rglob("*")}
    assert found == recorded | {"lineage.json", "README.md"}
    assert not any(path.is_symlink() for path in target.rglob("*"))


@pytest.mark.parametrize("plant", PLANTED)
def test_a_policy_is_opened_only_from_a_folder_of_recorded_files(kept_store, elsewhere, plant):
    folder = policy_folder(kept_store)
    assert artifact_of(kept_store).folder("policy") == folder
    name = plant(folder, elsewhere)
    with pytest.raises(StoreError, match="Remove it") as refused:
        artifact_of(kept_store).folder("policy")
    assert str(folder / name) in str(refused.value)
    with pytest.raises(StoreError, match="Remove it"):
        open_run(str(kept_store), "first")[1].policy_path()


def test_a_file_planted_beside_the_start_policy_stops_the_run_by_name(tmp_path, capsys):
    import tinyrun
    from golden.table import numbers_from_hashes

    config = tinyrun.config(tmp_path, limits={"rounds": 2})
    with numbers_from_hashes():
        records = tinyrun.work(tinyrun.config(tmp_path, limits={"rounds": 1}), tmp_path / "store")
        start = Artifact(records.store, records.rounds()[0].steps["policy"]).folder("policy")
        (start / "special_tokens_map.json").write_text('{"eos_token": "a"}')
        with pytest.raises(StoreError, match=r"special_tokens_map\.json: no record names this file"):
            tinyrun.work(config, tmp_path / "store")


@pytest.mark.parametrize("inward", [True, False])
def test_a_link_in_a_recorded_files_place_is_never_followed(kept_store, elsewhere, tmp_path, inward, capsys):
    """Even where it leads to the right bytes."""
    file = policy_folder(kept_store) / "model.safetensors"
    moved = (kept_store / "moved" if inward else elsewhere) / "model.safetensors"
    moved.parent.mkdir(exist_ok=True)
    file.rename(moved)
    file.symlink_to(moved)
    with pytest.raises(StoreError, match="Replace the link by what it points to"):
        artifact_of(kept_store).folder("policy")
    target = tmp_path / "out"
    assert main(["export", "first", "--round", "1", "--to", str(target), "--store", str(kept_store)]) == 1
    assert str(file) in capsys.readouterr().err
    assert not target.exists()


def test_a_changed_file_is_not_exported(kept_store, tmp_path, capsys):
    file = policy_folder(kept_store) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 3}))
    target = tmp_path / "out"
    assert main(["export", "first", "--round", "1", "--to", str(target), "--store", str(kept_store)]) == 1
    assert str(file) in capsys.readouterr().err
    assert not target.exists()
