"""The fault table, with little patience: `make faults` has the store's own."""

import pytest
from faultproxy import FAULTS
from reliability.faulting import OPERATIONS, TIMES, fault_table

from sera_core.artifacts.s3_requests import Patience

pytestmark = pytest.mark.s3

LITTLE = Patience(answer=4.0, total=24.0, tries=4, slowest=4 * 2**20)


def test_every_operation_survives_every_fault_or_says_clearly_that_it_does_not(server):
    rows = fault_table(server, LITTLE)
    assert len(rows) == len(OPERATIONS) * len(FAULTS) * len(TIMES)
    assert [row for row in rows if not row.survived] == []
    assert [row for row in rows if row.fault.endswith("twice") and row.outcome != "done"] == []
    assert max(row.seconds for row in rows) < 2 * LITTLE.total + 20
