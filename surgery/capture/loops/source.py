"""The text of a function, edited by insertion only, and compiled back at the original lines.

An edit is made once, as text put in at byte offsets. The edited text is what is shown; parsed,
with every position mapped back through the insertions, it is what is compiled. A traceback through
a rewritten function therefore points at the author's own lines and columns.
"""

from __future__ import annotations
import __future__

import ast
import bisect
import dis
import functools
import inspect
import linecache
import textwrap
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import cast

_FUTURES = functools.reduce(
    lambda flags, name: flags | getattr(__future__, name).compiler_flag,
    __future__.all_feature_names,
    0,
)
_NO_CLASS = "_"
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
_SYNONYMS = {"LOAD_METHOD": "LOAD_ATTR"}
_CALLING = frozenset({"PRECALL", "PUSH_NULL", "EXTENDED_ARG", "CACHE", "NOP"})


class NoSource(Exception):
    """The Python text of a function is not to be had, or is not what runs."""


@dataclass(frozen=True)
class Insertion:
    """``text`` put in before the byte ``at`` of the source; ``inner`` ones go in last."""

    at: int
    rank: int
    text: str


@dataclass(frozen=True, eq=False)
class Source:
    """The text of one ``def`` as it stands in its file, decorators included.

    Attributes:
        code: The code object it was compiled to.
        lines: The lines of the definition, unchanged, each with its newline.
        node: The parsed definition; its positions count within ``lines``.
    """

    code: types.CodeType
    lines: tuple[str, ...]
    node: ast.FunctionDef

    @functools.cached_property
    def text(self) -> bytes:
        """The definition in UTF-8, which is what positions of `ast` count in."""
        return "".join(self.lines).encode()

    @functools.cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for line in self.lines:
            starts.append(starts[-1] + len(line.encode()))
        return starts

    def offset(self, line: int, column: int) -> int:
        """The byte that a position of ``node`` stands for; lines count from 1."""
        return self._starts[line - 1] + column

    def position(self, offset: int) -> tuple[int, int]:
        """Line and column of a byte."""
        line = bisect.bisect_right(self._starts, offset, hi=len(self.lines))
        return line, offset - self._starts[line - 1]

    def where(self, node: ast.AST) -> str:
        """``file:line`` of a node."""
        line = getattr(node, "lineno", 1)
        return f"{self.code.co_filename}:{self.code.co_firstlineno + line - 1}"

    def line_of(self, node: ast.AST) -> str:
        """The first line of a node, as its author wrote it."""
        return self.lines[getattr(node, "lineno", 1) - 1].strip()


@functools.lru_cache(maxsize=4096)
def source_of(function: types.FunctionType) -> Source:
    """The text a function was compiled from.

    Raises:
        NoSource: there is none, or it compiles to something else than what runs.
    """
    code = function.__code__
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines or code.co_firstlineno > len(lines):
        raise NoSource(f"no source text of {code.co_filename}:{code.co_firstlineno}")
    try:
        block = inspect.getblock(lines[code.co_firstlineno - 1 :])
        node = _parse("".join(block))
    except (SyntaxError, IndentationError) as error:
        raise NoSource(
            f"the text at {code.co_filename}:{code.co_firstlineno} is no definition ({error.msg})"
        ) from None
    found = Source(code, tuple(block), node)
    if not _same(_compile(node, found, ()), code):
        raise NoSource(
            f"the text at {code.co_filename}:{code.co_firstlineno} is not what runs: the file was "
            "changed after it was imported, or its code was transformed"
        )
    return found


def _parse(text: str) -> ast.FunctionDef:
    """The definition alone, with positions as in ``text``."""
    indented = text[:1].isspace()
    tree = ast.parse(f"class {_NO_CLASS}:\n{text}" if indented else text)
    outer = tree.body[0]
    node = outer.body[0] if indented and isinstance(outer, ast.ClassDef) else outer
    if not isinstance(node, ast.FunctionDef):
        raise SyntaxError("it does not start with def")
    return ast.increment_lineno(node, -1) if indented else node


def _same(ours: types.CodeType, theirs: types.CodeType) -> bool:
    if (ours.co_names, ours.co_varnames) != (theirs.co_names, theirs.co_varnames):
        return False
    return ours.co_code == theirs.co_code or _essence(ours) == _essence(theirs)


def _essence(code: types.CodeType) -> list[tuple[str, object]]:
    """The instructions, less how names are looked up and called.

    The compiler calls ``x.f()`` in another way where the module imports ``x``, which a function
    compiled by itself does not show.
    """
    return [
        (_SYNONYMS.get(one.opname, one.opname), None if one.opcode in _JUMPS else _argument(one))
        for one in dis.get_instructions(code)
        if one.opname not in _CALLING and not isinstance(one.argval, types.CodeType)
    ]


def _argument(instruction: dis.Instruction) -> object:
    if instruction.opname in {"LOAD_GLOBAL", "LOAD_ATTR", "LOAD_METHOD"}:
        return instruction.argval
    if instruction.opname == "LOAD_CONST":
        # Not its text: a set may be written in any order.
        value: object = instruction.argval
        return type(value).__name__, value
    return instruction.argrepr


@dataclass(frozen=True)
class Edited:
    """A rewritten function: what runs and what is shown."""

    code: types.CodeType
    text: str


def edit(source: Source, insertions: Iterable[Insertion], cells: tuple[str, ...]) -> Edited:
    """Put text into a function.

    Args:
        source: The function as it stands.
        insertions: What to put where. At one place, lower ranks go first.
        cells: Names the new text uses that are to be cells of the closure.
    """
    ordered = sorted(insertions, key=lambda one: (one.at, one.rank))
    text, shifts = _apply(source.text, ordered)
    node = _parse(text)
    for inner in ast.walk(node):
        _restore(inner, source, text, shifts)
    code = _compile(node, source, cells)
    return Edited(code, textwrap.dedent(text))


class _Shifts:
    """Where each byte of the edited text comes from."""

    def __init__(self) -> None:
        self._starts: list[int] = [0]
        self._pieces: list[tuple[int, bool]] = [(0, True)]

    def add(self, start: int, original: int, *, kept: bool) -> None:
        self._starts.append(start)
        self._pieces.append((original, kept))

    def original(self, offset: int) -> int:
        index = bisect.bisect_right(self._starts, offset) - 1
        origin, kept = self._pieces[index]
        return origin + (offset - self._starts[index] if kept else 0)


def _apply(text: bytes, insertions: list[Insertion]) -> tuple[str, _Shifts]:
    pieces: list[bytes] = []
    shifts, done, length = _Shifts(), 0, 0
    for one in insertions:
        kept, new = text[done : one.at], one.text.encode()
        length += len(kept)
        shifts.add(length, one.at, kept=False)
        length += len(new)
        shifts.add(length, one.at, kept=True)
        pieces += [kept, new]
        done = one.at
    return b"".join([*pieces, text[done:]]).decode(), shifts


def _restore(node: ast.AST, source: Source, text: str, shifts: _Shifts) -> None:
    """Set a node's position to the one it has in the file."""
    if not isinstance(node, ast.expr | ast.stmt | ast.arg | ast.keyword | ast.excepthandler):
        return
    starts = _line_starts(text)
    for line, column in (("lineno", "col_offset"), ("end_lineno", "end_col_offset")):
        row, offset = cast("tuple[int, int]", (getattr(node, line), getattr(node, column)))
        old_line, old_column = source.position(shifts.original(starts[row - 1] + offset))
        setattr(node, line, old_line)
        setattr(node, column, old_column)


@functools.lru_cache(maxsize=16)
def _line_starts(text: str) -> list[int]:
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line.encode()) + 1)
    return starts


def _compile(node: ast.FunctionDef, source: Source, cells: tuple[str, ...]) -> types.CodeType:
    """The code object of a definition, as its class body would make it.

    It is compiled inside a function that has its free variables and a class of its name (for the
    mangling of private names), and taken out of there: nothing is run.
    """
    original = source.code
    names = tuple(dict.fromkeys((*original.co_freevars, *cells)))
    module = _around(node, names, _owner(original.co_qualname))
    shift = original.co_firstlineno - _first_line(node)
    ast.increment_lineno(node, shift)
    flags = original.co_flags & _FUTURES
    made = cast(
        "types.CodeType",
        compile(module, original.co_filename, "exec", flags=flags, dont_inherit=True),
    )
    ast.increment_lineno(node, -shift)
    found = next(
        code
        for code in _codes(made)
        if code.co_name == original.co_name and code.co_firstlineno == original.co_firstlineno
    )
    return found.replace(co_qualname=original.co_qualname)


def _around(node: ast.FunctionDef, names: tuple[str, ...], owner: str | None) -> ast.Module:
    """A module with the definition in a function of these variables, in a class of this name."""
    lines = [f"def scope({', '.join(names)}):"]
    if owner is not None and owner not in names:
        lines.append(f" global {owner}")  # methods find their class by name in the module
    lines.append(" pass" if owner is None else f" class {owner}: pass")
    module = ast.parse("\n".join(lines))
    scope = cast("ast.FunctionDef", module.body[0])
    holder = scope if owner is None else cast("ast.ClassDef", scope.body[-1])
    holder.body = [node]
    return module


def _first_line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _owner(qualname: str) -> str | None:
    """The class a method was defined in, by its qualified name; None for a plain function."""
    outer = qualname.rpartition(".")[0].rpartition(".")[2]
    return outer if outer.isidentifier() else None


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


@functools.lru_cache(maxsize=16384)
def names_in(code: types.CodeType) -> frozenset[str]:
    """Every attribute, global and string constant a function mentions, nested ones included."""
    words = (word for constant in code.co_consts for word in _words(constant))
    inner = (name for one in _codes(code) for name in names_in(one))
    return frozenset((*code.co_names, *words, *inner))


def _words(constant: object) -> tuple[str, ...]:
    if isinstance(constant, str):
        return (constant,)
    if isinstance(constant, tuple):
        return tuple(word for word in cast("tuple[object, ...]", constant) if isinstance(word, str))
    return ()


def uses_name(code: types.CodeType, name: str) -> bool:
    """Whether a function has a variable or global called ``name``."""
    variables = (*code.co_varnames, *code.co_freevars, *code.co_cellvars, *code.co_names)
    return name in variables or any(uses_name(inner, name) for inner in _codes(code))


__all__ = [
    "Edited",
    "Insertion",
    "NoSource",
    "Source",
    "edit",
    "names_in",
    "source_of",
    "uses_name",
]
