"""A module's own forward as a graph, with its children as leaves, and Python to run instead."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import fx, nn

from surgery.capture import private
from surgery.capture import signature as sig
from surgery.capture.beneath import own_forward
from surgery.capture.clone import Clones
from surgery.capture.codegen import Code, Miss, generate
from surgery.capture.contexts import Ambient
from surgery.capture.guards import Guard, assign
from surgery.capture.objects import Lost, Past, is_object
from surgery.capture.settle import settle
from surgery.capture.statics import is_static
from surgery.capture.structure import class_of, leaves, map_structure, tensors
from surgery.capture.tracing import Options, Tracer
from surgery.capture.values import is_proxy, is_symbol, plain
from surgery.errors import CaptureError


@dataclasses.dataclass(frozen=True)
class Capture:
    """One path through a module's own forward.

    Attributes:
        kind: Class of the module, for messages.
        graph: One node per operation, in the order of the original; children are
            ``call_module`` nodes, guards are ``expect`` nodes.
        guards: What Python demanded, in order.
        signature: The calls the graph is right for.
        constants: Tensors that belong to no module, by ``get_attr`` target.
        code: The generated Python; ``source`` is its text.
        inline: Paths of the children whose forward is part of the graph.
        function: The forward that was traced, without its ``self``; None when it was one of the
            instance's own.
        extra: Inputs after the forward's own parameters; the last one may be ``"*name"``.
    """

    kind: str
    graph: fx.Graph
    guards: tuple[Guard, ...]
    signature: sig.Signature
    constants: Mapping[str, torch.Tensor]
    code: Code
    inline: tuple[str, ...]
    function: Callable[..., Any] | None = None
    extra: tuple[str, ...] = ()
    _accepts: Callable[..., bool] = dataclasses.field(init=False, repr=False, compare=False)
    _run: Callable[..., Any] = dataclasses.field(init=False, repr=False, compare=False)
    _bind: Callable[..., tuple[Any, ...]] = dataclasses.field(init=False, repr=False, compare=False)

    @property
    def source(self) -> str:
        """The generated Python."""
        return self.code.source

    def __post_init__(self) -> None:
        # Now rather than at the first call, which may be under torch.compile.
        accepts, run = compiled(self.code.source, tuple(self.code.names.items()))
        object.__setattr__(self, "_accepts", accepts)
        object.__setattr__(self, "_run", run)
        object.__setattr__(self, "_bind", sig.binder(self.signature.parameters))

    def rewritten(self, graph: fx.Graph, root: nn.Module, extra: tuple[str, ...] = ()) -> Capture:
        """The same capture with another graph, such as one with its residuals rewired.

        Args:
            graph: Made from a copy of ``self.graph``; its guards and inputs stay.
            root: The module, which says how to spell the path to a child.
            extra: The targets of the placeholders that ``graph`` has beyond the parameters of
                the forward, in order. The last one may be ``"*name"``: a tuple of what is left.

        Raises:
            ValueError: the graph's placeholders are not the parameters followed by ``extra``.
        """
        targets = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
        expected = [*self.inputs, *extra]
        if targets != expected:
            raise ValueError(f"the graph's inputs are {targets}, expected {expected}")
        code = generate(graph, root, self.signature, self.constants)
        return dataclasses.replace(self, graph=graph, code=code, extra=extra)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the forward's own parameters."""
        return tuple(parameter.name for parameter in self.signature.parameters)

    def bind(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The values of the forward's parameters, in order."""
        return self._bind(*args, **kwargs)

    def accepts(self, module: nn.Module, *args: Any, **kwargs: Any) -> bool:
        """True when the graph is right for this call, as far as can be told beforehand."""
        return self.accepts_values(module, self._bind(*args, **kwargs))

    def accepts_values(self, module: nn.Module, values: tuple[Any, ...]) -> bool:
        """The same for arguments that are bound already."""
        return self._accepts(module, *values)

    def run(self, module: nn.Module, values: tuple[Any, ...], extra: tuple[Any, ...] = ()) -> Any:
        """Run the generated forward on bound arguments that it accepts, and its extra inputs.

        Raises:
            Miss: a guard on the way did not hold.
        """
        return self._run(module, *values, *extra)

    def known(self, values: tuple[Any, ...], extra: tuple[Any, ...] = ()) -> dict[str, Any]:
        """The values of the graph's placeholders, by node name."""
        names = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        single = len(self.extra)
        if self.extra and self.extra[-1].startswith("*"):
            single -= 1
            extra = (*extra[:single], extra[single:])
        return dict(zip(names, (*values, *extra), strict=True))

    def forward(
        self, module: nn.Module, *args: Any, extra: tuple[Any, ...] = (), **kwargs: Any
    ) -> Any:
        """Run the captured forward with ``module`` as ``self``.

        Args:
            module: What the forward is run on.
            args: Positional arguments of the forward.
            extra: The inputs that a rewritten graph has besides.
            kwargs: Keyword arguments of the forward.

        Raises:
            CaptureError: the graph is not right for this call; names the guard.
        """
        values = self._bind(*args, **kwargs)
        if not self.accepts_values(module, values):
            raise CaptureError(f"{self.kind}: {self.why_not(module, values)}")
        try:
            return self.run(module, values, extra)
        except Miss as miss:
            guard = self.code.inline[miss.index]
            raise CaptureError(f"{self.kind}: captured for {guard}") from None

    def why_not(self, module: nn.Module, values: tuple[Any, ...]) -> str:
        """The first condition of the capture that a call does not meet."""
        names = [node.name for node in self.graph.nodes if node.op == "placeholder"]
        scope = {"self": module, **dict(zip(names, values, strict=False))}
        for condition in self.code.conditions:
            if not eval(condition.text, self.code.names, scope):  # noqa: S307  our own text
                return f"captured for a call where {condition.why}"
        return "captured for another call"


def capture(
    module: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    inline: tuple[str, ...] = (),
    function: Callable[..., Any] | None = None,
    past: Past | None = None,
) -> Capture:
    """Trace a module's own forward; each child is one call.

    Nothing is computed but shapes, unless the forward asks for the contents of a tensor. The
    module, its flags, buffers and caches and the random generators are left as they were.

    Args:
        module: Any module.
        args: Positional arguments of its forward.
        kwargs: Keyword arguments of its forward.
        inline: Dotted paths of children whose forward becomes part of the graph.
        function: What to trace instead of the module's present forward: the one it had before
            something was grafted over it. Takes the module first.
        past: What a call that is under way has done to its objects already.

    Raises:
        CaptureError: the forward does something that cannot be followed; names the class and
            the statement.
    """
    options = Options(replayable=True)
    plain_args, plain_kwargs = map_structure((args, dict(kwargs or {})), plain)
    job = _Job(module, plain_args, plain_kwargs, inline, function, past)
    return settle(functools.partial(_capture, job), options)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What `capture` was asked for."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inline: tuple[str, ...]
    function: Callable[..., Any] | None
    past: Past | None


def _capture(job: _Job, options: Options) -> Capture:
    module, args, kwargs, function = job.module, job.args, job.kwargs, job.function
    clones = Clones(module, keep_caches=options.keep_caches)
    traced = {"", *job.inline}
    # A parent that is being traced runs this module on fake tensors.
    fake = private.fake_mode_of(tensors((args, kwargs)))
    tracer = Tracer(
        clones, lambda path, child: path not in traced, options, fake=fake, past=job.past
    )
    forward = types.MethodType(function, clones.root) if function else own_forward(clones.root)
    bound = sig.bind(forward, args, kwargs)
    before = _take_over_attributes(tracer, clones, traced)
    arguments = bound.signature.parameters
    specs = {name: _spec(parameter, bound) for name, parameter in arguments.items()}
    values = {name: tracer.proxies.input(name, bound.arguments.get(name)) for name in arguments}
    positional, keywords = sig.call_form(bound, values, len(args), kwargs)
    try:
        with tracer.recording(), tracer.writer.running(""):
            result = forward(*positional, **keywords)
            with private.without_torch_function():
                returned = output(tracer, result)
                _write_back(tracer, clones, traced, before)
                _write_containers(tracer, returned)
                tracer.writer.graph.output(returned)
    except CaptureError:
        raise
    except Exception as error:
        raise tracer.writer.failed(error) from error
    signature = sig.Signature(tuple(arguments.values()), specs, Ambient.now().autocast)
    code = generate(tracer.writer.graph, module, signature, tracer.writer.constants)
    return Capture(
        type(module).__name__,
        tracer.writer.graph,
        tuple(tracer.writer.guards),
        signature,
        tracer.writer.constants,
        code,
        job.inline,
        getattr(forward, "__func__", None),
    )


def _spec(parameter: inspect.Parameter, bound: inspect.BoundArguments) -> sig.Spec:
    if parameter.name in bound.arguments:
        return sig.spec_of(bound.arguments[parameter.name])
    if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
        return sig.Items(tuple, ())
    if parameter.kind is inspect.Parameter.VAR_KEYWORD:
        return sig.Keyed(())
    return sig.Static(parameter.default)


# -- what a module holds ------------------------------------------------------------------------


def _take_over_attributes(
    tracer: Tracer, clones: Clones, traced: set[str]
) -> dict[str, dict[str, Any]]:
    """Make what the traced modules hold symbolic: ``self.training``, ``self.num_heads``.

    Tensors that are neither parameters nor buffers too: a forward that keeps one for the next
    call asks for its size. Returns what each module then holds, by path.
    """
    held: dict[str, dict[str, Any]] = {}
    for path, clone in clones.at(traced):
        for name, value in list(clone.__dict__.items()):
            where = f"{path}.{name}" if path else name
            value = plain(value)  # noqa: PLW2901  of a parent that is being traced
            if type(value) in (int, float) or name == "training":
                clone.__dict__[name] = tracer.symbols.attribute(where, value)
            elif isinstance(value, torch.Tensor):
                clone.__dict__[name] = tracer.proxies.attribute(where, value)
        held[path] = _state(clone)
    return held


def _state(module: nn.Module) -> dict[str, Any]:
    plain = {name: value for name, value in module.__dict__.items() if name not in _REGISTRIES}
    registries = cast(Any, module)
    return {**plain, **registries._buffers, **registries._parameters}


_REGISTRIES = frozenset({"_parameters", "_buffers", "_modules", "_compiled_call_impl"})


def _write_back(
    tracer: Tracer, clones: Clones, traced: set[str], before: dict[str, dict[str, Any]]
) -> None:
    """Repeat the forward's assignments to ``self`` in the graph."""
    for path, clone in clones.at(traced):
        for name, value in _state(clone).items():
            old = before[path].get(name, _MISSING)
            if value is old:
                continue
            target = f"{path}.{name}" if path else name
            if is_static(old) and not is_symbol(
                old
            ):  # the forward may have asked what it was: "if self.cache is None"
                tracer.writer.guard_held(target, old)
            tracer.writer.graph.call_function(assign, (target, output(tracer, value)))


_MISSING = object()


def _write_containers(tracer: Tracer, returned: Any) -> None:
    """Repeat the forward's assignments to items of its list and dict arguments."""
    for container, key, value in list(tracer.proxies.written_containers()):
        for node in container.users:
            if node.target is operator.getitem and node.args[1] == key and node in leaves(returned):
                raise tracer.writer.error(
                    f"{container.name}[{key!r}] is replaced, and returned as it was"
                )
        written = output(tracer, value)
        if key is None:
            made = tracer.writer.graph.call_method("append", (container, written))
        else:
            made = tracer.writer.graph.call_function(operator.setitem, (container, key, written))
        made.meta["mutates"] = True


# -- results ------------------------------------------------------------------------------------


def output(tracer: Tracer, value: Any) -> Any:
    """A value the forward made, as an argument of a node.

    Raises:
        CaptureError: it is an object that the graph cannot rebuild.
    """
    if is_proxy(value) or is_symbol(value) or is_object(value):
        return tracer.writer.arguments(value)
    kind = class_of(value)
    if kind is Lost:
        raise value.error()
    if isinstance(value, torch.Tensor):
        return tracer.writer.node_of(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {name: output(tracer, item) for name, item in _fields(value)}
        return tracer.writer.make(kind, fields)
    if kind in (tuple, list, dict) or issubclass(kind, tuple):
        return map_structure(value, lambda leaf: output(tracer, leaf))
    if is_static(value):
        return value
    raise tracer.writer.error(
        f"an object of class {kind.__name__} was made here and leaves the forward: "
        "its construction is not part of the graph"
    )


def _fields(value: Any) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(value):
        if field.init:
            yield field.name, getattr(value, field.name)


@functools.lru_cache(maxsize=1024)
def compiled(
    source: str, names: tuple[tuple[str, Any], ...]
) -> tuple[Callable[..., bool], Callable[..., Any]]:
    """``accepts`` and ``forward`` of a generated source: the same objects for the same source."""
    scope = dict(names)
    exec(compile(source, "<surgery capture>", "exec"), scope)  # noqa: S102  our own text
    return scope["accepts"], scope["forward"]
