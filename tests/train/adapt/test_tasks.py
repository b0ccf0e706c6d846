"""Episodes: their sizes, their classes, and that they are functions of seed and number."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from surgery.errors import ConfigError, DataError
from surgery.train.adapt.tasks import open_tasks
from surgery.train.adapt.tasks.episodes import Episodes
from surgery.train.data import training_loader
from surgery.train.data.base import Data, Place
from tests.train.adapt import tiny


def opened(*overrides: str, seed: int = 0) -> Data:
    return open_tasks(tiny.digits(*overrides).data, seed=seed)


def section(**values: Any) -> str:
    return f"data={json.dumps(values)}"


def arrays(folder: Path, classes: int = 6, each: int = 5, **changed: Any) -> str:
    """Images whose pixels say their class and number."""
    labels = np.repeat(np.arange(classes), each)
    images = np.arange(classes * each, dtype=np.uint8)[:, None, None].repeat(16, 1).repeat(16, 2)
    path = folder / "arrays.npz"
    np.savez(path, **{"images": images, "labels": labels, **changed})
    return str(path)


def numbers(images: torch.Tensor) -> list[int]:
    """Which samples of ``arrays`` these are."""
    return ((images[..., 0, 0, 0] + 1) * 127.5).round().int().flatten().tolist()


def test_an_episode_has_ways_shots_and_queries(tmp_path: Path):
    config = tiny.digits(
        section(kind="arrays", path=arrays(tmp_path), ways=3, shots=2, queries=3)
    ).data
    data = open_tasks(config, seed=0)
    batch = data.train.batch([Place(0, 0), Place(1, 1)])
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "position": (2,),
        "support.images": (2, 6, 1, 16, 16),
        "query.images": (2, 9, 1, 16, 16),
        "support.labels": (2, 6),
        "query.labels": (2, 9),
    }
    for task in range(2):
        support, query = (numbers(batch[f"{part}.images"][task]) for part in ("support", "query"))
        assert len({*support, *query}) == 15, "no sample is in a task twice"
        for found, count in ((support, 2), (query, 3)):
            classes = [number // 5 for number in found]
            grouped = [classes[i : i + count] for i in range(0, len(classes), count)]
            assert all(len(set(group)) == 1 for group in grouped)
        assert {n // 5 for n in support} == {n // 5 for n in query}
        assert batch["support.labels"][task].tolist() == [0, 0, 1, 1, 2, 2]
        assert batch["query.labels"][task].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("held_out", [0.5, [4, 1, 5]])
def test_no_class_is_trained_on_and_held_out(held_out: Any, tmp_path: Path):
    path = arrays(tmp_path)
    config = tiny.digits(
        section(kind="arrays", path=path, ways=3, shots=1, queries=1, held_out=held_out)
    ).data
    data = open_tasks(config, seed=0)
    seen = []
    for part in (data.train, data.held_out):
        batch = part.batch([Place(i, i) for i in range(20)])
        seen.append({n // 5 for n in numbers(batch["support.images"])})
    assert seen[1] == ({3, 4, 5} if held_out == 0.5 else {4, 1, 5})
    assert seen[0] == {0, 1, 2, 3, 4, 5} - seen[1]


def test_a_task_is_a_function_of_seed_and_number():
    data, again, other = opened(), opened(), opened(seed=1)
    whole = data.train.batch([Place(0, n) for n in range(6)])
    alone = again.train.batch([Place(9, 4)])
    for name, tensor in alone.items():
        assert torch.equal(whole[name][4:5], tensor)
    assert not torch.equal(
        whole["support.images"][4:5], other.train.batch([Place(0, 4)])["support.images"]
    )
    first, second = (each.held_out.batch([Place(0, 0)]) for each in (data, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_resumed_loader_goes_on_with_the_same_tasks():
    samples = opened().train
    whole = training_loader(samples, batch=2, seed=0)
    rest = training_loader(samples, batch=2, seed=0, start=2)
    batches = [batch for _, batch in zip(range(4), whole, strict=False)]
    for ours, theirs in zip(batches[2:], rest, strict=False):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sine_waves_are_sine_waves():
    config = tiny.sinusoid('data={"kind": "sinusoid", "shots": 20, "queries": 30}').data
    data = open_tasks(config, seed=3)
    batch = data.train.batch([Place(i, i) for i in range(200)])
    x, y = (
        torch.cat([batch[f"{p}.{n}"] for p in ("support", "query")], 1)
        for n in ("inputs", "targets")
    )
    assert x.shape == (200, 50, 1)
    # a sin(x - p) = a cos p sin x - a sin p cos x: exact in two unknowns.
    basis = torch.cat([torch.sin(x), torch.cos(x)], dim=2).double()
    solved = torch.linalg.lstsq(basis, y.double()).solution
    assert float((basis @ solved - y).abs().max()) < 1e-5  # float32 samples up to 5
    amplitude = solved.squeeze(2).norm(dim=1)
    phase = torch.atan2(-solved[:, 1, 0], solved[:, 0, 0])
    assert 0.1 <= float(amplitude.min()) < 0.5
    assert 4.5 < float(amplitude.max()) <= 5.0
    assert -1e-4 <= float(phase.min()) < 0.3
    assert 2.8 < float(phase.max()) <= torch.pi + 1e-4
    held_out = data.held_out.batch([Place(0, 0)])
    assert not torch.equal(held_out["support.inputs"][0], batch["support.inputs"][0])


def test_texts_of_a_batch_are_padded_alike():
    overrides = section(
        kind="episodes",
        ways=2,
        shots=2,
        queries=1,
        source={"kind": "docstrings", "tokenizer": "bytes", "length": 24, "most": 10},
    )
    config = tiny.digits(overrides, 'objective={"kind": "sequence-classification"}').data
    data = open_tasks(config, seed=0)
    batch = data.train.batch([Place(0, 0), Place(1, 1)])
    assert batch["support.input_ids"].shape == (2, 4, 24)
    assert batch["query.attention_mask"].shape == (2, 2, 24)
    assert batch["query.labels"].tolist() == [[0, 1], [0, 1]]
    assert isinstance(data.train, Episodes)
    assert isinstance(data.held_out, Episodes)
    assert not {*data.train.names} & {*data.held_out.names}


def drawn(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("L", (12, 12), shade)
    image.putpixel((0, 0), 255)  # an orientation
    image.save(path)


def omniglot(folder: Path) -> str:
    for part, alphabets in (("background", ("Greek", "Latin")), ("evaluation", ("Tengwar",))):
        for alphabet in alphabets:
            for character in (1, 2):
                for number in range(1, 5):
                    place = folder / f"images_{part}" / alphabet / f"character0{character}"
                    drawn(place / f"0{character}0{number}_0{number}.png", 10 * number)
    return str(folder)


@pytest.mark.parametrize("rotations", [True, False])
def test_omniglot_in_its_layout(rotations: bool, tmp_path: Path):
    config = tiny.digits(
        section(
            kind="omniglot",
            path=omniglot(tmp_path),
            size=16,
            ways=2,
            shots=1,
            queries=2,
            rotations=rotations,
        )
    ).data
    data = open_tasks(config, seed=0)
    assert isinstance(data.train, Episodes)
    assert isinstance(data.held_out, Episodes)
    assert len(data.train.names) == (16 if rotations else 4)
    assert len(data.held_out.names) == (8 if rotations else 2)
    assert data.train.names[0] == "Greek/character01" + (", 0°" if rotations else "")
    batch = data.train.batch([Place(i, i) for i in range(30)])
    assert batch["query.images"].shape == (30, 4, 1, 16, 16)
    corners = batch["query.images"].flatten(0, 1)[:, 0, [0, 0, -1, -1], [0, -1, 0, -1]]
    bright = corners.argmax(1).unique().tolist()
    assert bright == ([0, 1, 2, 3] if rotations else [0])


def test_mini_imagenet_in_both_layouts(tmp_path: Path):
    listed, folders = tmp_path / "listed", tmp_path / "folders"
    rows: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for index, (part, classes) in enumerate({"train": "abc", "val": "de", "test": "fg"}.items()):
        for label in classes:
            for number in range(3):
                name = f"n{label}{number}.png"
                drawn(listed / "images" / name, 20 * index)
                drawn(folders / part / f"n{label}" / name, 20 * index)
                rows[part].append(f"{name},n{label}")
    for part, lines in rows.items():
        (listed / f"{part}.csv").write_text("filename,label\n" + "\n".join(lines) + "\n")
    found = []
    for folder in (listed, folders):
        config = tiny.digits(
            section(
                kind="mini-imagenet",
                path=str(folder),
                size=16,
                channels=1,
                ways=2,
                shots=1,
                queries=2,
                part="test",
            )
        ).data
        data = open_tasks(config, seed=0)
        assert data.train.names == ("na", "nb", "nc")
        assert data.held_out.names == ("nf", "ng")
        found.append(data.train.batch([Place(0, 0)]))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_folder_of_images(tmp_path: Path):
    for label in "abcd":
        for number in range(4):
            drawn(tmp_path / label / f"{number}.png", 50 * number)
    source = {"kind": "folder", "path": str(tmp_path), "size": 16, "channels": 1}
    config = tiny.digits(
        section(kind="episodes", ways=2, shots=1, queries=3, source=source, held_out=["a", "b"])
    ).data
    data = open_tasks(config, seed=0)
    assert data.train.names == ("c", "d")
    assert data.held_out.batch([Place(0, 0)])["query.images"].shape == (1, 6, 1, 16, 16)


REFUSED = {
    "fewer classes than ways": (
        {"ways": 4, "shots": 1, "queries": 1},
        r"a task has 4 ways, and there are 3 training classes",
    ),
    "fewer samples than shots and queries": (
        {"ways": 2, "shots": 3, "queries": 3},
        r"3 shots and 3 queries of each class, and training class 0 has 5 samples",
    ),
    "a class that does not exist": (
        {"ways": 2, "held_out": [4, 9], "queries": 1},
        r"data.held_out names classes that do not exist: 9",
    ),
    "a class twice": (
        {"ways": 2, "held_out": [4, 4], "queries": 1},
        r"data.held_out names a class twice",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tasks_that_cannot_be_filled_are_refused(case: str, tmp_path: Path):
    values, message = REFUSED[case]
    config = tiny.digits(section(kind="arrays", path=arrays(tmp_path), **values)).data
    with pytest.raises(DataError, match=message):
        open_tasks(config, seed=0)


BROKEN_ARRAYS = {
    "images of two axes": ({"images": np.zeros((30, 4), np.uint8)}, r"the shape \(30, 4\)"),
    "labels of another length": ({"labels": np.zeros(3, int)}, r"labels are int64 \(3,\)"),
    "labels that are no integers": ({"labels": np.zeros(30)}, r"labels are float64"),
    "values out of range": ({"images": np.full((30, 4, 4), 9.0)}, r"floating point in \[-1, 1\]"),
}


@pytest.mark.parametrize("case", BROKEN_ARRAYS)
def test_broken_arrays_are_refused(case: str, tmp_path: Path):
    changed, message = BROKEN_ARRAYS[case]
    config = tiny.digits(section(kind="arrays", path=arrays(tmp_path, **changed))).data
    with pytest.raises(DataError, match=message):
        open_tasks(config, seed=0)


def test_files_that_are_no_arrays_are_refused(tmp_path: Path):
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "empty.npz", other=np.zeros(3))
    whole = bytearray(Path(arrays(tmp_path)).read_bytes())
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "nothing.npz").write_bytes(b"")
    whole[whole.find(b"NUMPY") + 200] ^= 0xFF
    (tmp_path / "changed.npz").write_bytes(whole)
    with (tmp_path / "one.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    for name, message in {
        "text.npz": "cannot be read as .npz",
        "empty.npz": "has no array images and no array labels",
        "none.npz": "there is no file",
        "short.npz": "cannot be read as .npz: File is not a zip file",
        "nothing.npz": "cannot be read as .npz: No data left",
        "changed.npz": "cannot be read as .npz: Bad CRC-32",
        "one.npz": "holds one array, expected an archive",
    }.items():
        config = tiny.digits(section(kind="arrays", path=str(tmp_path / name))).data
        with pytest.raises(DataError, match=message):
            open_tasks(config, seed=0)


def test_layouts_that_are_not_there_are_refused(tmp_path: Path):
    cases = {
        "omniglot": "has no folder images_background",
        "mini-imagenet": re.escape("has neither train.csv nor a folder train"),
    }
    for kind, message in cases.items():
        config = tiny.digits(section(kind=kind, path=str(tmp_path))).data
        with pytest.raises(DataError, match=message):
            open_tasks(config, seed=0)


def test_a_table_that_leaves_its_folder_is_refused(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "train.csv").write_text("filename,label\n../outside.png,a\n")
    config = tiny.digits(section(kind="mini-imagenet", path=str(tmp_path))).data
    with pytest.raises(DataError, match=r"train\.csv:2: '\.\./outside\.png' is not inside"):
        open_tasks(config, seed=0)


def listed(folder: Path, train: str, val: str) -> str:
    for name in ("a0", "a1", "b0", "b1", "c0", "c1", "d0", "d1"):
        drawn(folder / "images" / f"{name}.png", 9)
    (folder / "train.csv").write_text("filename,label\n" + train)
    (folder / "val.csv").write_text("filename,label\n" + val)
    return str(folder)


GOOD = ("a0.png,a\na1.png,a\nb0.png,b\nb1.png,b\n", "c0.png,c\nc1.png,c\nd0.png,d\nd1.png,d\n")
TABLES = {
    "an image twice": (
        GOOD[0] + "a0.png,b\n",
        GOOD[1],
        r"train\.csv:6: a0\.png is in line 2 already",
    ),
    "an image of both parts": (GOOD[0], GOOD[1] + "a0.png,c\n", r"1 are in both train and val.*a0"),
    "a class of both parts": (
        GOOD[0],
        GOOD[1] + "a0.png,a\n",
        r"1 are in both train and val.*as a",
    ),
    "no label": (GOOD[0] + "c0.png\n", GOOD[1], r"train\.csv:6: expected a filename and a label"),
    "no name": (GOOD[0] + ",a\n", GOOD[1], r"train\.csv:6: expected a filename and a label"),
    "a null byte": (GOOD[0] + "a\0b,a\n", GOOD[1], r"train\.csv holds a null byte"),
    "no rows": ("", GOOD[1], r"train\.csv holds no rows"),
}


@pytest.mark.parametrize("case", TABLES)
def test_tables_that_are_wrong_are_refused(case: str, tmp_path: Path):
    train, val, message = TABLES[case]
    path = listed(tmp_path, train, val)
    options = {"path": path, "size": 16, "ways": 2, "shots": 1, "queries": 1}
    config = tiny.digits(section(kind="mini-imagenet", **options)).data
    with pytest.raises(DataError, match=message):
        open_tasks(config, seed=0)


def test_a_table_in_another_encoding_is_refused(tmp_path: Path):
    path = listed(tmp_path, *GOOD)
    (tmp_path / "train.csv").write_bytes(b"filename,label\n\xff,a\n")
    config = tiny.digits(section(kind="mini-imagenet", path=path)).data
    with pytest.raises(DataError, match=r"train\.csv is no text in UTF-8"):
        open_tasks(config, seed=0)


@pytest.mark.parametrize("kind", ["omniglot", "mini-imagenet"])
def test_a_file_that_is_no_image_is_refused_when_the_data_is_opened(kind: str, tmp_path: Path):
    if kind == "omniglot":
        path, file = omniglot(tmp_path), "images_background/Greek/character01/0101_01.png"
    else:
        path, file = listed(tmp_path, *GOOD), "images/a0.png"
    (tmp_path / file).write_bytes(b"no image")
    options = {"path": path, "size": 16, "ways": 2, "shots": 1, "queries": 1}
    config = tiny.digits(section(kind=kind, **options)).data
    with pytest.raises(DataError, match=r"\.png cannot be decoded as an image"):
        open_tasks(config, seed=0)


def test_a_character_in_both_folders_is_refused(tmp_path: Path):
    path = omniglot(tmp_path)
    drawn(tmp_path / "images_evaluation" / "Greek" / "character01" / "0101_01.png", 9)
    config = tiny.digits(section(kind="omniglot", path=path, size=16, ways=2)).data
    with pytest.raises(DataError, match=r"4 are in both .*, such as Greek/character01, 0°"):
        open_tasks(config, seed=0)


def test_an_objective_that_does_not_go_with_the_tasks_is_refused():
    with pytest.raises(ConfigError, match="objective regression does not go with tasks of"):
        tiny.digits('objective={"kind": "regression"}')
