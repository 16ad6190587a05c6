"""Policies that stay loaded: the same object again, no more than two, none after a release."""

import gc
import weakref

import pytest
from tiny import tiny_policy

from sera_core.models.shared_policies import release_policies, shared_policy


@pytest.fixture
def folders(tmp_path):
    release_policies()
    yield [tiny_policy(tmp_path / name) for name in "abc"]
    release_policies()


def test_the_last_two_policies_are_kept_on_a_cpu(folders):
    first, second = (weakref.ref(shared_policy(folder, "float32", "cpu")) for folder in folders[:2])
    assert shared_policy(folders[0], "float32", "cpu") is first()
    assert shared_policy(folders[0], "bfloat16", "cpu") is not first()  # another dtype is another policy
    gc.collect()
    assert second() is None and first() is not None  # the one that was not used for longest is gone
    release_policies()
    gc.collect()
    assert first() is None
