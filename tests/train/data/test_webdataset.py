"""Tar shards in the WebDataset layout."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from surgery.errors import DataError
from surgery.train.data import open_data, training_loader, webdataset
from surgery.train.data.base import Samples
from surgery.train.data.configs import Augment, WebDatasetData
from surgery.train.data.order import Order

Members = Sequence[tuple[str, bytes]]


def pixels(seed: int, height: int = 10, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(seed: int, height: int = 10, width: int = 8) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels(seed, height, width)).save(file, format="PNG")
    return file.getvalue()


def write(path: Path, members: Members) -> None:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def sample(seed: int, label: int, key: str | None = None) -> Members:
    key = key or f"images/{seed:06d}"
    return [(f"{key}.cls", str(label).encode()), (f"{key}.png", png(seed)), (f"{key}.txt", b"x")]


def fill(root: Path, shards: int = 3, each: int = 6) -> Path:
    for shard in range(shards):
        members = [
            member
            for number in range(each)
            for member in sample(shard * each + number, label=number % 3)
        ]
        write(root / f"shard-{shard:03d}.tar", members)
    return root


def config(root: Path, **options: object) -> WebDatasetData:
    return WebDatasetData(**{"path": str(root / "shard-{000..002}.tar"), "held_out": 0.2} | options)


def stored(samples: Samples) -> list[tuple[bytes, int]]:
    found = [samples[index] for index in range(len(samples))]
    return [(each["images"].numpy().tobytes(), int(each["labels"])) for each in found]


def expected(seed: int) -> bytes:
    return (pixels(seed).transpose(2, 0, 1).astype(np.float32) / np.float32(127.5) - 1).tobytes()


def test_every_sample_is_in_one_part(tmp_path: Path):
    data = open_data(config(fill(tmp_path)), seed=0)
    assert (data.facts.classes, data.facts.size, data.facts.channels) == (3, (10, 8), 3)
    assert isinstance(data.train, Samples)
    found = stored(data.train) + stored(data.held_out)
    assert len(found) == 18
    assert dict(found) == {expected(seed): seed % 6 % 3 for seed in range(18)}
    assert sorted(label for _, label in stored(data.held_out)) == [0, 1, 2]


def test_shards_of_their_own_may_be_held_out(tmp_path: Path):
    fill(tmp_path)
    parts = {
        "path": str(tmp_path / "shard-{000,002}.tar"),
        "held_out": str(tmp_path / "shard-001.tar"),
    }
    data = open_data(config(tmp_path, **parts), seed=0)
    assert [image for image, _ in stored(data.held_out)] == [
        expected(seed) for seed in range(6, 12)
    ]
    with pytest.raises(DataError, match=r"shard-001\.tar is a shard of data\.path and of"):
        open_data(config(tmp_path, held_out=parts["held_out"]), seed=0)


@pytest.mark.parametrize("label", ["json:class", None])
def test_labels_from_json_or_none(tmp_path: Path, label: str | None):
    members = [
        each
        for seed in range(6)
        for each in (
            (f"{seed}.jpg", png(seed)),
            (f"{seed}.json", json.dumps({"class": seed % 2, "url": "x"}).encode()),
        )
    ]
    write(tmp_path / "shard-000.tar", members)
    data = open_data(config(tmp_path, path=str(tmp_path), label=label), seed=0)
    assert isinstance(data.train, Samples)
    found = dict(stored(data.train) + stored(data.held_out))
    wanted = {expected(seed): seed % 2 if label else 0 for seed in range(6)}
    assert found == wanted
    assert data.facts.classes == (2 if label else None)


PATTERNS = [
    ("a-{000..002}.tar", ["a-000.tar", "a-001.tar", "a-002.tar"]),
    ("{8..11}", ["8", "9", "10", "11"]),
    ("{a,b}/{1..2}.tar", ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"]),
    ("plain.tar", ["plain.tar"]),
    ("x{5..5}", ["x5"]),
]


@pytest.mark.parametrize(("pattern", "paths"), PATTERNS)
def test_brace_patterns(pattern: str, paths: list[str]):
    assert webdataset.expand(pattern) == paths


BAD_PATTERNS = [
    ("a-{3..1}.tar", "counts from 3 to 1"),
    ("a-{x}.tar", "neither a range nor a list"),
    ("a-{0..9.tar", "braces that do not pair"),
    ("a-{b,{c,d}}.tar", "braces that do not pair"),
    ("{0..99999}{0..99999}", "10000000000 shards, too many"),
]


@pytest.mark.parametrize(("pattern", "message"), BAD_PATTERNS)
def test_bad_brace_patterns(pattern: str, message: str):
    with pytest.raises(DataError, match=message):
        webdataset.expand(pattern)


# --- order: resume, ranks, workers ------------------------------------------------------------


@pytest.fixture(scope="module")
def augmented(tmp_path_factory: pytest.TempPathFactory) -> WebDatasetData:
    root = fill(tmp_path_factory.mktemp("shards"))
    return config(root, size=6, augment=Augment(resized_crop=True, flip=True))


def seen(data: WebDatasetData, start: int, steps: int, workers: int = 0):
    samples = open_data(data, seed=3).train
    loader = iter(training_loader(samples, batch=4, seed=3, start=start, workers=workers))
    return [next(loader) for _ in range(steps)]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@settings(max_examples=10, deadline=None)
@given(start=st.integers(0, 12))
def test_resume_gives_the_same_samples(augmented: WebDatasetData, start: int):
    whole = seen(augmented, 0, start + 2)
    assert all(map(same, whole[start:], seen(augmented, start, 2)))


def test_workers_give_the_same_samples(augmented: WebDatasetData):
    assert all(map(same, seen(augmented, 2, 6), seen(augmented, 2, 6, workers=2)))


def test_samples_can_be_sent_to_a_worker_that_is_spawned(augmented: WebDatasetData):
    samples = open_data(augmented, seed=3).train
    assert isinstance(samples, Samples)
    copy = pickle.loads(pickle.dumps(samples))  # noqa: S301
    assert same(samples.sample(7, 9), copy.sample(7, 9))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_an_epoch_without_duplicates(tmp_path: Path, ranks: int):
    data = open_data(config(fill(tmp_path, each=8)), seed=0)
    assert isinstance(data.train, Samples)
    count = len(data.train)
    batches = list(itertools.islice(Order(count, batch=4, seed=1), count // 4))
    share = 4 // ranks
    images = [
        image.numpy().tobytes()
        for rank in range(ranks)
        for places in batches
        for image in data.train.batch(places[rank * share :][:share])["images"]
    ]
    assert count == 19
    assert len(images) == len(set(images)) == 16  # the rest is in the next batch


# --- the table on disk ------------------------------------------------------------------------


def test_the_table_is_kept_and_made_anew_when_a_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    scans: list[str] = []
    scan = webdataset._scan

    def counted(*args):
        scans.append(args[1])
        return scan(*args)

    monkeypatch.setattr(webdataset, "_scan", counted)
    chosen = config(fill(tmp_path), index=str(tmp_path / "tables" / "index.npz"))
    first = open_data(chosen, seed=0)
    again = open_data(chosen, seed=0)
    assert len(scans) == 1
    assert stored(first.held_out) == stored(again.held_out)
    assert [path.name for path in (tmp_path / "tables").iterdir()] == ["index.npz"]
    write(tmp_path / "shard-001.tar", sample(77, label=1))
    assert len(open_data(chosen, seed=0).train) < len(first.train)
    open_data(chosen.model_copy(update={"label": None}), seed=0)
    assert len(scans) == 3
    (tmp_path / "tables" / "index.npz").write_bytes(b"something else")
    with pytest.raises(DataError, match=r"index\.npz is no table of members"):
        open_data(chosen, seed=0)


# --- bad and hostile shards -------------------------------------------------------------------


GOOD = [*sample(1, 0), *sample(2, 1), *sample(3, 0), *sample(4, 1)]
BAD_MEMBERS = [
    pytest.param([*GOOD, ("z.cls", b"1")], r"sample 'z' has no image; it has \.cls", id="image"),
    pytest.param(
        [*GOOD, ("z.png", png(0))], r"sample 'z' has no label \.cls; it has \.p", id="cls"
    ),
    pytest.param(
        [*GOOD, ("z.png", png(0)), ("z.jpg", png(0)), ("z.cls", b"0")],
        r"'z' has several images; it has \.png, \.jpg",
        id="two images",
    ),
    pytest.param(
        [*GOOD, ("z.png", png(0)), ("z.png", png(0))], r"'z' has two members \.png", id="twice"
    ),
    pytest.param(
        [("z.png", png(0)), ("z.cls", b"0"), *GOOD, ("z.txt", b"")],
        r"'z' do not lie together",
        id="apart",
    ),
    pytest.param(
        [*GOOD, ("z.png", png(0)), ("z.cls", b"cat")], r"label of sample 'z' is no", id="l"
    ),
    pytest.param(
        [*GOOD, ("z.png", png(0)), ("z.cls", b"-1")], r"label of sample 'z' is no", id="n"
    ),
    pytest.param(
        [*GOOD, ("z.png", b"broken"), ("z.cls", b"0")],
        r"sample 'z' cannot be decoded as an image: no known format",
        id="corrupt",
    ),
    pytest.param(
        [*GOOD, ("z.png", png(0, 5, 5)), ("z.cls", b"0")],
        r"different shapes: .*is 10 high and 8 wide and .*'z' is 5 high and 5 wide",
        id="shapes",
    ),
    pytest.param([], "hold no samples", id="empty"),
    pytest.param([*sample(1, 0), *sample(2, 1)], "none can be held out", id="few"),
]


@pytest.mark.parametrize(("members", "message"), BAD_MEMBERS)
def test_bad_samples_are_named(tmp_path: Path, members: Members, message: str):
    write(tmp_path / "shard-000.tar", members)
    with pytest.raises(DataError, match=message):
        open_data(config(tmp_path, path=str(tmp_path)), seed=0)


def test_a_label_beyond_the_classes_is_named(tmp_path: Path):
    write(tmp_path / "shard-000.tar", [*GOOD, *sample(9, 7), *sample(10, 7)])
    message = (
        r"sample 'images/0000(09|10)' has the label 7, and data\.classes is 5: expected 0 to 4"
    )
    with pytest.raises(DataError, match=message):
        open_data(config(tmp_path, path=str(tmp_path), classes=5), seed=0)
    assert open_data(config(tmp_path, path=str(tmp_path), classes=9), seed=0).facts.classes == 9


CUTS = [
    pytest.param(lambda data: data[: len(data) // 2], id="in the middle"),
    pytest.param(lambda data: data[: 512 * 3], id="after a header"),
    pytest.param(lambda data: data[:512] + b"", id="one block"),
    pytest.param(lambda data: data[: data.rindex(b"x" + bytes(511)) + 512], id="before the end"),
    pytest.param(lambda data: data[:1024] + b"?" * 512 + data[1536:], id="broken header"),
    pytest.param(lambda _: b"", id="nothing"),
    pytest.param(lambda _: b"<html>not found</html>" * 100, id="a page"),
]


@pytest.mark.parametrize("cut", CUTS)
def test_a_damaged_shard_is_an_error_never_a_shorter_one(tmp_path: Path, cut):
    path = tmp_path / "shard-000.tar"
    write(path, GOOD)
    path.write_bytes(cut(path.read_bytes()))
    with pytest.raises(DataError, match=r"shard-000\.tar (is truncated|cannot be read as a tar)"):
        open_data(config(tmp_path, path=str(path)), seed=0)


def test_a_compressed_shard_says_why_not(tmp_path: Path):
    path = tmp_path / "shard-000.tar"
    with tarfile.open(path, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.cls"))
    with pytest.raises(DataError, match=r"compressed with gzip; samples are read at random"):
        open_data(config(tmp_path, path=str(path)), seed=0)


def test_missing_shards_and_addresses(tmp_path: Path):
    fill(tmp_path, shards=2)
    with pytest.raises(DataError, match=r"1 of 3 shards do not exist, such as .*shard-002\.tar"):
        open_data(config(tmp_path), seed=0)
    for path in ("https://example.com/shard-{000..009}.tar", "pipe:cat x.tar"):
        with pytest.raises(DataError, match="is not local"):
            open_data(config(tmp_path, path=path), seed=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.tar files"):
        open_data(config(tmp_path, path=str(tmp_path / "empty")), seed=0)


def test_names_that_climb_out_of_the_folder_write_nothing(tmp_path: Path):
    root = tmp_path / "data" / "inner"
    root.mkdir(parents=True)
    hostile = [
        each
        for seed, key in enumerate(("../../evil", "/etc/evil", "a/../../../b", "ok"))
        for each in sample(seed, 0, key)
    ]
    write(root / "shard-000.tar", hostile)
    data = open_data(config(root, path=str(root)), seed=0)
    assert isinstance(data.train, Samples)
    assert {image for image, _ in stored(data.train) + stored(data.held_out)} == {
        expected(seed) for seed in range(4)
    }
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "inner", "shard-000.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes):
    path = tmp_path / "shard-000.tar"
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo("a.png")
        member.type = kind
        member.linkname = "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(DataError, match=r"member 'a\.png' is no plain file but a link"):
        open_data(config(tmp_path, path=str(path)), seed=0)


@pytest.mark.parametrize("size", [-512, 1 << 60])
def test_sizes_that_lie_are_refused(tmp_path: Path, size: int):
    path = tmp_path / "shard-000.tar"
    member = tarfile.TarInfo("a.png")
    member.size = size
    path.write_bytes(member.tobuf(format=tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(DataError, match=r"truncated or damaged in member 'a\.png'"):
        open_data(config(tmp_path, path=str(path)), seed=0)


def test_a_shard_that_shrinks_during_training_is_named(tmp_path: Path):
    data = open_data(config(fill(tmp_path)), seed=0)
    (tmp_path / "shard-002.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-002\.tar: sample .* is cut off"):
        [data.train[index] for index in range(len(data.train))]


def test_contradictions_are_refused():
    with pytest.raises(ValidationError, match="shapes are not looked at"):
        WebDatasetData(path="x", check="none")
