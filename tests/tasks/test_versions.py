"""A step whose output changed under its version is found: see tests/golden/table.py."""

import copy
import json

import pytest
from golden import table

from sera_core.steps import VERSIONS

KEPT = json.loads(table.FILE.read_text())


def test_every_step_writes_what_its_version_wrote(tmp_path):
    assert table.changed(KEPT, table.current(tmp_path)) == []


def test_the_table_has_every_step():
    assert set(KEPT["versions"]) == set(VERSIONS) == set(KEPT["entries"]) | set(table.TRAINED)


@pytest.mark.parametrize("step", VERSIONS)
def test_another_output_under_the_same_version_names_the_number_to_raise(step):
    now = copy.deepcopy(KEPT)
    if step in table.TRAINED:
        now[step][0]["loss"] *= 1.01
    else:
        inputs = next(iter(now["entries"][step]))
        now["entries"][step][inputs] = "another"
    raised = VERSIONS[step] + 1
    (problem,) = table.changed(KEPT, now)
    assert f"raise VERSIONS['{step}'] in sera_core/steps.py to {raised}" in problem
    now["versions"][step] = raised
    (problem,) = table.changed(KEPT, now)
    assert "renew it with `make golden`" in problem
