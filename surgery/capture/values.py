"""What a traced forward computes with: tensors and numbers that know where they came from.

A `TensorProxy` is a ``torch.Tensor`` without data. It carries the graph node that computes it
and a fake tensor with its shape, dtype and device, so ``isinstance(x, torch.Tensor)`` holds and
every operator answers. A `SymbolicInt` (or float, or bool) is what ``x.shape[0]`` and the
arithmetic on it give: an expression with an example value. It stays an expression for as long
as it meets only arithmetic and torch calls. When Python demands the value itself (``if``,
``range``, ``len``, ``int``), the tracer records a guard and the value is handed out.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

if TYPE_CHECKING:
    from surgery.capture.tracer import Tracer


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, dtype and device of a tensor, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSpec:
        return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class TensorProxy(torch.Tensor):
    """A tensor of a trace: ``node`` computes it, ``fake`` has its shape, dtype and device."""

    tracer: Tracer
    node: fx.Node
    fake: torch.Tensor
    size_cache: torch.Size | None

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls, tracer: Tracer, node: fx.Node, fake: torch.Tensor, requires_grad: bool
    ) -> TensorProxy:
        make = cast(Any, torch.Tensor)._make_wrapper_subclass
        proxy = make(
            cls,
            fake.shape,
            strides=fake.stride() if fake.layout is torch.strided else None,
            storage_offset=fake.storage_offset() if fake.layout is torch.strided else 0,
            dtype=fake.dtype,
            layout=fake.layout,
            device=fake.device,
            requires_grad=requires_grad,
        )
        return cast(TensorProxy, proxy)

    def __init__(
        self, tracer: Tracer, node: fx.Node, fake: torch.Tensor, requires_grad: bool
    ) -> None:
        del requires_grad  # consumed by __new__
        self.tracer = tracer
        self.node = node
        self.fake = fake
        self.size_cache = None

    @classmethod
    def __torch_dispatch__(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The net below: an operator that reached the dispatcher unseen (a scripted function)."""
        return find_tracer((args, kwargs)).escaped(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> TensorProxy:
        return self


class Symbol:
    """Base of the symbolic numbers: an expression ``op(*args)`` with an example value.

    Args:
        tracer: The trace this number belongs to.
        op: What computes it; None when ``args`` is the one node that holds it.
        args: Operands: symbols, plain numbers or nodes.
        value: The example value, or a thunk when it takes data to know it.
    """

    tracer: Tracer
    op: Callable[..., Any] | None
    args: tuple[Any, ...]
    guarded: bool

    def __init__(
        self,
        tracer: Tracer,
        op: Callable[..., Any] | None,
        args: tuple[Any, ...],
        value: Any,
    ) -> None:
        self.tracer = tracer
        self.op = op
        self.args = args
        self.guarded = False
        self._value = value
        self._node: fx.Node | None = None

    @property
    def value(self) -> Any:
        """The example value. Reading it records nothing: for the tracer, not for the model."""
        if callable(self._value):
            self._value = self._value()
        return self._value

    @property
    def fx_node(self) -> fx.Node:
        """The node of this number, written into the graph when first used."""
        if self._node is None:
            self._node = self.tracer.emit_symbol(self)
        return self._node

    @property
    def node(self) -> _Demand:
        """What torch's own helpers ask of a symbolic number: each question is a demand."""
        return _Demand(self)

    def demand(self, kind: str) -> Any:
        """Python wants the value: record the guard and hand it out."""
        return self.tracer.demand(self, kind)

    def __repr__(self) -> str:
        return describe(self)

    def __str__(self) -> str:
        return str(self.demand("str"))

    def __format__(self, spec: str) -> str:
        return format(self.demand("str"), spec)

    def __hash__(self) -> int:
        # Callers that can do without hashing (einops) catch this, as they do for torch's own
        # symbolic sizes. The tracer retries with hashing allowed when nobody caught it.
        if not self.tracer.options.hash_symbols:
            raise UnhashableSymbol(f"unhashable: symbolic number {describe(self)}")
        return hash(self.demand("hash"))

    def __bool__(self) -> bool:
        return bool(self.demand("bool"))

    def __index__(self) -> int:
        return operator.index(self.demand("int"))

    def __int__(self) -> int:
        return int(self.demand("int"))

    def __float__(self) -> float:
        return float(self.demand("float"))

    def __complex__(self) -> complex:
        return complex(self.demand("float"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Symbol:
        return self

    def __copy__(self) -> Symbol:
        return self


class UnhashableSymbol(TypeError):
    """A symbolic number was used as a key."""


class _Demand:
    """The part of ``torch.SymNode`` that torch's helpers call: asking is demanding."""

    shape_env = None

    def __init__(self, symbol: Symbol) -> None:
        self._symbol = symbol

    def guard_int(self, file: str, line: int) -> int:
        return int(self._symbol)

    def guard_bool(self, file: str, line: int) -> bool:
        return bool(self._symbol)

    def guard_float(self, file: str, line: int) -> float:
        return float(self._symbol)

    def is_int(self) -> bool:
        return isinstance(self._symbol, SymbolicInt)

    def is_bool(self) -> bool:
        return isinstance(self._symbol, SymbolicBool)

    def is_float(self) -> bool:
        return isinstance(self._symbol, SymbolicFloat)

    def is_constant(self) -> bool:
        return False

    def is_symbolic(self) -> bool:
        return True

    def is_nested_int(self) -> bool:
        return False


# torch's argument parsers accept subclasses of these three where they accept numbers, and
# ``__class__`` makes ``isinstance(n, int)`` hold, as model code expects of a size.
class SymbolicInt(Symbol, torch.SymInt):
    """A symbolic int: a size, or arithmetic on sizes."""

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return int


class SymbolicFloat(Symbol, torch.SymFloat):
    """A symbolic float, such as ``x.shape[-1] ** -0.5``."""

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return float


class SymbolicBool(Symbol, torch.SymBool):
    """A symbolic truth value, such as ``x.shape[1] > 1`` before somebody branches on it."""

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        return bool


def make_symbol(
    tracer: Tracer, op: Callable[..., Any] | None, args: tuple[Any, ...], value: Any, kind: type
) -> Symbol:
    """The symbol class for a value of type ``kind``."""
    return _SYMBOLS[kind](tracer, op, args, value)


_SYMBOLS: dict[type, type[Symbol]] = {
    int: SymbolicInt,
    float: SymbolicFloat,
    bool: SymbolicBool,
}


def is_symbol(value: object) -> bool:
    """True for a symbolic number (``isinstance`` would be answered by ``__class__``)."""
    return issubclass(type(value), Symbol)


def _sym_not(value: Any) -> bool:
    return not value


_BINARY: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "pow": operator.pow,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}
_COMPARE: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
_UNARY: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "pos": operator.pos,
    "abs": operator.abs,
    "invert": operator.invert,
    "floor": math.floor,
    "ceil": math.ceil,
    "trunc": math.trunc,
    "sym_float": float,
    "sym_int": int,
    "sym_not": _sym_not,
    "sym_sqrt": math.sqrt,
}


def _arithmetic(op: Callable[..., Any], reflected: bool = False) -> Callable[[Any, Any], Any]:
    def method(self: Symbol, other: Any) -> Any:
        if not isinstance(other, (int, float)):  # a tensor's own operator takes over
            return NotImplemented
        return self.tracer.arithmetic(op, (other, self) if reflected else (self, other))

    return method


def _unary(op: Callable[..., Any]) -> Callable[[Any], Any]:
    def method(self: Symbol) -> Any:
        return self.tracer.arithmetic(op, (self,))

    return method


def _round(self: Symbol, digits: int | None = None) -> Any:
    return self.tracer.arithmetic(round, (self,) if digits is None else (self, digits))


def _divmod(self: Symbol, other: Any) -> Any:
    return self // other, self % other  # pyright: ignore[reportOperatorIssue]


def _sym_max(self: Symbol, other: Any) -> Any:
    return self.tracer.arithmetic(max, (self, other))


def _sym_min(self: Symbol, other: Any) -> Any:
    return self.tracer.arithmetic(min, (self, other))


for _name, _op in _BINARY.items():
    setattr(Symbol, f"__{_name}__", _arithmetic(_op))
    setattr(Symbol, f"__r{_name}__", _arithmetic(_op, reflected=True))
for _name, _op in _COMPARE.items():
    setattr(Symbol, f"__{_name}__", _arithmetic(_op))
for _name, _op in _UNARY.items():
    setattr(Symbol, f"__{_name}__", _unary(_op))
Symbol.__round__ = _round  # pyright: ignore[reportAttributeAccessIssue]
Symbol.__divmod__ = _divmod  # pyright: ignore[reportAttributeAccessIssue]
Symbol.__sym_max__ = _sym_max  # pyright: ignore[reportAttributeAccessIssue]
Symbol.__sym_min__ = _sym_min  # pyright: ignore[reportAttributeAccessIssue]


_SIGNS: dict[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
}


def describe(value: object) -> str:
    """A symbol as the Python that computes it: ``x.shape[1] // 2``."""
    if isinstance(value, fx.Node):
        return value.name
    if not is_symbol(value):
        return repr(value)
    symbol = cast(Symbol, value)
    if symbol.op is None:
        return describe(symbol.args[0])
    if symbol.op is operator.getitem:
        base, index = symbol.args
        if isinstance(base, fx.Node) and base.target is getattr:
            return f"{base.args[0]}.{base.args[1]}[{index}]"
        return f"{describe(base)}[{index}]"
    sign = _SIGNS.get(symbol.op)
    if sign is not None:
        left, right = (_operand(argument) for argument in symbol.args)
        return f"{left} {sign} {right}"
    name = getattr(symbol.op, "__name__", str(symbol.op))
    return f"{name}({', '.join(describe(argument) for argument in symbol.args)})"


def _operand(value: object) -> str:
    text = describe(value)
    compound = is_symbol(value) and cast(Symbol, value).op in _SIGNS
    return f"({text})" if compound else text


_LISTS = (list, fx.immutable_collections.immutable_list)
_DICTS = (dict, fx.immutable_collections.immutable_dict)


def map_structure(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """``value`` with every leaf of its tuples, lists, dicts and slices passed through ``leaf``."""
    kind = type(value)
    if kind is tuple:
        return tuple(map_structure(item, leaf) for item in value)
    if kind is torch.Size:
        return tuple(leaf(item) for item in value)
    if kind in _LISTS:
        return [map_structure(item, leaf) for item in value]
    if kind in _DICTS:
        return {key: map_structure(item, leaf) for key, item in value.items()}
    if kind is slice:
        bounds = (value.start, value.stop, value.step)
        return slice(*(map_structure(bound, leaf) for bound in bounds))
    if issubclass(kind, tuple):
        items = [map_structure(item, leaf) for item in value]
        named = getattr(kind, "_fields", None) is not None
        return kind(*items) if named else kind(items)
    return leaf(value)


def leaves(value: Any) -> list[Any]:
    """The leaves of a nested structure, in order."""
    found: list[Any] = []
    map_structure(value, found.append)
    return found


def find_tracer(value: Any) -> Tracer:
    """The tracer of the first proxy in ``value``."""
    for leaf in leaves(value):
        if type(leaf) is TensorProxy:
            return leaf.tracer
    raise AssertionError("a proxy's operator was called without a proxy")
