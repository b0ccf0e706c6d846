"""Reads and writes the YAML of rule files: YAML 1.2's core schema, plain data only.

ruamel.yaml turns text into events; everything after that is decided here, so that each value
remembers its line and column, and so that nothing a file can say builds an object, doubles a
key or grows without bound.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, cast

from surgery.errors import RuleError
from surgery.registry import suggest

if TYPE_CHECKING:
    from ruamel.yaml.error import MarkedYAMLError

Loc = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
"""Largest rule file. Real ones have a few hundred bytes."""

MAX_VALUES = 10_000
"""Most values in a file once its aliases are written out."""

MAX_DEPTH = 32
"""Deepest nesting."""

_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?(\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*( [A-Za-z0-9_./-]+)*")
_DIRECTIVE = re.compile(r"(?:[ \t]*(?:#.*)?\r?\n)*(%.*)")
_QUOTE = 'quote text that has special characters, as in "**.q_proj", "-8:" or ">=256"'
_WIDTH = 88

_AT_THE_START = ("could not find expected ':'", "found unexpected end of stream")
_SYNTAX: Mapping[str, tuple[str, str]] = {
    # what the parser says: what is said instead, and what to do
    "found character '\\t'": ("a tab cannot indent or separate", "use spaces"),
    "could not find expected ':'": (
        "no ':' follows this text",
        "write 'key: value', or quote the text",
    ),
    "mapping values are not allowed here": (
        "':' is not allowed here",
        f"begin a line for each key; {_QUOTE}",
    ),
    "unknown escape character": (
        "a backslash in double quotes is an escape, and this one does not exist",
        "use single quotes, as in 're:.*\\.[0-9]+'",
    ),
    "unexpected end of stream": ("the quotes are never closed", "close them"),
    "got '<stream end>'": ("the file ends within brackets", "close them"),
    "found '<stream end>'": ("the file ends within brackets", "close them"),
}
_JARGON: Mapping[str, str] = {
    "expected chomping or indentation indicators, but found": (
        "'>' and '|' begin a block of text and cannot be followed by"
    ),
    "start any token": "start a value",
    "the node content": "a value",
    "'<scalar>'": "text",
    "'<anchor>'": "an anchor",
    "'<alias>'": "an alias",
    "'<tag>'": "a tag",
    "<block end>": "the end of the block",
    "'<block mapping start>'": "a deeper indented key",
    "'<block sequence start>'": "a deeper indented list",
    "a flow mapping": "a mapping in braces",
    "a flow sequence": "a list in brackets",
    "a flow node": "a value",
    "a block node": "a value",
    "a block mapping": "a mapping",
    "a block collection": "a list",
}


class Mark(NamedTuple):
    """A place in a file, counted from 1."""

    line: int
    column: int


class MarkedDict(dict[str, Any]):
    """A mapping that knows where it, its keys and its values stand in the file."""

    def __init__(self, mark: Mark) -> None:
        super().__init__()
        self.mark = mark
        self.keys_at: dict[str, Mark] = {}
        self.values_at: dict[str, Mark] = {}


class MarkedList(list[Any]):
    """A list that knows where it and its items stand in the file."""

    def __init__(self, mark: Mark) -> None:
        super().__init__()
        self.mark = mark
        self.items_at: list[Mark] = []


def has(data: object, step: str | int) -> bool:
    """Whether ``data`` is a mapping with the key, or a list with the index, ``step``."""
    if isinstance(data, Mapping):
        return step in data
    return (
        isinstance(data, list | tuple) and isinstance(step, int) and step < len(cast("Any", data))
    )


def child(data: object, step: str | int) -> object:
    """The value under a key or at an index; None if there is none."""
    return cast("Any", data)[step] if has(data, step) else None


def locate(data: object, loc: Loc, *, key: bool = False) -> Mark | None:
    """Where the value at ``loc`` stands, or the nearest thing around it that stands anywhere.

    Args:
        data: What ``load`` returned, perhaps changed since by a migration.
        loc: Keys and indices that lead to the value.
        key: Ask for the key that leads to the value instead.

    Returns:
        None if ``data`` does not come from a file.
    """
    mark = data.mark if isinstance(data, MarkedDict | MarkedList) else None
    for depth, step in enumerate(loc):
        if not has(data, step):
            return mark
        at_key = key and depth == len(loc) - 1
        mark = _mark_of(data, step, at_key=at_key) or mark
        data = child(data, step)
    return mark


def _mark_of(data: object, step: str | int, *, at_key: bool) -> Mark | None:
    if at_key and isinstance(data, MarkedDict):
        return data.keys_at.get(str(step))
    # A container carries its own mark with it, wherever a migration moves it.
    value = child(data, step)
    if isinstance(value, MarkedDict | MarkedList):
        return value.mark
    if isinstance(data, MarkedDict):
        return data.values_at.get(str(step))
    if isinstance(data, MarkedList) and isinstance(step, int) and step < len(data.items_at):
        return data.items_at[step]
    return None


def decode(content: bytes, file: str) -> str:
    """The text of a rule file.

    Raises:
        RuleError: it is too large, or not UTF-8.
    """
    if len(content) > MAX_BYTES:
        raise RuleError(
            f"the file has more than {MAX_BYTES} bytes",
            hint="is this the right file?",
            file=file,
            line=1,
            column=1,
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode("utf-8", "replace")
        mark = _mark_at(before, len(before))
        raise RuleError(
            f"byte 0x{content[error.start]:02x} is not UTF-8",
            hint="save the file as UTF-8",
            file=file,
            line=mark.line,
            column=mark.column,
        ) from None


def read(path: Path, expected: str, listed: str, error: type[RuleError]) -> bytes:
    """The content of a file, or one byte more than may be read of it.

    Args:
        path: The file.
        expected: What it should be, for a message.
        listed: What the files beside it are called, for a hint.
        error: Raised where it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        problem, hint = "there is no such file", _siblings(path, listed)
    except IsADirectoryError:
        problem = f"this is a folder; expected a {expected}"
        hint = _siblings(path / "x", listed)
    except OSError as cause:
        problem, hint = f"cannot be read: {cause.strerror}", None
    raise error(problem, hint=hint, file=str(path))


def _siblings(path: Path, listed: str) -> str:
    """The YAML files beside a path that is none."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either"
    names = sorted(found.name for found in path.parent.glob("*.y*ml"))
    return suggest(path.name, names) if names else f"no {listed} are in {path.parent}"


def load(text: str, file: str) -> tuple[object, Mark]:
    """Parse one YAML document into plain data that remembers its lines.

    Args:
        text: The document.
        file: Name to put into errors.

    Returns:
        The document (``MarkedDict``, ``MarkedList``, str, int, float, bool or None), and where it
        starts.

    Raises:
        RuleError: the text is not such a document. It has a line and a column.
    """
    return _Reader(text.removeprefix("\ufeff"), file).document()


def _mark_at(text: str, position: int) -> Mark:
    before = text[:position]
    return Mark(before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1)


class _Event(NamedTuple):
    """An event of ruamel.yaml's parser, reduced to what is used here.

    Attributes:
        kind: ``Scalar``, ``SequenceStart``, ``MappingEnd``, ...
        mark: Where it starts.
        text: Text of a scalar; name of the anchor an alias refers to.
        plain: Whether a scalar stands without quotes.
        tag: Explicit tag.
        anchor: Anchor that the value is given.
    """

    kind: str
    mark: Mark
    text: str
    plain: bool
    tag: str | None
    anchor: str | None


def _event(raw: Any) -> _Event:
    kind = type(raw).__name__.removesuffix("Event")
    mark = Mark(raw.start_mark.line + 1, raw.start_mark.column + 1)
    if kind == "Alias":
        return _Event(kind, mark, raw.anchor, plain=True, tag=None, anchor=None)
    if kind not in ("Scalar", "SequenceStart", "MappingStart"):
        return _Event(kind, mark, "", plain=True, tag=None, anchor=None)
    tag = None if raw.ctag is None else str(raw.ctag)
    text, plain = (raw.value, not raw.style) if kind == "Scalar" else ("", True)
    return _Event(kind, mark, text, plain, tag, raw.anchor)


class _Reader:
    """Builds data from the events of a parser, one document at a time."""

    def __init__(self, text: str, file: str) -> None:
        self._text = text
        self._file = file
        self._values = 0
        self._anchors: dict[str, tuple[Any, int] | None] = {}
        self._events = self._parse()

    def document(self) -> tuple[object, Mark]:
        if len(self._text.encode("utf-8", "replace")) > MAX_BYTES:
            self._fail(f"the text has more than {MAX_BYTES} bytes", Mark(1, 1))
        if found := _UNPRINTABLE.search(self._text):
            self._fail(
                f"character U+{ord(found[0]):04X} is not allowed in YAML",
                _mark_at(self._text, found.start()),
                "is this a text file?",
            )
        if directive := _DIRECTIVE.match(self._text):
            self._fail(
                f"directives are not allowed, got {_shorten(directive[1])}",
                _mark_at(self._text, directive.start(1)),
                "remove the line; rule files are YAML 1.2",
            )
        next(self._events)  # the start of the stream
        event = next(self._events)
        if event.kind == "StreamEnd":
            self._fail("the file is empty", Mark(1, 1), "a rule file starts with 'version: 1'")
        event = next(self._events)
        value, mark = self._value(event, 0), event.mark
        next(self._events)  # the end of the document
        event = next(self._events)
        if event.kind != "StreamEnd":
            self._fail(
                "a second document starts here; a rule file has one",
                event.mark,
                "remove '---', or move the document to a file of its own",
            )
        return value, mark

    def _parse(self) -> Iterator[_Event]:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import MarkedYAMLError, YAMLError

        try:
            parser: Any = YAML(typ="safe", pure=True)
            yield from (_event(raw) for raw in parser.parse(self._text))
        except MarkedYAMLError as error:
            self._fail_syntax(error)
        except (YAMLError, ValueError, AssertionError) as error:  # assert: an odd %YAML directive
            self._fail(f"not valid YAML: {error}", Mark(1, 1))

    def _value(self, event: _Event, depth: int) -> Any:
        mark = event.mark
        if event.kind == "Alias":
            return self._alias(event.text, mark)
        self._values += 1
        if self._values > MAX_VALUES:
            self._fail(f"the file has more than {MAX_VALUES} values", mark)
        if event.tag is not None:
            self._fail(
                f"tags are not allowed, got {event.tag}",
                mark,
                "remove it, or quote the text if the '!' belongs to it",
            )
        before = self._values
        if event.anchor is not None:
            self._anchors[event.anchor] = None  # until it is complete
        value = self._content(event, mark, depth)
        if event.anchor is not None:
            self._anchors[event.anchor] = value, self._values - before + 1
        return value

    def _content(self, event: _Event, mark: Mark, depth: int) -> Any:
        if event.kind == "Scalar":
            return self._scalar(event, mark)
        if depth == MAX_DEPTH:
            self._fail(f"nested more than {MAX_DEPTH} levels deep", mark)
        if event.kind == "SequenceStart":
            return self._list(mark, depth)
        return self._dict(mark, depth)

    def _list(self, mark: Mark, depth: int) -> MarkedList:
        items = MarkedList(mark)
        while (event := next(self._events)).kind != "SequenceEnd":
            items.items_at.append(event.mark)
            items.append(self._value(event, depth + 1))
        return items

    def _dict(self, mark: Mark, depth: int) -> MarkedDict:
        items = MarkedDict(mark)
        while (event := next(self._events)).kind != "MappingEnd":
            at = event.mark
            key = self._key(event, at, depth)
            if key in items:
                first = items.keys_at[key].line
                self._fail(
                    f"key {key!r} appears twice; the first is in line {first}",
                    at,
                    "remove one of them",
                )
            event = next(self._events)
            # The parser places a value that is not there at whatever comes next.
            missing = event.kind == "Scalar" and event.plain and not event.text
            items.keys_at[key], items.values_at[key] = at, at if missing else event.mark
            items[key] = self._value(event, depth + 1)
        return items

    def _key(self, event: _Event, mark: Mark, depth: int) -> str:
        key = self._value(event, depth + 1)
        if not isinstance(key, str):
            self._fail(f"a key must be a word, got {_named(key)}", mark, _QUOTE)
        if key == "<<" and event.plain:
            self._fail(
                "merge keys ('<<') are not part of YAML 1.2",
                mark,
                "repeat the keys, or use an alias for a whole value",
            )
        return key

    def _alias(self, name: str, mark: Mark) -> Any:
        if name not in self._anchors:
            self._fail(
                f"alias '*{name}' refers to no anchor '&{name}'",
                mark,
                f'text that starts with * must be quoted: "*{name}"',
            )
        anchored = self._anchors[name]
        if anchored is None:
            self._fail(f"alias '*{name}' is inside the value it refers to", mark)
        value, size = anchored
        self._values += size
        if self._values > MAX_VALUES:
            self._fail(
                f"the file has more than {MAX_VALUES} values once its aliases are written out",
                mark,
            )
        return copy.deepcopy(value)

    def _scalar(self, event: _Event, mark: Mark) -> str | int | float | bool | None:
        text = event.text
        if not event.plain:  # quoted or a block: always text
            if any("\ud800" <= character <= "\udfff" for character in text):
                self._fail("half of a surrogate pair is not a character", mark)
            return text
        if _NOT_FINITE.fullmatch(text):
            self._fail(f"{text} is not a finite number", mark, "every number must be finite")
        value = resolve(text)
        if isinstance(value, float) and not math.isfinite(value):
            self._fail(f"the number {_shorten(text)} is too large", mark)
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            self._fail(f"the integer {_shorten(text)} does not fit into 64 bits", mark)
        return value

    def _fail_syntax(self, raised: MarkedYAMLError) -> NoReturn:
        error: Any = raised
        at, began = error.problem_mark or error.context_mark, error.context_mark
        mark = Mark(1, 1) if at is None else Mark(at.line + 1, at.column + 1)
        problem = str(error.problem)
        if problem in _AT_THE_START and began is not None:
            mark = Mark(began.line + 1, began.column + 1)
        for said, (message, hint) in _SYNTAX.items():
            if said in problem:
                self._fail(message, mark, hint)
        doing = f", {error.context} that starts in line {began.line + 1}" if began else ""
        words = f"{problem}{doing}"
        for jargon, plain in _JARGON.items():
            words = words.replace(jargon, plain)
        self._fail(f"not valid YAML: {words}", mark, _QUOTE)

    def _fail(self, message: str, mark: Mark, hint: str | None = None) -> NoReturn:
        raise RuleError(
            message, hint=hint, file=self._file, line=mark.line, column=mark.column
        ) from None


def resolve(text: str) -> str | int | float | bool | None:
    """What a plain (unquoted) scalar means in YAML 1.2's core schema.

    ``yes``, ``no``, ``on``, ``off``, ``1_000``, ``12:30`` and dates are text.
    """
    if _NULL.fullmatch(text):
        return None
    if _BOOL.fullmatch(text):
        return text.lower() == "true"
    if _INT.fullmatch(text):
        # Beyond 64 bits the digits do not matter, and Python refuses to read thousands of them.
        if len(text) > 64:
            return -(2**64) if text.startswith("-") else 2**64
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    return text


def _named(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else f"{json.dumps(value)}"


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:25]}..."


def dump(data: Mapping[str, Any]) -> str:
    """JSON-able data as YAML that ``load`` reads back to the same data.

    Lists and mappings that fit on a line are written on one, except at the two outermost
    levels; other lists and mappings get a line per item.
    """
    return "".join(f"{line}\n" for line in _block(data, outer=2))


def _block(data: Any, outer: int = 0) -> Iterator[str]:
    if isinstance(data, Mapping):
        for key, value in cast("Mapping[str, Any]", data).items():
            yield from _entry(f"{_text(key)}:", value, outer - 1, indent="  ")
    else:
        for value in cast("Sequence[Any]", data):
            yield from _item(value, outer - 1)


def _entry(head: str, value: Any, outer: int, indent: str) -> Iterator[str]:
    line = f"{head} {_flow(value)}"
    if _is_leaf(value) or (outer <= 0 and len(line) + len(indent) <= _WIDTH):
        yield line
        return
    yield head
    yield from (f"{indent}{inner}" for inner in _block(value, outer))


def _item(value: Any, outer: int) -> Iterator[str]:
    line = f"- {_flow(value)}"
    if _is_leaf(value) or (outer <= 0 and len(line) <= _WIDTH and not isinstance(value, Mapping)):
        yield line
        return
    lines = list(_block(value, outer))
    yield f"- {lines[0]}"
    yield from (f"  {line}" for line in lines[1:])


def _is_leaf(value: Any) -> bool:
    return not isinstance(value, Mapping | list | tuple) or not value


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        items = cast("Mapping[str, Any]", value).items()
        return f"{{{', '.join(f'{_text(key)}: {_flow(item)}' for key, item in items)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_flow(item) for item in cast('Sequence[Any]', value))}]"
    if isinstance(value, str):
        return _text(value)
    return json.dumps(value)


def _text(text: str) -> str:
    """A string as YAML, quoted unless it is plainly a string without quotes."""
    if _PLAIN.fullmatch(text) and isinstance(resolve(text), str):
        return text
    quoted = json.dumps(text, ensure_ascii=False)
    # JSON leaves characters that YAML does not print, or takes for the end of a line.
    return re.sub(
        "[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]", lambda c: f"\\u{ord(c[0]):04x}", quoted
    )
