"""Local text: which files there are, which of them are held out, and their content piece by piece.

Files come in the order of their names. Whole files are held out, chosen by a hash of their names,
so that no sentence of a document is on both sides, and a file stays on its side when others come
and go. A file that has the very content of a held-out one is not trained on.
"""

from __future__ import annotations

import glob
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from surgery import progress
from surgery.errors import DataError
from surgery.files import sha256_of

STDLIB = "stdlib"
DEFAULT_PATTERN = "**/*.txt"
#: A longer file is read in pieces of about this many bytes, cut where a line ends.
PIECE = 1 << 22

# What is installed beside the standard library's own source, generated when Python is built, or
# broken on purpose to test decoders.
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_GENERATED = ("_sysconfigdata", "config-")
# A line is looked for this far beyond the place where a file is to be cut.
_LINE = 1 << 20


@dataclass(frozen=True)
class File:
    """A text file.

    Attributes:
        name: Its path relative to the source, with slashes.
        path: Where it lies.
        size: Bytes.
    """

    name: str
    path: Path
    size: int


@dataclass(frozen=True)
class Piece:
    """Some of a document's bytes.

    Attributes:
        file: The file.
        start: First byte.
        stop: Byte after the last one.
        last: Whether the document ends with it.
    """

    file: File
    start: int
    stop: int
    last: bool

    @property
    def size(self) -> int:
        """Bytes."""
        return self.stop - self.start


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to evaluate on.

    Attributes:
        source: What was asked for.
        train: Pieces in order.
        held_out: Pieces in order.
        digest: SHA-256 over names, contents and sides, hex.
    """

    source: str
    train: tuple[Piece, ...]
    held_out: tuple[Piece, ...]
    digest: str


def open_corpus(source: str, *, pattern: str | None = None, held_out: float = 0.05) -> Corpus:
    """Find the documents of a source and split them.

    Args:
        source: ``stdlib``, a file, a folder, or a glob pattern.
        pattern: Which files of a folder; ``**/*.txt`` by default.
        held_out: Part of the files that is held out.

    Raises:
        DataError: there are no files, or no text in them.
    """
    files = [file for file in find(source, pattern) if file.size > 0]
    if not files:
        raise DataError(f"{source} holds no text: all its files are empty")
    total = sum(file.size for file in files)
    with progress.task(f"reading {source}", total, "bytes") as task:
        digests = [_digest(file, task) for file in files]
    if len(files) == 1:
        return _split_file(source, files[0], digests[0], held_out)
    return _split_files(source, files, digests, held_out)


def find(source: str, pattern: str | None = None) -> list[File]:
    """The files of a source in the order of their names.

    Args:
        source: As for ``open_corpus``.
        pattern: As for ``open_corpus``.

    Raises:
        DataError: there is no such source, or no file in it.
    """
    path = Path(source)
    if pattern is not None and (source == STDLIB or not path.is_dir()):
        raise DataError(
            f"the pattern {pattern!r} is for a folder, and {source} is none",
            hint="leave the pattern out",
        )
    if source == STDLIB:
        return _stdlib()
    if path.is_file():
        return [_file(path, path.parent)]
    if path.is_dir():
        return _in_folder(path, pattern or DEFAULT_PATTERN)
    if glob.has_magic(source):
        return _matching(source)
    raise DataError(
        f"there is no file or folder {source}",
        hint=f"a path starts at the working folder; {STDLIB} is Python's own source",
    )


def read(piece: Piece) -> str:
    """The text of a piece.

    Raises:
        DataError: it is not UTF-8; with file and offset.
    """
    with piece.file.path.open("rb") as file:
        file.seek(piece.start)
        data = file.read(piece.size)
    if len(data) != piece.size:
        raise DataError(f"{piece.file.path} has become shorter while it was read")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        offset = piece.start + error.start
        raise DataError(
            f"{piece.file.path} is not UTF-8: byte 0x{data[error.start]:02x} at offset {offset} "
            f"({error.reason})",
            hint=f"convert it, as with iconv -t UTF-8, or leave it out by a pattern such as "
            f"{DEFAULT_PATTERN}",
        ) from None


def groups(pieces: Iterable[Piece], size: int) -> Iterator[tuple[Piece, ...]]:
    """Runs of pieces of about ``size`` bytes each."""
    run: list[Piece] = []
    held = 0
    for piece in pieces:
        run.append(piece)
        held += piece.size
        if held >= size:
            yield tuple(run)
            run, held = [], 0
    if run:
        yield tuple(run)


def _stdlib() -> list[File]:
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        _file(path, root)
        for path in root.rglob("*.py")
        if not _NOT_STDLIB & set(path.relative_to(root).parts)
        and not path.relative_to(root).parts[0].startswith(_GENERATED)
    ]
    if not files:
        raise DataError(
            f"{root} holds no source of the standard library",
            hint="this Python came without it; give a text file or a folder as data.path",
        )
    return sorted(files, key=_name)


def _in_folder(folder: Path, pattern: str) -> list[File]:
    found = [path for path in folder.glob(pattern) if _is_plain(path, folder)]
    if found:
        return sorted((_file(path, folder) for path in found), key=_name)
    others = [path for path in folder.rglob("*") if _is_plain(path, folder)]
    if not others:
        raise DataError(f"the folder {folder} is empty", hint="put text files into it")
    endings = Counter(path.suffix for path in others)
    ending, count = endings.most_common(1)[0]
    raise DataError(
        f"none of the {len(others)} files in {folder} matches {pattern!r}",
        hint=f"{count} of them end in {ending!r}: the pattern '**/*{ending}' takes those",
    )


def _matching(pattern: str) -> list[File]:
    root = Path(pattern)
    while glob.has_magic(str(root)):
        root = root.parent
    found = root.glob(str(Path(pattern).relative_to(root)))
    files = [_file(path, root) for path in found if _is_plain(path, root)]
    if not files:
        raise DataError(f"no file matches {pattern!r}", hint=f"the search began in {root}")
    return sorted(files, key=_name)


def _is_plain(path: Path, folder: Path) -> bool:
    """Whether it is a file, and neither hidden nor in a hidden folder."""
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.is_file()


def _file(path: Path, root: Path) -> File:
    return File(path.relative_to(root).as_posix(), path, path.stat().st_size)


def _name(file: File) -> str:
    return file.name


def _digest(file: File, task: progress.Task) -> str:
    return sha256_of(file.path, task.advance)


def _split_files(source: str, files: Sequence[File], digests: list[str], share: float) -> Corpus:
    ranks = [_rank(file.name) for file in files]
    chosen = {number for number, rank in enumerate(ranks) if rank < share}
    # Of a few files, chance may put all on one side.
    if not chosen:
        chosen = {ranks.index(min(ranks))}
    if len(chosen) == len(files):
        chosen.remove(ranks.index(max(ranks)))
    seen = {digests[number] for number in chosen}
    train = [n for n in range(len(files)) if n not in chosen and digests[n] not in seen]
    if not train:
        raise DataError(
            f"{source}: nothing is left to train on, since all files have the same content"
        )
    sides = [[files[n].name, digests[n], n in chosen] for n in (*train, *sorted(chosen))]
    return Corpus(
        source=source,
        train=tuple(piece for n in train for piece in _pieces(files[n], 0, files[n].size)),
        held_out=tuple(
            piece for n in sorted(chosen) for piece in _pieces(files[n], 0, files[n].size)
        ),
        digest=sha256(repr(sides).encode()).hexdigest(),
    )


def _split_file(source: str, file: File, digest: str, share: float) -> Corpus:
    """Hold the end of the only file out."""
    border = _cut(file, int(file.size * (1 - share)))
    if not 0 < border < file.size:
        raise DataError(
            f"{file.path} has {file.size} bytes: too few to hold a part of {share} out",
            hint="give more text",
        )
    return Corpus(
        source=source,
        train=tuple(_pieces(file, 0, border)),
        held_out=tuple(_pieces(file, border, file.size)),
        digest=sha256(repr([file.name, digest, border]).encode()).hexdigest(),
    )


def _rank(name: str) -> float:
    """A number in [0, 1) that depends on the name only."""
    return int.from_bytes(sha256(name.encode("utf-8", "surrogateescape")).digest()[:8]) / 2**64


def _pieces(file: File, start: int, stop: int) -> Iterator[Piece]:
    while stop - start > PIECE:
        border = min(_cut(file, start + PIECE), stop)
        if border == stop:
            break
        yield Piece(file, start, border, last=False)
        start = border
    yield Piece(file, start, stop, last=True)


def _cut(file: File, offset: int) -> int:
    """Where the line ends that ``offset`` lies in; in a very long line, where a character does."""
    with file.path.open("rb") as opened:
        opened.seek(offset)
        ahead = opened.read(_LINE)
    line = ahead.find(b"\n")
    if line >= 0:
        return offset + line + 1
    inside = next((n for n, byte in enumerate(ahead) if byte & 0xC0 != 0x80), len(ahead))
    return offset + inside
