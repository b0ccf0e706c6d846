"""Which object a call in a driver's code calls, and what it does with a block it is given."""

from __future__ import annotations

import ast
import builtins
import collections
import copy
import functools
import inspect
import itertools
import re
import types
from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint

UNKNOWN = object()
"""The called object is known only when the code runs."""

INSPECTING: frozenset[Any] = frozenset(
    {
        isinstance, hasattr, len, type, id, print, repr, str, bool, callable, issubclass, setattr,
        delattr, range, int, float, hash, vars, dir, any, all, sum, max, min, format, super,
        inspect.signature, copy.copy, copy.deepcopy,
    }
)  # fmt: skip
"""Functions that take a module and run nothing."""

GATHERING: frozenset[Any] = frozenset(
    {
        list, tuple, iter, reversed, sorted, set, frozenset, collections.deque, itertools.cycle,
        itertools.islice,
    }
)  # fmt: skip
"""Functions that give the items of their first argument."""

CHAIN_FROM = vars(itertools.chain)["from_iterable"]

SEQUENCES: frozenset[Any] = frozenset({vars(checkpoint)["checkpoint_sequential"]})
"""Functions that run the items of their first argument, one after the other."""


def resolve(
    expression: ast.expr, function: types.FunctionType, is_local: Callable[[str], bool]
) -> Any:
    """The object an expression names through globals and closure, or UNKNOWN."""
    if isinstance(expression, ast.Name):
        if is_local(expression.id):
            return UNKNOWN
        return _free(expression.id, function)
    if isinstance(expression, ast.Attribute):
        owner = resolve(expression.value, function, is_local)
        if isinstance(owner, types.ModuleType | type):
            return inspect.getattr_static(owner, expression.attr, UNKNOWN)
    return UNKNOWN


def _free(name: str, function: types.FunctionType) -> Any:
    if name in function.__code__.co_freevars:
        cell = (function.__closure__ or ())[function.__code__.co_freevars.index(name)]
        try:
            return cell.cell_contents
        except ValueError:
            return UNKNOWN
    return function.__globals__.get(name, getattr(builtins, name, UNKNOWN))


def python_function(called: Any) -> types.FunctionType | None:
    """The function with Python text behind a callable, looking through ``__wrapped__``."""
    function: Any = called.__func__ if isinstance(called, staticmethod) else called
    unwrapped = inspect.unwrap(function) if isinstance(function, types.FunctionType) else None
    return unwrapped if isinstance(unwrapped, types.FunctionType) else None


def applies(called: Any) -> bool:
    """Whether it takes a function first and the function's arguments after it."""
    if called is UNKNOWN:
        return True
    found = python_function(called)
    if found is None:
        return False
    parameters = list(inspect.signature(found).parameters.values())
    kinds = [parameter.kind for parameter in parameters[:2]]
    return kinds == [inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL]


def constant_arguments(
    function: types.FunctionType, call: ast.Call, shift: int
) -> dict[str, bool] | None:
    """The truth of the parameters that a call leaves at their default or gives a constant.

    Args:
        function: What is called.
        call: The call.
        shift: How many parameters come before the first argument (1 for a bound method).

    Returns:
        By name, or None if arguments are unpacked from a list or dictionary.
    """
    starred = any(isinstance(argument, ast.Starred) for argument in call.args)
    if starred or any(keyword.arg is None for keyword in call.keywords):
        return None
    parameters = inspect.signature(function).parameters
    given: dict[str, ast.expr] = dict(zip([*parameters][shift:], call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg is not None}
    constants = {
        name: bool(value.value) for name, value in given.items() if isinstance(value, ast.Constant)
    }
    defaults = {
        name: bool(parameter.default)
        for name, parameter in parameters.items()
        if name not in given and isinstance(parameter.default, bool | int | str | None)
    }
    return {**defaults, **constants}


def is_partial(called: Any) -> bool:
    """Whether it is `functools.partial`."""
    return called is functools.partial


def name_pattern(expression: ast.expr) -> re.Pattern[str] | None:
    """What an attribute name that is put together at run time looks like; None for anything."""
    if isinstance(expression, ast.JoinedStr):
        parts = [_pattern(part) for part in expression.values]
        return re.compile("".join(parts))
    if isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Add):
        return re.compile(_pattern(expression.left) + _pattern(expression.right))
    if isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Mod):
        text = expression.left.value if isinstance(expression.left, ast.Constant) else None
        if isinstance(text, str):
            return re.compile(".*".join(re.escape(part) for part in re.split(r"%\w", text)))
    return None


def _pattern(part: ast.expr) -> str:
    if isinstance(part, ast.Constant) and isinstance(part.value, str):
        return re.escape(part.value)
    return ".*"
