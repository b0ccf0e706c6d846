"""Text made into a folder of tokens. Torch is not needed here, so that workers start quickly.

The documents of a split stand in one row, each followed by eos; ``shards`` says what the folder
looks like. A folder that was interrupted is gone on with, shard by shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import cast

import numpy as np

from surgery import files, progress
from surgery.errors import DataError
from surgery.train.data import shards
from surgery.train.data.shards import Index, Shard, Split, TokenizerEntry
from surgery.train.data.text import Corpus, Piece, groups, open_corpus, read
from surgery.train.data.tokenizer import (
    Ids,
    Tokenizer,
    bpe_recipe,
    load_saved,
    load_tokenizer,
    train_bpe,
)
from surgery.untrusted.documents import read_object

#: Bytes of text in a shard.
SHARD = 1 << 25
TOKENIZER = "tokenizer"

_PLAN = "making.json"
# Below this much text, starting processes takes longer than the work.
_WORTH_PROCESSES = 1 << 24


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
    maker = Maker(corpus, tokenizer, vocabulary, shard_size)
    index = maker.make(out, length=length, workers=workers or os.cpu_count() or 1)
    if index.length != length:
        # The tokens were there already; of the length, only the index knows.
        index = index.model_copy(update={"length": length})
        shards.write_index(out, index)
    return index


class Maker:
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
        """The index of the folder, made where it is not there yet, for samples of ``length``.

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
            found = read_object(plan, error=DataError).get("key")
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
        files.write(plan, json.dumps({"key": self.key}))

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
class _Job:
    """One shard to be made."""

    path: Path
    split: Split
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)


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
        with ProcessPoolExecutor(
            min(workers, len(jobs)), mp_context=get_context("spawn"), initializer=_one_thread
        ) as pool:
            try:
                made = pool.map(worker, jobs)
                return [_counted(shard, job, task) for shard, job in zip(made, jobs, strict=True)]
            except BrokenProcessPool:
                raise DataError(
                    "a process that made tokens died, as when memory is short",
                    hint="run the same again with fewer workers; finished shards are kept",
                ) from None
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _one_thread() -> None:
    """Keep tokenizers from starting a thread per core in each of the processes."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _counted(shard: Shard, job: _Job, task: progress.Task) -> Shard:
    task.advance(job.size)
    return shard


def _documents(pieces: Iterable[Piece]) -> int:
    return sum(piece.last for piece in pieces)
