"""Running what is recorded, on fake tensors: shapes, dtypes and devices without data."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Callable, Generator
from typing import Any, cast

import torch
from torch import fx, nn

from surgery.capture import private
from surgery.capture.clone import Clones
from surgery.capture.evaluate import Answer, Evaluator
from surgery.capture.guards import Guard
from surgery.capture.objects import is_object, shadow_of
from surgery.capture.statics import is_static
from surgery.capture.structure import leaves, map_structure
from surgery.capture.tracing.modes import SharedTensors
from surgery.capture.tracing.writer import Writer
from surgery.capture.values import DETACHED, TensorSpec, is_proxy, is_symbol
from surgery.capture.where import user_line


class Fakes:
    """The fake tensors of one trace.

    Args:
        clones: The module tree the forward runs on.
        writer: Has the nodes whose data is asked for, and takes the guards that come of it.
        mode: The mode that the inputs belong to, when they are fake already.

    Attributes:
        mode: What makes fake tensors, and computes with them.
        paused: True while what runs is not recorded.
    """

    def __init__(
        self, clones: Clones, writer: Writer, mode: private.FakeTensorMode | None = None
    ) -> None:
        self.mode = mode or private.new_fake_mode()
        self.paused = False
        self._clones = clones
        self._writer = writer
        self._examples: dict[str, Any] = {}
        self._evaluator = Evaluator(self._fetch, clones.pair)

    def example(self, node: fx.Node, value: Any) -> None:
        """``value`` is the example for an input of the graph."""
        self._examples[node.name] = value

    def to_fake(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor with the shape, dtype and device of a tensor."""
        if isinstance(tensor, private.FakeTensor):
            return tensor
        with private.without_torch_function():
            return private.to_fake(self.mode, tensor)

    @contextlib.contextmanager
    def pause(self) -> Generator[None]:
        """What runs inside is not recorded."""
        before, self.paused = self.paused, True
        try:
            with private.without_torch_function():
                yield
        finally:
            self.paused = before

    # -- what stands behind proxies ------------------------------------------------------------

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
        return self.to_fake(value) if isinstance(value, torch.Tensor) else value

    def detached(self, value: Any) -> Any:
        """``value`` as it is outside of the trace: its objects are copies with fake tensors."""

        def leaf(item: Any) -> Any:
            known = is_static(item) or isinstance(item, (torch.Tensor, nn.Module))
            return item if known else self.copy_object(item, {DETACHED: True})

        return map_structure(self.unwrap(value), leaf)

    def copy_object(self, value: Any, memo: dict[Any, Any] | None = None) -> Any:
        """A copy of an object among the inputs, for the forward to change.

        Raises:
            CaptureError: it cannot be copied.
        """
        try:
            with private.with_torch_function(), SharedTensors():
                return copy.deepcopy(value, memo)
        except (TypeError, RuntimeError, NotImplementedError) as error:
            kind = type(value).__name__
            raise self._writer.error(
                f"an input of class {kind} cannot be copied: {error}"
            ) from error

    # -- running -------------------------------------------------------------------------------

    def run(
        self,
        node: fx.Node,
        call: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What ``call`` gives, which ``node`` stands for, in fake tensors."""
        fake_args, fake_kwargs = self.unwrap(args), self.unwrap(kwargs)
        try:
            with private.no_autograd(), self.mode:
                return call(*fake_args, **fake_kwargs)
        except private.NEEDS_DATA:
            with self.pause(), self._known_integers((args, kwargs)):
                return self._run_with_data(node, call, fake_args, fake_kwargs)

    def _run_with_data(
        self, node: fx.Node, call: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """The result's shape depends on data: integers, masks, or the operator has no rule."""
        try:
            with private.no_autograd(), self.mode:
                return call(*args, **kwargs)
        except private.NEEDS_DATA:
            answer = self._evaluator.value(node)
        device = _device_of(node) if answer.assumed else None

        def fake(leaf: Any) -> Any:
            return self.to_fake(leaf.to(device)) if isinstance(leaf, torch.Tensor) else leaf

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
                    self._writer.guards.append(self._assumption(proxy.node))
                fake.constant = answer.value
                given.append(fake)
        try:
            yield
        finally:
            for fake in given:
                fake.constant = None

    def _assumption(self, node: fx.Node) -> Guard:
        where, owner = user_line(), self._writer.owner
        return Guard("data", node.name, "...", where.file, where.line, owner, True, node)

    # -- data ----------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Answer:
        """The real value of a node."""
        return self._evaluator.value(node)

    def _fetch(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            with private.with_torch_function(), SharedTensors(fake_only=True):
                return copy.deepcopy(self._examples[node.name])
        target = cast(str, node.target)
        if target in self._writer.constants:
            return self._writer.constants[target]
        return operator.attrgetter(target)(self._clones.original_root)


def _device_of(node: fx.Node) -> torch.device | None:
    """The device of a node's first tensor argument."""
    for argument in node.all_input_nodes:
        for spec in leaves(argument.meta["val"]):
            if isinstance(spec, TensorSpec):
                return spec.device
    return None
