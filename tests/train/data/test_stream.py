import gzip
import json
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from surgery.errors import DataError
from surgery.train.data import open_data, training_loader
from surgery.train.data import stream as streams
from surgery.train.data.configs import StreamData

README = """\
---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""
DOCUMENTS = 60


def text(split: str, file: int, number: int) -> str:
    return f"<{split}{file}.{number}>" + "abcdefg " * (number * 7 % 11)


@pytest.fixture(scope="module")
def c4(tmp_path_factory):
    """A dataset in the layout of allenai/c4."""
    folder = tmp_path_factory.mktemp("c4")
    (folder / "en").mkdir()
    (folder / "README.md").write_text(README)
    for split, files in (("train", 3), ("validation", 1)):
        for file in range(files):
            name = f"en/c4-{split}.{file:05d}-of-{files:05d}.json.gz"
            with gzip.open(folder / name, "wt", encoding="utf-8") as out:
                for number in range(DOCUMENTS // files):
                    row = {"text": text(split, file, number), "url": "https://example.org"}
                    out.write(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("parquet")
    for split in ("train", "test"):
        rows = arrow.table({"body": [text(split, 0, number) for number in range(30)]})
        writer.write_table(rows, folder / f"{split}.parquet", row_group_size=7)
    return folder


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(streams, "EVERY", 8)


def config(folder, cache, **changes):
    options = {
        "path": str(folder),
        "name": "en",
        "tokenizer": "bytes",
        "length": 32,
        "buffer": 16,
        "held_out_samples": 10,
        "cache": str(cache),
    }
    return StreamData(**(options | changes))


def ids(samples, count):
    return torch.stack([sample["input_ids"] for sample in islice(samples, count)]).tolist()


def row_of(samples):
    """Packed samples put together again."""
    return [samples[0][0], *(token for sample in samples for token in sample[1:])]


def documents_of(samples):
    """Whole documents in a row of byte tokens."""
    whole = row_of(samples)
    cut = [i for i, token in enumerate(whole) if token == 257]
    parts = [whole[a + 1 : b] for a, b in zip([-1, *cut], cut, strict=False)]
    return [bytes(part).decode() for part in parts]


def test_one_epoch_brings_every_document_once(c4, tmp_path):
    data = open_data(config(c4, tmp_path), seed=0)
    total = sum(len(text("train", f, n)) + 1 for f in range(3) for n in range(DOCUMENTS // 3))
    found = documents_of(ids(data.train, total // 31 + 1))
    expected = [text("train", f, n) for f in range(3) for n in range(DOCUMENTS // 3)]
    assert sorted(found[: len(expected)]) == sorted(expected)
    assert found[: len(expected)] != expected


def test_the_first_epoch_is_the_order_of_the_recipes(c4, tmp_path):
    import datasets

    rows = datasets.load_dataset(str(c4), "en", split="train", streaming=True)
    expected = [row["text"] for row in rows.shuffle(seed=42, buffer_size=16)]
    data = open_data(config(c4, tmp_path), seed=0)
    found = documents_of(ids(data.train, 60))
    assert len(found) > 10
    assert found == expected[: len(found)]


def test_epochs_differ_and_positions_count_on(c4, tmp_path):
    data = open_data(config(c4, tmp_path), seed=0)
    samples = list(islice(data.train, 250))
    assert [int(sample["position"]) for sample in samples] == list(range(250))
    found = documents_of([sample["input_ids"].tolist() for sample in samples])
    assert len(found) > 2 * DOCUMENTS
    one, other = found[:DOCUMENTS], found[DOCUMENTS : 2 * DOCUMENTS]
    assert sorted(one) == sorted(other)
    assert one != other


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("start", [1, 8, 23, 130])
def test_a_resumed_stream_is_the_rest_of_the_whole_one(c4, tmp_path, packing, start):
    def opened(cache):
        return open_data(config(c4, tmp_path / cache, packing=packing), seed=0).train

    whole: list[Any] = list(islice(opened("a"), start + 20))[start:]
    # With the bookmarks of the first reading, and without any.
    for cache in ("a", "b"):
        resumed: list[Any] = list(islice(opened(cache).at(start), 20))
        for one, other in zip(whole, resumed, strict=True):
            assert one.keys() == other.keys()
            assert all(torch.equal(one[key], other[key]) for key in one)


def test_bookmarks_spare_the_tokenizer(c4, tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "_AT_ONCE", 2)
    stream = open_data(config(c4, tmp_path), seed=0).train
    expected = ids(stream, 60)[-1:]
    encoded = []
    encode = stream.tokenizer.encode

    def noting(texts):
        encoded.extend(texts)
        return encode(texts)

    monkeypatch.setattr(stream.tokenizer, "encode", noting)
    assert ids(stream.at(59), 1) == expected
    with_bookmarks = len(encoded)
    for file in tmp_path.glob("*.jsonl"):
        file.unlink()
    assert ids(stream.at(59), 1) == expected
    assert 0 < 2 * with_bookmarks < len(encoded) - with_bookmarks


def test_a_broken_bookmark_costs_time_only(c4, tmp_path, caplog):
    stream = open_data(config(c4, tmp_path), seed=0).train
    expected = ids(stream, 45)[40:]
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:-1], lines[-1][:5]]))
    assert ids(stream.at(40), 5) == expected
    assert "broken bookmark" in caplog.text


def test_a_padded_sample_is_one_document(c4, tmp_path):
    data = open_data(config(c4, tmp_path, packing="padded", buffer=1), seed=0)
    batch = next(iter(training_loader(data.train, batch=4, seed=0)))
    assert batch["position"].tolist() == [0, 1, 2, 3]
    for row, number in enumerate(range(4)):
        expected = list(text("train", 0, number).encode())
        expected = [*expected[:31], 257]
        real = len(expected)
        assert batch["input_ids"][row].tolist() == expected + [258] * (32 - real)
        assert batch["labels"][row].tolist() == expected + [-100] * (32 - real)
        assert batch["attention_mask"][row].tolist() == [1] * real + [0] * (32 - real)


def test_the_held_out_part_is_another_split(c4, tmp_path):
    data = open_data(config(c4, tmp_path), seed=0)
    assert len(data.held_out) == 10
    found = documents_of([data.held_out[i]["input_ids"].tolist() for i in range(10)])
    assert found
    assert all(each.startswith("<validation") for each in found)


def test_documents_held_out_of_the_split_are_not_trained_on(parquet, tmp_path):
    changes = {"name": None, "column": "body", "held_out": None, "held_out_samples": 5}
    data = open_data(config(parquet, tmp_path, **changes), seed=0)
    held = row_of([data.held_out[i]["input_ids"].tolist() for i in range(5)])
    names = {f"<train0.{n}>" for n in range(30)}
    seen = {name for name in names if name in bytes(i for i in held if i < 256).decode()}
    trained = documents_of(ids(data.train, 200))
    assert seen
    assert len(trained) > 30
    assert not seen & {each.partition(">")[0] + ">" for each in trained}


def test_a_worker_reads_the_same_stream(c4, tmp_path):
    data = open_data(config(c4, tmp_path), seed=0)
    here, there = (
        islice(training_loader(data.train, batch=4, seed=0, start=2, workers=workers), 2)
        for workers in (0, 3)
    )
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one["input_ids"], other["input_ids"])
        assert torch.equal(one["position"], other["position"])
    assert one["position"].tolist() == [12, 13, 14, 15]


def test_several_workers_are_refused(c4, tmp_path):
    data = open_data(config(c4, tmp_path), seed=0)
    loader = torch.utils.data.DataLoader(data.train, batch_size=2, num_workers=2)
    with pytest.raises(DataError, match="2 workers would each read all"):
        next(iter(loader))


def test_ranks_share_a_batch_out(c4, tmp_path):
    """As the trainer prepares its loader."""
    from accelerate.data_loader import prepare_data_loader

    stream = open_data(config(c4, tmp_path), seed=0).train

    def loader():
        return training_loader(stream, batch=4, seed=0, start=1)

    shares = [
        prepare_data_loader(loader(), num_processes=2, process_index=rank, split_batches=True)
        for rank in range(2)
    ]
    for whole, *parts in islice(zip(loader(), *shares, strict=False), 3):
        for key, expected in whole.items():
            assert torch.equal(expected, torch.cat([part[key] for part in parts]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "nope"}, "Bad split"),
        ({"name": "fr"}, "'fr' not found"),
        ({"column": "body"}, "has no column 'body'"),
        ({"held_out": None, "held_out_samples": 10_000}, "leaves none to train on"),
        ({"length": 100_000, "held_out_samples": 1}, "too little text"),
        ({"path": "/nowhere/at/all"}, "cannot be opened"),
    ],
)
def test_what_cannot_be_streamed_is_refused(c4, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        open_data(config(c4, tmp_path, **changes), seed=0)


def test_a_hub_out_of_reach_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="hub cannot be reached for allenai/c4 en") as caught:
        open_data(config("allenai/c4", tmp_path), seed=0)
    assert "folder" in caught.value.hint


def test_a_connection_that_breaks_is_named(c4, tmp_path, monkeypatch):
    class Broken:
        def iter(self, batch_size):
            yield {"text": ["one"], "url": [""]}
            raise ConnectionError("reset by peer")

    documents = open_data(config(c4, tmp_path), seed=0).train.documents
    documents = streams.replace(documents, buffer=1)
    monkeypatch.setattr(streams.Documents, "_open", lambda _: Broken())
    with pytest.raises(DataError, match="broke off after 1 documents of epoch 0: reset by peer"):
        list(documents.epoch(0))


def test_a_document_longer_than_many_samples(tmp_path):
    from surgery.train.data.tokenizer import ByteTokenizer

    class One:
        def epoch(self, number, start=0):
            return iter(["x" * 1000, "", "yz"][start:])

    stream = streams.TokenStream(
        One(), ByteTokenizer(), length=16, padded=False, cache=None, endless=False
    )
    found = [sample["input_ids"].tolist() for sample in stream]
    expected = [*b"x" * 1000, 257, 257, *b"yz", 257]
    assert row_of(found) == expected[: len(found) * 15 + 1]
    assert len(found) == (len(expected) - 1) // 15
    assert np.array(found).shape == (len(found), 16)
