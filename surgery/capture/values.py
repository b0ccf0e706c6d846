"""What a traced forward computes with: tensors and numbers that know where they came from.

A `TensorProxy` is a ``torch.Tensor`` without data. It carries the graph node that computes it
and a fake tensor with its shape, dtype and device, so ``isinstance(x, torch.Tensor)`` holds and
every operator answers. A `Symbol` is what ``x.shape[0]`` and the arithmetic on it give: an
expression with an example value. It stays an expression for as long as it meets only arithmetic
and torch calls. When Python demands the value itself (``if``, ``range``, ``len``, ``int``), the
tracer records a guard and the value is handed out.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx

from surgery.capture import private
from surgery.capture.signs import (
    ARITHMETIC,
    COMPARISON,
    NUMERIC,
    PREFIXES,
    SIGNS,
    UNARY,
    Function,
)
from surgery.capture.structure import tensors

if TYPE_CHECKING:
    from surgery.capture.tracing.symbols import Symbols
    from surgery.capture.tracing.tracer import Tracer


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape, dtype and device of a tensor, without its data."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: torch.Tensor) -> TensorSpec:
        """The spec of a tensor."""
        return TensorSpec(tuple(tensor.shape), tensor.dtype, tensor.device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


# In the memo of a deepcopy: what belongs to the trace is copied as what stands behind it.
DETACHED = "surgery: detached"


class TensorProxy(torch.Tensor):
    """A tensor of a trace: ``node`` computes it, ``fake`` has its shape, dtype and device."""

    tracer: Tracer
    node: fx.Node
    fake: torch.Tensor
    sizes: torch.Size | None
    tracked: bool

    __torch_function__ = private.unhandled

    @classmethod
    def __torch_dispatch__(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The net below: an operator that reached the dispatcher unseen (a scripted function)."""
        proxies = [tensor for tensor in tensors((args, kwargs)) if isinstance(tensor, TensorProxy)]
        return proxies[0].tracer.escaped(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[Any, Any]) -> torch.Tensor:
        return self.fake if DETACHED in memo else self


def make_proxy(
    tracer: Tracer, node: fx.Node, fake: torch.Tensor, *, requires_grad: bool
) -> TensorProxy:
    """A proxy for the result of ``node``."""
    proxy = cast(TensorProxy, private.wrapper(TensorProxy, fake))
    proxy.tracer = tracer
    proxy.node = node
    proxy.fake = fake
    proxy.sizes = None
    # Not the tensor's own flag: under it a scripted function would take its gradients into its
    # own hands, and work on detached inputs.
    proxy.tracked = requires_grad
    return proxy


def is_proxy(value: object) -> bool:
    """True for a tensor of a trace."""
    return type(value) is TensorProxy


class UnhashableSymbol(TypeError):
    """A symbolic number was used as a key."""


class Symbol:
    """Base of the symbolic numbers: an expression ``op(*args)`` with an example value.

    Args:
        symbols: The numbers of the trace that this one belongs to.
        op: What computes it; None when ``args`` is the one node that holds it.
        args: Operands: symbols, plain numbers or nodes.
        value: The example value. For the tracer, not for the model: reading it records nothing.
        assumed: The value rests on made-up data.
    """

    symbols: Symbols
    op: Callable[..., Any] | None
    args: tuple[Any, ...]
    value: Any
    assumed: bool
    demanded: bool

    def __init__(
        self,
        symbols: Symbols,
        op: Callable[..., Any] | None,
        args: tuple[Any, ...],
        value: Any,
        *,
        assumed: bool = False,
    ) -> None:
        self.symbols = symbols
        self.op = op
        self.args = args
        self.value = value
        self.assumed = assumed
        self.demanded = False
        self._node: fx.Node | None = None

    @property
    def fx_node(self) -> fx.Node:
        """The node of this number, written into the graph when first used."""
        if self._node is None:
            self._node = self.symbols.emit(self)
        return self._node

    @property
    def node(self) -> Demand:
        """What torch's own helpers ask of a symbolic number: each question is a demand."""
        return Demand(self)

    def demand(self, kind: str) -> Any:
        """Python wants the value: record the guard and hand it out."""
        return self.symbols.demand(self, kind)

    def __repr__(self) -> str:
        return describe(self)

    def __str__(self) -> str:
        return str(self.demand("str"))

    def __format__(self, spec: str) -> str:
        return format(self.demand("str"), spec)

    def __hash__(self) -> int:
        # Callers that can do without hashing (einops) catch this, as they do for torch's own
        # symbolic sizes. The trace is run again with hashing allowed when nobody caught it.
        if not self.symbols.options.hash_symbols:
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

    def __deepcopy__(self, memo: dict[Any, Any]) -> Any:
        return self.value if DETACHED in memo else self

    def __copy__(self) -> Symbol:
        return self


class Demand:
    """The part of ``torch.SymNode`` that torch's helpers call: asking is demanding."""

    shape_env = None

    def __init__(self, symbol: Symbol) -> None:
        self._symbol = symbol

    def guard_int(self, file: str, line: int) -> int:
        """The value as an int."""
        return int(self._symbol)

    def guard_bool(self, file: str, line: int) -> bool:
        """The value as a bool."""
        return bool(self._symbol)

    def guard_float(self, file: str, line: int) -> float:
        """The value as a float."""
        return float(self._symbol)

    def is_int(self) -> bool:
        """True for a `SymbolicInt`."""
        return type(self._symbol) is SymbolicInt

    def is_bool(self) -> bool:
        """True for a `SymbolicBool`."""
        return type(self._symbol) is SymbolicBool

    def is_float(self) -> bool:
        """True for a `SymbolicFloat`."""
        return type(self._symbol) is SymbolicFloat

    def is_constant(self) -> bool:
        """Never: it stands for an expression."""
        return False

    def is_symbolic(self) -> bool:
        """Always."""
        return True

    def is_nested_int(self) -> bool:
        """Never: nested tensors are not traced."""
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


SYMBOLS: dict[type, type[Symbol]] = {
    int: SymbolicInt,
    float: SymbolicFloat,
    bool: SymbolicBool,
}


def is_symbol(value: object) -> bool:
    """True for a symbolic number (``isinstance`` would be answered by ``__class__``)."""
    return issubclass(type(value), Symbol)


def read_attribute(path: str) -> Any:
    """Marks a symbol that stands for a number the module holds: ``self.path``."""
    raise AssertionError(f"self.{path} is read by the generated code")


def _binary(op: Function, *, reflected: bool = False) -> Callable[[Symbol, Any], Any]:
    def method(self: Symbol, other: Any) -> Any:
        if not isinstance(other, (int, float)):  # a tensor's own operator takes over
            return NotImplemented
        if not (_is_live(self) and _is_live(other)):
            return NotImplemented
        return self.symbols.arithmetic(op, (other, self) if reflected else (self, other))

    return method


def _is_live(number: Any) -> bool:
    """False for a symbol of an earlier trace, left as a key in a cache: it equals nothing now."""
    return not is_symbol(number) or cast(Symbol, number).symbols.open


def _unary(op: Function) -> Callable[[Symbol], Any]:
    def method(self: Symbol) -> Any:
        return self.symbols.arithmetic(op, (self,))

    return method


def _round(self: Symbol, digits: int | None = None) -> Any:
    return self.symbols.arithmetic(round, (self,) if digits is None else (self, digits))


def _divmod(self: Any, other: Any) -> Any:
    return self // other, self % other


def _sym_max(self: Symbol, other: Any) -> Any:
    return self.symbols.arithmetic(max, (self, other))


def _sym_min(self: Symbol, other: Any) -> Any:
    return self.symbols.arithmetic(min, (self, other))


_METHODS: dict[str, Callable[..., Any]] = {
    **{f"__{name}__": _binary(op) for name, op in {**ARITHMETIC, **COMPARISON}.items()},
    **{f"__r{name}__": _binary(op, reflected=True) for name, op in ARITHMETIC.items()},
    **{f"__{name}__": _unary(op) for name, op in UNARY.items()},
    **{name: _unary(op) for name, op in NUMERIC.items()},
    "__round__": _round,
    "__divmod__": _divmod,
    "__sym_max__": _sym_max,
    "__sym_min__": _sym_min,
}
for _name, _method in _METHODS.items():
    setattr(Symbol, _name, _method)


def plain(value: Any) -> Any:
    """What stands behind a proxy of another trace: a fake tensor, or a number."""
    if is_proxy(value):
        return value.fake
    return value.value if is_symbol(value) else value


def describe(value: object) -> str:
    """A symbol as the Python that computes it: ``x.shape[1] // 2``."""
    if isinstance(value, fx.Node):
        return _describe_node(value)
    if not is_symbol(value):
        return repr(value)
    symbol = cast(Symbol, value)
    if symbol.op is None:
        return describe(symbol.args[0])
    return _describe_call(symbol.op, symbol.args)


def _describe_node(node: fx.Node) -> str:
    if node.target is getattr:
        return f"{describe(node.args[0])}.{node.args[1]}"
    if node.op == "get_attr":
        return f"self.{node.target}"
    if node.op == "call_method" and len(node.args) == 1:
        return f"{describe(node.args[0])}.{node.target}()"
    if node.target in (bool, int, float, len):
        return f"{cast(type, node.target).__name__}({describe(node.args[0])})"
    return node.name


def _describe_call(op: Function, args: tuple[Any, ...]) -> str:
    if op is operator.getitem:
        return f"{describe(args[0])}[{args[1]}]"
    if op is read_attribute:
        return f"self.{args[0]}"
    if op in SIGNS and len(args) == 2:
        return f"{_operand(args[0])} {SIGNS[op]} {_operand(args[1])}"
    if op in PREFIXES:
        return f"{PREFIXES[op]}{_operand(args[0])}"
    name = getattr(op, "__name__", str(op))
    return f"{name}({', '.join(describe(argument) for argument in args)})"


def _operand(value: object) -> str:
    text = describe(value)
    compound = is_symbol(value) and cast(Symbol, value).op in SIGNS
    return f"({text})" if compound else text
