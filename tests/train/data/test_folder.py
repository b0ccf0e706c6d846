"""Folders of image files as training data."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from surgery.errors import DataError
from surgery.train.data import open_data, training_loader
from surgery.train.data.base import Place, Samples
from surgery.train.data.configs import Augment, FolderData
from surgery.train.data.images import decode
from surgery.train.data.transforms import adm_crop


def noise(height: int, width: int, seed: int) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(drawn)


def fill(root: Path, classes: dict[str, int], size: tuple[int, int] = (12, 10)) -> Path:
    for number, (name, count) in enumerate(classes.items()):
        (root / name).mkdir(parents=True)
        for index in range(count):
            noise(*size, seed=100 * number + index).save(root / name / f"{index:02}.png")
    return root


def stored(samples: Samples) -> list[tuple[bytes, int]]:
    found = [samples[index] for index in range(len(samples))]
    return [(each["images"].numpy().tobytes(), int(each["labels"])) for each in found]


def test_every_image_is_in_one_part_with_the_class_of_its_folder(tmp_path: Path):
    fill(tmp_path, {"b": 5, "a": 10})
    (tmp_path / "a" / "deeper").mkdir()
    noise(12, 10, seed=999).save(tmp_path / "a" / "deeper" / "x.BMP")
    data = open_data(FolderData(path=str(tmp_path), held_out=0.2), seed=0)
    assert data.facts.names == ("a", "b")
    assert (data.facts.classes, data.facts.channels, data.facts.size) == (2, 3, (12, 10))
    expected = {
        (torch.tensor(np.asarray(Image.open(path))).permute(2, 0, 1) / 127.5 - 1)
        .numpy()
        .tobytes(): ("a", "b").index(path.relative_to(tmp_path).parts[0])
        for path in tmp_path.rglob("*.*")
    }
    assert isinstance(data.train, Samples)
    found = stored(data.train) + stored(data.held_out)
    assert len(found) == len(expected) == 16
    assert dict(found) == expected
    assert sorted(label for _, label in stored(data.held_out)) == [0, 0, 1]


def test_without_labels_every_image_below_is_taken(tmp_path: Path):
    fill(tmp_path, {"one": 2, "two/deep": 2})
    noise(12, 10, seed=5).save(tmp_path / "top.png")
    data = open_data(FolderData(path=str(tmp_path), labels="none", held_out=0.2), seed=0)
    assert (data.facts.classes, data.facts.names) == (None, None)
    assert isinstance(data.train, Samples)
    assert (len(data.train), len(data.held_out)) == (4, 1)
    assert {label for _, label in stored(data.train)} == {0}


def test_mixed_shapes_name_two_files_and_their_shapes(tmp_path: Path):
    fill(tmp_path, {"a": 3})
    noise(7, 9, seed=1).save(tmp_path / "a" / "odd.png")
    expected = (
        r"different shapes: \S+a/00\.png is 12 high and 10 wide and \S+a/odd\.png is 7 high and 9 "
    )
    with pytest.raises(DataError, match=expected):
        open_data(FolderData(path=str(tmp_path)), seed=0)
    data = open_data(FolderData(path=str(tmp_path), size=8), seed=0)
    assert {data.train[index]["images"].shape for index in range(3)} == {(3, 8, 8)}


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:150])


def _garble(path: Path) -> None:
    path.write_bytes(b"no image at all")


def test_corrupt_files_are_all_named(tmp_path: Path):
    fill(tmp_path, {"a": 5})
    _garble(tmp_path / "a" / "01.png")
    _garble(tmp_path / "a" / "03.png")
    with pytest.raises(DataError, match=r"(?s)2 images.*a/01\.png.*no known format.*a/03\.png"):
        open_data(FolderData(path=str(tmp_path)), seed=0)


def test_damaged_pixels_are_found_before_training_if_asked_for_and_named_in_any_case(
    tmp_path: Path,
):
    fill(tmp_path, {"a": 3})
    _truncate(tmp_path / "a" / "01.png")
    with pytest.raises(DataError, match=r"a/01\.png cannot be decoded"):
        open_data(FolderData(path=str(tmp_path), check="pixels"), seed=0)
    data = open_data(FolderData(path=str(tmp_path), size=8), seed=0)
    with pytest.raises(DataError, match=r"a/01\.png cannot be decoded.*\n.*hint: replace"):
        [samples[index] for samples in (data.train, data.held_out) for index in range(len(samples))]


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fill(tmp_path, {"a": 3})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match=r"a/00\.png.*decompression bomb"):
        open_data(FolderData(path=str(tmp_path)), seed=0)


def _empty(root: Path) -> None:
    del root


def _empty_class(root: Path) -> None:
    fill(root, {"a": 2})
    (root / "b").mkdir()
    (root / "b" / "notes.txt").write_text("nothing to see")


def _loose(root: Path) -> None:
    fill(root, {"a": 2})
    noise(4, 4, seed=0).save(root / "stray.png")


def _flat(root: Path) -> None:
    noise(4, 4, seed=0).save(root / "stray.png")


def _single(root: Path) -> None:
    fill(root, {"a": 1, "b": 1})


BAD_FOLDERS = [
    pytest.param(_empty, r"is empty: expected a folder for each class", id="empty"),
    pytest.param(_empty_class, r"1 class folders hold no images: b/", id="empty class"),
    pytest.param(_loose, r"stray\.png lies beside the folders of classes", id="loose"),
    pytest.param(_flat, r"(?s)no folder per class.*labels: none", id="flat"),
    pytest.param(_single, r"one image per class", id="nothing to hold out"),
]


@pytest.mark.parametrize(("make", "message"), BAD_FOLDERS)
def test_bad_folders_are_refused(tmp_path: Path, make, message: str):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        open_data(FolderData(path=str(tmp_path)), seed=0)


def test_a_missing_folder_and_one_without_images(tmp_path: Path):
    with pytest.raises(DataError, match="nowhere' does not exist"):
        open_data(FolderData(path=str(tmp_path / "nowhere")), seed=0)
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(DataError, match=r"is a file"):
        open_data(FolderData(path=str(tmp_path / "readme.txt")), seed=0)
    with pytest.raises(DataError, match=r"no images, only 1 other files such as readme\.txt"):
        open_data(FolderData(path=str(tmp_path), labels="none"), seed=0)


def test_links_are_followed_once(tmp_path: Path):
    fill(tmp_path / "real", {"x": 4})
    root = tmp_path / "data"
    (root / "a").mkdir(parents=True)
    (root / "a" / "linked").symlink_to(tmp_path / "real" / "x")
    data = open_data(FolderData(path=str(root)), seed=0)
    assert len(data.train) + len(data.held_out) == 4
    (root / "a" / "round").symlink_to(root / "a")
    with pytest.raises(DataError, match=r"a/round is \S+/a once more, by a link"):
        open_data(FolderData(path=str(root)), seed=0)


def test_a_worker_names_the_file_it_cannot_decode(tmp_path: Path):
    fill(tmp_path, {"a": 3})
    data = open_data(FolderData(path=str(tmp_path), size=8), seed=0)
    for path in (tmp_path / "a").iterdir():
        _garble(path)
    loader = training_loader(data.train, batch=2, seed=0, workers=1)
    with pytest.raises(DataError, match=r"a/0\d\.png cannot be decoded"):
        next(iter(loader))


def test_files_left_out_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    fill(tmp_path, {"a": 4})
    (tmp_path / "a" / "Thumbs.db").write_bytes(b"")
    (tmp_path / "a" / "._00.png").write_bytes(b"resource fork")
    with caplog.at_level(logging.WARNING):
        data = open_data(FolderData(path=str(tmp_path)), seed=0)
    assert len(data.train) + len(data.held_out) == 4
    assert "2 files are no images by their names" in caplog.text


def test_contradictions_are_refused():
    with pytest.raises(ValidationError, match="resized crop needs"):
        FolderData(path="x", augment=Augment(resized_crop=True))
    with pytest.raises(ValidationError, match="shapes are not looked at"):
        FolderData(path="x", check="none")


# --- what a decoded image looks like ----------------------------------------------------------


def pixels(path: Path, channels: int = 3) -> np.ndarray:
    return np.asarray(decode(path, str(path), channels))


def test_orientation_is_applied_to_pixels_and_to_the_shape(tmp_path: Path):
    upright = noise(6, 9, seed=3)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees to view
    (tmp_path / "a").mkdir()
    upright.save(tmp_path / "a" / "0.png", exif=exif)
    upright.save(tmp_path / "a" / "1.png", exif=exif)
    turned = np.asarray(upright.transpose(Image.Transpose.ROTATE_270))
    assert np.array_equal(pixels(tmp_path / "a" / "0.png"), turned)
    data = open_data(FolderData(path=str(tmp_path)), seed=0)
    assert data.facts.size == (9, 6)
    assert data.train[0]["images"].shape == (3, 9, 6)


def test_transparency_is_composited_over_white(tmp_path: Path):
    path = tmp_path / "x.png"
    half = np.zeros((2, 2, 4), dtype=np.uint8)
    half[..., 3] = [[0, 255], [128, 0]]  # black at four opacities
    Image.fromarray(half, "RGBA").save(path)
    assert pixels(path)[..., 0].tolist() == [[255, 0], [127, 255]]
    assert pixels(path, channels=1).tolist() == [[255, 0], [127, 255]]
    palette = Image.new("P", (2, 1), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(path, transparency=0)
    assert pixels(path).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_grey_is_repeated_and_colour_becomes_luma(tmp_path: Path):
    path = tmp_path / "x.png"
    Image.fromarray(np.array([[0, 100, 255]], dtype=np.uint8)).save(path)
    assert pixels(path).tolist() == [[[0] * 3, [100] * 3, [255] * 3]]
    Image.fromarray(np.array([[[255, 0, 0]]], dtype=np.uint8)).save(path)
    assert pixels(path, channels=1).tolist() == [[76]]  # 0.299 × 255


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, ending: str):
    path = tmp_path / f"x.{ending}"
    Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=np.uint16)).save(path)
    assert pixels(path, channels=1).tolist() == [[0, 1, 128, 255]]


def test_values_without_a_range_are_refused(tmp_path: Path):
    path = tmp_path / "x.tif"
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(path)
    with pytest.raises(DataError, match=r"x\.tif holds 32-bit floats"):
        pixels(path)
    Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)).save(path)
    with pytest.raises(DataError, match=r"x\.tif holds integers from 70000 to 70000"):
        pixels(path)


def test_eps_is_never_handed_to_ghostscript(tmp_path: Path):
    path = tmp_path / "x.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match="no known format"):
        pixels(path)


# --- shapes and randomness --------------------------------------------------------------------


def reference_adm_crop(pil_image: Image.Image, image_size: int) -> np.ndarray:
    """As published: guided-diffusion/image_datasets.py, center_crop_arr; DiT/train.py."""
    while min(*pil_image.size) >= 2 * image_size:
        pil_image = pil_image.resize(
            tuple(x // 2 for x in pil_image.size), resample=Image.Resampling.BOX
        )
    scale = image_size / min(*pil_image.size)
    pil_image = pil_image.resize(
        tuple(round(x * scale) for x in pil_image.size), resample=Image.Resampling.BICUBIC
    )
    arr = np.array(pil_image)
    crop_y = (arr.shape[0] - image_size) // 2
    crop_x = (arr.shape[1] - image_size) // 2
    return arr[crop_y : crop_y + image_size, crop_x : crop_x + image_size]


@pytest.mark.parametrize("shape", [(64, 64), (65, 130), (301, 47), (9, 20), (16, 16)])
def test_the_adm_crop_is_the_published_one(shape: tuple[int, int]):
    image = noise(*shape, seed=1)
    assert np.array_equal(np.asarray(adm_crop(image, 16)), reference_adm_crop(image, 16))


@pytest.mark.parametrize("fit", ["center", "imagenet", "adm"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_fit_gives_the_size_and_augments_training_only(tmp_path: Path, fit, channels):
    fill(tmp_path, {"a": 6}, size=(40, 23))
    augment = Augment(pad=2, flip=True)
    config = FolderData(path=str(tmp_path), size=16, fit=fit, channels=channels, augment=augment)
    data = open_data(config, seed=0)
    plain = open_data(config.model_copy(update={"augment": Augment()}), seed=0)
    for samples in (data.train, data.held_out, plain.train):
        assert samples[0]["images"].shape == (channels, 16, 16)
        assert samples[0]["images"].abs().max() <= 1
    assert torch.equal(data.held_out[0]["images"], plain.held_out[0]["images"])
    assert isinstance(data.train, Samples)
    drawn = {data.train.sample(0, position)["images"].numpy().tobytes() for position in range(9)}
    assert len(drawn) > 3


@pytest.fixture(scope="module")
def augmented(tmp_path_factory: pytest.TempPathFactory) -> FolderData:
    root = fill(tmp_path_factory.mktemp("images"), {"a": 9, "b": 4}, size=(20, 17))
    augment = Augment(resized_crop=True, pad=1, flip=True)
    return FolderData(path=str(root), size=8, augment=augment)


def seen(config: FolderData, *, batch: int, start: int, steps: int, workers: int = 0):
    samples = open_data(config, seed=5).train
    loader = iter(training_loader(samples, batch=batch, seed=5, start=start, workers=workers))
    return [next(loader) for _ in range(steps)]


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(start=st.integers(0, 12), batch=st.sampled_from([2, 4, 6]), noise_seed=st.integers(0, 99))
def test_resume_gives_the_same_pixels(augmented: FolderData, start, batch, noise_seed):
    whole = seen(augmented, batch=batch, start=0, steps=start + 2)
    torch.manual_seed(noise_seed)
    rest = seen(augmented, batch=batch, start=start, steps=2)
    for one, other in zip(whole[start:], rest, strict=True):
        assert one.keys() == other.keys() == {"images", "labels", "position"}
        assert all(torch.equal(one[key], other[key]) for key in one)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(step=st.integers(0, 12), ranks=st.sampled_from([1, 2, 3, 6]))
def test_ranks_together_see_the_batch_of_one(augmented: FolderData, step, ranks):
    """Accelerate hands each rank a slice of what the batch sampler yields."""
    (whole,) = seen(augmented, batch=6, start=step, steps=1)
    samples = open_data(augmented, seed=5).train
    places = next(iter(training_loader(samples, batch=6, seed=5, start=step).batch_sampler))
    share = 6 // ranks
    parts = [samples.batch(places[rank * share :][:share]) for rank in reversed(range(ranks))]
    together = torch.cat([part["images"] for part in reversed(parts)])
    assert torch.equal(together, whole["images"])


def test_workers_give_the_same_pixels(augmented: FolderData):
    alone = seen(augmented, batch=4, start=1, steps=6)
    helped = seen(augmented, batch=4, start=1, steps=6, workers=2)
    assert all(
        torch.equal(one[key], other[key])
        for one, other in zip(alone, helped, strict=True)
        for key in one
    )


def test_samples_can_be_sent_to_a_worker_that_is_spawned(augmented: FolderData):
    samples = open_data(augmented, seed=5).train
    copy = pickle.loads(pickle.dumps(samples))  # noqa: S301
    places = [Place(3, 30), Place(0, 31)]
    assert torch.equal(samples.batch(places)["images"], copy.batch(places)["images"])
