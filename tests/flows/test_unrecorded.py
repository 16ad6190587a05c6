"""What others put beside a store's recorded files has no effect: it is not exported, opened or overlooked."""

import json
from pathlib import Path

import pytest
from trainable import Bench

from sera_core import open_run
from sera_core.artifacts.manifest import Artifact
from sera_core.artifacts.runs import RunStore
from sera_core.artifacts.store import open_store
from sera_core.config import TrainConfig
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
def test_only_recorded_files_are_exported(kept_store, elsewhere, tmp_path, sera, plant):
    plant(policy_folder(kept_store), elsewhere)
    target = tmp_path / "out"
    sera("export", "first", "--round", "1", "--to", target, "--store", kept_store)
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


def test_a_file_planted_beside_the_start_policy_stops_the_run_by_name(tmp_path):
    import tinyrun
    from golden.table import numbers_from_hashes

    config = tinyrun.config(tmp_path, limits={"rounds": 2})
    with numbers_from_hashes():
        records = tinyrun.work(tinyrun.config(tmp_path, limits={"rounds": 1}), tmp_path / "store")
        start = Artifact(records.store, records.rounds()[0].steps["policy"]).folder("policy")
        (start / "special_tokens_map.json").write_text('{"eos_token": "a"}')
        with pytest.raises(StoreError, match=r"special_tokens_map\.json: no record names this file"):
            tinyrun.work(config, tmp_path / "store")


def test_a_tokenizer_file_planted_while_a_policy_is_trained_does_not_get_into_the_new_one(tmp_path):
    bench = Bench(tmp_path)
    start = Artifact(bench.store, bench.model).folder("policy")

    def plant_it(done: int, total: int, unit: str) -> None:
        (start / "special_tokens_map.json").write_text("{}")

    spec = bench.spec(bench.mixture(), TrainConfig(batch=4, epochs=1))
    with pytest.raises(StoreError, match=r"special_tokens_map\.json: no record names this file"):
        bench.run(spec, progress=plant_it)
    (start / "special_tokens_map.json").unlink()
    assert "policy/special_tokens_map.json" not in bench.run(spec).files


@pytest.mark.parametrize("inward", [True, False])
def test_a_link_in_a_recorded_files_place_is_never_followed(kept_store, elsewhere, tmp_path, inward, sera):
    """Even where it leads to the right bytes."""
    file = policy_folder(kept_store) / "model.safetensors"
    moved = (kept_store / "moved" if inward else elsewhere) / "model.safetensors"
    moved.parent.mkdir(exist_ok=True)
    file.rename(moved)
    file.symlink_to(moved)
    with pytest.raises(StoreError, match="Replace the link with what it points to"):
        artifact_of(kept_store).folder("policy")
    target = tmp_path / "out"
    assert (
        str(file)
        in sera("export", "first", "--round", "1", "--to", target, "--store", kept_store, code=1).err
    )
    assert not target.exists()


def test_a_changed_file_is_not_exported(kept_store, tmp_path, sera):
    file = policy_folder(kept_store) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vocab_size": 3}))
    target = tmp_path / "out"
    assert (
        str(file)
        in sera("export", "first", "--round", "1", "--to", target, "--store", kept_store, code=1).err
    )
    assert not target.exists()


# -------------------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("plant", PLANTED)
def test_verify_names_what_no_record_names(kept_store, elsewhere, sera, plant):
    sera("verify", "first", "--store", kept_store)
    folder = policy_folder(kept_store)
    name = plant(folder, elsewhere)
    assert f"{folder / name}: " in sera("verify", "first", "--store", kept_store, code=1).err


def test_verify_names_a_file_beside_data_and_says_how_many_there_are(kept_store, sera):
    folder = artifact_of(kept_store, "data").path("train.parquet").parent
    (folder / "a.parquet").write_bytes(b"")
    (policy_folder(kept_store) / "b.json").write_text("{}")
    said = sera("verify", "first", "--store", kept_store, code=1).err
    assert "no record names this file (and 1 more)" in said
    assert "a.parquet" in said or "b.json" in said


def test_verify_leaves_workspaces_and_leftovers_to_gc(kept_store, sera):
    artifact = artifact_of(kept_store)
    step = kept_store / "steps" / artifact.ref.step / artifact.ref.key
    attempt = policy_folder(kept_store).parent
    killed = step / ("0" * 16) / "policy"
    killed.mkdir(parents=True)
    (killed / "half.safetensors").write_bytes(b"")
    (attempt / "checkpoint-000001").mkdir()  # what a dropped checkpoint leaves
    checkpoint = {"attempt": attempt.name, "sha256": "0" * 64, "bytes": 0}
    (attempt / "checkpoint-000002").mkdir()
    (attempt / "checkpoint-000002" / "log.json").write_text("")
    number = len(list(step.glob("part-*.json")))
    part = {"format": 1, "files": {"checkpoint-000002/log.json": checkpoint}, "info": {}}
    (step / f"part-{number:05d}.json").write_text(json.dumps(part))
    sera("verify", "first", "--store", kept_store)


@pytest.mark.parametrize("place", ["runs/second/extra", "elsewhere", "steps/link", "runs/first/x.json"])
def test_verify_names_a_link_anywhere_in_the_store(kept_store, elsewhere, sera, place):
    (kept_store / place).symlink_to(elsewhere)
    assert (
        f"{kept_store / place}: a link leads out of the store"
        in sera("verify", "first", "--store", kept_store, code=1).err
    )


def test_verify_names_a_link_that_leads_in_a_circle(kept_store, sera):
    link = policy_folder(kept_store) / "vocab.json"
    link.symlink_to(link)
    assert f"{link}: this is a link" in sera("verify", "first", "--store", kept_store, code=1).err


def test_gc_deletes_nothing_through_a_link(kept_store, tmp_path, sera):
    outside = tmp_path / "outside"
    (kept_store / "steps").rename(outside)
    (kept_store / "steps").symlink_to(outside)
    before = sorted(outside.rglob("*"))
    assert (
        "a link leads out of the store"
        in sera("gc", "--delete", "--older-than", "0", "--store", kept_store, code=1).err
    )
    assert sorted(outside.rglob("*")) == before


def test_gc_removes_a_planted_link_and_not_what_it_leads_to(kept_store, elsewhere, sera):
    link = policy_folder(kept_store) / "more"
    link.symlink_to(elsewhere)
    sera("gc", "--delete", "--older-than", "0", "--store", kept_store)
    assert not link.is_symlink()
    assert (elsewhere / "secret.txt").read_text() == "secret"
    sera("verify", "first", "--store", kept_store)
