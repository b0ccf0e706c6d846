"""The text of a Python file that builds a rewritten model.

Everything in it that is not the text of an installed source file is a Python literal or a checked
name: no string of a checkpoint or a rule file gets into it in any other way.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn

from surgery.errors import ExportError
from surgery.exporting.code.inline import Inlined, is_copied
from surgery.exporting.code.rewrites import Method, Reclassed, Rewired, Rewrites, topology_of
from surgery.passes.streams import Fixed

_RUNTIME = "surgery.exporting.code.runtime"
_RECORDING = "surgery.exporting.code.recording"
_STANDARD = frozenset({"begin", "whole"})
_INDENT = "    "


class Code:
    """Builds the text.

    Args:
        rewrites: What the file has to say.
        records: Whether transformers records the states between layers.
    """

    def __init__(self, rewrites: Rewrites, *, records: bool = False) -> None:
        self.inlined = Inlined()
        self._records = records
        if records:
            self.inlined.instead[f"{_RUNTIME}:recorded"] = _RECORDING
        self.rewrites = rewrites
        self._classes: dict[tuple[Any, ...], str] = {}
        self._texts: list[str] = []
        self.root = False
        self.origins: dict[str, None] = {}
        self.inlined.imported("from torch import nn", "nn", nn)

    def stock(self, cls: type) -> str:
        """A name in the file for a stock class: imported under another name, or copied."""
        module = cls.__module__
        if is_copied(module):
            self.inlined.add(module, cls.__name__)
            return cls.__name__
        alias = f"Stock{identifier(cls.__name__)}"
        self.inlined.alias(cls, alias)
        return alias

    def root_class(self, cls: type) -> str:
        """A name for what the model's own class is to derive from, rewritten if it has to be.

        ``rewrite`` then leaves the class of the model itself alone.
        """
        self.root = True
        own = next((each for each in self.rewrites.classes if not each.path), None)
        return self.stock(cls) if own is None else self._class(own)

    def rewrite(self) -> str:
        """The classes and the function ``rewrite(model)``; "" where nothing is rewritten."""
        if not self.rewrites.any:
            return ""
        changed = [
            (each, self._class(each))
            for each in self.rewrites.classes
            if each.path or not self.root
        ]
        lines = [
            "def rewrite(model: nn.Module) -> None:",
            '    """Make a stock model what was exported: shared modules, learned shortcuts."""',
        ]
        if self.rewrites.shared:
            self.inlined.add(_RUNTIME, "share")
            lines += [f"    share(model, {literal(dict(self.rewrites.shared))})"]
        holders: dict[str, list[Rewired]] = {}
        for one in self.rewrites.shortcuts:
            holders.setdefault(one.holder, []).append(one)
        for holder, found in holders.items():
            lines += [f"    holder = model.get_submodule({holder!r})"]
            lines += ["    holder.shortcuts = nn.ModuleDict("]
            lines += ["        {"]
            for one in found:
                lines += textwrap.indent(
                    f"{one.number!r}: {self._shortcuts(one)},", " " * 12
                ).splitlines()
            lines += ["        }", "    )"]
        for each, name in changed:
            place = f"model.get_submodule({each.path!r})" if each.path else "model"
            lines += [f"    {place}.__class__ = {name}"]
            if self._records and any(
                cls.__name__ == "PreTrainedModel" for cls in each.base.__mro__
            ):
                self.inlined.add(_RECORDING, "records")
                lines += [f"    records({place})"]
        return "\n\n\n".join([*self._texts, "\n".join(lines)])

    def assembled(self, docstring: str, *parts: str) -> str:
        """The whole file: docstring, licences, imports, copied definitions, then ``parts``."""
        head = [
            f'"""{docstring.strip()}\n"""',
            *self._licences(),
            "from __future__ import annotations",
        ]
        body = [self.inlined.text(), *(part for part in parts if part)]
        text = "\n\n".join(head) + "\n\n" + "\n\n\n".join(body).rstrip() + "\n"
        compile(text, "<export>", "exec")
        return text

    # Classes -----------------------------------------------------------------------------------

    def _class(self, one: Reclassed) -> str:
        key = (one.base, one.holder, one.methods)
        if key in self._classes:
            return self._classes[key]
        base = self.stock(one.base)
        name = self._free(identifier(one.base.__name__))
        bases = [base]
        if one.holder:
            self.inlined.add(_RUNTIME, one.holder)
            bases.insert(0, one.holder)
        header = f"class {name}({', '.join(bases)}):"
        body = [f'"""A ``{one.base.__name__}`` whose layers are connected by learned shortcuts."""']
        body += [self._method(one, method, base) for method in one.methods]
        self._texts.append(f"{header}\n" + textwrap.indent("\n\n".join(body), _INDENT))
        self._classes[key] = name
        return name

    def _free(self, wanted: str) -> str:
        taken = {*self.inlined.names, *self._classes.values()}
        name = f"Rewired{wanted}" if wanted in taken else wanted
        number = 2
        while name in taken:
            name, number = f"Rewired{wanted}{number}", number + 1
        return name

    def _method(self, one: Reclassed, method: Method, base: str) -> str:
        source = textwrap.dedent(method.source).strip("\n")
        tree = ast.parse(source)
        _check_names(one, method, tree)
        module = method.function.__module__
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        for name in sorted(names):
            self._needed(name, module, cast("Any", method).function.__globals__)
        self.origins[module] = None
        owner = next(cls for cls in one.base.__mro__ if method.name in vars(cls))
        return _without_bare_super(source, tree, base if owner is one.base else self.stock(owner))

    def _needed(self, name: str, module: str, present: Mapping[str, Any]) -> None:
        """See that a global name that a method uses is there."""
        plain = name.rstrip("_")
        if name in present:
            value = present[name]
            if inspect.isclass(value) and value.__module__ == "builtins":
                return
            self.inlined.add(module, name)
        elif plain in _STANDARD and not hasattr(builtins, name):
            home = _RUNTIME if plain == "begin" else "surgery.capture.loops.targets"
            self.inlined.add(home, plain)
            if name != plain:
                self._texts.append(f"{name} = {plain}")

    # Shortcuts ---------------------------------------------------------------------------------

    def _shortcuts(self, one: Rewired) -> str:
        segment, topology = one.segment, topology_of(one)
        self.inlined.add(_RUNTIME, "Shortcuts")
        self.inlined.add(_RUNTIME, "Stream")
        cls = type(topology)
        self.inlined.add(cls.__module__, cls.__name__)
        options = {"init": topology.init, **one.arguments}
        given = ", ".join(f"{identifier(key)}={literal(value)}" for key, value in options.items())
        streams = [
            f"Stream({', '.join(map(literal, (s.position, s.name, s.inner, s.result)))}),"
            for s in segment.streams
        ]
        lines = [
            "Shortcuts(",
            f"    {cls.__name__}({topology.sites}, {given}),",
            f"    diagonal={literal(segment.diagonal)},",
            f"    shown={literal(segment.shown)},",
            f"    members={literal(segment.members)},",
            f"    streams=({' '.join(streams)}),",
        ]
        if segment.frozen is not None:
            self.inlined.add(Fixed.__module__, "Fixed")
            self.inlined.imported("import torch", "torch", torch)
            shape = literal(tuple(segment.frozen.weights.shape))
            lines.append(
                f"    frozen=Fixed(torch.zeros({shape}), {literal(segment.frozen.support)}),"
            )
        return "\n".join([*lines, ")"])

    # Licences ----------------------------------------------------------------------------------

    def _licences(self) -> Iterator[str]:
        for module in self.origins:
            if is_copied(module):
                continue
            header = _header(module)
            if re.search("copyright|licen[cs]e", header, re.IGNORECASE):
                yield f"# Methods below are made from those of {module}:\n#\n{header}"


def literal(value: object) -> str:
    """A value as a Python literal.

    Raises:
        ExportError: it is none.
    """
    text = repr(value)
    try:
        same = ast.literal_eval(text) == value
    except (ValueError, SyntaxError):
        same = False
    if not same:
        raise ExportError(f"{text[:80]} cannot be written into a Python file")
    return text


def identifier(name: str) -> str:
    """A name that may stand in code.

    Raises:
        ExportError: it may not.
    """
    if not name.isidentifier() or not name.isascii():
        raise ExportError(f"{name!r} is no name that can be written into a Python file")
    return name


def calls(parts: Iterable[tuple[str, object]]) -> str:
    """Keyword arguments of a call, as text."""
    return ", ".join(f"{identifier(name)}={literal(value)}" for name, value in parts)


def _check_names(one: Reclassed, method: Method, tree: ast.Module) -> None:
    free = set(method.function.__code__.co_freevars) - {"__class__"}
    free -= {name for name in free if name.rstrip("_") in _STANDARD}
    private = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.fullmatch(r"__\w*[^_]_?", node.attr)
    ]
    if free or private:
        raise ExportError(
            f"{one.base.__name__}.{method.name} uses {min([*free, *private])!r}, which only its "
            "own class can see; torch_export and onnx hold it"
        )


def _without_bare_super(source: str, tree: ast.Module, owner: str) -> str:
    """``super()`` as ``super(Owner, self)``: the new class is one further down."""
    function = cast("ast.FunctionDef", tree.body[0])
    arguments = [*function.args.posonlyargs, *function.args.args]
    places = [
        (node.lineno, node.col_offset)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "super"
        and not node.args
    ]
    lines = source.encode().splitlines(keepends=True)
    for line, column in sorted(places, reverse=True):
        text = lines[line - 1]
        full = f"super({owner}, {arguments[0].arg})".encode()
        lines[line - 1] = text[:column] + text[column:].replace(b"super()", full, 1)
    return b"".join(lines).decode()


def _header(module: str) -> str:
    """The comment at the top of a module's file: its copyright and licence."""
    found = inspect.getsourcefile(__import__(module, fromlist=["_"]))
    if found is None:
        return ""
    with open(found, encoding="utf-8") as file:  # noqa: PTH123 - a path that inspect gave
        lines = [line.rstrip() for line in file]
    start = 1 if lines and lines[0].startswith("#!") else 0
    header: list[str] = []
    for line in lines[start:]:
        if not line.startswith("#"):
            break
        header.append(line)
    return "\n".join(header)
