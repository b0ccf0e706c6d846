"""Runs a forward once and writes down every tensor operation as an fx graph.

The forward runs as ordinary Python on a clone of the module (``clone.py``), with proxies for
its tensors (``values.py``). A ``TorchFunctionMode`` sees every torch call, factory functions
included, records it, and computes the result's shape on fake tensors. Calls between modules
arrive here through the clones: each is recorded as a leaf or run, as the caller decides.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import operator
import threading
import types
from collections.abc import Callable, Generator, Iterator
from typing import Any, cast

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from surgery.capture import ops, private, queries
from surgery.capture.calls import Call, call_nodes
from surgery.capture.clone import Clones
from surgery.capture.contexts import Ambient, Checkpoints
from surgery.capture.evaluate import Evaluator
from surgery.capture.guards import Guard, expect
from surgery.capture.memory import Memories
from surgery.capture.objects import Lost, ObjectProxy, Past, is_object, node_of, shadow_of
from surgery.capture.reads import Reads
from surgery.capture.sizes import SizeRules
from surgery.capture.statics import is_static
from surgery.capture.structure import (
    class_of,
    containers,
    leaves,
    map_structure,
    rebuild,
    seal,
    tensors,
)
from surgery.capture.values import (
    DETACHED,
    SYMBOLS,
    Symbol,
    TensorProxy,
    TensorSpec,
    describe,
    is_proxy,
    is_symbol,
    make_proxy,
    read_attribute,
)
from surgery.capture.where import raised_at, user_line
from surgery.errors import CaptureError


@dataclasses.dataclass(frozen=True)
class Options:
    """How a trace answers what has more than one answer.

    Attributes:
        replayable: The graph will be run again on other inputs: everything Python is told gets
            a guard, and each guard a node at its place. Off for a trace that is only read.
        hash_symbols: Let a symbolic number be hashed (at the price of a guard). Off at first,
            since libraries that can do without (einops) then keep it symbolic.
        plain_bools: Hand out comparisons of sizes as plain values (with a guard each), for torch
            functions whose parsers refuse symbolic ones.
        plain_numbers: The same for the numbers a module holds.
        keep_caches: Keep tensors in a module's plain dicts: they are no caches after all.
    """

    replayable: bool = False
    hash_symbols: bool = False
    plain_bools: bool = False
    plain_numbers: bool = False
    keep_caches: bool = False


class Tracer:
    """One run of one forward.

    Args:
        clones: The module tree the forward runs on.
        is_leaf: Decides, by path and module, whether a child becomes one ``call_module`` node.
        options: See `Options`.
        fake: The mode that the inputs belong to, when they are fake already.
        past: What a call that is under way has done to its objects already.
        watch: Told the path of every module that is called, and handed a function that gives
            what it is called with, as fake tensors.
    """

    def __init__(
        self,
        clones: Clones,
        is_leaf: Callable[[str, nn.Module], bool],
        options: Options,
        *,
        fake: private.FakeTensorMode | None = None,
        past: Past | None = None,
        watch: Callable[[str, Callable[[], Any]], None] | None = None,
    ) -> None:
        self.options = options
        self._past = past or Past(frozenset(), {})
        self._watch = watch
        self.open = True
        self.graph = fx.Graph()
        self.guards: list[Guard] = []
        self.constants: dict[str, Any] = {}
        self._clones = clones
        self._is_leaf = is_leaf
        self._fake = fake or private.new_fake_mode()
        self._ambient = Ambient.now()
        self._checkpoints = Checkpoints()
        self._owners: list[str] = []
        self.calls: list[Call] = []
        self._paused = False
        self._examples: dict[str, Any] = {}
        self._names = _tensor_names(clones)
        self._attributes: dict[int, fx.Node] = {}
        self._devices: dict[int, tuple[torch.device, fx.Node]] = {}
        self._memories = Memories()
        self._measured: dict[fx.Node, list[Any]] = {}
        self._numbers: dict[fx.Node, Symbol] = {}
        self._size_rules = SizeRules(
            self._measure, self._numbers.get, clones.original_root.get_submodule
        )
        self._containers: list[tuple[fx.Node, Any, Any]] = []
        self._told: set[tuple[fx.Node, str]] = set()
        self._alive: list[Any] = []  # their ids are keys above, so they must not be freed
        self._evaluator = Evaluator(self._fetch, clones.pair)
        for module in clones.modules():
            clones.intercept(module, _Calls(self, module))
        self._shield_leaves()
        self._reads = Reads(self, clones, self._listening) if options.replayable else None

    def _listening(self) -> bool:
        """True while the forward itself runs, rather than a leaf or another trace."""
        running = self.open and self._owners and not self._paused
        return bool(running) and _ACTIVE.tracer is self

    def _shield_leaves(self) -> None:
        """Give the leaves fake buffers: a leaf that runs may write to its own (BatchNorm).

        Also fake weights for quantised ones, which know few of the operators of a fake run.
        """
        modules = self._clones.by_path()
        leaf_paths = {path for path, module in modules if self._is_leaf(path, module)}
        for path, module in modules:
            if _within(path, leaf_paths):
                for name, buffer in list(private.own_buffers(module).items()):
                    if not isinstance(buffer, torch.Tensor):
                        continue
                    fake = self._to_fake(buffer)
                    self._names[id(fake)] = f"{path}.{name}" if path else name
                    private.own_buffers(module)[name] = fake
                    self._alive.append(fake)
                for name, parameter in private.own_composites(module).items():
                    private.stand_in(module, name, self._to_fake(parameter))

    # -- running -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def recording(self) -> Generator[None]:
        """Torch calls made inside are recorded."""
        self._checkpoints = Checkpoints()
        outer, _ACTIVE.tracer = getattr(_ACTIVE, "tracer", None), self
        # Autocast would keep the fake casts of this trace for the calls that follow it.
        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.enable_grad(), private.with_torch_function(), _Recorder(self):
                yield
        finally:
            torch.set_autocast_cache_enabled(caching)
            _ACTIVE.tracer = outer
            self.open = False
            self._checkpoints.forget()

    @contextlib.contextmanager
    def _pause(self) -> Generator[None]:
        """What runs inside is not recorded."""
        before, self._paused = self._paused, True
        try:
            with private.without_torch_function():
                yield
        finally:
            self._paused = before

    @property
    def owner(self) -> str:
        """Dotted path of the module whose forward is running."""
        return self._owners[-1] if self._owners else ""

    @contextlib.contextmanager
    def running(self, path: str) -> Generator[None]:
        """What runs inside belongs to the forward of the module at ``path``."""
        self._owners.append(path)
        yield
        self._owners.pop()

    def make(self, kind: type, fields: dict[str, Any]) -> fx.Node:
        """Write down the construction of an object: ``kind(**fields)``."""
        node = self.graph.call_function(kind, (), fields)
        self._place(node)
        return node

    def input(self, name: str, example: Any) -> Any:
        """An input of the graph, whatever it is: the value to hand to the forward."""
        node = self.graph.placeholder(name)
        self._examples[node.name] = example
        self._annotate(node, _shadowed(example))
        return self._present(node, example)

    def call_module(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A module was called; ``run`` is what it does."""
        if self._paused:
            return run(*args, **kwargs)
        path, where = self._clones.path[id(module)], user_line()
        if self._watch is not None:
            with self._pause():
                self._watch(path, functools.partial(self._detached, (args, kwargs)))
        if self._is_leaf(path, module):
            result = self._record_module(path, module, run, args, kwargs)
        else:
            self._owners.append(path)
            result = run(*args, **kwargs)
            self._owners.pop()  # not in a finally: an error is reported where it happened
        given = (call_nodes(args), call_nodes(kwargs), call_nodes(result))
        self.calls.append(Call(path, self.owner, where, *given))
        return result

    def _record_module(
        self,
        path: str,
        module: nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        with self._pause():
            node = self._node("call_module", path, args, kwargs)
            result = self._run_fake(node, self._watching(path, run, (args, kwargs)), args, kwargs)
            requires_grad = _needs_grad((args, kwargs, list(module.parameters())))
            known = type(module).__module__.startswith("torch.nn.") and not _has_children(module)
            return self._wrap(node, result, requires_grad, opaque=not known)

    def _watching(
        self, path: str, run: Callable[..., Any], given: tuple[Any, ...]
    ) -> Callable[..., Any]:
        """``run``, after which the lists and dicts it wrote to cannot be read any more.

        It writes to copies with fake tensors; ``given`` has the originals.
        """

        def watched(*args: Any, **kwargs: Any) -> Any:
            before = containers((args, kwargs))
            result = run(*args, **kwargs)
            for (original, _), (_, old), (_, new) in zip(
                containers(given), before, containers((args, kwargs)), strict=False
            ):
                if old != new:
                    seal(original, Lost(self, path))
            return result

        return watched

    # -- torch calls ---------------------------------------------------------------------------

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One torch function or tensor method, called by the model."""
        accessor = ops.attribute(func)
        if accessor is not None:
            return self._access(func, accessor, args)
        name = getattr(func, "__name__", "")
        if ops.is_method(func) and name in queries.METHODS:
            return queries.METHODS[name](self, func, args, kwargs)
        if func is private.SET_GRAD_ENABLED:
            return self._set_grad_enabled(args[0])
        if func is torch.device:
            return func(*args, **kwargs)
        if func is nn.functional.multi_head_attention_forward:
            return self._inline(func, args, kwargs)
        return self.record(func, args, kwargs)

    def _set_grad_enabled(self, enabled: bool) -> None:
        # A re-entrant checkpoint begins by switching gradients off, and will again when the
        # generated code calls it: that is not part of what it runs.
        own = self.options.replayable and self._checkpoints.entering()
        private.SET_GRAD_ENABLED(enabled or own)

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write a torch call into the graph and give back proxies for its results."""
        op = ops.resolve(func, args, kwargs)
        node = self._node(op.kind, op.target, op.args, kwargs)
        result = self._run_fake(node, func, args, kwargs)
        if ops.mutates(func, kwargs):
            return self._wrap_written(node, result, args, kwargs)
        if not tensors(result):
            self.graph.erase_node(node)
            return result
        return self._wrap(node, result, _needs_grad((args, kwargs)), counted=_counted(func))

    def escaped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator called below the level of torch functions (by a scripted function)."""
        with self._pause():
            return self.record(func, args, kwargs)

    def _inline(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the Python body of a composite torch function, so that its parts are seen."""
        with _Recorder(self):
            return _body(func)(*args, **kwargs)

    def _access(self, func: Any, accessor: tuple[str, str], args: tuple[Any, ...]) -> Any:
        kind, name = accessor
        if kind == "get":
            return queries.answer_attribute(self, func, name, args[0])
        if name in ("requires_grad", "grad"):
            return None
        raise self.error(f"assignment to the attribute {name!r} of a tensor")

    def record_attribute(self, tensor: Any, name: str) -> Any:
        """``tensor.name`` where that is a tensor, such as ``x.T``."""
        node = self._node("call_function", getattr, (tensor, name), {})
        result = self._run_fake(node, getattr, (tensor, name), {})
        return self._wrap(node, result, _needs_grad(tensor))

    # -- sizes and numbers ---------------------------------------------------------------------

    def shape(self, tensor: torch.Tensor) -> torch.Size:
        """The symbolic shape of a tensor; a parameter's is fixed by the model."""
        if not is_proxy(tensor):
            with private.without_torch_function():
                return tensor.shape
        proxy = cast(TensorProxy, tensor)
        if proxy.sizes is None:
            known: list[Any] = [None] * len(proxy.fake.shape)
            if self.options.replayable and not proxy.node.meta.get("loose_rank"):
                known = self._size_rules.of(proxy.node)
            if None in known:
                own = self._measure(proxy.node)
                known = [
                    size if rule is None else rule for size, rule in zip(own, known, strict=True)
                ]
            proxy.sizes = torch.Size(known)
        return proxy.sizes

    def _measure(self, tensor: fx.Node) -> list[Any]:
        """The sizes of a tensor as sizes of that tensor, in one symbol each."""
        if tensor in self._measured:
            return self._measured[tensor]
        sizes = cast(TensorSpec, tensor.meta["val"]).shape
        node = self._call(getattr, (tensor, "shape"), sizes)
        if self.options.replayable and tensor.meta.get("loose_rank"):
            rank = self._call(len, (node,), len(sizes))
            self.guard("rank", f"len({describe(node)})", len(sizes), rank)
        self._measured[tensor] = [
            self._symbol(operator.getitem, (node, index), size) for index, size in enumerate(sizes)
        ]
        return self._measured[tensor]

    def arithmetic(self, op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """``op`` on symbolic numbers: a new symbol, nothing demanded."""
        value = op(*(arg.value if is_symbol(arg) else arg for arg in args))
        if type(value) not in SYMBOLS:
            return op(*(arg.demand("number") if is_symbol(arg) else arg for arg in args))
        assumed = any(is_symbol(arg) and arg.assumed for arg in args)
        symbol = self._symbol(op, args, value, assumed=assumed)
        if type(value) is bool and self.options.plain_bools:
            return bool(symbol)
        return symbol

    def demand(self, symbol: Symbol, kind: str) -> Any:
        """Python wants the value of a symbol: a guard."""
        if not symbol.demanded:
            symbol.demanded = True
            node = symbol.fx_node if self.options.replayable else None
            self.guard(kind, describe(symbol), symbol.value, node, assumed=symbol.assumed)
        return symbol.value

    def number(self, path: str, value: Any) -> Any:
        """A number that a module holds, as a symbol: ``self.path``."""
        symbol = self._symbol(read_attribute, (path,), value)
        return symbol.demand("plain") if self.options.plain_numbers else symbol

    def attribute(self, path: str, value: torch.Tensor) -> Any:
        """A tensor that a module holds besides its parameters and buffers."""
        node = self.graph.get_attr(path)
        return self._present(node, value)

    def held(self, path: str, value: Any) -> None:
        """Guard what an attribute was before the forward assigned to it."""
        node = self.graph.get_attr(path)
        self._place(node)
        node.meta["val"] = value
        self.guard("none" if value is None else "object", f"self.{path}", value, node)

    def attribute_guard(self, path: str, value: Any) -> None:
        """Guard a plain value that a module or its config holds."""
        node = self.graph.get_attr(path)
        self._place(node)
        node.meta["val"] = None
        self.guard("attribute", f"self.{path}", map_structure(value, _same), node)

    def guard(
        self,
        kind: str,
        expression: str,
        expected: Any,
        node: fx.Node | None = None,
        *,
        assumed: bool = False,
    ) -> None:
        """Put down that Python was told ``expected``."""
        where = user_line()
        guard = Guard(kind, expression, expected, where.file, where.line, self.owner, assumed, node)
        self.guards.append(guard)
        if self.options.replayable and node is not None:
            marker = self.graph.call_function(expect, (node, expected))
            self._place(marker)
            marker.meta["guard"] = guard

    def emit_symbol(self, symbol: Symbol) -> fx.Node:
        """Write the node that computes a symbol."""
        node = self._emit(symbol)
        self._numbers[node] = symbol
        return node

    def _emit(self, symbol: Symbol) -> fx.Node:
        if symbol.op is None:
            return symbol.args[0]
        if symbol.op is read_attribute:
            node = self.graph.get_attr(symbol.args[0])
            self._annotate(node, symbol.value)
            return node
        return self._call(symbol.op, symbol.args, symbol.value)

    def _symbol(
        self,
        op: Callable[..., Any] | None,
        args: tuple[Any, ...],
        value: Any,
        *,
        assumed: bool = False,
    ) -> Symbol:
        return SYMBOLS[type(value)](self, op, args, value, assumed=assumed)

    # -- facts and contents --------------------------------------------------------------------

    def tell(self, tensor: Any, name: str, value: Any) -> Any:
        """A fact about a tensor (``x.dtype``), with its guard if the graph is to run again."""
        if not self.options.replayable or not is_proxy(tensor):
            return value
        if type(value) is bool:
            return self._symbol(None, (self._call(getattr, (tensor, name), value),), value)
        if (tensor.node, name) not in self._told:
            self._told.add((tensor.node, name))
            node = self._call(getattr, (tensor, name), value)
            self.guard(name, describe(node), value, node)
        return value

    def tell_method(
        self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any
    ) -> Any:
        """The same for a fact that a method tells (``x.is_contiguous()``)."""
        if not self.options.replayable or not is_proxy(args[0]):
            return value
        node = self._node("call_method", name, args, kwargs)
        node.meta["val"] = value
        return self._present(node, value, none_guard=False)

    def device(self, tensor: Any, device: torch.device) -> torch.device:
        """``x.device``: guarded as far as its type, and passed on as ``x.device`` itself."""
        if not self.options.replayable or not is_proxy(tensor):
            return device
        node = self._call(getattr, (tensor, "device"), device)
        if (tensor.node, "device") not in self._told:
            self._told.add((tensor.node, "device"))
            kind = self._call(getattr, (node, "type"), device.type)
            self.guard("device", describe(kind), device.type, kind)
        fresh = torch.device(str(device))  # an object of its own, recognised when passed on
        self._devices[id(fresh)] = (fresh, node)
        return fresh

    def contents(self, tensor: torch.Tensor, how: Callable[..., Any] | str) -> Symbol:
        """One number out of a tensor: ``bool(x)``, ``int(x)``, ``float(x)`` or ``x.item()``."""
        source = self.node_of(tensor)
        with self._pause():
            answer = self._evaluator.value(source)
            value = answer.value.item() if isinstance(how, str) else how(answer.value)
        kind = "call_method" if isinstance(how, str) else "call_function"
        node = self._node(kind, how, (tensor,), {})
        node.meta["val"] = value
        return self._symbol(None, (node,), value, assumed=answer.assumed)

    def _fetch(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            with private.with_torch_function(), _SharedTensors(fake_only=True):
                return copy.deepcopy(self._examples[node.name])
        target = cast(str, node.target)
        if target in self.constants:
            return self.constants[target]
        return operator.attrgetter(target)(self._clones.original_root)

    # -- objects -------------------------------------------------------------------------------

    def object_attribute(self, proxy: ObjectProxy, name: str) -> Any:
        """``object.name``: a method is recorded when called, anything else right away."""
        shadow = shadow_of(proxy)
        with self._pause():
            value = getattr(shadow, name)
            if callable(value) and getattr(value, "__self__", None) is shadow:
                return functools.partial(self._method, proxy, name)
            return self._present(self._call(getattr, (proxy, name), None), value)

    def _method(self, proxy: ObjectProxy, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.object_call(proxy, name, args, kwargs)

    def object_call(
        self, proxy: ObjectProxy, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """``object.name(...)``, carried out on the example object."""
        shadow = shadow_of(proxy)
        with self._pause():
            node = self._node("call_method", name, (proxy, *args), kwargs)
            node.meta["mutates"] = True
            node_of(proxy).meta.setdefault("written_by", []).append(node)
            if node.name in self._past.names:
                result = self._past_result(node)
            else:
                with private.no_autograd(), self._fake:
                    result = getattr(shadow, name)(*self.unwrap(args), **self.unwrap(kwargs))
            if result is shadow:
                return proxy
            return self._wrap(node, result, _needs_grad((args, kwargs)), opaque=True)

    def _past_result(self, node: fx.Node) -> Any:
        """What a method gave when the call that is under way called it: once is enough."""
        if node.name not in self._past.values:
            raise self.error(f"the call is past {describe(node)}, whose result is gone")
        result = self._past.values[node.name]
        return map_structure(
            result, lambda leaf: self._to_fake(leaf) if isinstance(leaf, torch.Tensor) else leaf
        )

    def object_truth(self, proxy: ObjectProxy) -> bool:
        """``bool(object)``."""
        value = bool(shadow_of(proxy))
        return bool(self._symbol(None, (self._call(bool, (proxy,), value),), value))

    def object_items(self, proxy: ObjectProxy) -> Iterator[Any]:
        """``iter(object)``: as many items as the example has, with a guard on that."""
        with self._pause():
            items = list(shadow_of(proxy))
            return iter(self._present(self._call(list, (proxy,), None), items))

    def set_object_attribute(self, proxy: ObjectProxy, name: str, value: Any) -> None:
        """``object.name = value``."""
        node = self._node("call_function", setattr, (proxy, name, value), {})
        node.meta["mutates"] = True
        setattr(shadow_of(proxy), name, self.unwrap(value))

    def _present(self, node: fx.Node, value: Any, *, none_guard: bool = True) -> Any:
        """What the forward gets to see of ``value``, which ``node`` gives."""
        kind = class_of(value)
        if isinstance(value, torch.Tensor):
            fake = value if isinstance(value, private.FakeTensor) else self._to_fake(value)
            node.meta["val"] = TensorSpec.of(fake)
            return make_proxy(self, node, fake, requires_grad=value.requires_grad)
        if kind in SYMBOLS:
            if kind is bool and _inside_placeholder(node):
                return value  # part of the signature
            node.meta["val"] = value
            return self._symbol(None, (node,), value)
        if issubclass(kind, _SEQUENCES):
            return self._present_items(node, value)
        if kind is dict:
            keyed = {key: self._present(self._item(node, key), item) for key, item in value.items()}
            return self._watched(node, keyed)
        if is_static(value):
            if none_guard and not _inside_placeholder(node):
                self.guard("none" if value is None else "object", describe(node), value, node)
            return value
        shadow = value if node.op != "placeholder" else self.copy_object(value)
        return ObjectProxy(self, node, shadow)

    def _present_items(self, node: fx.Node, value: Any) -> Any:
        if not _inside_placeholder(node):
            count = len(value)
            length = self._call(len, (node,), count)
            self.guard("len", f"len({node.name})", count, length)
        items = [self._present(self._item(node, index), item) for index, item in enumerate(value)]
        return self._watched(node, rebuild(class_of(value), items))

    def _watched(self, node: fx.Node, container: Any) -> Any:
        """A list or dict among the inputs, which the forward may write to."""
        if _inside_placeholder(node) and type(container) in (list, dict):
            self._containers.append((node, container, container.copy()))
        return container

    def written_containers(self) -> Iterator[tuple[fx.Node, Any, Any]]:
        """(container, key, value) for each item of an input that the forward wrote.

        The key is None for one appended to a list.
        """
        for node, now, before in self._containers:
            if len(now) < len(before):
                raise self.error(f"items were removed from the input {describe(node)}")
            keyed = class_of(now) is dict
            pairs: Any = now.items() if keyed else enumerate(now)
            for key, value in pairs:
                if keyed and value is not before.get(key, now):
                    yield node, key, value
                if not keyed and (key >= len(before) or value is not before[key]):
                    yield node, key if key < len(before) else None, value

    def _item(self, node: fx.Node, key: Any) -> fx.Node:
        return self._call(operator.getitem, (node, key), None)

    def copy_object(self, value: Any, memo: dict[Any, Any] | None = None) -> Any:
        """A copy of an object among the inputs, for the forward to change."""
        try:
            with private.with_torch_function(), _SharedTensors():
                return copy.deepcopy(value, memo)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            kind = type(value).__name__
            raise self.error(f"an input of class {kind} cannot be copied: {error}") from error

    # -- nodes ---------------------------------------------------------------------------------

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], value: Any) -> fx.Node:
        node = self._node("call_function", function, args, {})
        node.meta["val"] = value
        return node

    def _node(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        node = self.graph.create_node(kind, target, self.arguments(args), self.arguments(kwargs))
        self._place(node)
        return node

    def _place(self, node: fx.Node) -> None:
        node.meta["owner"] = self.owner
        node.meta["calls"] = tuple(self._owners)
        node.meta["where"] = user_line()
        if self.options.replayable:
            node.meta["context"] = self._ambient.changes()
            node.meta["checkpoint"] = self._checkpoints.running()

    def _annotate(self, node: fx.Node, value: Any) -> None:
        self._place(node)
        node.meta["val"] = map_structure(value, _spec)

    def arguments(self, value: Any) -> Any:
        """``value`` with nodes for everything the trace made."""
        return map_structure(value, self._argument)

    def _argument(self, value: Any) -> Any:
        if is_proxy(value):
            return value.node
        if is_symbol(value):
            return value.fx_node
        if is_object(value):
            return node_of(value)
        if type(value) is Lost:
            raise value.error()
        if isinstance(value, torch.Tensor):
            return self._tensor_node(value)
        if type(value) is torch.device and id(value) in self._devices:
            return self._devices[id(value)][1]
        if self.options.replayable and not is_static(value) and not isinstance(value, fx.Node):
            return self._held_object(value)
        return value

    def _held_object(self, value: Any) -> fx.Node:
        """The node of an object that the module holds: a child, its config."""
        stands_for = None if self._reads is None else self._reads.path_of(value)
        name = stands_for or self._clones.path_of(value)
        if name is None:
            raise self.error(
                f"an object of class {type(value).__name__} was made here and is passed on: "
                "its construction is not part of the graph"
            )
        node = self.graph.get_attr(name)
        self._place(node)
        node.meta["val"] = None
        return node

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """The node that gives a tensor."""
        return cast(fx.Node, self._argument(tensor))

    def _tensor_node(self, tensor: torch.Tensor) -> fx.Node:
        """The ``get_attr`` node of a parameter, a buffer, or a tensor the model holds elsewhere."""
        key = id(tensor)
        if isinstance(tensor, private.FakeTensor) and key not in self._names:
            raise self.error("a tensor computed inside a leaf escaped without being returned")
        if key not in self._attributes:
            name = self._names.get(key)
            if name is None:
                name = f"_constant{len(self.constants)}"
                self.constants[name] = tensor
            self._alive.append(tensor)
            node = self.graph.get_attr(name)
            with private.without_torch_function():
                self._annotate(node, tensor)
            self._attributes[key] = node
        return self._attributes[key]

    # -- fake execution ------------------------------------------------------------------------

    def _to_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        if isinstance(tensor, private.FakeTensor):
            return tensor
        with private.without_torch_function():
            return private.to_fake(self._fake, tensor)

    def unwrap(self, value: Any) -> Any:
        """``value`` with fake tensors, plain numbers and example objects for its proxies."""
        return map_structure(value, self._unwrap_leaf)

    def _unwrap_leaf(self, value: Any) -> Any:
        if is_proxy(value):
            return value.fake
        if is_symbol(value):
            return value.value
        if is_object(value):
            return shadow_of(value)
        # A real tensor would be written to for real, fake mode or not.
        return self._to_fake(value) if isinstance(value, torch.Tensor) else value

    def _detached(self, value: Any) -> Any:
        """``value`` as it is outside of the trace: its objects are copies with fake tensors."""

        def leaf(item: Any) -> Any:
            known = is_static(item) or isinstance(item, (torch.Tensor, nn.Module))
            return item if known else self.copy_object(item, {DETACHED: True})

        return map_structure(self.unwrap(value), leaf)

    def _run_fake(
        self,
        node: fx.Node,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        fake_args, fake_kwargs = self.unwrap(args), self.unwrap(kwargs)
        try:
            with private.no_autograd(), self._fake:
                return call(*fake_args, **fake_kwargs)
        except private.NEEDS_DATA:
            with self._pause(), self._known_integers((args, kwargs)):
                return self._run_with_data(node, call, fake_args, fake_kwargs)

    def _run_with_data(
        self, node: fx.Node, call: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The result's shape depends on data: integers, masks, or the operator has no rule."""
        try:
            with private.no_autograd(), self._fake:
                return call(*args, **kwargs)
        except private.NEEDS_DATA:
            answer = self._evaluator.value(node)
        device = _device_of(node) if answer.assumed else None

        def fake(leaf: Any) -> Any:
            return self._to_fake(leaf.to(device)) if isinstance(leaf, torch.Tensor) else leaf

        return map_structure(answer.value, fake)

    @contextlib.contextmanager
    def _known_integers(self, arguments: Any) -> Generator[None]:
        """Inside, the integer and bool tensors among the arguments have their contents."""
        given: list[private.FakeTensor] = []
        for proxy in leaves(arguments):
            if not is_proxy(proxy) or proxy.fake.dtype.is_floating_point:
                continue
            fake = cast(private.FakeTensor, proxy.fake)
            if fake.constant is None:
                answer = self._evaluator.value(proxy.node)
                if answer.assumed:
                    self.guards.append(self._assumption(proxy.node))
                fake.constant = answer.value
                given.append(fake)
        try:
            yield
        finally:
            for fake in given:
                fake.constant = None

    def _assumption(self, node: fx.Node) -> Guard:
        where = user_line()
        return Guard("data", node.name, "...", where.file, where.line, self.owner, True, node)

    # -- results -------------------------------------------------------------------------------

    def _wrap(
        self,
        node: fx.Node,
        result: Any,
        requires_grad: bool,
        *,
        opaque: bool = False,
        counted: bool = False,
    ) -> Any:
        """Proxies for a result.

        ``opaque``: it comes from code that was not traced, so that its structure may differ at
        the next call. ``counted``: so may the number of its tensors.
        """
        node.meta["val"] = map_structure(result, _spec)
        node.meta["loose_rank"] = _has_loose_rank(node, opaque)
        return self._wrap_part(node, result, requires_grad, opaque=opaque, counted=counted)

    def _wrap_part(
        self, node: fx.Node, result: Any, requires_grad: bool, *, opaque: bool, counted: bool
    ) -> Any:
        kind = class_of(result)
        if isinstance(result, torch.Tensor):
            self._memories.add(node, result)
            floating = result.is_floating_point() or result.is_complex()
            return make_proxy(self, node, result, requires_grad=requires_grad and floating)
        if issubclass(kind, _SEQUENCES):
            if (opaque or counted) and self.options.replayable:
                length = self._call(len, (node,), len(result))
                self.guard("len", f"len({node.name})", len(result), length)
            items = [
                self._wrap_item(node, index, item, requires_grad, opaque)
                for index, item in enumerate(result)
            ]
            return rebuild(kind, items)
        if not opaque:
            return result
        if kind in SYMBOLS or is_static(result):
            replayable = self.options.replayable
            return self._present(node, result, none_guard=replayable)
        return ObjectProxy(self, node, result)

    def _wrap_item(
        self, node: fx.Node, index: int, item: Any, requires_grad: bool, opaque: bool
    ) -> Any:
        if not opaque and not tensors(item):
            return item
        part = self._item(node, index)
        part.meta["val"] = map_structure(item, _spec)
        part.meta["loose_rank"] = opaque
        return self._wrap_part(part, item, requires_grad, opaque=opaque, counted=False)

    def _wrap_written(
        self, node: fx.Node, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The result of a call that writes: its target under the new node."""
        node.meta["val"] = map_structure(result, _spec)
        node.meta["mutates"] = True
        for target in leaves(kwargs.get("out", args[0] if args else None)):
            if is_proxy(target):
                self._memories.write(node, target.node, target.fake)
        for proxy in leaves((args, kwargs)):
            if is_proxy(proxy) and proxy.fake is result:
                proxy.node = node
                proxy.sizes = None
                return proxy
        needs_grad = _needs_grad((args, kwargs))
        return self._wrap_part(node, result, needs_grad, opaque=False, counted=False)

    def error(self, why: str, *, cause: BaseException | None = None) -> CaptureError:
        """A CaptureError for the statement that is running, or that raised ``cause``."""
        where = user_line() if cause is None else raised_at(cause)
        path = self.owner
        kind = type(self._clones.root.get_submodule(path)).__name__
        return CaptureError(f"cannot trace {path or 'the module'} ({kind}): {where}: {why}")

    def failed(self, error: Exception) -> CaptureError:
        """The CaptureError for an exception that came out of the forward."""
        return self.error(f"{type(error).__name__}: {error}", cause=error)


class _Calls:
    """Where the calls of one cloned module go."""

    def __init__(self, tracer: Tracer, module: nn.Module) -> None:
        self._tracer = tracer
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(_run_module, self._module)
        return self._tracer.call_module(self._module, run, args, kwargs)

    def outer(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same for a class with a ``__call__`` of its own, which is ``run``."""
        return self._tracer.call_module(self._module, run, args, kwargs)


def _run_module(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return private.call_inner(module, args, kwargs)


class _Recorder(TorchFunctionMode):
    """Hands every torch call of this thread to the tracer."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if _ACTIVE.tracer is not self._tracer:  # a trace within this one is running
            return func(*args, **(kwargs or {}))
        return self._tracer.call(func, args, kwargs or {})


# The innermost trace of each thread: a module that a parent's trace runs may need one itself.
_ACTIVE = threading.local()


class _SharedTensors(TorchFunctionMode):
    """Inside, copies of objects hold the same tensors: a trace never writes to a real one.

    ``fake_only``: only those without contents, which cannot be copied.
    """

    def __init__(self, *, fake_only: bool = False) -> None:
        super().__init__()
        self._fake_only = fake_only

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not private.COPY_TENSOR:
            return func(*args, **(kwargs or {}))
        if not self._fake_only or isinstance(args[0], private.FakeTensor):
            return args[0]
        with private.without_torch_function():
            return func(*args, **(kwargs or {}))


@functools.cache
def _body(func: Any) -> Callable[..., Any]:
    """The Python body of a torch function, without its question whether to be intercepted."""
    names = {**func.__globals__, "has_torch_function": _never}
    made = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__)
    made.__kwdefaults__ = func.__kwdefaults__
    return made


def _never(*args: Any) -> bool:
    return False


_SEQUENCES: tuple[type[Any], ...] = (tuple, list)

# Functions that give as many tensors as the sizes of their argument say.
_COUNTED = frozenset(
    {"split", "chunk", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit", "unsafe_split",
     "unsafe_chunk", "nonzero"}
)  # fmt: skip
# Functions whose result drops dimensions as the sizes of their argument say.
_LOOSE_RANK = frozenset({"squeeze", "squeeze_"})
# Functions whose result has as many dimensions as the call says.
_GIVEN_RANK = frozenset({"view", "reshape", "expand", "permute"})


def _counted(func: Any) -> bool:
    return getattr(func, "__name__", "") in _COUNTED


def _has_loose_rank(node: fx.Node, opaque: bool) -> bool:
    """True when the graph alone does not say how many dimensions the result has."""
    name = getattr(node.target, "__name__", node.target)
    if opaque or name in _LOOSE_RANK:
        return True
    if name in _GIVEN_RANK:
        return False
    return any(argument.meta.get("loose_rank") for argument in node.all_input_nodes)


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _inside_placeholder(node: fx.Node) -> bool:
    while node.target is operator.getitem:
        node = cast(fx.Node, node.args[0])
    return node.op == "placeholder"


def _shadowed(example: Any) -> Any:
    return example if isinstance(example, torch.Tensor) or is_static(example) else None


def _within(path: str, parents: set[str]) -> bool:
    """True when ``path`` is one of ``parents`` or below one."""
    while path and path not in parents:
        path = path.rpartition(".")[0]
    return path in parents


def _same(value: Any) -> Any:
    return value


def _spec(value: Any) -> Any:
    return TensorSpec.of(value) if isinstance(value, torch.Tensor) else value


def _needs_grad(value: Any) -> bool:
    if not torch.is_grad_enabled():
        return False
    with private.without_torch_function():
        return any(
            cast(TensorProxy, tensor).tracked if is_proxy(tensor) else tensor.requires_grad
            for tensor in tensors(value)
        )


def _device_of(node: fx.Node) -> torch.device | None:
    """The device of a node's first tensor argument."""
    for argument in node.all_input_nodes:
        for spec in leaves(argument.meta["val"]):
            if isinstance(spec, TensorSpec):
                return spec.device
    return None


def _tensor_names(clones: Clones) -> dict[int, str]:
    """``id`` of every tensor held by a module → its dotted name, the first of a tied one's."""
    names: dict[int, str] = {}
    for module in clones.modules():
        prefix = clones.path[id(module)]
        for name, tensor in private.own_tensors(module):
            names.setdefault(id(tensor), f"{prefix}.{name}" if prefix else name)
    return names
