"""Sides share no prompt, whatever the order of the rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sera_core.data.parsing import parse_pair, parse_prompt
from sera_core.data.preferences import Pair
from sera_core.data.sources import Row
from sera_core.data.splitting import (
    flip_labels,
    group_key,
    groups_of,
    remove_overlap,
    share,
    split_groups,
    subset,
)
from sera_core.errors import InputError


def pair(prompt: str, chosen: str = "yes", rejected: str = "no") -> Pair:
    where = f"pairs.jsonl row {prompt}"
    return parse_pair(Row(where, {"prompt": prompt, "chosen": chosen, "rejected": rejected}))


def many(count: int) -> list[Pair]:
    return [pair(f"question {number}") for number in range(count)]


PAIRS = st.lists(
    st.builds(pair, st.integers(0, 12).map(str), st.sampled_from(["yes", "si", "ja"])),
    max_size=30,
    unique_by=lambda p: p.pair_id,
)


def ids(pairs) -> list[str]:
    return sorted(p.pair_id for p in pairs)


def test_prompts_that_differ_in_case_width_or_white_space_are_one_group():
    variants = ["What is 5?", "  what\n IS\u00a05? ", "Ｗｈａｔ is 5?"]
    assert len({group_key(pair(text).prompt) for text in variants}) == 1
    system = [{"role": "system", "content": "x"}, {"role": "user", "content": "What is 5?"}]
    assert group_key(system) == group_key(pair("What is 5?").prompt)
    assert group_key(pair("What is 6?").prompt) != group_key(pair("What is 5?").prompt)


def test_the_group_key_is_the_hash_of_the_folded_first_user_turn():
    """sha256 of "hi there" begins with 9b96a1fe1d548cbb."""
    assert group_key(pair("Hi\t THERE").prompt) == "9b96a1fe1d548cbb"


@given(PAIRS, st.floats(0, 0.33), st.floats(0, 0.33), st.integers(0, 5), st.randoms())
def test_sides_share_no_group_lose_no_pair_and_ignore_the_order_of_rows(pairs, heldout, test, seed, random):
    try:
        sides = split_groups(pairs, heldout, test, seed)
    except InputError:
        assert len(groups_of(pairs)) < 3
        return
    groups = [groups_of(side) for side in sides.values()]
    assert sum(len(side) for side in groups) == len(set().union(*groups))
    assert ids(p for side in sides.values() for p in side) == ids(pairs)
    assert sides["train"]
    shuffled = split_groups(random.sample(pairs, len(pairs)), heldout, test, seed)
    assert {name: ids(side) for name, side in shuffled.items()} == {
        name: ids(side) for name, side in sides.items()
    }


def test_fractions_count_groups_and_not_pairs():
    pairs = [pair(f"question {n}", f"answer {m}") for n in range(10) for m in range(n + 1)]
    sides = split_groups(pairs, 0.2, 0.1, seed=0)
    assert {name: len(groups_of(side)) for name, side in sides.items()} == {
        "train": 7,
        "heldout": 2,
        "test": 1,
    }


def test_a_small_fraction_of_two_groups_is_one_and_a_single_group_stays_in_train():
    assert len(split_groups(many(2), 0.01, 0.0, 0)["heldout"]) == 1
    assert split_groups(many(1), 0.5, 0.4, 0) == {"train": many(1), "heldout": [], "test": []}


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(
        InputError, match=r"2 different prompts are too few: 1 held out and 1 for the test side"
    ):
        split_groups(many(2), 0.1, 0.1, 0)


def test_another_seed_gives_another_split_and_a_test_side_does_not_move_the_heldout_one():
    pairs = many(40)
    heldout = split_groups(pairs, 0.25, 0.0, 0)["heldout"]
    assert ids(split_groups(pairs, 0.25, 0.25, 0)["heldout"]) == ids(heldout)
    assert ids(split_groups(pairs, 0.25, 0.0, 1)["heldout"]) != ids(heldout)


@given(PAIRS, st.integers(0, 40), st.randoms())
def test_a_subset_is_of_the_asked_size_and_ignores_the_order_of_rows(pairs, count, random):
    taken, rest = subset(pairs, count, 0, "limit")
    assert len(taken) == min(count, len(pairs))
    assert ids(taken + rest) == ids(pairs)
    assert ids(subset(random.sample(pairs, len(pairs)), count, 0, "limit")[0]) == ids(taken)


def test_a_larger_subset_holds_the_smaller_one_and_another_seed_draws_anew():
    pairs = many(50)
    small, large = (set(ids(subset(pairs, count, 0, "limit")[0])) for count in (10, 20))
    assert small < large
    assert set(ids(subset(pairs, 10, 1, "limit")[0])) != small
    assert len(share(pairs, 0.25, 0)[0]) == 13
    assert len(share(pairs, 0.001, 0)[0]) == 1


def test_overlap_is_refused_with_counts_and_an_example():
    train = [pair("a"), pair("a", "si"), pair("b"), pair("c")]
    with pytest.raises(InputError) as caught:
        remove_overlap(train, {"heldout": [pair("A"), pair("d")]}, side="train", on_overlap="refuse")
    first = min(train[:2], key=lambda p: p.pair_id)
    assert "data.heldout shares 1 of its 2 different prompts with data.train, where 2 pairs have them" in str(
        caught.value
    )
    assert f"the first is pair {first.pair_id} (pairs.jsonl row a)" in str(caught.value)
    assert 'data.on_overlap = "drop"' in str(caught.value)


def test_overlap_with_prompt_only_rows_names_the_prompt():
    prompts = [parse_prompt(Row("p.jsonl line 2", {"prompt": "a"}))]
    with pytest.raises(
        InputError, match=r"1 prompts have them; the first is prompt [0-9a-f]{16} \(p\.jsonl line 2\)"
    ):
        remove_overlap(prompts, {"test": [pair("a")]}, side="prompts", on_overlap="refuse")


@given(PAIRS, PAIRS, PAIRS)
def test_after_dropping_no_group_is_shared_and_no_pair_is_lost(train, heldout, test):
    kept, dropped = remove_overlap(train, {"heldout": heldout, "test": test}, side="train", on_overlap="drop")
    assert not groups_of(kept) & (groups_of(heldout) | groups_of(test))
    assert ids(kept + [drop.item for drop in dropped]) == ids(train)
    assert {(drop.side, drop.reason) for drop in dropped} <= {("train", "overlap")}
    assert remove_overlap(train, {"heldout": heldout}, side="train", on_overlap="keep") == (train, [])


@given(st.integers(1, 40), st.floats(0, 1), st.integers(0, 3))
def test_exactly_the_asked_share_of_labels_is_turned(count, fraction, seed):
    pairs = many(count)
    turned, flipped = flip_labels(pairs, fraction, seed)
    changed = [new for old, new in zip(pairs, turned, strict=True) if old != new]
    assert len(changed) == len(flipped) == int(fraction * count + 0.5 + 1e-9)
    assert sorted(p.pair_id for p in changed) == flipped
    assert all(p.chosen[0]["content"] == "no" for p in changed)


def test_a_pair_under_both_labels_is_never_turned_into_a_repetition():
    pairs = [pair("a"), pair("a", "no", "yes"), pair("b")]
    turned, flipped = flip_labels(pairs, 1.0, 0)
    assert len({p.pair_id for p in turned}) == 3
    assert flipped == [pair("b", "no", "yes").pair_id]
