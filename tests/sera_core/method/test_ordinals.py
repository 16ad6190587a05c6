import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sera_core.method.ordinals import hashes, hex_numbers, ordinals, sortable, sorted_by

light = settings(max_examples=60, deadline=None, derandomize=True)
hex_ids = st.integers(0, 2**64 - 1).map(lambda number: f"{number:016x}")
some_ids = st.lists(st.one_of(hex_ids, st.text("0aFg/é", min_size=1, max_size=20)), min_size=1, max_size=30)


@light
@given(st.one_of(some_ids, st.lists(hex_ids, min_size=1, max_size=30)))
def test_numbers_compare_as_the_ids_do(ids):
    for held in (ids, np.array(ids), np.array([id.encode() for id in ids])):
        numbers = ordinals(held)
        for one, number in zip(ids, numbers, strict=True):
            assert (numbers < number).tolist() == [other < one for other in ids]
            assert (numbers == number).tolist() == [other == one for other in ids]


def test_only_sixteen_lowercase_hex_digits_are_a_number():
    ids = np.array(["00000000000000ff", "00000000000000FF", "0123456789abcdef0", "abc", "0123456789abcdeg"])
    for held in (ids, ids.astype(np.bytes_)):
        numbers, fits = hex_numbers(held)
        assert numbers.tolist() == [255, 0, 0, 0, 0]
        assert fits.tolist() == [True, False, False, False, False]
    assert not hex_numbers(np.arange(3))[1].any()


@light
@given(some_ids)
def test_hashes_sort_as_the_digests_do(ids):
    digests = [hashlib.sha256(f"order:7:{id}".encode()).digest() for id in ids]
    expected = sorted(range(len(ids)), key=digests.__getitem__)
    for held in (ids, np.array([id.encode() for id in ids])):
        assert np.argsort(hashes("order:7:", held), kind="stable").tolist() == expected


def test_digests_that_begin_alike_are_compared_to_their_end():
    digests = np.zeros((3, 32), dtype=np.uint8)
    digests[:, 31] = [3, 1, 2]
    assert np.argsort(sortable(digests)).tolist() == [1, 2, 0]
    digests[:, 7] = [0, 1, 2]
    assert np.argsort(sortable(digests)).tolist() == [0, 1, 2]


@light
@given(st.lists(st.tuples(st.sampled_from([-1.0, -0.0, 0.0, 2.5]), st.booleans()), max_size=40), st.randoms())
def test_ties_of_all_keys_go_by_number(rows, random):
    numbers = np.array(random.sample(range(1000), len(rows)), dtype=np.uint64)
    values, flags = np.array([v for v, _ in rows], dtype=float), np.array([f for _, f in rows], dtype=bool)
    for keys in ((values, flags), (values,), (flags, values), ()):
        assert sorted_by(numbers, *keys).tolist() == np.lexsort((numbers, *keys)).tolist()
