"""CIFAR-10 and CIFAR-100 in their published binary layout, from small files of that layout."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from surgery.errors import DataError
from surgery.train.data import cifar, open_data, training_loader
from surgery.train.data.base import Samples
from surgery.train.data.configs import Augment, CifarData

COUNT = 6
TEN = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PLAIN = Augment()


def records(seed: int, *classes: int) -> np.ndarray:
    """Records as published: one byte per kind of label, then red, green and blue planes."""
    draw = np.random.default_rng(seed)
    labels = [draw.integers(0, count, (COUNT, 1), dtype=np.uint8) for count in classes]
    return np.concatenate([*labels, draw.integers(0, 256, (COUNT, 3072), dtype=np.uint8)], axis=1)


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    for seed, name in enumerate(TEN):
        (tmp_path / name).write_bytes(records(seed, 10).tobytes())
    # The published file ends with an empty line.
    (tmp_path / "batches.meta.txt").write_text("\n".join(NAMES) + "\n\n")
    return tmp_path


@pytest.fixture
def hundred(tmp_path: Path) -> Path:
    for seed, name in enumerate(("train.bin", "test.bin")):
        (tmp_path / name).write_bytes(records(seed, 20, 100).tobytes())
    return tmp_path


def config(path: Path, **options: object) -> CifarData:
    return CifarData(path=str(path), **{"subset": True, "augment": PLAIN} | options)


def check(samples: Samples, expected: np.ndarray, column: int, labels: int) -> None:
    assert len(samples) == len(expected)
    for index, record in enumerate(expected):
        pixels = record[labels:].reshape(3, 32, 32).astype(np.float32) / 127.5 - 1
        assert torch.equal(samples[index]["images"], torch.from_numpy(pixels))
        assert int(samples[index]["labels"]) == record[column]


def test_cifar_10_is_read_as_published(ten: Path):
    data = open_data(config(ten), seed=0)
    assert data.facts.names == NAMES
    assert (data.facts.classes, data.facts.size, data.facts.channels) == (10, (32, 32), 3)
    assert isinstance(data.train, Samples)
    check(data.train, np.concatenate([records(seed, 10) for seed in range(5)]), 0, 1)
    check(data.held_out, records(5, 10), 0, 1)


@pytest.mark.parametrize(("labels", "column", "classes"), [("coarse", 0, 20), ("fine", 1, 100)])
def test_cifar_100_has_two_labels(hundred: Path, labels: str, column: int, classes: int):
    data = open_data(config(hundred, labels=labels), seed=0)
    assert (data.facts.classes, data.facts.names) == (classes, None)
    assert isinstance(data.train, Samples)
    check(data.train, records(0, 20, 100), column, 2)
    check(data.held_out, records(1, 20, 100), column, 2)


def pack(folder: Path, archive: Path) -> Path:
    with tarfile.open(archive, "w:gz") as file:
        for path in sorted(folder.iterdir()):
            if path.suffix in {".bin", ".txt"}:
                file.add(path, arcname=f"cifar-10-batches-bin/{path.name}")
    return archive


def test_the_published_archive_is_read_without_extracting(ten: Path):
    archive = pack(ten, ten / "cifar-10-binary.tar.gz")
    before = sorted(ten.iterdir())
    packed, folder = open_data(config(archive), seed=0), open_data(config(ten), seed=0)
    assert packed.facts == folder.facts
    assert all(
        torch.equal(packed.train[index]["images"], folder.train[index]["images"])
        for index in range(5 * COUNT)
    )
    assert sorted(ten.iterdir()) == before


def test_the_standard_augmentation_pads_crops_and_mirrors(ten: Path):
    standard = CifarData(path=str(ten), subset=True)
    assert standard.augment == Augment(pad=4, flip=True)
    samples = open_data(standard, seed=0).train
    plain = open_data(config(ten), seed=0).train
    assert isinstance(samples, Samples)
    image = plain[7]["images"]
    padded = torch.nn.functional.pad(image, (4, 4, 4, 4), value=-1.0)
    windows = {
        part.contiguous().numpy().tobytes(): (top, left, mirrored)
        for top in range(9)
        for left in range(9)
        for mirrored in (False, True)
        for part in [padded[:, top : top + 32, left : left + 32].flip(-1 if mirrored else ())]
    }
    drawn = [samples.sample(7, position)["images"].numpy().tobytes() for position in range(200)]
    places = [windows[each] for each in drawn]  # KeyError: no crop of the padded image
    assert {top for top, _, _ in places} == {left for _, left, _ in places} == set(range(9))
    # 200 fair coins: outside of 70 to 130 with a probability below 1 in 10 000.
    assert 70 < sum(mirrored for _, _, mirrored in places) < 130


def test_resume_gives_the_same_pixels(ten: Path):
    data = open_data(CifarData(path=str(ten), subset=True), seed=2)
    whole = iter(training_loader(data.train, batch=8, seed=2))
    batches = [next(whole) for _ in range(9)]
    again = open_data(CifarData(path=str(ten), subset=True), seed=2)
    rest = next(iter(training_loader(again.train, batch=8, seed=2, start=8)))
    assert all(torch.equal(batches[8][key], rest[key]) for key in rest)


# --- bad input --------------------------------------------------------------------------------


def _short(root: Path) -> None:
    path = root / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-100])


def _empty_file(root: Path) -> None:
    (root / "data_batch_3.bin").write_bytes(b"")


def _missing(root: Path) -> None:
    (root / "data_batch_4.bin").unlink()


def _label(root: Path) -> None:
    path = root / "data_batch_2.bin"
    data = bytearray(path.read_bytes())
    data[3073 * 2] = 11
    path.write_bytes(data)


def _both(root: Path) -> None:
    (root / "train.bin").write_bytes(records(0, 20, 100).tobytes())


def _nothing(root: Path) -> None:
    for path in root.iterdir():
        path.unlink()


def _pickled(root: Path) -> None:
    _nothing(root)
    (root / "data_batch_1").write_bytes(b"pickled")


def _names(root: Path) -> None:
    (root / "batches.meta.txt").write_text("cat\ndog\n")


BAD = [
    pytest.param(_short, r"data_batch_3\.bin has 18338 bytes, expected a multiple of 3073", id="s"),
    pytest.param(_empty_file, r"data_batch_3\.bin has 0 bytes", id="empty"),
    pytest.param(_missing, r"has no data_batch_4\.bin, which CIFAR-10 needs", id="missing"),
    pytest.param(_label, r"data_batch_2\.bin has the label 11 at image 2, expected 0 to 9", id="l"),
    pytest.param(_both, r"files of CIFAR-10 and of CIFAR-100", id="both"),
    pytest.param(_nothing, r"holds no CIFAR files; expected data_batch_1\.bin", id="nothing"),
    pytest.param(_pickled, r"(?s)pickled objects and not read.*-binary\.tar\.gz", id="pickled"),
    pytest.param(_names, r"names 2 classes, expected 10", id="names"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_bad_files_are_named(ten: Path, spoil: Callable[[Path], None], message: str):
    spoil(ten)
    with pytest.raises(DataError, match=message):
        open_data(config(ten), seed=0)


def test_fewer_images_than_published_are_refused_unless_asked_for(ten: Path):
    message = r"data_batch_1\.bin has 18438 bytes, expected 30730000: 10000 records of 3073 bytes"
    with pytest.raises(DataError, match=message):
        open_data(CifarData(path=str(ten)), seed=0)


def test_cifar_10_has_no_coarse_labels(ten: Path):
    with pytest.raises(DataError, match="CIFAR-10, which has no coarse labels"):
        open_data(config(ten, labels="coarse"), seed=0)
    with pytest.raises(ValidationError, match="no resized crop"):
        CifarData(path="x", augment=Augment(resized_crop=True))


def test_bad_archives_are_named(ten: Path, monkeypatch: pytest.MonkeyPatch):
    archive = pack(ten, ten / "c.tar.gz")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"c\.tar\.gz cannot be read as a \.tar\.gz"):
        open_data(config(archive), seed=0)
    archive.write_bytes(b"<html>404</html>")
    with pytest.raises(DataError, match=r"c\.tar\.gz cannot be read as a \.tar\.gz"):
        open_data(config(archive), seed=0)
    archive.write_bytes(whole)
    monkeypatch.setattr(cifar, "_MOST", 1000)
    with pytest.raises(DataError, match="too many for CIFAR"):
        open_data(config(archive), seed=0)
    with pytest.raises(DataError, match=r"nowhere\.tar\.gz' does not exist"):
        open_data(config(ten / "nowhere.tar.gz"), seed=0)


def test_a_pickle_in_an_archive_is_not_loaded(tmp_path: Path):
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (pytest.fail, ("the pickle was loaded",))

    content = pickle.dumps(Trap())
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        member = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match="pickled objects and not read"):
        open_data(config(archive), seed=0)
