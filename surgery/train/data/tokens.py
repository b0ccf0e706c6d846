"""Text made into shards of tokens, and samples cut out of them.

The documents of a split stand in one row, each followed by eos. Sample i of length L is the part
[i·(L-1), i·(L-1)+L) of that row: the last token of a sample is the first one of the next, so that
every token but the row's first is predicted exactly once, at the borders of samples and of shards
too. Fewer than L-1 tokens at the very end of a split are left over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from surgery import progress
from surgery.errors import DataError
from surgery.train.data import shards
from surgery.train.data.base import Batch, Data, Facts, Place, Samples, positions
from surgery.train.data.configs import TextData, TokenData
from surgery.train.data.shards import Index, Shard, Split, TokenizerEntry, TokenRow
from surgery.train.data.text import Corpus, Piece, groups, open_corpus, read
from surgery.train.data.tokenizer import (
    Ids,
    Tokenizer,
    bpe_recipe,
    load_saved,
    load_tokenizer,
    train_bpe,
)

#: Bytes of text in a shard.
SHARD = 1 << 25
TOKENIZER = "tokenizer"

_PLAN = "making.json"
# Below this much text, starting processes takes longer than the work.
_WORTH_PROCESSES = 1 << 24


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


@dataclass(frozen=True)
class _Job:
    """One shard to be made."""

    path: Path
    split: Split
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


def open_text(config: TextData, *, seed: int) -> Data:
    """Local text, tokenized into the cache if it is not there yet.

    Args:
        config: The ``data`` section.
        seed: Not used: the split depends on names only.

    Raises:
        DataError: there is no text, it is not UTF-8, or it is shorter than a sample.
    """
    corpus = open_corpus(config.path, pattern=config.pattern, held_out=config.held_out)
    maker = _Maker(corpus, config.tokenizer, config.vocabulary)
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


def tokenize(
    source: str,
    out: Path,
    *,
    tokenizer: str = "bytes",
    vocabulary: int | None = None,
    pattern: str | None = None,
    held_out: float = 0.05,
    length: int = 256,
    workers: int | None = None,
    shard_size: int = SHARD,
) -> Index:
    """Make shards of tokens from local text. Run again after an interruption, it goes on.

    Args:
        source: ``stdlib``, a file, a folder, or a glob pattern.
        out: The folder to write.
        tokenizer: ``bytes``, ``bpe``, a folder, or ``hub:ORG/NAME``.
        vocabulary: Tokens of ``bpe``.
        pattern: Which files of a folder; ``**/*.txt`` by default.
        held_out: Part of the files that is held out.
        length: Tokens in a sample, unless a configuration says otherwise.
        workers: Processes; one per core by default.
        shard_size: Bytes of text in a shard.

    Returns:
        The index of the folder.

    Raises:
        DataError: there is no text, it is not UTF-8, the tokenizer cannot be had, or ``out`` holds
            something else.
    """
    corpus = open_corpus(source, pattern=pattern, held_out=held_out)
    maker = _Maker(corpus, tokenizer, vocabulary, shard_size)
    return maker.make(out, length=length, workers=workers or os.cpu_count() or 1)


def cache_folder(named: str | None, kind: str) -> Path:
    """The folder a configuration names, else one in the user's cache (XDG base directories)."""
    if named is not None:
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "model-surgery" / kind


class _Maker:
    """Makes one folder of tokens.

    Attributes:
        key: Hash of all that the folder's content depends on.
    """

    def __init__(
        self, corpus: Corpus, spec: str, vocabulary: int | None, shard_size: int = SHARD
    ) -> None:
        if (spec == "bpe") != (vocabulary is not None):
            raise DataError(
                f"the tokenizer {spec} and a vocabulary of {vocabulary} do not go together",
                hint="a vocabulary is for bpe, and bpe needs one",
            )
        self.corpus = corpus
        self.spec = spec
        self.vocabulary = vocabulary
        self.shard_size = shard_size
        # A BPE is not there yet; what it will be depends on the texts and on this.
        self.known = None if spec == "bpe" else load_tokenizer(spec)
        made_by = bpe_recipe(vocabulary or 0) if self.known is None else self.known.fingerprint()
        parts = [shards.FORMAT, shards.VERSION, corpus.digest, made_by, shard_size]
        self.key = sha256(json.dumps(parts).encode()).hexdigest()

    def make(self, folder: Path, *, length: int, workers: int) -> Index:
        """The index of the folder, made where it is not there yet.

        Several processes may make the same folder at once: each writes the same files, each in
        one step.
        """
        if (folder / shards.INDEX).is_file():
            return self._existing(folder)
        self._begin(folder)
        tokenizer = self._tokenizer(folder)
        jobs = list(self._jobs(folder))
        dtype = shards.dtype_for(tokenizer.vocab_size)
        worker = _Worker(tokenizer, self.key, dtype)
        made = _run(worker, jobs, workers, f"tokenizing {self.corpus.source}")
        index = Index(
            key=self.key,
            source=self.corpus.source,
            dtype=dtype,
            length=length,
            tokenizer=TokenizerEntry(
                kind=tokenizer.kind,
                spec=self.spec,
                sha256=tokenizer.fingerprint(),
                vocab_size=tokenizer.vocab_size,
                eos=tokenizer.eos,
            ),
            documents={
                "train": _documents(self.corpus.train),
                "held_out": _documents(self.corpus.held_out),
            },
            splits={
                split: tuple(m for m, job in zip(made, jobs, strict=True) if job.split == split)
                for split in shards.SPLITS
            },
        )
        shards.write_index(folder, index)
        (folder / _PLAN).unlink(missing_ok=True)
        return index

    def _existing(self, folder: Path) -> Index:
        index = shards.read_index(folder)
        if index.key != self.key:
            raise DataError(
                f"{folder} holds other tokens: those of {index.source} by {index.tokenizer.spec}",
                hint="the text, the split, the tokenizer or the size of shards has changed since; "
                "choose another folder or delete this one",
            )
        return index

    def _begin(self, folder: Path) -> None:
        """Claim a new folder, or go on in one that was interrupted."""
        folder.mkdir(parents=True, exist_ok=True)
        plan = folder / _PLAN
        if plan.is_file():
            found = json.loads(plan.read_text(encoding="utf-8")).get("key")
            if found == self.key:
                return
            raise DataError(
                f"{folder} was begun with another text, split, tokenizer or size of shards",
                hint="choose another folder or delete this one",
            )
        if any(not each.name.startswith(".") for each in folder.iterdir()):
            raise DataError(
                f"{folder} is not empty and holds no tokens", hint="choose another folder"
            )
        shards.write_beside(plan, json.dumps({"key": self.key}).encode())

    def _tokenizer(self, folder: Path) -> Tokenizer:
        place = folder / TOKENIZER
        if self.known is not None:
            if not place.is_dir():
                self.known.save(place)
            return self.known
        if not place.is_dir():
            with progress.task(f"training a BPE of {self.vocabulary} tokens"):
                train_bpe(map(read, self.corpus.train), self.vocabulary or 0).save(place)
        # Of several processes that train at once, the first one's is everybody's.
        return load_saved("bpe", place)

    def _jobs(self, folder: Path) -> Iterator[_Job]:
        for split, pieces in (("train", self.corpus.train), ("held_out", self.corpus.held_out)):
            for number, run in enumerate(groups(pieces, self.shard_size)):
                yield _Job(folder / f"{split}-{number:05d}.bin", cast("Split", split), run)


def _nobody(_: int) -> None:
    """Where progress goes that nobody follows."""


@dataclass(frozen=True)
class _Worker:
    """Makes shards, in this process or in another."""

    tokenizer: Tokenizer
    key: str
    dtype: shards.Dtype

    def __call__(self, job: _Job, advance: Callable[[int], None] = _nobody) -> Shard:
        found = shards.finished_shard(job.path, self.key)
        if found is not None:
            advance(job.size)
            return found
        tokens = list(self._tokens(job.pieces, advance))
        return shards.write_shard(job.path, tokens, self.key, self.dtype)

    def _tokens(self, pieces: Iterable[Piece], advance: Callable[[int], None]) -> Iterator[Ids]:
        eos = np.array([self.tokenizer.eos], dtype=np.uint32)
        for few in groups(pieces, 1 << 20):
            ids = self.tokenizer.encode([read(piece) for piece in few])
            for piece, each in zip(few, ids, strict=True):
                yield each
                if piece.last:
                    yield eos
            advance(sum(piece.size for piece in few))


def _run(worker: _Worker, jobs: Sequence[_Job], workers: int, title: str) -> list[Shard]:
    total = sum(job.size for job in jobs)
    with progress.task(title, total, "bytes") as task:
        if workers == 1 or len(jobs) == 1 or total < _WORTH_PROCESSES:
            return [worker(job, task.advance) for job in jobs]
        # Spawned, not forked: this process has threads, of torch and of tokenizers.
        pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn"))
        try:
            with pool:
                made = pool.map(worker, jobs)
                return [_counted(shard, job, task) for shard, job in zip(made, jobs, strict=True)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _counted(shard: Shard, job: _Job, task: progress.Task) -> Shard:
    task.advance(job.size)
    return shard


def _documents(pieces: Iterable[Piece]) -> int:
    return sum(piece.last for piece in pieces)


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
