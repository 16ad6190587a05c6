"""Where commands write: what cannot be written to is refused in one message, and no link is followed."""

from pathlib import Path

import pytest
import tiny
import tinyrun


def report(store: Path, out: object) -> list[str]:
    return ["report", "first", "--out", str(out), "--store", str(store)]


def export(store: Path, to: object) -> list[str]:
    return ["export", "first", "--round", "1", "--to", str(to), "--store", str(store)]


@pytest.mark.parametrize("page", ["index.html", "round-000.html"])
@pytest.mark.parametrize("dangling", [True, False])
def test_a_report_is_not_written_through_a_link(kept_store, tmp_path, sera, page, dangling):
    sera(*report(kept_store, tmp_path / "report"))
    other = tmp_path / "elsewhere.html"
    (tmp_path / "report" / page).rename(other)
    before = other.read_bytes()
    if dangling:
        other.unlink()
    (tmp_path / "report" / page).symlink_to(other)
    assert (
        f"{tmp_path / 'report' / page}: this is a link"
        in sera(*report(kept_store, tmp_path / "report"), code=2).err
    )
    assert not other.exists() if dangling else other.read_bytes() == before


def test_a_report_is_written_again_over_itself(kept_store, tmp_path, sera):
    for _ in range(2):
        sera(*report(kept_store, tmp_path / "report"))
    found = sorted(
        path.relative_to(tmp_path / "report").as_posix() for path in (tmp_path / "report").rglob("*.*")
    )
    pairs = [f"round-00{n}/{file}" for n in range(2) for file in ("pairs.html", "rows.js", "texts-00000.js")]
    assert found == sorted(["index.html", "answers.html", "round-000.html", "round-001.html", *pairs])


def test_a_folder_in_a_pages_place_is_refused(kept_store, tmp_path, sera):
    (tmp_path / "report" / "index.html").mkdir(parents=True)
    assert "not a sera-flow report" in sera(*report(kept_store, tmp_path / "report"), code=2).err


def places(tmp_path: Path) -> dict[str, Path]:
    """Places that nothing can be made at."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    return {
        "a link to nothing": tmp_path / "dangling",
        "below a link to nothing": tmp_path / "dangling" / "x",
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "x",
        "deep below a file": tmp_path / "file" / "x" / "y",
        "below /proc": Path("/proc/x"),
    }


@pytest.mark.parametrize("command", [report, export])
def test_a_place_that_cannot_be_written_to_is_refused_in_one_line(kept_store, tmp_path, sera, command):
    for place, path in places(tmp_path).items():
        said = sera(*command(kept_store, path), code=2).err
        assert str(path) in said and said.count("\n") == 1, place
    assert not (tmp_path / "nothing").exists()
    assert (tmp_path / "file").read_text() == "mine"


def test_a_table_is_not_written_to_such_a_place_either(tmp_path, sera):
    policy = tiny.tiny_policy(tmp_path / "policy", layers=1, hidden=32)
    pairs = tinyrun.write_rows(tmp_path / "pairs.jsonl", tinyrun.pairs(2))
    command = ["score", "--policy", str(policy), "--score", "simpo", "--pairs", str(pairs), "--out"]
    for place, path in places(tmp_path).items():
        assert str(path) in sera(*command, path, code=2).err, place
    sera(*command, tmp_path / "dangling", "--force")
    assert not (tmp_path / "dangling").is_symlink()  # replaced, not followed
    assert not (tmp_path / "nothing").exists()
