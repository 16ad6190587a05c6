"""The servers, each started once, and a cache of each test's own."""

import objectstores
import pytest


@pytest.fixture(scope="session")
def moto_server():
    with objectstores.moto() as server:
        yield server


@pytest.fixture(scope="session")
def radosgw_server():
    with objectstores.radosgw() as server:
        yield server


@pytest.fixture(params=["moto", "radosgw"])
def server(request):
    """Each of the two servers, in this process's environment."""
    found = request.getfixturevalue(f"{request.param}_server")
    with found.in_environment():
        yield found


@pytest.fixture
def moto(moto_server):
    """Moto, in this process's environment."""
    with moto_server.in_environment():
        yield moto_server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache: nothing local is needed."""
    monkeypatch.setenv("SERA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
