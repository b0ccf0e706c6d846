from itertools import islice

import numpy as np
import pytest
import torch
from accelerate.data_loader import prepare_data_loader

from surgery.errors import DataError
from surgery.train.data import Samples, evaluation_loader, open_data, training_loader
from surgery.train.data.configs import TextData
from surgery.train.data.order import Order


class Numbers(Samples):
    """Samples that are their own number, with noise drawn from their position."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def sample(self, index, position):
        noise = np.random.default_rng([7, position]).standard_normal()
        return {"x": torch.tensor([index, index]), "noise": torch.tensor(noise)}


def equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_batches_follow_the_order():
    loader = training_loader(Numbers(10), batch=4, seed=3)
    for batch, places in zip(islice(loader, 7), Order(10, batch=4, seed=3), strict=False):
        assert batch["x"][:, 0].tolist() == [place.index for place in places]
        assert batch["position"].tolist() == [place.position for place in places]
        assert batch["position"].dtype == torch.int64
        assert batch["x"].shape == (4, 2)


@pytest.mark.parametrize("start", [0, 1, 5])
def test_workers_and_resuming_change_nothing(start):
    whole = list(islice(training_loader(Numbers(10), batch=3, seed=0), 9))[start:]
    resumed = training_loader(Numbers(10), batch=3, seed=0, start=start, workers=2)
    for one, other in zip(whole, resumed, strict=False):
        equal(one, other)


def test_a_loader_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    next(iter(training_loader(Numbers(10), batch=3, seed=0)))
    list(evaluation_loader(Numbers(10), batch=3))
    assert torch.equal(torch.rand(3), expected)


def test_pages_are_locked_where_asked_for():
    if not torch.cuda.is_available():
        pytest.skip("only an accelerator locks pages")
    loader = training_loader(Numbers(10), batch=3, seed=0, pin=True)
    assert next(iter(loader))["x"].is_pinned()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_batches_of_training_out(ranks):
    """As the trainer prepares its loader; random samples do not depend on the ranks either."""

    def loader():
        return training_loader(Numbers(10), batch=4, seed=1, start=2)

    shares = [
        prepare_data_loader(loader(), num_processes=ranks, process_index=rank, split_batches=True)
        for rank in range(ranks)
    ]
    for whole, *parts in islice(zip(loader(), *shares, strict=False), 6):
        equal(whole, {key: torch.cat([part[key] for part in parts]) for key in whole})


@pytest.mark.parametrize("count", [None, 1, 6, 10, 99])
def test_an_evaluation_takes_samples_at_equal_distances(count):
    loader = evaluation_loader(Numbers(10), batch=4, count=count)
    found = [int(i) for batch in loader for i in batch["x"][:, 0]]
    assert len(found) == min(10, count or 10)
    assert found == sorted(set(found))
    gaps = np.diff([*found, 10 + found[0]])
    assert max(gaps) - min(gaps) <= 1
    again = [int(i) for batch in loader for i in batch["position"]]
    assert again == list(range(len(found)))


@pytest.mark.parametrize("count", [6, 7, 8])
def test_accelerate_knows_what_it_repeats_at_the_end(count):
    """``gather_for_metrics`` drops what was repeated to fill up the last batch."""
    loader = evaluation_loader(Numbers(20), batch=4, count=count)
    parts = [
        prepare_data_loader(loader, num_processes=2, process_index=rank, split_batches=True)
        for rank in range(2)
    ]
    batches = list(zip(*parts, strict=True))
    assert len(batches) == 2
    found = [int(i) for pair in batches for part in pair for i in part["position"]]
    assert found[:count] == list(range(count))
    assert parts[0].remainder == count % 4


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (Numbers(0), {}, "no samples"),
        (Numbers(3), {"batch": 0}, "batch has 0"),
        (Numbers(3), {"start": -1}, "batch -1"),
    ],
)
def test_impossible_loaders_are_refused(samples, options, message):
    with pytest.raises(DataError, match=message):
        training_loader(samples, **({"batch": 2, "seed": 0} | options))


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(DataError, match="no samples"):
        evaluation_loader(Numbers(0), batch=2)


def test_text_is_read_by_workers(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"text {number} " * 90)
    config = TextData(path=str(tmp_path), length=20, cache=str(tmp_path / "cache"))
    samples = open_data(config, seed=0).train
    here = training_loader(samples, batch=5, seed=0)
    there = training_loader(samples, batch=5, seed=0, workers=2)
    for one, other in islice(zip(here, there, strict=False), 40):
        equal(one, other)
