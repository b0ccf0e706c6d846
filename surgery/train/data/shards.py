"""Shards of tokens: flat files of unsigned integers, mapped into memory, and an index of them.

A folder of tokens::

    index.json            what is in it; written last, so that a folder with an index is whole
    train-00000.bin       64 bytes of header, then the tokens, little-endian
    held_out-00000.bin
    tokenizer/            the tokenizer's files, if it has any

The tokens of a split are one row; where one shard ends and the next begins means nothing. The
header of a shard bears the key of its folder, a hash of the source and the tokenizer, so that a
shard of another folder is known at sight.
"""

from __future__ import annotations

import json
import struct
from bisect import bisect_right
from collections.abc import Sequence
from hashlib import file_digest, sha256
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from surgery import files, progress
from surgery.errors import DataError
from surgery.files import sha256_of
from surgery.train.data.configs import Count, Name, Section
from surgery.untrusted.documents import parse, read_bytes
from surgery.untrusted.paths import check_inside, plain_name

if TYPE_CHECKING:
    from rich.table import Table

INDEX = "index.json"
FORMAT = "surgery-tokens"
VERSION = 1

Split = Literal["train", "held_out"]
Dtype = Literal["uint16", "uint32"]
Array = NDArray[Any]

SPLITS: tuple[Split, ...] = ("train", "held_out")

_HEADER = struct.Struct("<8sII32sQ8x")  # magic, version, bytes per token, key, tokens
_MAGIC = b"SRGTOKEN"
_AGAIN = "delete the folder and make it again with surgery data tokenize"


class Shard(Section):
    """One file: its name, its number of tokens, and the SHA-256 of all its bytes in hex."""

    file: Name
    tokens: int
    sha256: Name


class TokenizerEntry(Section):
    """The tokenizer that made the tokens.

    Attributes:
        kind: Its class: bytes, bpe or transformers.
        spec: How it was asked for.
        sha256: Its fingerprint.
        vocab_size: Ids are below it.
        eos: Id that ends a document.
    """

    kind: Literal["bytes", "bpe", "transformers"]
    spec: Name
    sha256: Name
    vocab_size: Count
    eos: int


class Index(Section):
    """What a folder of tokens holds.

    Attributes:
        key: Hash of the source's content and the tokenizer, hex.
        source: Where the text came from.
        dtype: Of the tokens.
        length: Tokens in a sample, unless a configuration says otherwise.
        documents: How many documents each split has.
        splits: Shards of each split in order.
    """

    format: Literal["surgery-tokens"] = FORMAT
    version: Literal[1] = VERSION
    key: Name
    source: Name
    dtype: Dtype
    length: Count
    tokenizer: TokenizerEntry
    documents: dict[Split, int]
    splits: dict[Split, tuple[Shard, ...]]

    def tokens(self, split: Split) -> int:
        """How many tokens a split has."""
        return sum(shard.tokens for shard in self.splits[split])

    def summary(self) -> dict[str, Any]:
        """What is in the folder, as JSON-able data."""
        return {
            "source": self.source,
            "tokenizer": self.tokenizer.spec,
            "vocab_size": self.tokenizer.vocab_size,
            "dtype": self.dtype,
            "length": self.length,
            "splits": {
                split: {
                    "documents": self.documents[split],
                    "tokens": self.tokens(split),
                    "samples": samples_in(self.tokens(split), self.length),
                    "shards": len(self.splits[split]),
                }
                for split in SPLITS
            },
        }

    def view(self) -> Table:
        """The same as a table."""
        from rich.table import Table

        table = Table(
            title=f"{self.source} by {self.tokenizer.spec}: {self.tokenizer.vocab_size} tokens, "
            f"{self.dtype}, samples of {self.length}"
        )
        table.add_column("part")
        for name in ("documents", "tokens", "samples", "shards"):
            table.add_column(name, justify="right")
        for split, numbers in self.summary()["splits"].items():
            table.add_row(split, *(f"{number:,}" for number in numbers.values()))
        return table


class TokenRow:
    """All tokens of a split as one row.

    Args:
        folder: The folder of tokens.
        index: Its index.
        split: Which row.

    Raises:
        DataError: a shard is missing, truncated, too long, or from another folder.
    """

    def __init__(self, folder: Path, index: Index, split: Split) -> None:
        self._dtype = np.dtype(index.dtype).newbyteorder("<")
        shards = index.splits[split]
        self._files = [(folder / shard.file, shard.tokens) for shard in shards]
        for path, tokens in self._files:
            check_shard(path, index.key, tokens, self._dtype.itemsize)
        # Ends of the shards in the row.
        self._ends = list(accumulate(shard.tokens for shard in shards))
        self._maps: dict[int, Array] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        # A mapped file pickles as its whole content; another process maps it again.
        return {**self.__dict__, "_maps": {}}

    def read(self, starts: Sequence[int], length: int) -> NDArray[np.int64]:
        """Runs of tokens, shape (n, length): one from each start on, across shards."""
        runs = np.empty((len(starts), length), dtype=np.int64)
        for run, start in zip(runs, starts, strict=True):
            number = bisect_right(self._ends, start)
            begin = start - (self._ends[number - 1] if number else 0)
            part = self._map(number)[begin : begin + length]
            run[: len(part)] = part
            if len(part) < length:
                self._read_on(number + 1, run[len(part) :])
        return runs

    def _read_on(self, number: int, out: Array) -> None:
        """Fill ``out`` from the beginning of a shard and, if need be, the ones after it."""
        done = 0
        while done < len(out):
            part = self._map(number)[: len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            number += 1

    def _map(self, number: int) -> Array:
        if number not in self._maps:
            path, tokens = self._files[number]
            mapped = np.memmap(
                path, dtype=self._dtype, mode="r", offset=_HEADER.size, shape=(tokens,)
            )
            # A plain array on the same memory: cutting a memmap costs more than copying a sample.
            self._maps[number] = np.asarray(mapped)
        return self._maps[number]


def samples_in(tokens: int, length: int) -> int:
    """How many samples a row of tokens has; each begins with the last token of the one before."""
    return max(tokens - 1, 0) // (length - 1)


def dtype_for(vocab_size: int) -> Dtype:
    """The smallest type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def read_index(folder: Path) -> Index:
    """The index of a folder of tokens.

    Raises:
        DataError: there is none, or it is broken or of a newer version.
    """
    path = folder / INDEX
    if not path.exists():
        raise _no_index(folder)
    text = read_bytes(path, error=DataError)
    data: Any = parse(text, f"{path} is broken", error=DataError)
    try:
        _check_format(path, data)
        index = Index.model_validate_json(text)
    except (ValidationError, ValueError) as error:
        raise DataError(f"{path} is broken: {error}", hint=_AGAIN) from None
    for shards in index.splits.values():
        for shard in shards:
            plain_name(shard.file, str(path), error=DataError)
    return index


def write_index(folder: Path, index: Index) -> None:
    """Write the index in one step; the folder is whole from then on."""
    text = json.dumps(index.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"
    files.write(folder / INDEX, text)


def write_shard(path: Path, tokens: Sequence[Array], key: str, dtype: Dtype) -> Shard:
    """Write pieces of tokens as one shard, in one step.

    Args:
        path: Where it goes; a file there is replaced.
        tokens: Arrays of ids, shape (n,), one after the other.
        key: Key of the folder.
        dtype: Type that holds every id.
    """
    joined = np.concatenate([*tokens, np.empty(0, dtype=np.uint32)])
    plain = joined.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    header = _HEADER.pack(
        _MAGIC, VERSION, np.dtype(dtype).itemsize, bytes.fromhex(key), len(joined)
    )
    content = header + plain
    files.write(path, content)
    return Shard(file=path.name, tokens=len(joined), sha256=sha256(content).hexdigest())


def finished_shard(path: Path, key: str) -> Shard | None:
    """A shard that an interrupted run has written to its end; None if there is none."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size:
                return None
            magic, version, width, found, tokens = _HEADER.unpack(head)
            if (magic, version, found) != (_MAGIC, VERSION, bytes.fromhex(key)):
                return None
            if path.stat().st_size != _HEADER.size + tokens * width:
                return None
            file.seek(0)
            digest = file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    return Shard(file=path.name, tokens=tokens, sha256=digest)


def check_shard(path: Path, key: str, tokens: int, width: int) -> None:
    """Compare a shard's name, size and header with the index.

    Raises:
        DataError: it is missing, truncated, too long, or from another folder.
    """
    expected = _HEADER.size + tokens * width
    check_inside(path, path.parent, error=DataError)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
    except FileNotFoundError:
        raise DataError(f"{path} is missing, and the index names it", hint=_AGAIN) from None
    if size != expected:
        what = "truncated" if size < expected else "too long"
        raise DataError(f"{path} is {what}: {size} bytes, expected {expected}", hint=_AGAIN)
    if head != _HEADER.pack(_MAGIC, VERSION, width, bytes.fromhex(key), tokens):
        raise DataError(
            f"{path} is no shard of this folder: its header is another one",
            hint="shards of other sources, tokenizers or versions do not mix; " + _AGAIN,
        )


def verify(folder: Path, index: Index) -> None:
    """Compare every byte of every shard with its checksum.

    Raises:
        DataError: a shard is not what the index says.
    """
    width = np.dtype(index.dtype).itemsize
    shards = [shard for split in SPLITS for shard in index.splits[split]]
    for shard in progress.track(shards, f"checking {folder}"):
        path = folder / shard.file
        check_shard(path, index.key, shard.tokens, width)
        found = sha256_of(path)
        if found != shard.sha256:
            raise DataError(
                f"{path} has changed since it was written: SHA-256 {found}, expected "
                f"{shard.sha256}",
                hint=_AGAIN,
            )


def _check_format(path: Path, data: object) -> None:
    fields = cast("dict[str, Any]", data) if isinstance(data, dict) else {}
    if fields.get("format") != FORMAT:
        raise DataError(f"{path} is no index of tokens: it does not say format: {FORMAT}")
    version = fields.get("version")
    if version != VERSION:
        raise DataError(
            f"{path} has version {version!r}, and this release reads version {VERSION}",
            hint="update model-surgery, or make the folder again",
        )


def _no_index(folder: Path) -> DataError:
    if not folder.is_dir():
        return DataError(
            f"there is no folder {folder}",
            hint=f"make it: surgery data tokenize SOURCE {folder}",
        )
    return DataError(
        f"{folder} has no {INDEX}: it is no folder of tokens, or its making was interrupted",
        hint="run the same surgery data tokenize again; it goes on where it stopped",
    )
