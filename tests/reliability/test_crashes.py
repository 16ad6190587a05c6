"""The crash matrix: every eighth point in a folder, fewer on servers; `make faults`: all points on all."""

import objectstores
import pytest
from reliability.crashing import in_own_process

pytestmark = pytest.mark.faults
LEAST_POINTS = 150


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("store", "every"),
    [
        pytest.param("local", 8, marks=pytest.mark.slow),
        pytest.param("moto", 30, marks=pytest.mark.s3),
        pytest.param("radosgw", 30, marks=pytest.mark.s3),
    ],
)
def test_a_run_killed_at_any_commit_point_resumes_to_the_same_policy(store, every):
    if store == "radosgw":
        objectstores.require_radosgw()
    crashes = list(in_own_process(f"{store}:{every}"))
    assert [crash for crash in crashes if not crash.is_good] == []
    assert len(crashes) >= LEAST_POINTS // every
    assert any(crash.steps_repeated for crash in crashes)
