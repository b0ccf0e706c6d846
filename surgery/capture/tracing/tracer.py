"""One run of one forward: where its calls arrive, and what becomes of each."""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import nn

from surgery.capture import ops, private, queries
from surgery.capture.calls import Call, call_nodes
from surgery.capture.clone import Clones
from surgery.capture.contexts import Checkpoints
from surgery.capture.objects import Lost, Past
from surgery.capture.reads import Reads
from surgery.capture.structure import containers, seal, tensors
from surgery.capture.tracing.facts import Facts
from surgery.capture.tracing.fakes import Fakes
from surgery.capture.tracing.modes import ACTIVE, Recorder
from surgery.capture.tracing.objects import Objects
from surgery.capture.tracing.options import Options
from surgery.capture.tracing.proxies import Proxies, needs_grad
from surgery.capture.tracing.symbols import Symbols
from surgery.capture.tracing.writer import Writer
from surgery.capture.where import user_line

# Functions that give as many tensors as the sizes of their argument say.
_COUNTED = frozenset(
    {"split", "chunk", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit", "unsafe_split",
     "unsafe_chunk", "nonzero"}
)  # fmt: skip


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

    Attributes:
        calls: Every module call, in the order they ended.
        writer: Has the graph, its guards and its constants.
        fakes: Runs what is recorded.
        symbols: Makes symbolic numbers.
        proxies: Makes what the forward gets to see.
        facts: Tells facts about tensors.
        objects: Carries out what is done to objects.
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
        self._clones = clones
        self._is_leaf = is_leaf
        self._watch = watch
        self.calls: list[Call] = []
        self.writer = Writer(clones, options)
        self.fakes = Fakes(clones, self.writer, fake)
        self.symbols = Symbols(clones, self.writer)
        self.proxies = Proxies(self)
        parts = (self.writer, self.fakes, self.symbols, self.proxies)
        self.facts = Facts(*parts)
        self.objects = Objects(*parts, past or Past(frozenset(), {}))
        for module in clones.modules():
            clones.intercept(module, _Calls(self, module))
        self._shield_leaves()
        if options.replayable:
            reads = Reads(self.writer, self.symbols, clones, self._listening)
            self.writer.stands_for = reads.path_of

    def _listening(self) -> bool:
        """True while the forward itself runs, rather than a leaf or another trace."""
        running = self.writer.open and self.writer.inside and not self.fakes.paused
        return running and ACTIVE.tracer is self

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
                    fake = self.fakes.to_fake(buffer)
                    self.writer.name_tensor(fake, f"{path}.{name}" if path else name)
                    private.own_buffers(module)[name] = fake
                for name, parameter in private.own_composites(module).items():
                    private.stand_in(module, name, self.fakes.to_fake(parameter))

    @contextlib.contextmanager
    def recording(self) -> Generator[None]:
        """Torch calls made inside are recorded."""
        self.writer.checkpoints = Checkpoints()
        outer, ACTIVE.tracer = ACTIVE.tracer, self
        # Autocast would keep the fake casts of this trace for the calls that follow it.
        caching = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            with torch.enable_grad(), private.with_torch_function(), Recorder(self):
                yield
        finally:
            torch.set_autocast_cache_enabled(caching)
            ACTIVE.tracer = outer
            self.writer.open = False
            self.writer.checkpoints.forget()

    # -- module calls --------------------------------------------------------------------------

    def call_module(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """A module was called; ``run`` is what it does."""
        if self.fakes.paused:
            return run(*args, **kwargs)
        path, where = self._clones.path[id(module)], user_line()
        if self._watch is not None:
            with self.fakes.pause():
                self._watch(path, functools.partial(self.fakes.detached, (args, kwargs)))
        if self._is_leaf(path, module):
            result = self._record_module(path, module, run, args, kwargs)
        else:
            with self.writer.running(path):
                result = run(*args, **kwargs)
        given = (call_nodes(args), call_nodes(kwargs), call_nodes(result))
        self.calls.append(Call(path, self.writer.owner, where, *given))
        return result

    def _record_module(
        self,
        path: str,
        module: nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        with self.fakes.pause():
            node = self.writer.node("call_module", path, args, kwargs)
            watched = self._watching(path, run, (args, kwargs))
            result = self.fakes.run(node, watched, args, kwargs)
            requires_grad = needs_grad((args, kwargs, list(module.parameters())))
            known = type(module).__module__.startswith("torch.nn.") and not _has_children(module)
            return self.proxies.wrap(node, result, requires_grad, opaque=not known)

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
                    seal(original, Lost(self.writer, path))
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
        own = self.writer.options.replayable and self.writer.checkpoints.entering()
        private.SET_GRAD_ENABLED(enabled or own)

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write a torch call into the graph and give back proxies for its results."""
        op = ops.resolve(func, args, kwargs)
        node = self.writer.node(op.kind, op.target, op.args, kwargs)
        result = self.fakes.run(node, func, args, kwargs)
        if ops.mutates(func, kwargs):
            return self.proxies.wrap_written(node, result, args, kwargs)
        if not tensors(result):
            self.writer.graph.erase_node(node)
            return result
        return self.proxies.wrap(node, result, needs_grad((args, kwargs)), counted=_counted(func))

    def escaped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator called below the level of torch functions (by a scripted function)."""
        with self.fakes.pause():
            return self.record(func, args, kwargs)

    def _inline(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the Python body of a composite torch function, so that its parts are seen."""
        with Recorder(self):
            return _body(func)(*args, **kwargs)

    def _access(self, func: Any, accessor: tuple[str, str], args: tuple[Any, ...]) -> Any:
        kind, name = accessor
        if kind == "get":
            return queries.answer_attribute(self, func, name, args[0])
        if name in ("requires_grad", "grad"):
            return None
        raise self.writer.error(f"assignment to the attribute {name!r} of a tensor")

    def record_attribute(self, tensor: Any, name: str) -> Any:
        """``tensor.name`` where that is a tensor, such as ``x.T``."""
        node = self.writer.node("call_function", getattr, (tensor, name), {})
        result = self.fakes.run(node, getattr, (tensor, name), {})
        return self.proxies.wrap(node, result, needs_grad(tensor))


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


@functools.cache
def _body(func: Any) -> Callable[..., Any]:
    """The Python body of a torch function, without its question whether to be intercepted."""
    names = {**func.__globals__, "has_torch_function": _never}
    made = types.FunctionType(func.__code__, names, func.__name__, func.__defaults__)
    made.__kwdefaults__ = func.__kwdefaults__
    return made


def _never(*args: Any) -> bool:
    return False


def _counted(func: Any) -> bool:
    return getattr(func, "__name__", "") in _COUNTED


def _has_children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _within(path: str, parents: set[str]) -> bool:
    """True when ``path`` is one of ``parents`` or below one."""
    while path and path not in parents:
        path = path.rpartition(".")[0]
    return path in parents
