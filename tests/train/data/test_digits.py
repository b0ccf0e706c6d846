"""The digits of scikit-learn as training data."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.datasets import load_digits

from surgery.errors import DataError
from surgery.train.data.base import Place, Samples
from surgery.train.data.configs import Augment, DigitsData
from surgery.train.data.digits import open_digits


def everything(samples: Samples) -> dict[str, torch.Tensor]:
    return samples.batch([Place(index, index) for index in range(len(samples))])


def test_the_two_parts_are_the_whole_and_nothing_twice():
    data = open_digits(DigitsData(), seed=0)
    assert isinstance(data.train, Samples)
    train, held_out = everything(data.train), everything(data.held_out)
    found = torch.cat([train["images"], held_out["images"]]).flatten(1)
    labels = torch.cat([train["labels"], held_out["labels"]])
    rows = torch.cat([found, labels[:, None].float()], dim=1).numpy()
    expected = load_digits()
    wanted = np.concatenate([expected.data / 8 - 1, expected.target[:, None]], axis=1)
    assert np.array_equal(np.unique(rows, axis=0), np.unique(wanted.astype("float32"), axis=0))
    assert len(rows) == len(wanted) == 1797
    overlap = {row.tobytes() for row in train["images"].numpy()} & {
        row.tobytes() for row in held_out["images"].numpy()
    }
    assert not overlap


def test_facts_and_samples_agree():
    data = open_digits(DigitsData(size=16, channels=3), seed=0)
    facts = data.facts
    assert (facts.kind, facts.channels, facts.size, facts.classes) == ("digits", 3, (16, 16), 10)
    assert facts.names == tuple("0123456789")
    sample = data.held_out[5]
    assert sample["images"].shape == (3, 16, 16)
    assert sample["images"].dtype == torch.float32
    assert sample["labels"].dtype == torch.int64
    assert sample["labels"].shape == ()
    assert sample["images"].min() >= -1
    assert sample["images"].max() <= 1
    assert torch.equal(sample["images"][0], sample["images"][2])


def test_the_held_out_part_is_stratified_and_the_same_for_every_seed():
    one, other = (open_digits(DigitsData(held_out=0.25), seed=seed) for seed in (0, 7))
    labels = everything(one.held_out)["labels"]
    assert torch.equal(everything(one.held_out)["images"], everything(other.held_out)["images"])
    counts = np.bincount(load_digits().target)
    assert torch.bincount(labels).tolist() == [round(0.25 * count) for count in counts]


def test_a_batch_is_its_samples():
    train = open_digits(DigitsData(), seed=0).train
    assert isinstance(train, Samples)
    places = [Place(5, 0), Place(1436, 9), Place(5, 1500), Place(0, 3)]
    batch = train.batch(places)
    for row, place in enumerate(places):
        sample = train.sample(place.index, place.position)
        assert torch.equal(batch["images"][row], sample["images"])
        assert batch["labels"][row] == sample["labels"]
        assert batch["position"][row] == place.position


def test_augmentation_depends_on_seed_and_position_only_and_leaves_the_generator_alone():
    config = DigitsData(augment=Augment(pad=2))
    train, again, other = (open_digits(config, seed=seed).train for seed in (3, 3, 4))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = [train.sample(8, position)["images"] for position in range(12)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    backwards = [again.sample(8, position)["images"] for position in reversed(range(12))]
    assert all(map(torch.equal, first, reversed(backwards)))
    assert len({image.numpy().tobytes() for image in first}) > 3
    elsewhere = [other.sample(8, position)["images"] for position in range(12)]
    assert not all(map(torch.equal, first, elsewhere))


def test_held_out_samples_are_never_augmented():
    plain = open_digits(DigitsData(), seed=0).held_out
    augmented = open_digits(DigitsData(augment=Augment(pad=2, flip=True)), seed=0).held_out
    assert torch.equal(everything(plain)["images"], everything(augmented)["images"])


def test_contradictions_are_refused():
    with pytest.raises(ValidationError, match="no resized crop"):
        DigitsData(augment=Augment(resized_crop=True))
    with pytest.raises(ValidationError, match="greater than or equal to 8"):
        DigitsData(size=4)


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"scikit-learn.*not installed\n.*\[train\]"):
        open_digits(DigitsData(), seed=0)
