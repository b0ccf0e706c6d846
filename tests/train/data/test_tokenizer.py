import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.errors import DataError
from surgery.train.data.tokenizer import (
    BpeTokenizer,
    ByteTokenizer,
    load_saved,
    load_tokenizer,
    train_bpe,
)

WORDS = ["the cat sat on the mat", "the dog sat on the log", "ça va, naïve café ☕ 数学"] * 20


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(WORDS, 300)


@settings(deadline=None)
@given(text=st.text())
def test_bytes_lose_nothing(text):
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids.tolist()) == text
    assert len(ids) == len(text.encode())


def test_bytes_and_their_special_tokens():
    tokenizer = ByteTokenizer()
    (ids,) = tokenizer.encode(["\x00é"])
    assert ids.tolist() == [0, 0xC3, 0xA9]
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (256, 257, 258)
    assert tokenizer.vocab_size == 259
    assert tokenizer.decode([256, 104, 105, 257, 258]) == "hi"
    # Half a character, as an untrained model writes it.
    assert tokenizer.decode([0xC3, 104]) == "\ufffdh"


@settings(deadline=None)
@given(text=st.text())
def test_a_bpe_loses_nothing(bpe, text):
    (ids,) = bpe.encode([text])
    assert bpe.decode(ids.tolist()) == text
    assert all(0 <= i < bpe.vocab_size for i in ids)


def test_a_bpe_merges_what_is_frequent(bpe):
    (ids,) = bpe.encode(["the cat sat on the mat"])
    assert len(ids) < 12
    assert bpe.vocab_size <= 300


def test_a_document_that_speaks_of_eos_does_not_end_there(bpe):
    for tokenizer in (bpe, pickle.loads(pickle.dumps(bpe))):  # noqa: S301 - made here
        (ids,) = tokenizer.encode(["a <|eos|> b"])
        assert tokenizer.eos not in ids
        assert tokenizer.decode(ids.tolist()) == "a <|eos|> b"


def test_the_same_texts_train_the_same_bpe(bpe):
    assert train_bpe(iter(WORDS), 300).fingerprint() == bpe.fingerprint()
    assert train_bpe(WORDS[:1], 300).fingerprint() != bpe.fingerprint()


def test_a_saved_bpe_is_read_back(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer")
    # The first one stays: another process may be reading it.
    train_bpe(["other"], 270).save(tmp_path / "tokenizer")
    again = load_saved("bpe", tmp_path / "tokenizer")
    assert again.fingerprint() == bpe.fingerprint()
    assert again.encode(WORDS)[2].tolist() == bpe.encode(WORDS)[2].tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_transformers_reads_a_saved_bpe(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    assert tokenizer.kind == "transformers"
    assert tokenizer.vocab_size == bpe.vocab_size
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad) == (bpe.bos, bpe.eos, bpe.pad)
    for one, other in zip(tokenizer.encode(WORDS[:3]), bpe.encode(WORDS[:3]), strict=True):
        assert one.tolist() == other.tolist()
        assert tokenizer.decode(one.tolist()) == bpe.decode(one.tolist())
    assert tokenizer.encode([]) == []
    tokenizer.save(tmp_path / "again")
    assert load_saved("transformers", tmp_path / "again").fingerprint() == tokenizer.fingerprint()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("byte", "unknown tokenizer 'byte'"),
        ("google-t5/t5-base", "hub:google-t5/t5-base"),
    ],
)
def test_an_unknown_tokenizer_is_refused(spec, message):
    with pytest.raises(DataError, match=message):
        load_tokenizer(spec)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_an_end_is_refused(bpe, tmp_path):
    bpe.save(tmp_path / "tokenizer")
    config = tmp_path / "tokenizer" / "tokenizer_config.json"
    config.write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(DataError, match="neither an eos nor a sep token"):
        load_tokenizer(str(tmp_path / "tokenizer"))


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0"}'])
def test_a_broken_file_is_refused(tmp_path, content):
    Path(tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="is no tokenizer"):
        load_saved("bpe", tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        load_saved("bpe", tmp_path)


def test_a_hub_out_of_reach_is_named(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="hub:google-t5/t5-base cannot be loaded") as caught:
        load_tokenizer("hub:google-t5/t5-base")
    assert "hub cannot be reached" in caught.value.hint


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(DataError, match="no room for 256 bytes"):
        train_bpe(WORDS, 258)


def test_a_bpe_without_its_special_tokens_is_refused():
    with pytest.raises(DataError, match="has no token"):
        BpeTokenizer(
            '{"version":"1.0","truncation":null,"padding":null,"added_tokens":[],"normalizer":null,'
            '"pre_tokenizer":null,"post_processor":null,"decoder":null,'
            '"model":{"type":"BPE","vocab":{"a":0},"merges":[]}}'
        )
