"""The order of rows: exact shares, every row once an epoch, a pure function of seed and index."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cptjob_trainer.data.mix import BLOCK, Mix, permute, splitmix64
from cptjob_trainer.errors import ConfigError

SOURCES = st.lists(
    st.tuples(st.integers(1, 300), st.integers(0, 900)), min_size=1, max_size=6
).filter(lambda pairs: any(quota for _, quota in pairs))


@settings(max_examples=60, deadline=None)
@given(pairs=SOURCES, seed=st.integers(0, 2**31))
def test_every_row_comes_once_in_each_epoch(pairs: list[tuple[int, int]], seed: int) -> None:
    rows, drawn = zip(*pairs, strict=True)
    mix = Mix(rows, drawn, seed)
    places = [mix.place(i) for i in range(mix.total_rows)]
    assert len(set(places)) == mix.total_rows == sum(drawn)
    assert Counter(place.source for place in places) == {
        source: quota for source, quota in enumerate(drawn) if quota
    }
    for source, (available, quota) in enumerate(pairs):
        whole, rest = divmod(quota, available)
        epochs = Counter(place.epoch for place in places if place.source == source)
        assert epochs == {
            **dict.fromkeys(range(whole), available),
            **({whole: rest} if rest else {}),
        }


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 63, 64, 65, 1000])
def test_permute_is_a_permutation_that_depends_on_its_key(size: int) -> None:
    orders = [[permute(i, size, key) for i in range(size)] for key in (1, 2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(size))
    if size > 10:
        assert orders[0] != orders[1]


def test_shares_hold_in_every_block_and_not_only_at_the_end() -> None:
    drawn = (100_000, 20_000, 5_263)
    mix = Mix((40_000, 7_000, 90_000), drawn, seed=3)
    blocks = mix.total_rows // BLOCK
    for block in range(blocks):
        start, end = (at * mix.total_rows // blocks for at in (block, block + 1))
        counts = Counter(mix.locate(i)[0] for i in range(start, end))
        for source, quota in enumerate(drawn):
            assert abs(counts[source] - quota * (end - start) / mix.total_rows) <= 2


@pytest.mark.parametrize("sources", [2, 64])
def test_many_equal_sources_are_exact_too(sources: int) -> None:
    mix = Mix([10] * sources, [173] * sources, seed=0)
    counts = Counter(mix.locate(i)[0] for i in range(mix.total_rows))
    assert counts == dict.fromkeys(range(sources), 173)


def test_the_order_is_a_pure_function_of_seed_and_index() -> None:
    rows, drawn = (900, 70), (9000, 473)
    mix = Mix(rows, drawn, seed=5)
    whole = [mix.locate(i) for i in range(9473)]
    resumed = Mix(rows, drawn, seed=5)
    assert [resumed.locate(i) for i in range(7000, 9473)] == whole[7000:]
    assert [resumed.locate(i) for i in reversed(range(200))] == whole[:200][::-1]
    for i in (0, 1, 4735, 4736, 4737, 9472):
        assert Mix(rows, drawn, seed=5).locate(i) == whole[i]
    other = Mix(rows, drawn, seed=6)
    assert whole != [other.locate(i) for i in range(9473)]


def test_the_order_is_the_same_in_every_version() -> None:
    """Written down: a checkpoint of an older version must find its rows."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    mix = Mix((5, 3), (10, 4), seed=7)
    assert [mix.locate(i) for i in range(14)] == PINNED


def test_each_epoch_has_an_order_of_its_own() -> None:
    mix = Mix((500,), (1000,), seed=1)
    rows = [mix.place(i) for i in range(1000)]
    first, second = ([p.row for p in rows if p.epoch == epoch] for epoch in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_beyond_the_last_row_there_is_nothing() -> None:
    mix = Mix((5,), (7,), seed=0)
    for i in (-1, 7):
        with pytest.raises(IndexError, match="outside"):
            mix.locate(i)


def test_more_sources_than_a_block_can_share_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 64"):
        Mix([1] * 65, [1] * 65, 0)


PINNED: list[tuple[int, int]] = [
    (0, 0),
    (0, 2),
    (0, 3),
    (0, 1),
    (0, 4),
    (1, 0),
    (0, 1),
    (0, 2),
    (0, 0),
    (0, 4),
    (0, 3),
    (1, 1),
    (1, 2),
    (1, 0),
]
