"""A captured graph as readable Python.

Operations stand in the order of the original, nested where one follows from the other; sizes and
attributes of the module are written where they are used; a variable is deleted after its last
use, so that memory is freed as early as the original frees it. What ran under ``torch.no_grad``
or autocast is put into ``with`` blocks again.
"""

from __future__ import annotations

import dataclasses
import itertools
import operator
import re
from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, cast

import torch
from torch import fx, nn

from surgery.capture import analysis, private
from surgery.capture import signature as sig
from surgery.capture.contexts import Change, Checkpointed
from surgery.capture.expressions import MODULES, Expressions
from surgery.capture.guards import Guard, assign, expect
from surgery.capture.signs import PREFIXES, SIGNS

_INDENT = "    "
_WIDTH = 88


class Miss(Exception):
    """A guard inside a generated forward did not hold.

    Args:
        index: Which of `Code.inline`.
        values: The local variables of the forward.
    """

    def __init__(self, index: int, values: Mapping[str, Any]) -> None:
        super().__init__(index)
        self.index = index
        self.values = values


@dataclasses.dataclass(frozen=True)
class Condition:
    """One thing that holds at a call the graph is right for.

    Attributes:
        text: Python over the parameters of the forward.
        why: What to tell the user when it does not hold.
    """

    text: str
    why: str


@dataclasses.dataclass(frozen=True)
class Code:
    """Generated source.

    Attributes:
        source: The text of ``accepts`` and ``forward``.
        names: The globals it refers to, besides builtins.
        conditions: What ``accepts`` checks, one by one.
        inline: The guards checked on the way, in the order of their numbers in the text.
    """

    source: str
    names: dict[str, Any]
    conditions: tuple[Condition, ...]
    inline: tuple[Guard, ...]


def generate(
    graph: fx.Graph,
    root: nn.Module,
    signature: sig.Signature,
    constants: Mapping[str, Any],
) -> Code:
    """Write the Python of a captured graph.

    Args:
        graph: A graph of a replayable trace.
        root: The module it was captured from: says how to spell the path to a child.
        signature: The calls it is right for.
        constants: Tensors that belong to no module, by their ``get_attr`` target.
    """
    return _Writer(graph, root, signature, constants).code()


@dataclasses.dataclass
class _Statement:
    """A line of the forward: ``node`` as ``text``, kept as ``target`` unless that is empty."""

    node: fx.Node
    text: str
    target: str
    context: tuple[Change, ...]
    checkpoint: Checkpointed | None = None
    comment: str = ""

    def line(self) -> str:
        kept = f"{self.target} = {self.text}" if self.target else self.text
        return kept + self.comment


class _Writer:
    def __init__(
        self,
        graph: fx.Graph,
        root: nn.Module,
        signature: sig.Signature,
        constants: Mapping[str, Any],
    ) -> None:
        self._nodes = list(graph.nodes)
        self._inputs = [node for node in self._nodes if node.op == "placeholder"]
        self._signature = signature
        self._upfront = analysis.upfront(self._nodes)
        self._inline = analysis.inlined(self._nodes)
        self._used = analysis.used(self._nodes, self._upfront)
        self._guards: list[Guard] = []
        self._say = Expressions(
            root, constants, self._inline, frozenset({"Tensor", "Miss", "checkpoint"})
        )
        self._say.names.update(Tensor=torch.Tensor, Miss=Miss)

    def code(self) -> Code:
        lines = [_INDENT + line for line in self._body()]
        conditions = tuple(self._conditions())
        own = self._inputs[: len(self._signature.parameters)]
        parameters = ", ".join(["self", *map(self._say.variable, own)])
        inputs = ", ".join(["self", *map(self._parameter, self._inputs)])
        checks = f"\n{_INDENT * 2}and ".join(condition.text for condition in conditions)
        source = "\n".join(
            [
                f"def accepts({parameters}):",
                f"{_INDENT}return (",
                f"{_INDENT * 2}{checks or True}",
                f"{_INDENT})",
                "",
                "",
                f"def forward({inputs}):",
                *lines,
                "",
            ]
        )
        modules = {name: module for name, module in MODULES.items() if f"{name}." in source}
        names = {**modules, **self._say.names}
        return Code(source, names, conditions, tuple(self._guards))

    def _parameter(self, node: fx.Node) -> str:
        stars = "*" if str(node.target).startswith("*") else ""
        return stars + self._say.variable(node)

    # -- the conditions of a call --------------------------------------------------------------

    def _conditions(self) -> Iterator[Condition]:
        for parameter, node in zip(self._signature.parameters, self._inputs, strict=False):
            spec = self._signature.specs[parameter.name]
            yield from self._spec_conditions(self._say.variable(node), spec)
        for state in self._signature.autocast:
            kind = repr(state.device_type)
            switch = "on" if state.enabled else "off"
            text = f"torch.is_autocast_enabled({kind}) is {state.enabled}"
            yield Condition(text, f"autocast on {state.device_type} is {switch}")
            if state.enabled:
                text = f"torch.get_autocast_dtype({kind}) == {state.dtype}"
                yield Condition(text, f"autocast on {state.device_type} uses {state.dtype}")
        yield from self._guard_conditions()

    def _guard_conditions(self) -> Iterator[Condition]:
        seen: set[str] = set()
        for node in self._nodes:
            if node.target is not expect or node not in self._upfront:
                continue
            text = self._holds(node)
            if text not in seen:
                seen.add(text)
                yield Condition(text, str(node.meta["guard"]))

    def _spec_conditions(self, name: str, spec: sig.Spec) -> Iterator[Condition]:
        yield Condition(self._spec_condition(name, spec), f"{name} is {spec}")
        if isinstance(spec, sig.Items):
            for index, item in enumerate(spec.items):
                yield from self._spec_conditions(f"{name}[{index}]", item)
        if isinstance(spec, sig.Keyed):
            for key, item in spec.items:
                yield from self._spec_conditions(f"{name}[{key!r}]", item)

    def _spec_condition(self, name: str, spec: sig.Spec) -> str:
        if isinstance(spec, sig.Tensor):
            return f"isinstance({name}, Tensor) and {name}.ndim == {spec.rank}"
        if isinstance(spec, sig.Static):
            same = "is" if spec.value is None or isinstance(spec.value, bool) else "=="
            return f"{name} {same} {self._say.literal(spec.value)}"
        if isinstance(spec, sig.Items):
            kind = self._say.name(spec.kind)
            return f"type({name}) is {kind} and len({name}) == {len(spec.items)}"
        if isinstance(spec, sig.Keyed):
            keys = ", ".join(repr(key) for key, _ in spec.items)
            return f"{name}.keys() == {{{keys}}}" if keys else f"not {name}"
        return f"type({name}) is {self._say.name(spec.kind)}"

    def _holds(self, node: fx.Node) -> str:
        value, expected = node.args
        if node.meta["guard"].kind == "attribute" and isinstance(expected, bool):
            return f"{self._say.operand(value)} is {expected}"
        if expected is False:
            return f"not {self._say.operand(value)}"
        if expected is True:
            return self._say.write(value)
        if expected is None:
            return f"{self._say.operand(value)} is None"
        return f"{self._say.operand(value)} == {self._say.write(expected)}"

    def _fails(self, node: fx.Node) -> str:
        value, expected = node.args
        if expected is False:
            return self._say.write(value)
        if expected is True:
            return f"not {self._say.operand(value)}"
        if expected is None:
            return f"{self._say.operand(value)} is not None"
        return f"{self._say.operand(value)} != {self._say.write(expected)}"

    # -- the body ------------------------------------------------------------------------------

    def _body(self) -> Iterator[str]:
        statements = self._nested([made for node in self._nodes for made in self._statements(node)])
        dead = self._dead(statements)
        start = 0
        for checkpoint, group in itertools.groupby(statements, lambda made: made.checkpoint):
            end = start + len(list(group))
            if checkpoint is None:
                yield from _lines(statements[start:end], dead[start:end])
            else:
                yield from self._checkpointed(checkpoint, statements, dead, start, end)
            start = end

    def _checkpointed(
        self,
        checkpoint: Checkpointed,
        statements: list[_Statement],
        dead: list[list[str]],
        start: int,
        end: int,
    ) -> Iterator[str]:
        """What ran under ``torch.utils.checkpoint``, as a function of its own that does again."""
        inside, after = statements[start:end], statements[end:]
        made = {statement.target for statement in inside if statement.target.isidentifier()}
        known = {*map(self._say.variable, self._inputs), *(s.target for s in statements[:start])}
        given = sorted(known & _words(inside))
        results = sorted(made & _words(after))
        gone = [[name for name in names if name in made] for names in dead[start:end]]
        name = f"checkpointed_{checkpoint.region}"
        yield f"def {name}({', '.join(given)}):"
        yield from (_INDENT + line for line in _lines(inside, gone))
        yield f"{_INDENT}return {', '.join(results)}" if results else f"{_INDENT}return None"
        self._say.names["checkpoint"] = private.CHECKPOINT
        options = (
            f"use_reentrant={checkpoint.use_reentrant}, "
            f"preserve_rng_state={checkpoint.preserve_rng_state}"
        )
        call = f"checkpoint({', '.join([name, *given, options])})"
        yield f"{', '.join(results)} = {call}" if results else call
        freed = sorted({name for names in dead[start:end] for name in names} - made)
        if freed:
            yield f"del {', '.join(freed)}"

    def _statements(self, node: fx.Node) -> Iterator[_Statement]:
        if node.op == "placeholder" or node in self._inline or node not in self._used:
            return
        for statement in self._made(node, cast("tuple[Change, ...]", node.meta.get("context", ()))):
            statement.checkpoint = node.meta.get("checkpoint")
            yield statement

    def _made(self, node: fx.Node, context: tuple[Change, ...]) -> Iterator[_Statement]:
        if node.op == "output":
            yield _Statement(node, f"return {self._say.write(node.args[0])}", "", ())
        elif node.target is expect:
            yield self._guard(node, context)
        elif node.target is assign:
            path, value = node.args
            yield _Statement(node, self._say.write(value), self._say.path(cast(str, path)), context)
        else:
            write = self._write(node)
            target = self._say.variable(node) if node.users and write is None else ""
            yield _Statement(node, write or self._say.call(node), target, context)

    def _write(self, node: fx.Node) -> str | None:
        """An assignment into something: it has no value of its own."""
        if node.target is operator.setitem or node.target == "__setitem__":
            target, index, value = node.args
            place = f"{self._say.operand(target)}[{self._say.index(index)}]"
            return f"{place} = {self._say.write(value)}"
        if node.target is setattr:
            target, name, value = node.args
            return f"{self._say.operand(target)}.{name} = {self._say.write(value)}"
        return None

    def _guard(self, node: fx.Node, context: tuple[Change, ...]) -> _Statement:
        guard = cast(Guard, node.meta["guard"])
        text = f"if {self._fails(node)}: raise Miss({len(self._guards)}, locals())"
        self._guards.append(guard)
        comment = f"  # {PurePath(guard.file).name}:{guard.line}"
        return _Statement(node, text, "", context, comment=comment)

    def _nested(self, statements: list[_Statement]) -> list[_Statement]:
        """Put a value that only the next statement uses into that statement.

        Nothing runs earlier or later than before: the value was computed right before, and
        whatever the next statement has nested already stands to the right of it.
        """
        result: list[_Statement] = []
        for statement in statements:
            limit = len(statement.text)
            while result and (place := self._place(result[-1], statement, limit)) is not None:
                inner = result.pop()
                end = place + len(inner.target)
                statement.text = statement.text[:place] + inner.text + statement.text[end:]
                limit = place
            result.append(statement)
        return result

    def _place(self, inner: _Statement, outer: _Statement, limit: int) -> int | None:
        """Where in ``outer`` the value of ``inner`` can be written out; None if it cannot."""
        node = inner.node
        alone = inner.target and node.target is not assign and not node.meta.get("mutates")
        together = inner.context == outer.context and inner.checkpoint == outer.checkpoint
        if not alone or not together or outer.node.target is expect:
            return None
        if len(inner.text) + len(outer.text) > _WIDTH or re.search("[\"'#]", outer.text):
            return None
        if outer.node.meta.get("mutates") or node.meta.get("written_by"):
            return None
        found = list(re.finditer(rf"(?<![\w.]){inner.target}(?!\w)(?!=[^=])", outer.text))
        if len(found) != 1 or self._uses(node) != 1 or found[0].start() >= limit:
            return None
        place = found[0].start()
        # Brackets inside brackets are harder to read than a name.
        plain = not self._is_infix(node) or _stands_alone(outer.text, place, inner)
        return place if plain or (place == 0 and _binds_first(node, outer.node)) else None

    def _uses(self, node: fx.Node) -> int:
        """How many statements read a node, through what is written inline."""
        count = 0
        for user in node.users:
            if user in self._used or user in self._upfront:
                count += self._uses(user) if user in self._inline else 1
        return count

    def _is_infix(self, node: fx.Node) -> bool:
        return node.target in SIGNS or node.target in PREFIXES

    def _dead(self, statements: list[_Statement]) -> list[list[str]]:
        """For each statement, the variables that none after it needs."""
        targets = {s.target for s in statements if s.target and s.node.target is not assign}
        dead: list[list[str]] = [[] for _ in statements]
        seen: set[str] = set()
        for position in range(len(statements) - 1, -1, -1):
            statement = statements[position]
            words = {statement.target, *_words([statement])}
            last = sorted((words & targets) - seen)
            seen.update(last)
            rest = statements[position + 1 :]
            ends = not rest or (len(rest) == 1 and _BARE_RETURN.fullmatch(rest[0].text))
            if not ends:  # a bare return frees everything itself
                dead[position] = last
        return dead


def _lines(statements: list[_Statement], dead: list[list[str]]) -> Iterator[str]:
    """The text of statements, in the ``with`` blocks they ran in."""
    context: tuple[Change, ...] = ()
    for statement, names in zip(statements, dead, strict=True):
        if statement.context != context and statement.context:
            yield f"with {', '.join(map(str, statement.context))}:"
        context = statement.context
        indent = _INDENT if context else ""
        yield indent + statement.line()
        if names:
            yield f"{indent}del {', '.join(names)}"


def _words(statements: list[_Statement]) -> set[str]:
    """The names that statements read."""
    return {
        word
        for statement in statements
        for word in re.findall(r"(?<![\w.])[A-Za-z_]\w*", statement.text)
    }


_BARE_RETURN = re.compile(r"return \w+")
_STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2, "@": 2}


def _binds_first(inner: fx.Node, outer: fx.Node) -> bool:
    """True where ``inner`` needs no brackets as the left operand of ``outer``."""
    strength = _STRENGTH.get(SIGNS.get(inner.target, ""), 0)
    return strength >= _STRENGTH.get(SIGNS.get(outer.target, ""), 3)


def _stands_alone(text: str, place: int, inner: _Statement) -> bool:
    """True where brackets or commas already separate a value from what is around it."""
    before = text[:place].rstrip()
    after = text[place + len(inner.target) :].lstrip()
    opened = not before or before[-1] in "([,=" or before.endswith("return")
    return opened and (not after or after[0] in ")],")
