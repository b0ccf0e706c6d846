"""ImageNet's layout: train/WNID/ and val/WNID/."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from surgery.errors import DataError
from surgery.train.data import open_data
from surgery.train.data.base import Samples
from surgery.train.data.configs import Augment, ImagenetData

WNIDS = ("n01440764", "n01443537", "n01484850")


def noise(seed: int) -> Image.Image:
    generator = np.random.default_rng(seed)
    height, width = generator.integers(20, 60, 2)
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for part, count in (("train", 4), ("val", 2)):
        for number, wnid in enumerate(reversed(WNIDS)):
            (tmp_path / part / wnid).mkdir(parents=True)
            for index in range(count):
                path = tmp_path / part / wnid / f"{wnid}_{index}.JPEG"
                noise(10 * number + index + 1000 * count).save(path, format="JPEG")
    return tmp_path


def test_classes_are_the_sorted_folders_of_both_parts(root: Path):
    data = open_data(ImagenetData(path=str(root), size=16), seed=0)
    assert data.facts.names == WNIDS
    assert (data.facts.classes, data.facts.size, data.facts.channels) == (3, (16, 16), 3)
    assert isinstance(data.train, Samples)
    for samples, count in ((data.train, 4), (data.held_out, 2)):
        labels = [int(samples[index]["labels"]) for index in range(len(samples))]
        assert labels == [label for label in range(3) for _ in range(count)]


def test_evaluation_is_the_centre_crop_of_classifiers(root: Path):
    data = open_data(ImagenetData(path=str(root), size=28), seed=0)
    reference = v2.Compose(
        [
            v2.Resize(32),
            v2.CenterCrop(28),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    path = root / "val" / WNIDS[1] / f"{WNIDS[1]}_0.JPEG"
    expected = reference(Image.open(path).convert("RGB"))
    # Two ways of writing x / 127.5 - 1 in float32.
    assert torch.allclose(data.held_out[2]["images"], expected, rtol=0, atol=2e-7)


def test_training_crops_at_random_and_dit_only_mirrors(root: Path):
    random = open_data(ImagenetData(path=str(root), size=16), seed=0).train
    config = ImagenetData(path=str(root), size=16, fit="adm", augment=Augment(flip=True))
    mirrored = open_data(config, seed=0).train
    assert isinstance(random, Samples)
    assert isinstance(mirrored, Samples)
    crops = [random.sample(0, position)["images"] for position in range(10)]
    assert len({crop.numpy().tobytes() for crop in crops}) == 10
    found = [mirrored.sample(0, position)["images"] for position in range(10)]
    one, other = found[0], found[0].flip(-1)
    kinds = {torch.equal(each, one) for each in found}
    assert kinds == {True, False}
    assert all(torch.equal(each, one) or torch.equal(each, other) for each in found)


def _flat(root: Path) -> None:
    for wnid in WNIDS:
        for path in (root / "val" / wnid).iterdir():
            path.rename(root / "val" / path.name)
        (root / "val" / wnid).rmdir()


def _no_val(root: Path) -> None:
    (root / "val").rename(root / "validation")


def _other_classes(root: Path) -> None:
    (root / "val" / WNIDS[0]).rename(root / "val" / "n99999999")


def _corrupt(root: Path) -> None:
    (root / "val" / WNIDS[0] / f"{WNIDS[0]}_1.JPEG").write_bytes(b"broken")


BAD = [
    pytest.param(_flat, r"(?s)flat, as the published archive.*folder per class", id="flat"),
    pytest.param(_no_val, r"no folder val/; it has train, validation", id="no val"),
    pytest.param(
        _other_classes, r"2 are in one of them only, such as n01440764/ in .*train", id="classes"
    ),
    pytest.param(_corrupt, r"n01440764_1\.JPEG cannot be decoded", id="corrupt"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_bad_layouts_are_refused(root: Path, spoil, message: str):
    spoil(root)
    with pytest.raises(DataError, match=message):
        open_data(ImagenetData(path=str(root), size=16, check="headers"), seed=0)
