"""Samples cut out of a row of tokens.

Sample i of length L is the part [i·(L-1), i·(L-1)+L) of the row: the last token of a sample is the
first one of the next, so that every token but the row's first is predicted exactly once, at the
borders of samples and of shards too. Fewer than L-1 tokens at the very end of a row are left over.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from surgery.errors import DataError
from surgery.train.data import shards
from surgery.train.data.base import Batch, Data, Facts, Place, Samples, positions
from surgery.train.data.configs import TextData, TokenData
from surgery.train.data.making import TOKENIZER, Maker
from surgery.train.data.shards import Index, Split, TokenRow
from surgery.train.data.text import open_corpus
from surgery.train.data.tokenizer import load_saved


class TokenSamples(Samples):
    """Parts of a row of tokens: {"input_ids": int64 (L,)}.

    Args:
        row: The tokens.
        length: Tokens in a sample.
        what: What an error calls the row.

    Raises:
        DataError: the row is shorter than a sample.
    """

    def __init__(self, row: TokenRow, length: int, what: str) -> None:
        if len(row) < length:
            raise DataError(
                f"{what} has {len(row)} tokens, fewer than one sample of {length}",
                hint="lower data.length, or give more text",
            )
        self.row = row
        self.length = length

    def __len__(self) -> int:
        return shards.samples_in(len(self.row), self.length)

    def sample(self, index: int, position: int) -> Batch:
        """One sample."""
        return {"input_ids": self._ids([index])[0]}

    def batch(self, places: Sequence[Place]) -> Batch:
        """Samples copied straight from the mapped files."""
        return {
            "input_ids": self._ids([place.index for place in places]),
            "position": positions(places),
        }

    def _ids(self, indices: Sequence[int]) -> Tensor:
        starts = [index * (self.length - 1) for index in indices]
        return torch.from_numpy(self.row.read(starts, self.length))  # pyright: ignore[reportUnknownMemberType]


def open_text(config: TextData, *, seed: int) -> Data:
    """Local text, tokenized into the cache if it is not there yet.

    Args:
        config: The ``data`` section.
        seed: Not used: the split depends on names only.

    Raises:
        DataError: there is no text, it is not UTF-8, or it is shorter than a sample.
    """
    corpus = open_corpus(config.path, pattern=config.pattern, held_out=config.held_out)
    maker = Maker(corpus, config.tokenizer, config.vocabulary)
    folder = cache_folder(config.cache, "tokens") / maker.key[:32]
    maker.make(folder, length=config.length, workers=1)
    return _open(folder, config.length, config.kind)


def open_tokens(config: TokenData, *, seed: int) -> Data:
    """Shards made by ``surgery data tokenize``.

    Args:
        config: The ``data`` section.
        seed: Not used.

    Raises:
        DataError: the folder is none of tokens, is broken, or is shorter than a sample.
    """
    folder = Path(config.path)
    if config.verify:
        shards.verify(folder, shards.read_index(folder))
    return _open(folder, config.length, config.kind)


def cache_folder(named: str | None, kind: str) -> Path:
    """The folder a configuration names, else one in the user's cache (XDG base directories)."""
    if named is not None:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "model-surgery" / kind


def _open(folder: Path, length: int | None, kind: str) -> Data:
    index = shards.read_index(folder)
    tokenizer = load_saved(index.tokenizer.kind, folder / TOKENIZER)
    if tokenizer.fingerprint() != index.tokenizer.sha256:
        raise DataError(
            f"the tokenizer in {folder / TOKENIZER} is not the one that made the tokens",
            hint="delete the folder and make it again with surgery data tokenize",
        )
    length = index.length if length is None else length
    return Data(
        train=_samples(folder, index, "train", length),
        held_out=_samples(folder, index, "held_out", length),
        facts=Facts(kind=kind, vocab_size=tokenizer.vocab_size, length=length, tokenizer=tokenizer),
    )


def _samples(folder: Path, index: Index, split: Split, length: int) -> TokenSamples:
    row = TokenRow(folder, index, split)
    return TokenSamples(row, length, f"the part {split} of {index.source}")
