"""A dataset of the hub, streamed: documents are tokenized as they come, and nothing is stored.

The documents of all epochs stand in one row, as in ``tokens``; epoch e shuffles the order of the
files and a buffer of documents with the seed ``shuffle_seed + e``, so that the first epoch is the
order of the GaLore recipes (``shuffle(seed=42)``).

To begin at a later sample the documents before it are read again but not tokenized: the stream
leaves bookmarks in its cache that say in which document a sample begins. The state that
``datasets`` keeps by itself would be quicker to return to, but it forgets what was in the shuffle
buffer, and the order would be another one. Without bookmarks everything is tokenized again.
"""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from surgery import progress
from surgery.errors import DataError
from surgery.train.data.base import Batch, Data, Facts, Samples, StreamSamples
from surgery.train.data.configs import StreamData
from surgery.train.data.libraries import require
from surgery.train.data.tokenizer import Ids, Tokenizer, load_tokenizer
from surgery.train.data.tokens import cache_folder

logger = logging.getLogger(__name__)

#: Samples between two bookmarks.
EVERY = 1024

# Documents that are read and tokenized at once.
_AT_ONCE = 64
_IGNORED = -100


@dataclass(frozen=True)
class Mark:
    """Where a sample begins.

    Attributes:
        position: The sample.
        epoch: Epoch of the document in which it begins.
        document: The how-manieth of its epoch that document is.
        token: The how-manieth token of the document is the sample's first one.
    """

    position: int = 0
    epoch: int = 0
    document: int = 0
    token: int = 0


@dataclass(frozen=True)
class Documents:
    """Documents of one split, in their order.

    Attributes:
        path: Id of the dataset, or a folder.
        name: Its configuration.
        revision: Branch, tag or commit.
        split: The split.
        column: Column that holds the text.
        buffer: Documents among which the next one is drawn; 1 keeps the order.
        shuffle_seed: Seed of the first epoch.
        skip: Documents at the beginning that are not among them.
    """

    path: str
    name: str | None
    revision: str | None
    split: str
    column: str
    buffer: int = 1
    shuffle_seed: int = 0
    skip: int = 0

    def epoch(self, number: int, start: int = 0) -> Iterator[str]:
        """Documents of one epoch from the one at ``start`` on.

        Raises:
            DataError: the dataset cannot be reached, has no such split or column, or the
                connection broke.
        """
        rows = self._open()
        if self.skip:
            rows = rows.skip(self.skip)
        if self.buffer > 1:
            rows = rows.shuffle(seed=self.shuffle_seed + number, buffer_size=self.buffer)
        read = start
        try:
            # Not rows.skip(start): that fixes the order of the files before it is shuffled. And
            # not iter(rows): in a worker of torch that draws from another seed.
            for row in islice(_one_by_one(rows.iter(batch_size=_AT_ONCE)), start, None):
                yield self._text(row, read)
                read += 1
        except (OSError, EOFError) as error:
            raise DataError(
                f"the stream {self} broke off after {read} documents of epoch {number}: {error}",
                hint="resume the run; it goes on with the same samples",
            ) from error

    def _open(self) -> Any:
        load = require("datasets", "streams come by datasets").load_dataset
        try:
            return load(
                self.path, self.name, split=self.split, revision=self.revision, streaming=True
            )
        except ConnectionError as error:
            raise DataError(
                f"the hub cannot be reached for {self}: {error}",
                hint="without a network, give a folder with the dataset's files as data.path, or "
                "use data of kind text or tokens",
            ) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"the dataset {self} cannot be opened: {error}") from error

    def _text(self, row: dict[str, Any], number: int) -> str:
        text = row.get(self.column)
        if isinstance(text, str):
            return text
        if self.column not in row:
            raise DataError(
                f"{self} has no column {self.column!r}",
                hint=f"its columns: {', '.join(sorted(row))}; set data.column",
            )
        raise DataError(
            f"document {number} of {self} has {type(text).__name__} in its column "
            f"{self.column!r}, expected text"
        )

    def __str__(self) -> str:
        name = f" {self.name}" if self.name else ""
        return f"{self.path}{name} ({self.split})"


@dataclass(frozen=True)
class _Document:
    epoch: int
    number: int
    ids: Ids


class TokenStream(StreamSamples):
    """Samples of a stream.

    Packed: {"input_ids": int64 (L,), "position": int64 ()}, each token the target of one sample,
    as in ``tokens``. Padded: one document each, cut or filled up, with "attention_mask" (L,), 0 on
    the padding, and "labels" (L,), -100 there.

    Args:
        documents: Where the text comes from.
        tokenizer: What tokenizes it.
        length: Tokens in a sample.
        padded: Whether each document is one sample.
        cache: Folder for bookmarks; None leaves none.
        start: Position of the first sample.
        endless: Whether another epoch follows the last document.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Tokenizer,
        *,
        length: int,
        padded: bool,
        cache: Path | None,
        start: int = 0,
        endless: bool = True,
    ) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.length = length
        self.padded = padded
        self.cache = cache
        self.start = start
        self.endless = endless

    def at(self, position: int) -> Self:
        """The same stream from another sample on."""
        other = copy(self)
        other.start = position
        return other

    def __iter__(self) -> Iterator[Batch]:
        for mark, ids in self.marked():
            yield self.batch_of(ids) | {"position": torch.tensor(mark.position)}

    def marked(self) -> Iterator[tuple[Mark, Ids]]:
        """Samples from ``start`` on, each with where it begins.

        Raises:
            DataError: several processes would each read all of the stream; or as ``Documents``.
        """
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise DataError(
                f"{worker.num_workers} workers would each read all of {self.documents}",
                hint="a stream is read by one worker, as training_loader does",
            )
        book = None if self.cache is None else _Bookmarks(self.cache / f"{self.key()}.jsonl")
        begin = Mark() if book is None else book.before(self.start)
        samples = self._padded(begin) if self.padded else self._packed(begin)
        if book is not None:
            samples = book.noting(samples)
        passed = self.start - begin.position
        deque(progress.track(islice(samples, passed), f"going to sample {self.start}", passed), 0)
        yield from samples

    def key(self) -> str:
        """Hash of all that the samples depend on."""
        # Another release of datasets may shuffle in another way.
        made_by = [version("datasets"), self.tokenizer.fingerprint(), self.length, self.padded]
        return sha256(json.dumps([repr(self.documents), *made_by]).encode()).hexdigest()[:32]

    def batch_of(self, ids: Ids) -> Batch:
        """A sample without its position."""
        tokens = _tensor(ids)
        if not self.padded:
            return {"input_ids": tokens}
        pad = self.tokenizer.eos if self.tokenizer.pad is None else self.tokenizer.pad
        filled = torch.full((self.length,), pad)
        filled[: len(tokens)] = tokens
        mask = (torch.arange(self.length) < len(tokens)).long()
        labels = filled.masked_fill(mask == 0, _IGNORED)
        return {"input_ids": filled, "attention_mask": mask, "labels": labels}

    def _packed(self, begin: Mark) -> Iterator[tuple[Mark, Ids]]:
        coming = self._tokenized(begin)
        held: deque[_Document] = deque()
        position, offset, size = begin.position, begin.token, 0
        while True:
            while size - offset < self.length:
                document = next(coming, None)
                if document is None:
                    return
                held.append(document)
                size += len(document.ids)
            mark = Mark(position, held[0].epoch, held[0].number, offset)
            yield mark, _joined(held, offset, self.length)
            position += 1
            offset += self.length - 1
            while offset >= len(held[0].ids):
                gone = len(held.popleft().ids)
                offset -= gone
                size -= gone

    def _padded(self, begin: Mark) -> Iterator[tuple[Mark, Ids]]:
        end = np.array([self.tokenizer.eos], dtype=np.uint32)
        position = begin.position
        for document in self._tokenized(begin):
            if document.epoch > begin.epoch + 1 and position == begin.position:
                raise DataError(f"{self.documents} has no text in any of its documents")
            # Of nothing but its end, nothing can be predicted.
            if len(document.ids) < 2:
                continue
            ids = document.ids
            if len(ids) > self.length:
                ids = np.concatenate([ids[: self.length - 1], end])
            yield Mark(position, document.epoch, document.number), ids
            position += 1

    def _tokenized(self, begin: Mark) -> Iterator[_Document]:
        """Documents with eos at their end, from the one a sample begins in on."""
        epoch, first = begin.epoch, begin.document
        while True:
            texts = self.documents.epoch(epoch, first)
            number = first
            while few := list(islice(texts, _AT_ONCE)):
                for ids in self.tokenizer.encode(few):
                    yield _Document(epoch, number, np.append(ids, np.uint32(self.tokenizer.eos)))
                    number += 1
            if number == 0:
                raise DataError(f"{self.documents} has no documents")
            if not self.endless:
                return
            epoch, first = epoch + 1, 0


class MemoryTokens(Samples):
    """Samples that were read from a stream and are kept."""

    def __init__(self, batches: list[Batch]) -> None:
        self._samples = batches

    def __len__(self) -> int:
        return len(self._samples)

    def sample(self, index: int, position: int) -> Batch:
        """One sample."""
        return self._samples[index]


class _Bookmarks:
    """Marks of a stream in a file: one JSON list a line. Several processes may write it at once.

    Args:
        path: The file; made when the first mark is put.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.marks = {mark.position: mark for mark in self._read()}

    def before(self, position: int) -> Mark:
        """The last mark at or before a sample."""
        known = [each for each in self.marks if each <= position]
        return self.marks[max(known)] if known else Mark()

    def noting(self, samples: Iterator[tuple[Mark, Ids]]) -> Iterator[tuple[Mark, Ids]]:
        """The samples as they come; every so often, where one begins is noted down."""
        for mark, ids in samples:
            if mark.position % EVERY == 0 and mark.position not in self.marks:
                self.put(mark)
            yield mark, ids

    def put(self, mark: Mark) -> None:
        """Note down where a sample begins."""
        self.marks[mark.position] = mark
        line = json.dumps([mark.position, mark.epoch, mark.document, mark.token]) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # One write of a short line at the end: lines of several processes do not mix.
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line.encode())
        finally:
            os.close(handle)

    def _read(self) -> Iterator[Mark]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return
        for line in lines:
            try:
                yield Mark(*json.loads(line))
            except (ValueError, TypeError, RecursionError):
                # Cut off by a crash. A mark less costs time and nothing else.
                logger.warning("%s holds a broken bookmark, which is left out", self.path)


def open_stream(config: StreamData, *, seed: int) -> Data:
    """A streamed dataset; what is held out is read and kept.

    Args:
        config: The ``data`` section.
        seed: Not used: the order is that of ``shuffle_seed``, for every run the same.

    Raises:
        DataError: the dataset cannot be reached, or has no such split, column or documents.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    documents = Documents(
        path=config.path,
        name=config.name,
        revision=config.revision,
        split=config.split,
        column=config.column,
    )
    aside = documents if config.held_out is None else replace(documents, split=config.held_out)
    held_out, used = _held_out(_stream(config, aside, tokenizer, endless=False), config)
    trained = replace(
        documents,
        buffer=config.buffer,
        shuffle_seed=config.shuffle_seed,
        skip=used if config.held_out is None else 0,
    )
    if next(replace(trained, buffer=1).epoch(0), None) is None:
        raise DataError(
            f"{trained} has no documents to train on" + (f" after {used} held out" if used else ""),
            hint="lower data.held_out_samples, or name a split as data.held_out" if used else None,
        )
    return Data(
        train=_stream(config, trained, tokenizer, endless=True),
        held_out=held_out,
        facts=Facts(
            kind=config.kind,
            vocab_size=tokenizer.vocab_size,
            length=config.length,
            tokenizer=tokenizer,
        ),
    )


def _stream(
    config: StreamData, documents: Documents, tokenizer: Tokenizer, *, endless: bool
) -> TokenStream:
    return TokenStream(
        documents,
        tokenizer,
        length=config.length,
        padded=config.packing == "padded",
        cache=cache_folder(config.cache, "streams") if endless else None,
        endless=endless,
    )


def _held_out(stream: TokenStream, config: StreamData) -> tuple[MemoryTokens, int]:
    """Samples to evaluate on, and how many documents they were cut from."""
    count = config.held_out_samples
    marked = islice(stream.marked(), count + 1)
    found = list(progress.track(marked, f"tokenizing {stream.documents}", count + 1))
    if not found:
        raise DataError(
            f"{stream.documents} has too little text for a held-out sample of {config.length} "
            "tokens",
            hint="lower data.length, or name another split as data.held_out",
        )
    kept = MemoryTokens([stream.batch_of(ids) for _, ids in found[:count]])
    if config.held_out is None and len(found) <= count:
        raise DataError(
            f"{stream.documents} has text for {len(found)} samples, and data.held_out_samples: "
            f"{count} leaves none to train on",
            hint="lower data.held_out_samples, or name a split as data.held_out",
        )
    # The sample after the last one begins in the last document that was used.
    return kept, found[-1][0].document + 1


def _joined(held: Iterable[_Document], offset: int, length: int) -> Ids:
    """``length`` tokens from the one at ``offset`` on, across documents."""
    row = np.empty(length, dtype=np.uint32)
    done = 0
    for document in held:
        part = document.ids[offset : offset + length - done]
        row[done : done + len(part)] = part
        done += len(part)
        offset = 0
    return row


def _one_by_one(batches: Iterable[dict[str, list[Any]]]) -> Iterator[dict[str, Any]]:
    """Rows of batches that are given column by column."""
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _tensor(ids: Iterable[int]) -> Tensor:
    return torch.from_numpy(np.asarray(ids, dtype=np.int64))  # pyright: ignore[reportUnknownMemberType]
