"""Latents of images, encoded once with a VAE and cached."""

from __future__ import annotations

import errno
import json
import os
import pickle
import threading
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file

from surgery import files, progress
from surgery.errors import DataError
from surgery.train.data import latent_cache, open_data, training_loader
from surgery.train.data.base import Place, Samples
from surgery.train.data.configs import Augment, DigitsData, FolderData, ImagenetData, LatentData

COUNT = 20  # images of either part
EACH = 8  # of them in a file of the cache, or 4 with room for their mirror images


def make_vae(seed: int = 0, **options: object) -> diffusers.AutoencoderKL:
    torch.manual_seed(seed)
    small = {
        "in_channels": 1,
        "out_channels": 1,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 8),
        "norm_num_groups": 4,
        "latent_channels": 2,
        "scaling_factor": 0.5,
        "shift_factor": 0.25,
    }
    return diffusers.AutoencoderKL(**small | options).eval()


@pytest.fixture(scope="module")
def vae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    make_vae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> FolderData:
    """Two classes of grey images of 8 × 8 pixels, without mirror images."""
    root = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(0)
    for index in range(2 * COUNT):
        path = root / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return FolderData(path=str(root), channels=1, held_out=0.5, size=8)


@pytest.fixture(scope="module")
def mirrored(images: FolderData) -> FolderData:
    return images.model_copy(update={"augment": Augment(flip=True)})


@pytest.fixture(scope="module", autouse=True)
def small_files():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_cache, "_SHARD_BYTES", EACH * 4 * 4 * 4 * 4)
        yield


@pytest.fixture(scope="module")
def cached(vae_folder: Path, mirrored: FolderData, tmp_path_factory, small_files) -> LatentData:
    """A section whose cache is complete, with mirror images."""
    config = section(vae_folder, tmp_path_factory.mktemp("latents") / "cache", mirrored)
    open_data(config, seed=0)
    return config


def section(vae: Path, cache: Path, images: object, **options: object) -> LatentData:
    chosen = {"images": images, "vae": str(vae), "cache": str(cache), "batch": 4} | options
    return LatentData(**chosen)


def train(config: LatentData, seed: int = 0) -> Samples:
    samples = open_data(config, seed=seed).train
    assert isinstance(samples, Samples)
    return samples


@torch.no_grad()
def direct(images: torch.Tensor):
    return make_vae().encode(images).latent_dist


def test_means_are_those_of_the_vae_scaled(vae_folder: Path, images: FolderData, tmp_path: Path):
    data = open_data(section(vae_folder, tmp_path / "cache", images, posterior="mean"), seed=0)
    plain = open_data(images, seed=0)
    facts = data.facts
    assert (facts.kind, facts.channels, facts.size, facts.classes) == ("latents", 2, (4, 4), 2)
    assert facts.names == ("a", "b")
    for latents, pixels in ((data.train, plain.train), (data.held_out, plain.held_out)):
        assert isinstance(latents, Samples)
        assert isinstance(pixels, Samples)
        assert len(latents) == len(pixels) == COUNT
        places = [Place(index, index) for index in range(COUNT)]
        batch, reference = latents.batch(places), pixels.batch(places)
        expected = (direct(reference["images"]).mode() - 0.25) * 0.5
        # The same weights on batches of another size: float32 rounding of a small network.
        torch.testing.assert_close(batch["images"], expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(batch["labels"], reference["labels"])
        assert batch["images"].dtype == torch.float32
        assert batch["labels"].dtype == torch.int64
    names = sorted(path.name for path in (tmp_path / "cache").glob("*.safetensors"))
    assert names == [
        f"{part}-{n:05d}.safetensors" for part in ("held_out", "train") for n in range(3)
    ]


def test_a_latent_is_drawn_from_the_distribution_of_its_image(
    vae_folder: Path, images: FolderData, tmp_path: Path
):
    samples = train(section(vae_folder, tmp_path, images))
    image = open_data(images, seed=0).train[3]["images"]
    expected = direct(image.unsqueeze(0))
    drawn = torch.stack([samples.sample(3, position)["images"] for position in range(1000)])
    back = drawn / 0.5 + 0.25
    error = expected.std[0] / 1000**0.5
    # Six standard errors of 32 means and 32 deviations each.
    assert ((back.mean(0) - expected.mean[0]).abs() < 6 * error).all()
    assert ((back.std(0) - expected.std[0]).abs() < 6 * error).all()


def test_half_of_the_samples_are_mirrored_and_held_out_ones_never(
    cached: LatentData, images: FolderData
):
    means = cached.model_copy(update={"posterior": "mean"})
    samples = train(means)
    image = open_data(images, seed=0).train[3]["images"]
    both = (direct(torch.stack([image, image.flip(-1)])).mode() - 0.25) * 0.5
    found = []
    for position in range(200):
        latent = samples.sample(3, position)["images"]
        gaps = (both - latent).abs().amax((1, 2, 3))
        found.append(int(gaps.argmin()))
        assert gaps.min() < 1e-5 < gaps.max()
    assert 70 < sum(found) < 130  # fair coins fall outside with a probability below 1 in 10 000
    held_out = open_data(means, seed=0).held_out
    assert torch.equal(held_out.sample(3, 1)["images"], held_out.sample(3, 2)["images"])


# --- what a draw depends on -------------------------------------------------------------------


def seen(config: LatentData, start: int, steps: int, workers: int = 0, seed: int = 5):
    samples = train(config, seed)
    loader = iter(training_loader(samples, batch=8, seed=seed, start=start, workers=workers))
    return [next(loader) for _ in range(steps)]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_resume_workers_and_ranks_change_nothing(cached: LatentData):
    whole = seen(cached, 0, 4)
    torch.manual_seed(77)
    assert all(map(same, whole[2:], seen(cached, 2, 2)))
    assert all(map(same, whole, seen(cached, 0, 4, workers=2)))
    samples = train(cached, seed=5)
    places = next(iter(training_loader(samples, batch=8, seed=5, start=3).batch_sampler))
    halves = [samples.batch(places[4:]), samples.batch(places[:4])]
    assert torch.equal(torch.cat([halves[1]["images"], halves[0]["images"]]), whole[3]["images"])


def test_samples_can_be_sent_to_a_worker_that_is_spawned(cached: LatentData):
    samples = train(cached)
    samples.sample(0, 0)  # a file is open
    copy = pickle.loads(pickle.dumps(samples))  # noqa: S301
    assert torch.equal(samples.sample(7, 9)["images"], copy.sample(7, 9)["images"])


def test_another_seed_or_position_draws_another_latent(cached: LatentData):
    one, other = train(cached, seed=1), train(cached, seed=2)
    latents = [one.sample(0, 0), one.sample(0, 1), other.sample(0, 0), one.sample(1, 0)]
    assert len({each["images"].numpy().tobytes() for each in latents}) == 4


# --- the cache --------------------------------------------------------------------------------


class Watch:
    """What was encoded, by title and number of images."""

    def __init__(self) -> None:
        self.done: dict[str, int] = {}

    def started(self, task: progress.Task) -> None:
        self.done[task.title] = 0

    def advanced(self, task: progress.Task) -> None:
        self.done[task.title] = task.done

    def finished(self, task: progress.Task) -> None:
        assert task.done == task.total or task.title != "encoding images"


def encoded(config: LatentData) -> int:
    watch = Watch()
    with progress.listen(watch):
        open_data(config, seed=0)
    return watch.done["encoding images"]


def contents(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.iterdir() if path.name != ".lock"}


def test_a_complete_cache_is_not_encoded_again(cached: LatentData):
    before = contents(Path(cached.cache))
    assert encoded(cached) == 0
    assert contents(Path(cached.cache)) == before


@settings(max_examples=4, deadline=None)
@given(after=st.integers(0, 9))
def test_encoding_goes_on_where_it_was_interrupted(
    vae_folder: Path, cached: LatentData, tmp_path_factory: pytest.TempPathFactory, after: int
):
    cache = tmp_path_factory.mktemp("interrupted")
    config = cached.model_copy(update={"cache": str(cache)})
    calls = 0
    real = latent_cache._encoded

    def interrupted(vae, images):
        nonlocal calls
        calls += 1
        if calls == after + 1:
            raise KeyboardInterrupt
        return real(vae, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_cache, "_encoded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_data(config, seed=0)
        patch.setattr(latent_cache, "_encoded", real)
        (cache / ".train-00003.safetensors.writing").write_bytes(b"half a file")
        there = len(list(cache.glob("*.safetensors")))
        left = encoded(config)
    assert there == after  # files of 4 images, the batch
    assert left == 2 * COUNT - 4 * there
    assert contents(cache) == contents(Path(cached.cache))


def test_two_ranks_at_once_encode_once(cached: LatentData, tmp_path: Path):
    config = cached.model_copy(update={"cache": str(tmp_path / "cache")})
    calls: list[int] = []
    real = latent_cache._moments
    found: list[int] = []

    def counted(vae, images, *rest):
        calls.append(len(images))
        return real(vae, images, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latent_cache, "_moments", counted)
        ranks = [
            threading.Thread(target=lambda: found.append(len(open_data(config, seed=0).train)))
            for _ in range(2)
        ]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    assert found == [COUNT, COUNT]
    assert sum(calls) == 2 * COUNT


def test_a_full_disk_keeps_what_is_complete(cached: LatentData, tmp_path: Path, monkeypatch):
    config = cached.model_copy(update={"cache": str(tmp_path)})
    real, calls = os.fsync, []

    def full(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(DataError, match=r"train-00002.* \(\d+ bytes\): No space left on device"):
        open_data(config, seed=0)
    assert sorted(contents(tmp_path)) == [
        "index.json",
        "train-00000.safetensors",
        "train-00001.safetensors",
    ]
    assert encoded(config) == 2 * COUNT - 2 * 4


def test_another_vae_or_other_images_are_another_cache(
    cached: LatentData, vae_folder: Path, images: FolderData, mirrored: FolderData, tmp_path: Path
):
    make_vae(seed=1).save_pretrained(tmp_path / "vae")
    changes = [
        ({"vae": str(tmp_path / "vae")}, r"something else: the VAE \(\w{12}, now \w{12}\)\n"),
        ({"images": mirrored.model_copy(update={"held_out": 0.3})}, r"images to train on \("),
        ({"images": mirrored.model_copy(update={"size": 16})}, "how images are prepared"),
        ({"images": images}, r"flip \(True, now False\)"),
        ({"dtype": "float16"}, r"dtype \(float32, now float16\)"),
    ]
    before = contents(Path(cached.cache))
    for change, message in changes:
        with pytest.raises(DataError, match=message):
            open_data(cached.model_copy(update=change), seed=0)
    assert contents(Path(cached.cache)) == before
    moved = tmp_path / "moved"
    vae_folder.rename(moved)
    try:
        assert encoded(cached.model_copy(update={"vae": str(moved)})) == 0
    finally:
        moved.rename(vae_folder)


def test_half_precision_is_rounded_once(cached: LatentData, tmp_path: Path):
    change = {"cache": str(tmp_path), "dtype": "bfloat16", "posterior": "mean"}
    config = cached.model_copy(update=change)
    half = train(config)[5]["images"]
    full = train(cached.model_copy(update={"posterior": "mean"}))[5]["images"]
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=2**-8, atol=2**-8)
    assert not torch.equal(half, full)
    tensors = load_file(tmp_path / "train-00000.safetensors")
    assert tensors["moments"].dtype == torch.bfloat16


def test_damaged_and_missing_files_are_named(cached: LatentData, tmp_path: Path):
    config = cached.model_copy(update={"cache": str(tmp_path)})
    open_data(config, seed=0)
    path = tmp_path / "train-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"train-00001\.safetensors cannot be read"):
        open_data(config, seed=0)
    path.write_bytes((tmp_path / "held_out-00002.safetensors").read_bytes())
    with pytest.raises(DataError, match=r"train-00001.* holds moments \(4, 1, .*expected \(4, 2,"):
        open_data(config, seed=0)
    path.unlink()
    assert encoded(config) == 4
    assert path.read_bytes() == whole
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"index\.json: not valid JSON"):
        open_data(config, seed=0)
    (tmp_path / "index.json").write_text(json.dumps([1]))
    with pytest.raises(DataError, match="expected a JSON object, got list"):
        open_data(config, seed=0)


def test_a_folder_of_other_things_is_left_alone(cached: LatentData, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match=r"holds thesis\.txt and no index\.json: it is no cache"):
        open_data(cached.model_copy(update={"cache": str(tmp_path)}), seed=0)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(DataError, match="cannot be made: File exists"):
        open_data(cached.model_copy(update={"cache": str(tmp_path / "thesis.txt")}), seed=0)


# --- what does not fit ------------------------------------------------------------------------


def test_a_vae_must_have_weights_and_be_one(images: FolderData, tmp_path: Path):
    with pytest.raises(DataError, match=r"'diffusers:AutoencoderKL' has random weights"):
        open_data(section(Path("diffusers:AutoencoderKL"), tmp_path / "cache", images), seed=0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(DataError, match=r"is a UNet2DModel, expected diffusers' AutoencoderKL"):
        open_data(section(tmp_path / "unet", tmp_path / "cache", images), seed=0)
    make_vae(latents_mean=(0.0, 0.0), latents_std=(1.0, 1.0)).save_pretrained(tmp_path / "mean")
    with pytest.raises(DataError, match="normalises each channel"):
        open_data(section(tmp_path / "mean", tmp_path / "cache", images), seed=0)


def test_images_must_fit_the_vae(vae_folder: Path, tmp_path: Path):
    colour = section(vae_folder, tmp_path, images=DigitsData(channels=3))
    with pytest.raises(DataError, match=r"(?s)have 3 channels.*takes 1.*images\.channels: 1"):
        open_data(colour, seed=0)
    odd = section(vae_folder, tmp_path, images=DigitsData(size=9))
    with pytest.raises(DataError, match=r"(?s)9 by 9 pixels do not divide by 2.*multiple of 2"):
        open_data(odd, seed=0)
    assert not list(tmp_path.iterdir())


def test_latents_that_are_not_finite_are_refused(images: FolderData, tmp_path: Path):
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias.fill_(1e6)
    vae.save_pretrained(tmp_path / "vae")
    config = section(tmp_path / "vae", tmp_path / "cache", images, dtype="float16")
    with pytest.raises(DataError, match=r"not finite in float16\n.*data\.dtype: float32"):
        open_data(config, seed=0)


def test_what_cannot_be_cached_is_refused(tmp_path: Path):
    for cropped in (
        DigitsData(augment=Augment(pad=1)),
        ImagenetData(path="x"),
        FolderData(path="x", size=8, augment=Augment(resized_crop=True)),
    ):
        with pytest.raises(ValidationError, match="cannot be cropped anew each time"):
            section(tmp_path, tmp_path, images=cropped)
