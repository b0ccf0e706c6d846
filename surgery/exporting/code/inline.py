"""Copy definitions out of Python modules, with everything they need, into one text.

What belongs to an installed library or to Python itself is imported; the rest, this project's
modules and a person's own, is copied. Only text of installed source files is copied, never any
of a checkpoint or a rule file.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import packages_distributions
from types import ModuleType
from typing import Any

from surgery.errors import ExportError

_OURS = frozenset({"surgery", "architectures"})


def is_copied(module: str) -> bool:
    """Whether text of a module is copied, rather than the module imported."""
    top = module.partition(".")[0]
    return top in _OURS or not (top in sys.stdlib_module_names or top in _installed())


@cache
def _installed() -> frozenset[str]:
    return frozenset(packages_distributions()) | {"torch"}


@dataclass
class Inlined:
    """Text that is being put together.

    Attributes:
        imports: Import statements, each once, in the order they came up.
        definitions: Copied statements, in the order they can stand in.
        names: Every name that the text defines → what it stands for here.
        instead: Definitions to take from another module, ``module:name`` → module.
    """

    imports: dict[str, None] = field(default_factory=dict[str, None])
    definitions: list[str] = field(default_factory=list[str])
    names: dict[str, object] = field(default_factory=dict[str, object])
    instead: dict[str, str] = field(default_factory=dict[str, str])

    def add(self, module: str, name: str) -> None:
        """Make the global ``name`` of a module available under that name.

        Raises:
            ExportError: it cannot be copied, or two different things would bear one name.
        """
        if not is_copied(module):
            self._import(module, name)
            return
        found = _module(self.instead.get(f"{module}:{name}", module))
        if name not in found.statements:
            raise ExportError(
                f"{module}.{name} is put there at run time, so its text cannot be copied into "
                "an export"
            )
        statement = found.statements[name]
        if isinstance(statement, ast.Import | ast.ImportFrom):
            self._imported(found, statement, name)
            return
        self._define(found, statement, name)

    def alias(self, cls: type, alias: str) -> None:
        """Import a class of a library under another name."""
        if self.claim(alias, cls):
            self.imports[f"from {cls.__module__} import {cls.__name__} as {alias}"] = None

    def imported(self, statement: str, name: str, value: object) -> None:
        """Have an import statement that binds ``name``."""
        if self.claim(name, value):
            self.imports[statement] = None

    def claim(self, name: str, value: object) -> bool:
        """Note what a name stands for; False if it does already.

        Raises:
            ExportError: it stands for something else.
        """
        if name not in self.names:
            self.names[name] = value
            return True
        if self.names[name] is value:
            return False
        raise ExportError(
            f"two different things are called {name!r} in the code of this model: "
            f"{self.names[name]!r} and {value!r}"
        )

    def text(self) -> str:
        """Imports, then definitions."""
        return "\n\n\n".join(filter(None, [_sorted(self.imports), *self.definitions]))

    def _import(self, module: str, name: str) -> None:
        value: Any = getattr(importlib.import_module(module), name)
        if not isinstance(value, ModuleType):
            self.imported(f"from {module} import {name}", name, value)
        elif value.__name__ == name:
            self.imported(f"import {name}", name, value)
        else:
            parent, _, last = value.__name__.rpartition(".")
            renamed = "" if last == name else f" as {name}"
            whole = f"from {parent} import {last}{renamed}" if parent else f"import {last}{renamed}"
            self.imported(whole, name, value)

    def _imported(self, module: _Module, node: ast.Import | ast.ImportFrom, name: str) -> None:
        one = next(each for each in node.names if _bound(each, node) == name)
        if isinstance(node, ast.ImportFrom) and node.module is not None and is_copied(node.module):
            if one.asname not in {None, one.name}:
                raise ExportError(f"{module.name} renames {one.name}, which cannot be copied")
            if inspect.ismodule(sys.modules.get(f"{node.module}.{one.name}")):
                raise ExportError(
                    f"{module.name} imports the module {node.module}.{one.name} whole, of which "
                    "no text can be copied by itself"
                )
            self.add(node.module, one.name)
            return
        if isinstance(node, ast.Import) and is_copied(one.name):
            raise ExportError(f"{module.name} imports the module {one.name} whole")
        single = (
            ast.Import([one])
            if isinstance(node, ast.Import)
            else ast.ImportFrom(node.module, [one], node.level)
        )
        text = ast.unparse(single)
        self.imported(text, name, getattr(module.loaded, name, text))

    def _define(self, module: _Module, node: ast.stmt, name: str) -> None:
        defined = _defined(node)
        new = [self.claim(one, getattr(module.loaded, one, node)) for one in defined]
        if not any(new):
            return
        at_once = _names(*_evaluated(node))
        self._add_all(module, (name for name in at_once if name not in defined))
        self.definitions.append(module.text_of(node))
        # What only bodies and annotations name may stand further down, and refer back to this.
        self._add_all(module, (name for name in _names(node) if name not in defined))

    def _add_all(self, module: _Module, names: Iterable[str]) -> None:
        for name in names:
            if name in module.statements:
                self.add(module.name, name)


def _sorted(statements: Iterable[str]) -> str:
    """Imports, those of one module together, Python's own first."""
    whole: set[str] = set()
    parts: dict[str, set[str]] = {}
    for statement in statements:
        words = statement.split(maxsplit=3)
        if words[0] == "import":
            whole.add(statement)
        else:
            parts.setdefault(words[1], set()).add(words[3])
    lines = sorted(whole) + [f"from {m} import {_names_in(parts[m])}" for m in sorted(parts)]
    own = [line for line in lines if _is_standard(line)]
    return "\n".join([*own, *([""] if own else []), *(line for line in lines if line not in own)])


def _names_in(names: Iterable[str]) -> str:
    text = ", ".join(sorted(names))
    if len(text) < 60:
        return text
    return "(\n" + "".join(f"    {name},\n" for name in text.split(", ")) + ")"


def _is_standard(statement: str) -> bool:
    return statement.split()[1].partition(".")[0] in sys.stdlib_module_names


class _Module:
    """The top-level statements of a module by the names they define."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.loaded = importlib.import_module(name)
        try:
            self.source = inspect.getsource(self.loaded)
        except (OSError, TypeError):
            raise ExportError(f"there is no source text of the module {name}") from None
        self.lines = self.source.splitlines()
        tree = ast.parse(self.source)
        self.statements: dict[str, ast.stmt] = {}
        for node in _top_level(tree.body):
            for defined in _defined(node):
                self.statements.setdefault(defined, node)

    def text_of(self, node: ast.stmt) -> str:
        first, last = _lines(node)
        while first > 1 and self.lines[first - 2].startswith("#"):
            first -= 1
        return "\n".join(self.lines[first - 1 : last])


@cache
def _module(name: str) -> _Module:
    return _Module(name)


def _top_level(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements, those under ``if TYPE_CHECKING:`` included."""
    for node in body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from node.body
        else:
            yield node


def _defined(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return [_bound(each, node) for each in node.names]
    targets = node.targets if isinstance(node, ast.Assign) else []
    if isinstance(node, ast.AnnAssign):
        targets = [node.target]
    return [one.id for target in targets for one in ast.walk(target) if isinstance(one, ast.Name)]


def _bound(alias: ast.alias, node: ast.stmt) -> str:
    plain = alias.name if isinstance(node, ast.ImportFrom) else alias.name.partition(".")[0]
    return alias.asname or plain


def _names(*nodes: ast.AST) -> list[str]:
    walked = (one for node in nodes for one in ast.walk(node))
    return list(dict.fromkeys(one.id for one in walked if isinstance(one, ast.Name)))


def _evaluated(node: ast.stmt) -> Iterator[ast.AST]:
    """The parts of a statement that are evaluated when it is; annotations are not."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from (*node.decorator_list, *node.args.defaults)
        yield from (default for default in node.args.kw_defaults if default is not None)
    elif isinstance(node, ast.ClassDef):
        yield from (*node.bases, *(each.value for each in node.keywords), *node.decorator_list)
        for inner in node.body:
            yield from _evaluated(inner)
    elif isinstance(node, ast.AnnAssign):
        yield from () if node.value is None else (node.value,)
    else:
        yield node


def _lines(node: ast.stmt) -> tuple[int, int]:
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(each.lineno for each in decorators)])
    return first, node.end_lineno or node.lineno
