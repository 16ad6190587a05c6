"""One Prefect server for all the tests that run a flow in this process."""

import os

import migrated
import places
import pytest


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory):
    """The embedded server, started once; commands that find PREFECT_API_URL use it."""
    from flows.orchestration.embedded_server import prefect_api

    os.environ["PREFECT_HOME"] = str(migrated.sqlite_home(tmp_path_factory.mktemp("prefect")))
    with prefect_api() as url:
        yield url


@pytest.fixture(autouse=True)
def _flows_in_this_process(request):
    """A command that runs a flow in this process finds the server, instead of starting one for itself."""
    if request.node.get_closest_marker("flow") is not None:
        request.getfixturevalue("prefect_server")


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """Postgres, Prefect server, deployments and worker, for the tests that break none of them."""
    with places.place(tmp_path_factory.mktemp("place")) as place:
        yield place
