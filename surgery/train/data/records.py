"""Texts with a sample each, from a table: JSONL, CSV, TSV, or a dataset in the hub's layout.

    rows ──► checked texts and classes ──► parts ──► token ids ──► batches padded to their longest

Every row is looked at before training starts. What is surprising and no error (texts that were cut,
classes of very different sizes, held-out texts that occur in training) is said in ``Data.notes``.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from surgery.errors import DataError
from surgery.train.data.base import Batch, Data, Facts, Place, Samples, need, positions
from surgery.train.data.configs import Columns, DocstringsData, HubData, RecordsData
from surgery.train.data.libraries import require
from surgery.train.data.tokenizer import Framed, Tokenizer, load_tokenizer
from surgery.train.data.transforms import split

#: What torch's cross entropy leaves out.
IGNORED = -100
_UNEVEN = 3.0
"""Classes whose sizes differ by more than this factor are worth a sentence."""
_LISTED = 8

Label = str | int


@dataclass(frozen=True)
class Rows:
    """Texts of a table.

    Attributes:
        source: What errors call it.
        texts: N texts.
        pairs: N second texts, or None.
        labels: N classes as they are written, or None.
    """

    source: str
    texts: list[str]
    pairs: list[str] | None = None
    labels: list[Label] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Iterable[int]) -> Rows:
        """Some of the rows."""
        chosen = list(indices)
        return Rows(
            self.source,
            [self.texts[i] for i in chosen],
            None if self.pairs is None else [self.pairs[i] for i in chosen],
            None if self.labels is None else [self.labels[i] for i in chosen],
        )

    def key(self, index: int) -> tuple[str, str | None]:
        """What makes two rows the same question."""
        return self.texts[index], None if self.pairs is None else self.pairs[index]


class TextSamples(Samples):
    """Token ids of texts, padded on the right to the longest of a batch.

    A batch has ``input_ids`` and ``attention_mask`` (1 on tokens, 0 on padding), both int64
    (B, L), ``token_type_ids`` where the tokenizer gives them, and ``labels``: the class, int64
    (B,); or, of texts without classes, the ids (B, L) with -100 on padding.

    Args:
        framed: N texts.
        classes: int64 (N,), or None.
        pad: Id of padding.
    """

    def __init__(self, framed: Sequence[Framed], classes: Tensor | None, pad: int) -> None:
        self.framed = framed
        self.classes = classes
        self.pad = pad

    def __len__(self) -> int:
        return len(self.framed)

    def sample(self, index: int, position: int) -> Batch:
        """One text, without padding."""
        batch = self.batch([Place(index, position)])
        return {name: tensor[0] for name, tensor in batch.items() if name != "position"}

    def batch(self, places: Sequence[Place]) -> Batch:
        """Texts under each other, the shorter ones padded."""
        rows = [self.framed[place.index] for place in places]
        ids = _padded([row.ids for row in rows], self.pad)
        mask = _padded([np.ones(len(row.ids), dtype=np.uint32) for row in rows], 0)
        found = {"input_ids": ids, "attention_mask": mask, "position": positions(places)}
        types = [row.types for row in rows if row.types is not None]
        if len(types) == len(rows):
            found["token_type_ids"] = _padded(types, 0)
        if self.classes is None:
            found["labels"] = ids.masked_fill(mask == 0, IGNORED)
        else:
            found["labels"] = self.classes[[place.index for place in places]]
        return found


def open_records(config: RecordsData, *, seed: int) -> Data:
    """A local table, split into a part to train on and a part to evaluate on.

    Args:
        config: The ``data`` section.
        seed: Not used: the split does not depend on it.

    Raises:
        DataError: a file is missing, broken or empty, a column is missing, or a row lacks its
            text or class; with the line.
    """
    rows = _checked(_read(Path(config.path).expanduser()), config)
    held_out = config.held_out
    if not isinstance(held_out, str):
        return made(config, *_divided(rows, held_out))
    return made(config, rows, _checked(_read(Path(held_out).expanduser()), config))


def open_hub(config: HubData, *, seed: int) -> Data:
    """A dataset in the hub's layout, read whole.

    Args:
        config: The ``data`` section.
        seed: Not used.

    Raises:
        DataError: it cannot be had, a column is missing, or a row lacks its text or class.
    """
    rows = _checked(_dataset(config, config.split), config)
    held_out = config.held_out
    if not isinstance(held_out, str):
        return made(config, *_divided(rows, held_out))
    return made(config, rows, _checked(_dataset(config, held_out), config))


def made(config: RecordsData | HubData | DocstringsData, train: Rows, held_out: Rows) -> Data:
    """Data of two parts of a table.

    Args:
        config: A section of ``Texts``: its tokenizer, length, and classes where it names them.
        train: What is trained on.
        held_out: What is evaluated on.

    Raises:
        DataError: there is nothing to train on, or a class occurs in one part only.
    """
    train, notes = _without(train, held_out)
    need(len(train) > 0, f"{train.source}: nothing is left to train on")
    names = _classes(train, config.labels if isinstance(config, Columns) else None)
    tokenizer = load_tokenizer(config.tokenizer)
    parts: list[TextSamples] = []
    for name, rows in (("training", train), ("held-out", held_out)):
        framed = tokenizer.frame(rows.texts, rows.pairs, config.length)
        notes += _cut(name, framed, config.length)
        parts.append(TextSamples(framed, _indices(rows, names), _pad(tokenizer)))
    if names is not None:
        notes += _balance(train, names)
    facts = Facts(
        kind=config.kind,
        vocab_size=tokenizer.vocab_size,
        longest=max(len(each.ids) for part in parts for each in part.framed),
        classes=None if names is None else len(names),
        names=None if names is None else tuple(map(str, names)),
        tokenizer=tokenizer,
    )
    return Data(parts[0], parts[1], facts, tuple(notes))


# --- reading ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Rows as they are written, each with the place that an error names."""

    source: str
    columns: tuple[str, ...]
    rows: list[tuple[str, Mapping[str, Any]]]


def _read(path: Path) -> _Table:
    need(path.is_file(), f"there is no file {path}", hint="a path starts at the working folder")
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _separated, ".tsv": _separated}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise DataError(
            f"{path} ends in {path.suffix!r}; known endings: {', '.join(readers)}",
            hint="rename it after what is in it, or convert it",
        )
    try:
        rows = list(reader(path))
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}", hint="convert it with iconv") from None
    need(bool(rows), f"{path} holds no rows")
    columns = tuple(dict.fromkeys(key for _, row in rows for key in row))
    return _Table(str(path), columns, rows)


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row: object = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: no JSON: {error}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected an object with columns as its keys")
            yield f"{path}:{number}", cast("dict[str, Any]", row)


def _separated(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header = next(reader, None)
        need(header is not None, f"{path} is empty", hint="its first line names the columns")
        names = cast("list[str]", header)
        need(len(set(names)) == len(names), f"{path}:1: a column is named twice")
        try:
            for row in reader:
                if not row:
                    continue
                where = f"{path}:{reader.line_num}"
                if len(row) != len(names):
                    raise DataError(f"{where}: {len(row)} fields, and the header has {len(names)}")
                yield where, dict(zip(names, row, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: {error}") from None


def _dataset(config: HubData, part: str) -> _Table:
    load = require("datasets", "data of kind hub").load_dataset
    source = f"{config.path}{f' {config.name}' if config.name else ''} ({part})"
    try:
        loaded = load(config.path, config.name, split=part, revision=config.revision)
    except ConnectionError as error:
        raise DataError(
            f"the hub cannot be reached for {source}: {error}",
            hint="without a network, give a folder with the dataset's files as data.path, or use "
            "data of kind records",
        ) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"the dataset {source} cannot be opened: {error}") from error
    need(len(loaded) > 0, f"{source} holds no rows")
    names = _class_names(loaded, config.label)
    rows = [
        (f"{source}, row {number}", _named(row, config.label, names))
        for number, row in enumerate(loaded)
    ]
    return _Table(source, tuple(loaded.column_names), rows)


def _class_names(loaded: Any, label: str | None) -> list[str] | None:
    """The names of a column that the dataset itself declares as classes."""
    feature = loaded.features.get(label)
    declares = isinstance(feature, require("datasets", "data of kind hub").ClassLabel)
    return feature.names if declares else None


def _named(
    row: dict[str, Any], label: str | None, names: Sequence[str] | None
) -> Mapping[str, Any]:
    if names is None or label is None:
        return row
    value = row[label]
    # Hidden labels of a test split are -1.
    return {**row, label: names[value] if isinstance(value, int) and value >= 0 else None}


# --- checking -----------------------------------------------------------------------------------


def _checked(table: _Table, config: Columns) -> Rows:
    for column in (config.text, config.pair, config.label):
        need(
            column is None or column in table.columns,
            f"{table.source} has no column {column!r}",
            hint=f"its columns: {', '.join(table.columns)}; set data.text, data.pair, data.label",
        )
    pair, label = config.pair, config.label
    return Rows(
        table.source,
        [_text(where, row, config.text) for where, row in table.rows],
        None if pair is None else [_text(where, row, pair) for where, row in table.rows],
        None if label is None else [_label(where, row, label, config) for where, row in table.rows],
    )


def _text(where: str, row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if isinstance(value, str) and value.strip():
        return value
    got = "nothing" if value is None or value == "" else type(value).__name__
    got = "blanks" if isinstance(value, str) and value else got
    raise DataError(f"{where}: column {column!r} holds {got}, expected text")


def _label(where: str, row: Mapping[str, Any], column: str, config: Columns) -> Label:
    value = row.get(column)
    if isinstance(value, bool):
        value = str(value).lower()
    if not isinstance(value, (str, int)) or value == "":
        got = "nothing" if value in (None, "") else f"{value!r} ({type(value).__name__})"
        raise DataError(
            f"{where}: column {column!r} holds {got}, expected a class: text or an integer",
            hint="round numbers are for regression, which is not offered"
            if isinstance(value, float)
            else "remove rows without a class",
        )
    if config.labels is not None and str(value) not in config.labels:
        raise DataError(
            f"{where}: class {value!r} is not among data.labels: {', '.join(config.labels)}"
        )
    return value


def _classes(train: Rows, given: Sequence[str] | None) -> list[Label] | None:
    if train.labels is None:
        return None
    if given is not None:
        return list(given)
    found = set(train.labels)
    need(
        len(found) > 1,
        f"{train.source}: every row is of class {next(iter(found))!r}; there is nothing to tell "
        "apart",
    )
    return sorted(found, key=_order)


def _order(label: Label) -> tuple[bool, int, str]:
    """Numbers by size, and before words."""
    text = str(label)
    number = text.lstrip("-").isdecimal()
    return not number, int(text) if number else 0, text


def _indices(rows: Rows, names: Sequence[Label] | None) -> Tensor | None:
    if names is None or rows.labels is None:
        return None
    places = {str(name): index for index, name in enumerate(names)}
    for label in rows.labels:
        need(
            str(label) in places,
            f"{rows.source}: class {label!r} occurs in what is evaluated on, and not in training",
            hint="name all classes in data.labels, or give training texts of it",
        )
    return torch.tensor([places[str(label)] for label in rows.labels])


def _divided(rows: Rows, share: float) -> tuple[Rows, Rows]:
    names = _classes(rows, None)
    labels = _indices(rows, names)
    train, held_out = split(torch.zeros(len(rows)) if labels is None else labels, share)
    need(
        len(held_out) > 0,
        f"{rows.source}: no row can be held out for evaluation",
        hint="a class needs two rows or more; or name a file as data.held_out",
    )
    take = cast("list[list[int]]", [cast("Any", part).tolist() for part in (train, held_out)])
    return rows.take(take[0]), rows.take(take[1])


def _without(train: Rows, held_out: Rows) -> tuple[Rows, list[str]]:
    """The training rows that are no held-out ones."""
    seen = {held_out.key(index) for index in range(len(held_out))}
    kept = [index for index in range(len(train)) if train.key(index) not in seen]
    left = len(train) - len(kept)
    if not left:
        return train, []
    told = f"{left} of {len(train)} training texts are also held out, and are not trained on"
    return train.take(kept), [told]


def _cut(part: str, framed: Sequence[Framed], length: int) -> list[str]:
    count = sum(each.cut for each in framed)
    if not count:
        return []
    share = f"{count / len(framed):.0%}"
    return [f"{count} of {len(framed)} {part} texts ({share}) are cut to {length} tokens"]


def _balance(train: Rows, names: Sequence[Label]) -> list[str]:
    counts = Counter(str(label) for label in train.labels or ())
    sizes = {str(name): counts[str(name)] for name in names}
    absent = [name for name, count in sizes.items() if count == 0]
    found = [f"class {name} has no training text" for name in absent]
    most, least = max(sizes, key=lambda n: sizes[n]), min(sizes, key=lambda n: sizes[n])
    if sizes[least] and sizes[most] > _UNEVEN * sizes[least]:
        listed = sorted(sizes.items(), key=lambda pair: -pair[1])
        told = ", ".join(f"{name} {count}" for name, count in listed[:_LISTED])
        more = f", and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
        found.append(
            f"classes are uneven: {sizes[most]} training texts of {most}, {sizes[least]} of "
            f"{least} ({told}{more}); naming the largest is right for "
            f"{sizes[most] / len(train):.0%} of them"
        )
    return found


def _pad(tokenizer: Tokenizer) -> int:
    """Padding is masked and counts nowhere, so that any id will do where there is none for it."""
    return tokenizer.eos if tokenizer.pad is None else tokenizer.pad


def _padded(rows: Sequence[Any], value: int) -> Tensor:
    """Rows of different lengths under each other, int64 (B, L)."""
    longest = max(len(row) for row in rows)
    made = np.full((len(rows), longest), value, dtype=np.int64)
    for place, row in zip(made, rows, strict=True):
        place[: len(row)] = row
    return torch.from_numpy(made)  # pyright: ignore[reportUnknownMemberType]
