"""Of eight processes that commit the same step one wins, and the others go on with its work."""

import pytest
from reliability.racing import double_commits, race

from sera_core.artifacts.local_store import LocalStore


@pytest.mark.s3
def test_twenty_times_exactly_one_of_eight_processes_wins_on_a_real_server(radosgw_server, tmp_path):
    with radosgw_server.in_environment():
        assert double_commits(race(radosgw_server.bucket(), 20, tmp_path)) == 0


def test_exactly_one_of_eight_processes_wins_in_a_folder(tmp_path):
    assert double_commits(race(str(tmp_path / "store"), 5, tmp_path)) == 0


def test_a_store_in_which_the_last_writer_wins_is_found_out(tmp_path, monkeypatch):
    def replace(store: LocalStore, path: str, data: bytes) -> bytes:
        (store.root / path).parent.mkdir(parents=True, exist_ok=True)
        (store.root / path).write_bytes(data)
        return data

    monkeypatch.setattr(LocalStore, "create", replace)
    with pytest.raises(AssertionError):
        assert double_commits(race(str(tmp_path / "store"), 1, tmp_path)) == 0
