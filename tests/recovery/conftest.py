"""A Prefect of their own for the tests that break it."""

import places
import pytest


@pytest.fixture(scope="module")
def own_place(tmp_path_factory):
    """Server, worker and deployments that may be killed."""
    with places.place(tmp_path_factory.mktemp("prefect")) as place:
        yield place
