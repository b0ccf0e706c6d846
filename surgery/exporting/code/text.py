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
from typing import Any, TypeVar, cast

import torch
from torch import nn

from surgery.errors import ExportError
from surgery.exporting.code.banks import ADAPTING, attaching
from surgery.exporting.code.inline import Inlined, is_copied
from surgery.exporting.code.literals import identifier, literal
from surgery.exporting.code.rewrites import (
    Method,
    Reclassed,
    Rewired,
    Rewrites,
    topology_of,
)
from surgery.passes.streams import Fixed

_RUNTIME = "surgery.exporting.code.runtime"
#: What reads adapters → its class in a generated file, and the class right above which it stands;
#: None where it comes before the layer's own class.
_HOSTS: dict[str, tuple[str, type[nn.Module] | None]] = {
    "linear": ("AdaptedLinear", nn.Linear),
    "embedding": ("AdaptedEmbedding", nn.Embedding),
    "conv1d": ("AdaptedConv1d", nn.Conv1d),
    "conv2d": ("AdaptedConv2d", nn.Conv2d),
    "conv3d": ("AdaptedConv3d", nn.Conv3d),
    "output": ("AdaptedOutput", None),
    "weight": ("AdaptedWeight", None),
}
_RECORDING = "surgery.exporting.code.recording"
_STANDARD = frozenset({"begin", "whole"})
_INDENT = "    "

T = TypeVar("T")


class Code:
    """Builds the text.

    Args:
        rewrites: What the file has to say.
        records: Whether transformers records the states between layers.
    """

    def __init__(self, rewrites: Rewrites, *, records: bool = False) -> None:
        self.inlined = Inlined()
        self._records = records
        for name in ("Bank", "bank_of"):
            self.inlined.instead[f"surgery.passes.hosts.bank:{name}"] = ADAPTING
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
            '    """Make a stock model what was exported."""',
            *self._holders(),
            *self._attached({each.path: name for each, name in changed}),
            *self._sharing(),
        ]
        first = {one.paths[0] for one in self.rewrites.adapted if not one.bare}
        left = ((name, each.path) for each, name in changed if each.path not in first)
        for name, paths in _grouped(left):
            lines += _for_each(paths, [f"layer.__class__ = {name}"])
        for each, _ in changed:
            if self._records and any(
                cls.__name__ == "PreTrainedModel" for cls in each.base.__mro__
            ):
                self.inlined.add(_RECORDING, "records")
                lines += [f"    records({_place(each.path)})"]
        if not self._records:  # the loader of transformers would undo it
            lines += [f"    {each}" for each in self.frozen("model")]
        return "\n\n\n".join([*self._texts, "\n".join(lines)])

    def frozen(self, model: str) -> list[str]:
        """The statement that lets only the adapters be trained; none if all of it was trained."""
        if self.rewrites.trained is None:
            return []
        self.inlined.add(ADAPTING, "train_adapters")
        return [f"train_adapters({model}, {literal(tuple(sorted(self.rewrites.trained)))})"]

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

    # Statements of ``rewrite`` ------------------------------------------------------------------

    def _holders(self) -> Iterator[str]:
        """Put shortcuts beside layers."""
        holders: dict[str, list[Rewired]] = {}
        for one in self.rewrites.shortcuts:
            holders.setdefault(one.holder, []).append(one)
        for holder, found in holders.items():
            yield f"    holder = model.get_submodule({holder!r})"
            yield "    holder.shortcuts = nn.ModuleDict("
            yield "        {"
            for one in found:
                text = f"{one.number!r}: {self._shortcuts(one)},"
                yield from textwrap.indent(text, " " * 12).splitlines()
            yield "        }"
            yield "    )"

    def _attached(self, classes: Mapping[str, str]) -> Iterator[str]:
        """Put adapters beside weights, those of one form in one loop, and the class over layers."""
        forms: list[tuple[str, str]] = []
        for one in self.rewrites.adapted:
            path = one.paths[0]
            statements = attaching(one, self.inlined)
            if not one.bare and path in classes:
                statements.append(f"layer.__class__ = {classes[path]}")
            forms.append(("\n".join(statements), path))
        for text, paths in _grouped(forms):
            yield from _for_each(paths, text.splitlines())

    def _sharing(self) -> Iterator[str]:
        """Put modules in the place of others, too."""
        shared = dict(self.rewrites.shared)
        for one in self.rewrites.adapted:
            first, *others = one.places()
            shared |= dict.fromkeys(others, first)
        if shared:
            self.inlined.add(_RUNTIME, "share")
            yield f"    share(model, {literal(shared)})"

    # Classes -----------------------------------------------------------------------------------

    def _class(self, one: Reclassed) -> str:
        key = (one.base, one.holder, one.host, one.methods)
        if key in self._classes:
            return self._classes[key]
        host, above = _HOSTS[one.host] if one.host else ("", None)
        if host:
            self.inlined.add(ADAPTING, host)
        if above is one.base and not one.holder and not one.methods:
            self._classes[key] = host
            return host
        base = self.stock(one.base)
        name = self._free(identifier(one.base.__name__))
        bases = [base, host] if above else [host, base]
        if one.holder:
            self.inlined.add(_RUNTIME, one.holder)
            bases.insert(0, one.holder)
        header = f"class {name}({', '.join(filter(None, bases))}):"
        body = [f'"""A ``{one.base.__name__}`` {_told(one)}."""']
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


def _told(one: Reclassed) -> str:
    said = [
        "with low-rank adapters" if one.host else "",
        "whose layers are connected by learned shortcuts" if one.holder or one.methods else "",
    ]
    return " ".join(filter(None, said))


def _grouped(pairs: Iterable[tuple[str, T]]) -> Iterator[tuple[str, list[T]]]:
    """What has the same text, in the order in which the texts first came."""
    found: dict[str, list[T]] = {}
    for text, one in pairs:
        found.setdefault(text, []).append(one)
    return iter(found.items())


def _place(path: str) -> str:
    return f"model.get_submodule({literal(path)})" if path else "model"


def _for_each(paths: list[str], statements: list[str]) -> Iterator[str]:
    """Statements about ``layer``, for the layers with these paths."""
    if len(paths) == 1:
        yield f"    layer = {_place(paths[0])}"
        yield from (_INDENT + each for each in statements)
        return
    yield "    for path in ("
    yield from (f"        {literal(path)}," for path in paths)
    yield "    ):"
    yield "        layer = model.get_submodule(path)"
    yield from (2 * _INDENT + each for each in statements)


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
