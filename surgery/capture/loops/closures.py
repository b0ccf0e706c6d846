"""Functions made around a block, to be handed to a checkpointing function.

    def custom_forward(*inputs):
        return layer(*inputs, mask)
    x = checkpoint(custom_forward, x)

What comes out of the checkpointed region is what the block returned, and what goes in is what the
block is given first, so that the call can be treated as one of the block itself.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence

from surgery.capture.loops.values import LocalFunction


def passes_on(function: LocalFunction, call: ast.Call) -> bool:
    """Whether a function gives its arguments to ``call``, first and in order, and returns it."""
    if _returned(function) != [call]:
        return False
    arguments = function.args
    defaults = len(arguments.defaults)
    required = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args)]
    wanted = required[: len(required) - defaults]
    given = [argument.id for argument in call.args if isinstance(argument, ast.Name)]
    if given[: len(wanted)] != wanted or len(call.args) < len(wanted):
        return False
    if arguments.vararg is None:
        return bool(wanted)
    rest = call.args[len(wanted)] if len(call.args) > len(wanted) else None
    return isinstance(rest, ast.Starred) and _is_name(rest.value, arguments.vararg.arg)


def _returned(function: LocalFunction) -> list[ast.expr]:
    if isinstance(function, ast.Lambda):
        return [function.body]
    body = [one for one in function.body if not _is_docstring(one)]
    only = body[0] if len(body) == 1 else None
    return [only.value] if isinstance(only, ast.Return) and only.value is not None else []


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_name(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def block_name(
    function: LocalFunction,
    callee: ast.expr,
    handed: ast.expr,
    makers: Mapping[LocalFunction, LocalFunction],
) -> str | None:
    """Python for the block inside ``function``, as seen from where ``handed`` is evaluated.

    Args:
        function: The function around the block.
        callee: The block in it.
        handed: The expression at the call of the checkpointing function: the function itself, or
            a call of the function that makes it.
        makers: The function in which another is defined.
    """
    if isinstance(callee, ast.Attribute) and callee.attr in {"forward", "__call__"}:
        callee = callee.value
    if not isinstance(callee, ast.Name):
        return None
    default = _default(function, callee.id)
    if default is not None:
        return default.id if isinstance(default, ast.Name) else None
    if not isinstance(handed, ast.Call):
        return callee.id
    maker = makers.get(function)
    argument = None if maker is None else _argument(maker, callee.id, handed)
    return ast.unparse(argument) if isinstance(argument, ast.Name) else None


def _default(function: LocalFunction, name: str) -> ast.expr | None:
    arguments = function.args
    positional = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args)]
    named: Sequence[tuple[str, ast.expr | None]] = [
        *zip(reversed(positional), reversed(arguments.defaults), strict=False),
        *zip((arg.arg for arg in arguments.kwonlyargs), arguments.kw_defaults, strict=True),
    ]
    return dict(named).get(name)


def _argument(maker: LocalFunction, name: str, call: ast.Call) -> ast.expr | None:
    """What a call of ``maker`` gives for its parameter ``name``."""
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value
    names = [arg.arg for arg in (*maker.args.posonlyargs, *maker.args.args)]
    index = names.index(name) if name in names else len(call.args)
    return call.args[index] if index < len(call.args) else None
