import json
import os
import pickle
import threading

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from surgery.cli import app
from surgery.errors import DataError
from surgery.train.data import making, open_data, shards, text
from surgery.train.data.base import Place
from surgery.train.data.configs import TextData, TokenData
from surgery.train.data.making import tokenize
from surgery.train.data.shards import INDEX, TokenRow, read_index
from surgery.train.data.text import open_corpus, read
from surgery.train.data.tokenizer import ByteTokenizer, load_saved

EOS = 257


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        lines = f"text {number}:\n" + "word é\n" * (number % 7)
        (folder / f"{number:02d}.txt").write_text(lines, encoding="utf-8")
    return folder


def row(folder, split="train"):
    index = read_index(folder)
    whole = TokenRow(folder, index, split)
    return whole.read([0], len(whole))[0].tolist()


def expected_row(source, split="train", **options):
    """Documents by bytes, each ended by eos, without a look at shards and pieces."""
    corpus = open_corpus(str(source), **options)
    found = []
    for file in dict.fromkeys(piece.file for piece in getattr(corpus, split)):
        found += [*file.path.read_bytes(), EOS]
    return found


@pytest.mark.parametrize("shard_size", [1, 100, 1 << 20])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_documents_are_joined_by_eos_across_shards(texts, tmp_path, shard_size, split):
    index = tokenize(str(texts), tmp_path / "out", shard_size=shard_size, workers=1, held_out=0.3)
    assert row(tmp_path / "out", split) == expected_row(texts, split, held_out=0.3)
    assert (len(index.splits[split]) == 1) == (shard_size > 100)
    assert index.dtype == "uint16"


def test_a_document_in_pieces_ends_once(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "PIECE", 20)
    pieces = open_corpus(str(texts)).train
    assert len(pieces) > len({piece.file for piece in pieces})
    index = tokenize(str(texts), tmp_path / "out", shard_size=50, workers=1)
    assert row(tmp_path / "out") == expected_row(texts)
    assert index.documents["train"] == len({piece.file for piece in pieces})


@pytest.mark.parametrize("length", [2, 3, 16, 57])
def test_every_token_is_predicted_once_across_shards(texts, tmp_path, length):
    out = tmp_path / "out"
    tokenize(str(texts), out, shard_size=90, workers=1, held_out=0.3)
    samples = open_data(TokenData(path=str(out), length=length), seed=0).train
    whole = expected_row(texts, held_out=0.3)
    targets = [t for i in range(len(samples)) for t in samples[i]["input_ids"][1:].tolist()]
    assert targets == whole[1 : len(targets) + 1]
    assert 0 <= len(whole) - 1 - len(targets) < length - 1
    firsts = [int(samples[i]["input_ids"][0]) for i in range(len(samples))]
    assert firsts == whole[: len(samples) * (length - 1) : length - 1]


def test_a_batch_is_its_samples_with_their_positions(texts, tmp_path):
    tokenize(str(texts), tmp_path / "out", shard_size=90, workers=1)
    samples = open_data(TokenData(path=str(tmp_path / "out"), length=20), seed=0).train
    batch = samples.batch([Place(5, 105), Place(0, 106), Place(len(samples) - 1, 107)])
    assert batch["input_ids"].dtype == torch.int64
    assert batch["position"].tolist() == [105, 106, 107]
    for ids, index in zip(batch["input_ids"], [5, 0, len(samples) - 1], strict=True):
        assert torch.equal(ids, samples[index]["input_ids"])
    with pytest.raises(IndexError):
        samples[len(samples)]


def test_a_large_vocabulary_takes_four_bytes(texts, tmp_path, monkeypatch):
    class Wide(ByteTokenizer):
        vocab_size = 70_000

        def encode(self, texts):
            return [ids + 69_000 for ids in super().encode(texts)]

    monkeypatch.setattr(making, "load_tokenizer", lambda _: Wide())
    index = tokenize(str(texts), tmp_path / "out", workers=1)
    assert index.dtype == "uint32"
    shifted = [token if token == EOS else token + 69_000 for token in expected_row(texts)]
    assert row(tmp_path / "out") == shifted


def test_processes_make_the_same_shards(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "_WORTH_PROCESSES", 0)
    one = tokenize(str(texts), tmp_path / "one", shard_size=150, workers=1)
    two = tokenize(str(texts), tmp_path / "two", shard_size=150, workers=2)
    assert len(one.splits["train"]) > 2
    assert one == two


class Dying(ByteTokenizer):
    def __reduce__(self):
        # Whoever unpickles it is gone.
        return os._exit, (9,)


def test_a_process_that_dies_ends_the_run(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "_WORTH_PROCESSES", 0)
    monkeypatch.setattr(making, "load_tokenizer", lambda _: Dying())
    with pytest.raises(DataError, match="a process that made tokens died"):
        tokenize(str(texts), tmp_path / "out", shard_size=150, workers=2)


def test_an_error_in_a_process_ends_the_run(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "_WORTH_PROCESSES", 0)
    bad = open_corpus(str(texts)).train[7].file.path
    bad.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=f"{bad.name} is not UTF-8: byte 0xe9 at offset 3"):
        tokenize(str(texts), tmp_path / "out", shard_size=150, workers=2)


def test_an_interrupted_run_goes_on(texts, tmp_path, monkeypatch):
    def interrupt(path, *rest):
        if path.name == "train-00003.bin":
            raise KeyboardInterrupt
        return write(path, *rest)

    write = shards.write_shard
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "write_shard", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tokenize(str(texts), out, shard_size=90, workers=1)
    with pytest.raises(DataError, match="its making was interrupted"):
        open_data(TokenData(path=str(out)), seed=0)
    with pytest.raises(DataError, match="was begun with another text"):
        tokenize(str(texts), out, shard_size=91, workers=1)
    made = {path.name: path.stat().st_ino for path in out.glob("*.bin")}
    assert sorted(made) == [f"train-0000{n}.bin" for n in range(3)]
    index = tokenize(str(texts), out, shard_size=90, workers=1)
    assert index == tokenize(str(texts), tmp_path / "whole", shard_size=90, workers=1)
    assert {name: (out / name).stat().st_ino for name in made} == made
    assert row(out) == expected_row(texts)
    assert sorted(p.name for p in out.iterdir() if p.suffix != ".bin") == [INDEX]


def test_a_shard_that_was_cut_off_is_made_again(texts, tmp_path):
    out = tmp_path / "out"
    whole = tokenize(str(texts), out, shard_size=90, workers=1)
    (out / INDEX).unlink()
    (out / "making.json").write_text(json.dumps({"key": whole.key}))
    cut = out / "train-00001.bin"
    cut.write_bytes(cut.read_bytes()[:-10])
    assert tokenize(str(texts), out, shard_size=90, workers=1) == whole
    shards.verify(out, whole)


def test_once_made_a_folder_is_not_made_again(texts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    index = tokenize(str(texts), out, workers=1)
    monkeypatch.setattr(shards, "write_shard", None)
    assert tokenize(str(texts), out, workers=1) == index
    with pytest.raises(DataError, match="holds other tokens"):
        tokenize(str(texts), out, workers=1, held_out=0.5)


def test_a_folder_of_something_else_is_left_alone(texts, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="is not empty and holds no tokens"):
        tokenize(str(texts), out, workers=1)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_several_may_make_the_same_folder_at_once(texts, tmp_path):
    """As ranks do that start at once: whoever comes late finds or writes the same files."""
    out, made, failed = tmp_path / "out", [], []
    gate = threading.Barrier(4)

    def rank():
        try:
            gate.wait()
            options = {"tokenizer": "bpe", "vocabulary": 280, "shard_size": 90, "workers": 1}
            made.append(tokenize(str(texts), out, **options))
            shards.verify(out, made[-1])
        except BaseException as error:
            failed.append(error)
            raise

    ranks = [threading.Thread(target=rank) for _ in range(4)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    assert not failed
    assert len(made) == 4
    assert all(index == made[0] for index in made)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".")]


def test_a_bpe_is_trained_on_the_training_part_and_kept(texts, tmp_path):
    held = open_corpus(str(texts), held_out=0.3).held_out[0].file.path
    held.write_text("zzqxzzqx" * 400, encoding="utf-8")
    out = tmp_path / "out"
    index = tokenize(str(texts), out, tokenizer="bpe", vocabulary=300, workers=1, held_out=0.3)
    tokenizer = load_saved("bpe", out / "tokenizer")
    assert tokenizer.fingerprint() == index.tokenizer.sha256
    # Never seen, so never merged.
    assert len(tokenizer.encode(["zzqxzzqx"])[0]) == 8
    assert len(tokenizer.encode(["word"])[0]) < 4
    corpus = open_corpus(str(texts), held_out=0.3)
    assert tokenizer.decode(row(out)) == "".join(read(piece) for piece in corpus.train)
    data = open_data(TokenData(path=str(out), length=8), seed=0)
    assert data.facts.vocab_size == index.tokenizer.vocab_size == tokenizer.vocab_size
    assert data.facts.tokenizer.decode([*tokenizer.encode(["word é"])[0]]) == "word é"


def test_a_foreign_tokenizer_is_refused(texts, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    tokenize(str(texts), one, tokenizer="bpe", vocabulary=280, workers=1)
    tokenize(str(texts), other, tokenizer="bpe", vocabulary=290, workers=1)
    (other / "tokenizer" / "tokenizer.json").replace(one / "tokenizer" / "tokenizer.json")
    with pytest.raises(DataError, match="is not the one that made the tokens"):
        open_data(TokenData(path=str(one), length=8), seed=0)


@pytest.fixture
def made(texts, tmp_path):
    tokenize(str(texts), tmp_path / "out", shard_size=90, workers=1)
    return tmp_path / "out"


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"xx")


def cut_header(path):
    path.write_bytes(path.read_bytes()[:20])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "train-00001.bin is truncated: "),
        (cut_header, "train-00001.bin is truncated: 20 bytes"),
        (lengthen, "train-00001.bin is too long: "),
        (lambda path: path.unlink(), "train-00001.bin is missing"),
    ],
)
def test_a_damaged_shard_is_refused(made, damage, message):
    damage(made / "train-00001.bin")
    with pytest.raises(DataError, match=message):
        open_data(TokenData(path=str(made), length=8), seed=0)


def test_a_shard_of_another_folder_is_refused(made, texts, tmp_path):
    # Of the same size and name, from the same text with one letter changed.
    path = sorted(texts.iterdir())[3]
    path.write_text(path.read_text(encoding="utf-8").replace("text", "texT"), encoding="utf-8")
    tokenize(str(texts), tmp_path / "foreign", shard_size=90, workers=1)
    foreign = tmp_path / "foreign" / "train-00001.bin"
    assert foreign.stat().st_size == (made / "train-00001.bin").stat().st_size
    foreign.replace(made / "train-00001.bin")
    with pytest.raises(DataError, match="is no shard of this folder"):
        open_data(TokenData(path=str(made), length=8), seed=0)


def test_a_changed_byte_is_found_when_asked_for(made):
    path = made / "train-00001.bin"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    open_data(TokenData(path=str(made), length=8), seed=0)
    with pytest.raises(DataError, match="has changed since it was written"):
        open_data(TokenData(path=str(made), length=8, verify=True), seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "", "is broken"),
        (lambda text: text[:-30], "is broken"),
        (lambda text: "[]", "is no index of tokens"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "has version 2"),
        (lambda text: text.replace('"uint16"', '"int8"'), "is broken"),
        (lambda text: text.replace('"train": [', '"other": ['), "is broken"),
        (lambda text: text.replace('"train-00001', '"../train-00001'), "lies outside the folder"),
        (lambda text: text.replace('"version"', '"version": 1, "version"'), "is there twice"),
    ],
)
def test_a_broken_index_is_refused(made, change, message):
    path = made / INDEX
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=message):
        read_index(made)


def test_no_folder_of_tokens(tmp_path):
    with pytest.raises(DataError, match="there is no folder") as caught:
        open_data(TokenData(path=str(tmp_path / "no")), seed=0)
    assert "surgery data tokenize" in caught.value.hint
    with pytest.raises(DataError, match="has no index"):
        open_data(TokenData(path=str(tmp_path)), seed=0)


def test_too_little_text_for_a_sample_is_refused(made):
    with pytest.raises(DataError, match="fewer than one sample of 5000"):
        open_data(TokenData(path=str(made), length=5000), seed=0)


def test_the_length_of_the_folder_is_the_default(texts, tmp_path):
    tokenize(str(texts), tmp_path / "out", length=12, workers=1)
    data = open_data(TokenData(path=str(tmp_path / "out")), seed=0)
    assert data.facts.length == 12
    assert data.train[0]["input_ids"].shape == (12,)
    # Asked for again with another length, the tokens stay.
    assert tokenize(str(texts), tmp_path / "out", length=20, workers=1).length == 20
    assert open_data(TokenData(path=str(tmp_path / "out")), seed=0).facts.length == 20


def test_text_is_tokenized_once_into_the_cache(texts, tmp_path, monkeypatch):
    config = TextData(path=str(texts), length=16, cache=str(tmp_path / "cache"))
    data = open_data(config, seed=0)
    assert data.facts.vocab_size == 259
    assert data.facts.length == 16
    whole = expected_row(texts)
    assert data.train[1]["input_ids"].tolist() == whole[15:31]
    monkeypatch.setattr(ByteTokenizer, "encode", None)
    again = open_data(config, seed=1)
    assert torch.equal(again.train[1]["input_ids"], data.train[1]["input_ids"])
    # Another length is another view of the same tokens.
    open_data(config.model_copy(update={"length": 8}), seed=0)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_changed_text_is_tokenized_again(texts, tmp_path):
    config = TextData(path=str(texts), length=16, cache=str(tmp_path / "cache"))
    open_data(config, seed=0)
    path = open_corpus(str(texts)).train[0].file.path
    path.write_text("a new beginning", encoding="utf-8")
    data = open_data(config, seed=0)
    assert data.facts.tokenizer.decode(data.train[0]["input_ids"].tolist()).startswith("a new b")


def test_the_cache_is_the_users(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    open_data(TextData(path=str(texts), length=16), seed=0)
    assert list((tmp_path / "xdg" / "model-surgery" / "tokens").glob(f"*/{INDEX}"))


def test_samples_travel_to_other_processes_without_their_tokens(texts, tmp_path):
    for path in texts.iterdir():
        path.write_text(path.name * 2000)
    tokenize(str(texts), tmp_path / "out", workers=1)
    samples = open_data(TokenData(path=str(tmp_path / "out"), length=8), seed=0).train
    first = samples[0]["input_ids"]
    sent = pickle.dumps(samples)
    assert len(sent) < 2000
    assert len(row(tmp_path / "out")) > 100_000
    assert torch.equal(pickle.loads(sent)[0]["input_ids"], first)  # noqa: S301 - made here


def test_bpe_and_vocabulary_go_together(texts, tmp_path):
    for options in ({"tokenizer": "bpe"}, {"vocabulary": 300}):
        with pytest.raises(DataError, match="do not go together"):
            tokenize(str(texts), tmp_path / "out", **options)
        with pytest.raises(ValueError, match="vocabulary"):
            TextData(**options)


def test_the_command(texts, tmp_path):
    out = tmp_path / "out"
    run = CliRunner().invoke(
        app, ["data", "tokenize", str(texts), str(out), "--length", "12", "--json", "-q"]
    )
    assert run.exit_code == 0, run.output
    shown = json.loads(run.stdout)
    assert shown["vocab_size"] == 259
    assert shown["splits"]["train"]["tokens"] == len(expected_row(texts))
    assert shown["splits"]["train"]["samples"] == (len(expected_row(texts)) - 1) // 11
    assert CliRunner().invoke(app, ["data", "check", str(out), "-q"]).exit_code == 0
    truncate(out / "train-00000.bin")
    run = CliRunner().invoke(app, ["data", "check", str(out)])
    assert run.exit_code == DataError.exit_code
    assert "truncated" in run.stderr
    run = CliRunner().invoke(app, ["data", "tokenize", str(tmp_path / "no"), str(out)])
    assert run.exit_code == DataError.exit_code


def test_shards_are_little_endian_after_64_bytes(made):
    index = read_index(made)
    content = (made / "train-00000.bin").read_bytes()
    assert content[:8] == b"SRGTOKEN"
    assert content[16:48].hex() == index.key
    tokens_there = np.frombuffer(content[64:], dtype="<u2")
    assert len(tokens_there) == index.splits["train"][0].tokens
    assert tokens_there.tolist() == row(made)[: len(tokens_there)]
