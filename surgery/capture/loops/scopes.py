"""Names and the scopes they live in."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator

from surgery.capture.loops.values import NOTHING, Value


class Scope:
    """The names of one function, lambda or comprehension."""

    def __init__(self, names: Iterable[str], outer: Scope | None) -> None:
        self.values: dict[str, Value] = dict.fromkeys(names, NOTHING)
        self.outer = outer

    def holder(self, name: str) -> Scope | None:
        """The scope, this or an outer one, that a name belongs to."""
        scope: Scope | None = self
        while scope is not None and name not in scope.values:
            scope = scope.outer
        return scope


def parameters(arguments: ast.arguments) -> list[str]:
    """The named parameters of a function, those by keyword only last."""
    return [arg.arg for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def names_of(node: ast.AST) -> set[str]:
    """The local names of a function or lambda."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return set()
    arguments = node.args
    names = {*parameters(arguments)}
    names |= {arg.arg for arg in (arguments.vararg, arguments.kwarg) if arg is not None}
    body: list[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else [*node.body]
    for part in body:
        names |= set(stored(part))
    return names - {name for part in body for name in _declared(part)}


def _declared(node: ast.AST) -> Iterator[str]:
    """Names that a function says are not its own."""
    if isinstance(node, ast.Global | ast.Nonlocal):
        yield from node.names
    if isinstance(node, ast.stmt | ast.excepthandler) and not isinstance(node, ast.FunctionDef):
        for child in ast.iter_child_nodes(node):
            yield from _declared(child)


def assigned(node: ast.FunctionDef) -> set[str]:
    """The names that the body of a function assigns."""
    return {name for statement in node.body for name in stored(statement)}


def stored(node: ast.AST) -> Iterator[str]:
    """Names assigned in a piece of code, not counting scopes inside it."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
        yield node.id
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield node.name
        return
    if isinstance(node, ast.Import | ast.ImportFrom):
        yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
    if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
        yield node.name
    if isinstance(node, ast.Lambda):
        return
    if isinstance(node, ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp):
        inside = (one for one in ast.walk(node) if isinstance(one, ast.NamedExpr))
        yield from (one.target.id for one in inside)
        return
    for child in ast.iter_child_nodes(node):
        yield from stored(child)
