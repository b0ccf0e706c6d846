"""The edit of one method: calls of blocks go through ``steps``, which is made before the first."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from surgery.capture.loops.findings import Findings, Run, Trouble
from surgery.capture.loops.source import Insertion, Source, uses_name

_WRAPPERS = {
    "call": "",
    "through": ".through",
    "sequence": ".sequence",
    "whole": "",
    "view": ".view",
}
_SCOPES = (
    ast.For, ast.AsyncFor, ast.While, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef,
)  # fmt: skip
_WHOLE = "*"
_LISTING = ("children", "named_children")
_Place = tuple[int, int, ast.stmt]
"""A statement: which list it stands in (by identity), where in it, and itself."""


class NotUnderstood(Exception):
    """A method runs blocks in a way that cannot be rewritten."""


@dataclass(frozen=True)
class Rewriting:
    """What to put into a method.

    Attributes:
        insertions: The text and its places.
        begin: The name the runtime is called by inside the method.
        whole: The name of `surgery.capture.loops.targets.whole` inside the method.
    """

    insertions: tuple[Insertion, ...]
    begin: str
    whole: str


def plan(
    source: Source, findings: Findings, elsewhere: frozenset[str] = frozenset()
) -> Rewriting | None:
    """The edit that findings ask for; None if the method runs no block.

    Args:
        source: The method.
        findings: What it does.
        elsewhere: Lists of blocks that another method runs in full.

    Raises:
        NotUnderstood: it runs, or may run, a block in a way that cannot be rewritten.
    """
    runs = list(findings.runs.values())
    troubles = list(findings.troubles.values())
    run = elsewhere.union(*(one.containers for one in runs))
    troubles = [one for one in troubles if not (one.aside and one.containers <= run)]
    stops = [trouble for trouble in troubles if trouble.runs] or (troubles if runs else [])
    if stops:
        raise NotUnderstood(_reason(source, stops[0]))
    if not runs:
        return None
    _check_strings(source, runs)
    containers = sorted({path for run in runs for path in run.containers})
    owner = source.node.args.args[0].arg if source.node.args.args else "self"
    runs += _views(source, owner, containers)
    begin, whole = _free_name("begin", source), _free_name("whole", source)
    names = {path: _free_name(_steps_name(path, containers), source) for path in containers}
    names[_WHOLE] = whole
    insertions = [one for run in runs for one in _wrap(source, run, names)]
    for rank, path in enumerate(containers):
        uses = [run.callee for run in runs if path in run.containers]
        text = f"{names[path]} = {begin}({expression(owner, path)})"
        insertions.append(_before(source, _place(source, uses), text, rank))
    return Rewriting(tuple(insertions), begin, whole)


def _views(source: Source, owner: str, containers: Iterable[str]) -> Iterator[Run]:
    """Calls that list all children of a container, those among them that were put in."""
    lists = {f"{expression(owner, path)}.{name}": path for path in containers for name in _LISTING}
    for node in ast.walk(source.node):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in lists:
            yield Run("view", node, frozenset({lists[ast.unparse(node.func)]}))


def expression(owner: str, path: str) -> str:
    """Python for the module at ``path``, seen from ``owner``."""
    if all(part.isidentifier() for part in path.split(".")):
        return f"{owner}.{path}"
    return f"{owner}.get_submodule({path!r})" if path else owner


def _reason(source: Source, trouble: Trouble) -> str:
    text = f"{trouble.why} ({source.where(trouble.node)})"
    if trouble.loop is None or isinstance(trouble.loop, ast.expr):
        shown = source.line_of(trouble.loop or trouble.node)
        return f"{text}: `{shown}`"
    return f"{text}, in the loop `{source.line_of(trouble.loop)}` ({source.where(trouble.loop)})"


def _check_strings(source: Source, runs: Sequence[Run]) -> None:
    """Positions inside f-strings are not to be relied on before Python 3.12."""
    callees = {run.callee for run in runs}
    for node in ast.walk(source.node):
        if isinstance(node, ast.JoinedStr) and not callees.isdisjoint(ast.walk(node)):
            where, shown = source.where(node), source.line_of(node)
            raise NotUnderstood(f"a block is run inside a string ({where}): `{shown}`")


def _free_name(wanted: str, source: Source) -> str:
    while uses_name(source.code, wanted):
        wanted += "_"
    return wanted


def _steps_name(path: str, containers: Sequence[str]) -> str:
    if len(containers) == 1:
        return "steps"
    last = path.replace(".", "_") or "own"
    return f"{last}_steps"


def _wrap(source: Source, run: Run, names: dict[str, str]) -> Iterator[Insertion]:
    start = source.offset(run.callee.lineno, run.callee.col_offset)
    end = source.offset(run.callee.end_lineno or 1, run.callee.end_col_offset or 0)
    wrapper = _WRAPPERS[run.kind]
    openings = [f"{names[path]}{wrapper}(" for path in sorted(run.containers)]
    openings += [f"{names[_WHOLE]}("] if run.kind == "whole" else []
    # Nested callees (`f(x)(y)`) start together: the outer one's opening goes first.
    yield Insertion(start, 100 - (end - start), "".join(openings))
    closing = ")" if run.block is None else f", {run.block})"
    yield Insertion(end, 1000 + end - start, closing * len(openings))


# Where `begin` stands -----------------------------------------------------------------------------


def _place(source: Source, uses: Iterable[ast.expr]) -> ast.stmt:
    """The statement before which `begin` is reached once, whichever path leads to a use.

    As deep in the code as all uses agree on, but outside every loop and nested function: what
    they repeat must not start the history again.
    """
    chains = [_chain(source, use) for use in uses]
    found = chains[0][0]
    for depth in range(min(len(chain) for chain in chains)):
        here = [chain[depth] for chain in chains]
        if len({place[0] for place in here}) > 1:
            break
        found = min(here, key=lambda place: place[1])
        if len({place[1] for place in here}) > 1:
            break
    return found[2]


def _chain(source: Source, use: ast.expr) -> list[_Place]:
    """The statements around an expression, outermost first, down to the first loop."""
    found: list[_Place] = []
    body: list[ast.stmt] | None = source.node.body
    while body is not None:
        index = next(i for i, statement in enumerate(body) if _contains(statement, use))
        statement = body[index]
        if found and _is_elif(source, statement):
            break
        found.append((id(body), index, statement))
        if isinstance(statement, _SCOPES):
            break
        body = next((one for one in _bodies(statement) if _holds(one, use)), None)
    return found


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for name in ("body", "orelse", "finalbody"):
        inner = getattr(node, name, None)
        if isinstance(inner, list) and inner:
            yield inner
    for name in ("handlers", "cases"):
        for case in getattr(node, name, ()):
            yield from _bodies(case)


def _holds(body: Sequence[ast.stmt], use: ast.expr) -> bool:
    return any(_contains(statement, use) for statement in body)


def _contains(node: ast.AST, use: ast.expr) -> bool:
    return any(inner is use for inner in ast.walk(node))


def _is_elif(source: Source, node: ast.stmt) -> bool:
    if not isinstance(node, ast.If):
        return False
    return source.text[source.offset(node.lineno, node.col_offset) :].startswith(b"elif")


def _before(source: Source, node: ast.stmt, text: str, rank: int) -> Insertion:
    """A statement put in before another: on a line of its own where that line begins with it."""
    first = _first_position(source, node)
    start = source.offset(first, 0)
    indent = source.text[start : source.offset(first, _first_column(source, node))].decode()
    if indent.strip():
        return Insertion(source.offset(first, node.col_offset), rank - 1000, f"{text}; ")
    return Insertion(start, rank - 1000, f"{indent}{text}\n")


def _first_position(source: Source, node: ast.stmt) -> int:
    del source
    decorators: list[ast.expr] = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _first_column(source: Source, node: ast.stmt) -> int:
    line = source.lines[_first_position(source, node) - 1]
    if getattr(node, "decorator_list", []):
        return len(line) - len(line.lstrip())
    return node.col_offset
