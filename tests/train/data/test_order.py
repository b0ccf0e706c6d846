import itertools

import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import DataError
from surgery.train.data.base import Place
from surgery.train.data.order import Order, Sweep

COUNTS = st.integers(1, 40)
BATCHES = st.integers(1, 12)
SEEDS = st.integers(0, 2**32 - 1)


def places(order: Order, batches: int) -> list[Place]:
    return list(itertools.chain.from_iterable(itertools.islice(order, batches)))


@settings(deadline=None)
@given(count=COUNTS, batch=BATCHES, seed=SEEDS)
def test_every_sample_comes_once_in_every_epoch(count, batch, seed):
    epochs = 3
    found = places(Order(count, batch=batch, seed=seed), -(-epochs * count // batch))
    for epoch in range(epochs):
        indices = [place.index for place in found[epoch * count : (epoch + 1) * count]]
        assert sorted(indices) == list(range(count))


@settings(deadline=None)
@given(count=COUNTS, batch=BATCHES, seed=SEEDS)
def test_positions_count_on_through_all_epochs(count, batch, seed):
    found = places(Order(count, batch=batch, seed=seed), 9)
    assert [place.position for place in found] == list(range(9 * batch))


@settings(deadline=None)
@given(count=COUNTS, batch=BATCHES, seed=SEEDS, start=st.integers(0, 30))
def test_a_resumed_order_is_the_rest_of_the_whole_one(count, batch, seed, start):
    whole = itertools.islice(Order(count, batch=batch, seed=seed), start, start + 8)
    resumed = itertools.islice(Order(count, batch=batch, seed=seed, start=start), 8)
    assert list(whole) == list(resumed)


@settings(deadline=None)
@given(count=COUNTS, part=st.integers(1, 5), seed=SEEDS, start=st.integers(0, 9))
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_accelerate_gives_each_rank_its_part_of_each_batch(ranks, count, part, seed, start):
    order = Order(count, batch=part * ranks, seed=seed, start=start)
    shares = [
        itertools.islice(BatchSamplerShard(order, ranks, rank, split_batches=True), 6)
        for rank in range(ranks)
    ]
    joined = [list(itertools.chain.from_iterable(parts)) for parts in zip(*shares, strict=True)]
    assert joined == list(itertools.islice(order, 6))


@settings(deadline=None)
@given(count=COUNTS, seed=SEEDS, batch=BATCHES, pieces=st.integers(1, 4))
def test_accumulation_cuts_a_batch_and_keeps_its_samples(count, seed, batch, pieces):
    whole = places(Order(count, batch=batch * pieces, seed=seed, start=2), 3)
    cut = places(Order(count, batch=batch, seed=seed, start=2 * pieces), 3 * pieces)
    assert whole == cut


def test_epochs_and_seeds_have_orders_of_their_own():
    def order(seed: int, epoch: int) -> list[int]:
        return Order(1000, batch=1, seed=seed).permutation(epoch).tolist()

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(each) for each in orders}) == 9
    # A random permutation keeps about one of its elements in place.
    assert all(sum(a == i for i, a in enumerate(each)) < 10 for each in orders)


def test_the_order_is_the_same_in_every_release():
    # numpy may change its streams (NEP 19); a run could then not be resumed by a later release.
    found = places(Order(7, batch=7, seed=3), 1)
    assert [place.index for place in found] == [5, 6, 2, 1, 4, 3, 0]


@settings(deadline=None)
@given(count=COUNTS, batch=BATCHES)
def test_a_sweep_takes_every_sample_once(count, batch):
    sweep = Sweep(count, batch=batch)
    batches = list(sweep)
    assert len(batches) == len(sweep)
    assert [p.index for each in batches for p in each] == list(range(count))
    assert all(len(each) == batch for each in batches[:-1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "no samples"),
        ({"batch": 0}, "batch has 0 samples"),
        ({"seed": -1}, "seed -1"),
        ({"start": -1}, "batch -1"),
    ],
)
def test_impossible_orders_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        Order(**({"count": 3, "batch": 2, "seed": 0} | options))
