"""The text that makes the adapters of a weight and puts them beside it."""

from __future__ import annotations

import dataclasses
from typing import cast

from architectures.adapters import Adapter, Method, Sliced
from surgery.exporting.code.inline import Inlined
from surgery.exporting.code.literals import calls, identifier, literal
from surgery.exporting.code.rewrites import Adapted

#: Where what such text needs is defined.
ADAPTING = "surgery.exporting.code.adapting"


def attaching(one: Adapted, inlined: Inlined) -> list[str]:
    """Statements that give ``layer`` the adapters of its weight.

    Args:
        one: The weight with its adapters.
        inlined: Gets the definitions that the statements need.

    Raises:
        ExportError: an adapter has no text.
    """
    bank = one.bank
    inlined.add(ADAPTING, "attach")
    inlined.add(ADAPTING, "Bank")
    inlined.add("architectures.adapters", "Matrix")
    matrix = dataclasses.asdict(bank.matrix)
    lines = [f"matrix = Matrix({calls(matrix.items())})", "adapters = {"]
    for name, adapter in bank.adapters.items():
        lines.append(f"    {literal(name)}: {_adapter(adapter, bank.matrix.columns, inlined)},")
    parameter = literal(bank.parameter)
    where = f", {parameter}" if one.bare else ""
    made = f"Bank(matrix, {parameter}, adapters, {literal(bank.active)})"
    return [*lines, "}", f"attach(layer, {made}{where})"]


def _adapter(adapter: Adapter, columns: int, inlined: Inlined) -> str:
    if not isinstance(adapter, Sliced):
        return _method(cast("Method", adapter), "matrix", inlined)
    inlined.add("architectures.adapters", "Sliced")
    parts: list[str] = []
    for name, (ranges, method) in adapter.parts.items():
        rows = sum(stop - start for start, stop in ranges)
        made = _method(method, f"Matrix.of(({rows}, {columns}), stacked=False)", inlined)
        parts.append(f"{literal(name)}: ({literal(ranges)}, {made})")
    return f"Sliced({{{', '.join(parts)}}}, {adapter.rows})"


def _method(method: Method, matrix: str, inlined: Inlined) -> str:
    cls = type(method)
    inlined.add(cls.__module__, cls.__name__)
    name = identifier(cls.__name__)
    given = {"rank": method.rank, "scaling": method.scaling, "dropout": method.dropout}
    options = dataclasses.asdict(method.options)
    told = f", options={name}.Options({calls(options.items())})" if options else ""
    return f"{name}({matrix}, {calls(given.items())}{told})"
