"""Runs a forward once and writes down every tensor operation as an fx graph.

The forward runs as ordinary Python on a clone of the module (``clone.py``), with proxies for
its tensors (``values.py``). A ``TorchFunctionMode`` sees every torch call, factory functions
included, records it, and computes the result's shape on fake tensors. Calls between modules
arrive here through the clones: each is recorded as a leaf or run, as the caller decides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.overrides import TorchFunctionMode

from surgery.capture import ops
from surgery.capture.clone import Clones
from surgery.capture.evaluate import Evaluator
from surgery.capture.guards import Guard
from surgery.capture.values import (
    Symbol,
    TensorProxy,
    TensorSpec,
    describe,
    is_symbol,
    leaves,
    make_symbol,
    map_structure,
)
from surgery.errors import CaptureError


@dataclasses.dataclass(frozen=True)
class Options:
    """How a trace answers what has more than one answer.

    Attributes:
        hash_symbols: Let a symbolic number be hashed (at the price of a guard). Off at first,
            since libraries that can do without (einops) then keep it symbolic.
        eager_bools: Turn every comparison of sizes into a guard at once, for torch functions
            whose parsers want a plain bool.
    """

    hash_symbols: bool = False
    eager_bools: bool = False


class Where(str):
    """``file:line`` of a statement of the model's own code."""

    __slots__ = ()

    @property
    def file(self) -> str:
        return self.rpartition(":")[0]

    @property
    def line(self) -> int:
        return int(self.rpartition(":")[2])


class Tracer:
    """One run of one forward.

    Args:
        clones: The module tree the forward runs on.
        is_leaf: Decides, by path and module, whether a child becomes one ``call_module`` node.
        options: See `Options`.
    """

    def __init__(
        self,
        clones: Clones,
        is_leaf: Callable[[str, nn.Module], bool],
        options: Options | None = None,
    ) -> None:
        self.options = options or Options()
        self.graph = fx.Graph()
        self.guards: list[Guard] = []
        self.constants: dict[str, torch.Tensor] = {}
        self._clones = clones
        self._is_leaf = is_leaf
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._owners: list[str] = []
        self._paused = False
        self._examples: dict[str, Any] = {}
        self._attributes = _tensor_names(clones)
        self._attribute_nodes: dict[int, fx.Node] = {}
        self._devices: dict[int, torch.device] = {}
        self._written: dict[int, list[fx.Node]] = {}
        self._alive: list[Any] = []  # ids are keys above: what they name must not be freed
        self._evaluator = Evaluator(self._fetch, clones.root.get_submodule)
        for module in clones.modules():
            module.__dict__["_compiled_call_impl"] = functools.partial(self._call_module, module)

    # -- running -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Torch calls made inside are recorded."""
        with torch.enable_grad(), _Recorder(self):
            yield

    @contextlib.contextmanager
    def _pause(self) -> Iterator[None]:
        """What runs inside is not recorded."""
        before, self._paused = self._paused, True
        try:
            with torch._C.DisableTorchFunction():
                yield
        finally:
            self._paused = before

    @property
    def owner(self) -> str:
        """Dotted path of the module whose forward is running."""
        return self._owners[-1] if self._owners else ""

    def placeholder(self, name: str, example: torch.Tensor) -> TensorProxy:
        """An input of the graph."""
        node = self.graph.placeholder(name)
        self._examples[node.name] = example
        fake = self._to_fake(example)
        self._annotate(node, fake)
        return TensorProxy(self, node, fake, example.requires_grad)

    def _call_module(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._paused:
            return nn.Module._call_impl(module, *args, **kwargs)
        path = self._clones.path[id(module)]
        if self._is_leaf(path, module):
            return self._record_module(path, module, args, kwargs)
        self._owners.append(path)
        result = nn.Module._call_impl(module, *args, **kwargs)
        self._owners.pop()  # not in a finally: an error is reported where it happened
        return result

    def _record_module(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        node = self._node("call_module", path, args, kwargs)
        with self._pause():
            call = functools.partial(nn.Module._call_impl, module)
            result = self._run_fake(node, call, args, kwargs)
            return self._wrap(node, result, _needs_grad((args, kwargs, [*module.parameters()])))

    # -- torch calls ---------------------------------------------------------------------------

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One torch function or tensor method, called by the model."""
        accessor = ops.attribute(func)
        if accessor is not None:
            return self._attribute(func, accessor, args)
        name = getattr(func, "__name__", "")
        if ops.is_method(func) and name in _QUERIES:
            return _QUERIES[name](self, func, args, kwargs)
        if func in _STATE or func is torch.device:
            return func(*args, **kwargs)
        if func in _INLINED:
            return self._inline(func, args, kwargs)
        return self.record(func, args, kwargs)

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write a torch call into the graph and give back proxies for its results."""
        op = ops.resolve(func, args, kwargs)
        node = self._node(op.kind, op.target, op.args, kwargs)
        result = self._run_fake(node, func, args, kwargs)
        if not _holds_tensor(result):
            if ops.mutates(func, kwargs):
                self._note_write(node, args, kwargs)
                return result
            self.graph.erase_node(node)
            return result
        if ops.mutates(func, kwargs):
            return self._wrap_mutated(node, result, args, kwargs)
        return self._wrap(node, result, _needs_grad((args, kwargs)))

    def escaped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator called below the level of torch functions (by a scripted function)."""
        with self._pause():
            return self.record(func, args, kwargs)

    def _inline(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the Python body of a composite torch function, so that its parts are seen."""
        with _Recorder(self):
            return _body(func)(*args, **kwargs)

    def _attribute(self, func: Any, accessor: tuple[str, str], args: tuple[Any, ...]) -> Any:
        kind, name = accessor
        tensor = args[0]
        if kind != "get":
            if name in ("requires_grad", "grad"):
                return None
            raise self.error(f"assignment to the attribute {name!r} of a tensor")
        if name == "shape":
            return self._shape(tensor)
        if name == "requires_grad":
            return tensor.requires_grad
        result = func(tensor.fake if type(tensor) is TensorProxy else tensor)
        if name == "device":
            return self._device(result)
        if isinstance(result, torch.Tensor):
            return self._record_getattr(tensor, name)
        return result

    def _record_getattr(self, tensor: Any, name: str) -> TensorProxy:
        node = self._node("call_function", getattr, (tensor, name), {})
        result = self._run_fake(node, getattr, (tensor, name), {})
        return cast(TensorProxy, self._wrap(node, result, _needs_grad(tensor)))

    def _device(self, device: torch.device) -> torch.device:
        return device

    # -- sizes and numbers ---------------------------------------------------------------------

    def _shape(self, tensor: torch.Tensor) -> torch.Size:
        if type(tensor) is not TensorProxy:
            return torch.Tensor.shape.__get__(tensor)  # a parameter: fixed by the model
        if tensor.size_cache is None:
            node = self.graph.call_function(getattr, (tensor.node, "shape"))
            self._place(node)
            node.meta["val"] = tuple(tensor.fake.shape)
            sizes = [
                make_symbol(self, operator.getitem, (node, index), size, int)
                for index, size in enumerate(tensor.fake.shape)
            ]
            tensor.size_cache = torch.Size(cast(Any, sizes))
        return tensor.size_cache

    def arithmetic(self, op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """``op`` on symbolic numbers: a new symbol, nothing demanded."""
        if any(is_symbol(arg) and callable(arg._value) for arg in args):
            raise_value = functools.partial(_compute, op, args)
            kind = _result_kind(op, args)
            return make_symbol(self, op, args, raise_value, kind)
        value = _compute(op, args)
        if type(value) not in (int, float, bool):
            return _demand_all(op, args)
        symbol = make_symbol(self, op, args, value, type(value))
        if type(value) is bool and self.options.eager_bools:
            return bool(symbol)
        return symbol

    def demand(self, symbol: Symbol, kind: str) -> Any:
        """Python wants the value of a symbol: a guard."""
        value = symbol.value
        if not symbol.guarded:
            symbol.guarded = True
            self.guard(kind, describe(symbol), value)
        return value

    def guard(
        self,
        kind: str,
        expression: str,
        expected: Any,
        node: fx.Node | None = None,
        assumed: bool = False,
    ) -> None:
        where = user_line()
        self.guards.append(
            Guard(kind, expression, expected, where.file, where.line, self.owner, assumed, node)
        )

    def emit_symbol(self, symbol: Symbol) -> fx.Node:
        """Write the node that computes a symbol."""
        if symbol.op is None:
            return symbol.args[0]
        node = self.graph.call_function(symbol.op, self._arguments(symbol.args))
        self._place(node)
        node.meta["val"] = symbol.value
        return node

    # -- data ----------------------------------------------------------------------------------

    def data(self, tensor: torch.Tensor, kind: str, expression: str) -> torch.Tensor:
        """The contents of a tensor, demanded by Python, with the guard that comes of it."""
        node = self._as_node(tensor)
        with self._pause():
            answer = self._evaluator.value(node)
        expected = answer.value.tolist() if answer.value.numel() <= 16 else "..."
        self.guard(kind, expression, expected, node, answer.assumed)
        return answer.value

    def _fetch(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return self._examples[node.name]
        target = cast(str, node.target)
        if target in self.constants:
            return self.constants[target]
        return operator.attrgetter(target)(self._clones.root)

    # -- nodes ---------------------------------------------------------------------------------

    def _node(
        self, kind: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> fx.Node:
        node = self.graph.create_node(kind, target, self._arguments(args), self._arguments(kwargs))
        self._place(node)
        return node

    def _place(self, node: fx.Node) -> None:
        node.meta["owner"] = self.owner
        node.meta["where"] = user_line()

    def _annotate(self, node: fx.Node, value: Any) -> None:
        self._place(node)
        node.meta["val"] = map_structure(value, _spec)

    def _arguments(self, value: Any) -> Any:
        return map_structure(value, self._argument)

    def _argument(self, value: Any) -> Any:
        if type(value) is TensorProxy:
            return value.node
        if is_symbol(value):
            return value.fx_node
        if isinstance(value, torch.Tensor):
            return self._attribute_node(value)
        return value

    def _as_node(self, tensor: torch.Tensor) -> fx.Node:
        return cast(fx.Node, self._argument(tensor))

    def _attribute_node(self, tensor: torch.Tensor) -> fx.Node:
        """The ``get_attr`` node of a parameter, a buffer, or a tensor the model holds elsewhere."""
        if isinstance(tensor, FakeTensor):
            raise self.error("a tensor computed inside a leaf escaped without being returned")
        key = id(tensor)
        if key not in self._attribute_nodes:
            name = self._attributes.get(key)
            if name is None:
                name = f"_constant{len(self.constants)}"
                self.constants[name] = tensor
            self._alive.append(tensor)
            node = self.graph.get_attr(name)
            self._annotate(node, tensor)
            self._attribute_nodes[key] = node
        return self._attribute_nodes[key]

    # -- fake execution ------------------------------------------------------------------------

    def _to_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._fake.from_tensor(tensor.detach(), static_shapes=True)

    def _unwrap(self, value: Any) -> Any:
        return map_structure(value, _unwrap_leaf)

    def _run_fake(
        self,
        node: fx.Node,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        fake_args, fake_kwargs = self._unwrap(args), self._unwrap(kwargs)
        try:
            with _without_grad(), self._fake:
                return call(*fake_args, **fake_kwargs)
        except _NEEDS_DATA:
            with self._pause(), self._known_integers((args, kwargs)):
                return self._run_with_data(node, call, fake_args, fake_kwargs)

    def _run_with_data(
        self, node: fx.Node, call: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The result's shape depends on data: integers, masks, or the operator has no rule."""
        try:
            with _without_grad(), self._fake:
                return call(*args, **kwargs)
        except _NEEDS_DATA:
            answer = self._evaluator.value(node)
        device = _device_of(node) if answer.assumed else None

        def fake(leaf: Any) -> Any:
            return self._to_fake(leaf.to(device)) if isinstance(leaf, torch.Tensor) else leaf

        return map_structure(answer.value, fake)

    @contextlib.contextmanager
    def _known_integers(self, arguments: Any) -> Iterator[None]:
        """Inside, the integer and bool tensors among the arguments have their contents."""
        given: list[FakeTensor] = []
        for proxy in leaves(arguments):
            if type(proxy) is not TensorProxy or proxy.fake.dtype.is_floating_point:
                continue
            fake = cast(FakeTensor, proxy.fake)
            if fake.constant is None:
                answer = self._evaluator.value(proxy.node)
                if answer.assumed:
                    self.guard("data", proxy.node.name, "...", proxy.node, assumed=True)
                fake.constant = answer.value
                given.append(fake)
        try:
            yield
        finally:
            for fake in given:
                fake.constant = None

    def _wrap(self, node: fx.Node, result: Any, requires_grad: bool) -> Any:
        self._annotate(node, result)
        node.meta["written_by"] = self._written.get(_storage(result), ())
        return self._wrap_parts(node, result, requires_grad)

    def _wrap_parts(self, node: fx.Node, result: Any, requires_grad: bool) -> Any:
        kind = type(result)
        if isinstance(result, torch.Tensor):
            floating = result.is_floating_point() or result.is_complex()
            return TensorProxy(self, node, result, requires_grad and floating)
        if issubclass(kind, (tuple, list)):
            items = [
                self._wrap_parts(self._item(node, index, item), item, requires_grad)
                for index, item in enumerate(result)
            ]
            return _rebuild(kind, items)
        if isinstance(result, dict):
            keyed = cast(dict[Any, Any], result)
            return kind(
                (key, self._wrap_parts(self._item(node, key, item), item, requires_grad))
                for key, item in keyed.items()
            )
        return result

    def _item(self, node: fx.Node, key: Any, item: Any) -> fx.Node:
        if not _holds_tensor(item):
            return node
        part = self.graph.call_function(operator.getitem, (node, key))
        self._annotate(part, item)
        return part

    def _wrap_mutated(
        self, node: fx.Node, result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._annotate(node, result)
        self._note_write(node, args, kwargs)
        for proxy in leaves((args, kwargs)):
            if type(proxy) is TensorProxy and proxy.fake is result:
                proxy.node = node
                proxy.size_cache = None
                return proxy
        return self._wrap_parts(node, result, _needs_grad((args, kwargs)))

    def _note_write(self, node: fx.Node, args: Any, kwargs: dict[str, Any]) -> None:
        node.meta["mutates"] = True
        target = kwargs.get("out", args[0] if args else None)
        for tensor in leaves(target):
            if type(tensor) is TensorProxy:
                written = self._written.setdefault(_storage(tensor.fake), [])
                written.append(node)
                tensor.node.meta["written_by"] = written

    def error(self, why: str, *, cause: BaseException | None = None) -> CaptureError:
        """A CaptureError for the statement that is running, or that raised ``cause``."""
        where = user_line() if cause is None else _raised_at(cause)
        path = self.owner
        module = self._clones.root.get_submodule(path)
        name = f"{path or 'the model'} ({type(module).__name__})"
        return CaptureError(f"cannot trace {name}: {where}: {why}")


_NEEDS_DATA = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


# -- questions a model asks of a tensor ---------------------------------------------------------


def _size(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shape = tracer._shape(args[0])
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return shape if dim is None else shape[dim]


def _numel(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return functools.reduce(operator.mul, tracer._shape(args[0]), 1)


def _length(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    shape = tracer._shape(args[0])
    return operator.index(shape[0])


def _plain(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answered from the tensor's layout and dtype."""
    return func(*tracer._unwrap(args), **tracer._unwrap(kwargs))


def _to_bool(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(tracer.data(args[0], "data", f"bool({tracer._as_node(args[0]).name})"))


def _to_int(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return int(tracer.data(args[0], "data", f"int({tracer._as_node(args[0]).name})"))


def _to_float(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    return float(tracer.data(args[0], "data", f"float({tracer._as_node(args[0]).name})"))


def _to_list(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tracer.data(args[0], "data", f"{tracer._as_node(args[0]).name}.tolist()").tolist()


def _item(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return tracer.data(args[0], "data", f"{tracer._as_node(args[0]).name}.item()").item()


def _contains(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool((args[0] == args[1]).any())


def _repr(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    return f"<{tracer._as_node(args[0]).name}: {TensorSpec.of(tracer._unwrap(args[0]))}>"


def _hash(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    return id(args[0])


def _numpy(tracer: Tracer, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    raise tracer.error("the tensor leaves torch for NumPy, where it cannot be followed")


_QUERIES: dict[str, Callable[[Tracer, Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    "size": _size,
    "numel": _numel,
    "nelement": _numel,
    "__len__": _length,
    "__bool__": _to_bool,
    "__int__": _to_int,
    "__index__": _to_int,
    "__float__": _to_float,
    "tolist": _to_list,
    "item": _item,
    "__contains__": _contains,
    "__repr__": _repr,
    "__format__": _repr,
    "__hash__": _hash,
    "numpy": _numpy,
    "__array__": _numpy,
    **dict.fromkeys(
        (
            "dim",
            "ndimension",
            "is_contiguous",
            "is_floating_point",
            "is_complex",
            "is_signed",
            "element_size",
            "stride",
            "storage_offset",
            "get_device",
            "is_pinned",
            "is_shared",
            "is_inference",
        ),
        _plain,
    ),
}

# Calls that change the state of the thread: carried out, not recorded.
_STATE = frozenset({torch._C._set_grad_enabled})
_INLINED = frozenset({nn.functional.multi_head_attention_forward})


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
        return self._tracer.call(func, args, kwargs or {})


@functools.cache
def _body(func: Any) -> Callable[..., Any]:
    """The Python body of a torch function, without its question whether to be intercepted."""
    names = {**func.__globals__, "has_torch_function": _never}
    copy = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _never(*args: Any) -> bool:
    return False


@contextlib.contextmanager
def _without_grad() -> Iterator[None]:
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(False)
    try:
        yield
    finally:
        torch._C._set_grad_enabled(before)


def _unwrap_leaf(value: Any) -> Any:
    if type(value) is TensorProxy:
        return value.fake
    return value.value if is_symbol(value) else value


def _spec(value: Any) -> Any:
    return TensorSpec.of(value) if isinstance(value, torch.Tensor) else value


def _holds_tensor(value: Any) -> bool:
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return True
    if issubclass(kind, (tuple, list)):
        return any(_holds_tensor(item) for item in value)
    if isinstance(value, dict):
        return any(_holds_tensor(item) for item in cast(dict[Any, Any], value).values())
    return False


def _rebuild(kind: type, items: list[Any]) -> Any:
    if kind in (tuple, list) or getattr(kind, "_fields", None) is None:
        return kind(items)
    return kind(*items)


def _needs_grad(value: Any) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves(value))


def _storage(value: Any) -> int:
    """Identifies the memory a fake tensor lives in."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return 0
    return value.untyped_storage()._cdata


def _device_of(node: fx.Node) -> torch.device | None:
    """The device of a node's first tensor argument."""
    for argument in node.all_input_nodes:
        for spec in leaves(argument.meta["val"]):
            if isinstance(spec, TensorSpec):
                return spec.device
    return None


def _compute(op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return op(*(arg.value if is_symbol(arg) else arg for arg in args))


def _demand_all(op: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    return op(*(arg.demand("complex") if is_symbol(arg) else arg for arg in args))


def _result_kind(op: Callable[..., Any], args: tuple[Any, ...]) -> type:
    raise AssertionError


def _tensor_names(clones: Clones) -> dict[int, str]:
    """``id`` of every tensor held by a module → its dotted name, the first of a tied one's."""
    names: dict[int, str] = {}
    for module in clones.modules():
        prefix = clones.path[id(module)]
        for name, value in _own_tensors(module):
            names.setdefault(id(value), f"{prefix}.{name}" if prefix else name)
    return names


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for group in (module._parameters, module._buffers, module.__dict__):
        for name, value in group.items():
            if isinstance(value, torch.Tensor):
                yield name, value


_HERE = __file__.rpartition("/")[0] + "/"
_TORCH = torch.__file__.rpartition("/")[0] + "/"


@functools.lru_cache(maxsize=4096)
def _is_library(filename: str) -> bool:
    """True for torch, this package and einops: a statement there is not the model's."""
    if filename.startswith(("<", _HERE, _TORCH)):
        return True
    return "/einops/" in filename or filename.endswith(("/contextlib.py", "/functools.py"))


def _raised_at(error: BaseException) -> Where:
    """The innermost of the model's own statements an exception went through."""
    found = Where("<unknown>:0")
    entry = error.__traceback__
    while entry is not None:
        if not _is_library(entry.tb_frame.f_code.co_filename):
            found = Where(f"{entry.tb_frame.f_code.co_filename}:{entry.tb_lineno}")
        entry = entry.tb_next
    return found


def user_line() -> Where:
    """The innermost running statement that belongs to the model's own code."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if not _is_library(frame.f_code.co_filename):
            return Where(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        frame = frame.f_back
    return Where("<unknown>:0")
