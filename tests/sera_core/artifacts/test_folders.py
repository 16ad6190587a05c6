"""Folders in the cache: each holds exactly what it was made of, whatever others put there."""

import pytest

from sera_core.artifacts.folders import assemble


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("SERA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "sha").mkdir()
    (tmp_path / "sha" / "config.json").write_text("{}")
    return {"policy/config.json": tmp_path / "sha" / "config.json"}


def names(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def plant(folder, elsewhere):
    (folder / "policy" / "added_tokens.json").write_text("{}")


def plant_link(folder, elsewhere):
    (folder / "policy" / "vocab.json").symlink_to(elsewhere)


def lead_elsewhere(folder, elsewhere):
    (folder / "policy" / "config.json").unlink()
    (folder / "policy" / "config.json").symlink_to(elsewhere)


def replace_a_link_by_another_file(folder, elsewhere):
    (folder / "policy" / "config.json").unlink()
    (folder / "policy" / "config.json").write_text("other")


def change_a_text(folder, elsewhere):
    (folder / "base.json").write_text("other")


def replace_the_folder_by_a_link(folder, elsewhere):
    folder.rename(folder.with_name("moved"))
    folder.symlink_to(folder.with_name("moved"))


@pytest.mark.parametrize(
    "attack",
    [
        plant,
        plant_link,
        lead_elsewhere,
        replace_a_link_by_another_file,
        change_a_text,
        replace_the_folder_by_a_link,
    ],
)
def test_a_folder_that_holds_something_else_is_made_again(files, tmp_path, attack):
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text("secret")
    folder = assemble("digest", files, {"base.json": "mine"})
    attack(folder, elsewhere)
    assert assemble("digest", files, {"base.json": "mine"}) == folder
    assert not folder.is_symlink()
    assert names(folder) == ["base.json", "policy/config.json"]
    assert (folder / "base.json").read_text() == "mine"
    assert (folder / "policy" / "config.json").read_text() == "{}"
    assert elsewhere.read_text() == "secret"
    assert len(list(folder.parent.glob(".*"))) == 0


def test_a_folder_that_holds_what_it_should_is_kept(files):
    folder = assemble("digest", files)
    born = folder.stat().st_ino
    assert assemble("digest", files) == folder
    assert folder.stat().st_ino == born


def test_where_nothing_can_be_linked_files_are_copied(files, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("pathlib.Path.symlink_to", refuse)
    folder = assemble("digest", files)
    assert assemble("digest", files) == folder
    (folder / "policy" / "config.json").write_text("other")
    assert (assemble("digest", files) / "policy" / "config.json").read_text() == "{}"


def test_other_content_has_another_folder(files, tmp_path):
    first = assemble("digest", files, {"base.json": "one"})
    assert assemble("digest", files, {"base.json": "two"}) != first
    assert (first / "base.json").read_text() == "one"
