"""A model as a function of its parameters: in what mode it runs, and whether it is one.

In the inner loop, unless asked otherwise, every module is in eval mode but batch norms, which
normalise by the samples of the episode at hand (the support set when adapting, the query set when
judging) and record nothing. With ``statistics: running`` they use what they have recorded before,
which the inner loop never changes. Dropout is off unless it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery import mirrors
from surgery.errors import ModelStateError
from surgery.train.adapt.inner import Tensors
from surgery.train.statistics import normalisations, unrecorded
from surgery.tree import joined, named_modules, own_buffers

Statistics = Literal["episode", "running"]


@contextmanager
def episode_mode(model: nn.Module, statistics: Statistics, *, dropout: bool) -> Generator[None]:
    """The model as it runs in the inner loop; afterwards each module is in the mode it was in.

    Mirror maps are left to the caller, who passes mapped values, and attention uses kernels that
    can be differentiated twice.

    Args:
        model: The model.
        statistics: Whether batch norms normalise by the ``episode`` or by what they ``running``ly
            recorded before.
        dropout: Whether dropout, and whatever else only train mode does, is on.

    Raises:
        ModelStateError: a norm is to use running statistics and keeps none.
    """
    if statistics == "running":
        _check_recorded(model)
    modes = [(module, module.training) for module in model.modules()]
    model.train(dropout)
    for norm in normalisations(model):
        norm.train(statistics == "episode")
    try:
        with ExitStack() as stack:
            stack.enter_context(unrecorded(model))
            stack.enter_context(mirrors.unmapped(model))
            twice = cast("Callable[..., AbstractContextManager[object]]", sdpa_kernel)
            stack.enter_context(twice([SDPBackend.MATH]))
            yield
    finally:
        for module, training in modes:
            module.training = training


def _check_recorded(model: nn.Module) -> None:
    norms = {id(norm) for norm in normalisations(model) if norm.running_mean is None}
    for path, module in named_modules(model, duplicates=False):
        if id(module) in norms:
            raise ModelStateError(
                f"{path} ({type(module).__name__}) keeps no running statistics",
                hint="use inner.statistics: episode",
            )


def bound(model: nn.Module, values: Tensors) -> Callable[..., Any]:
    """The model's forward with some of its parameters replaced by ``values``."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, values, args, kwargs)

    return forward


def check_functional(model: nn.Module, forward: Callable[[], object]) -> None:
    """Refuse a model whose forward writes into tensors that it keeps.

    ``functional_call`` replaces parameters. A tensor that a forward changes beside them would
    carry something of one task into the next, and cannot be differentiated through or mapped.

    Args:
        model: In the mode of the inner loop.
        forward: One pass. It is made three times: what a first one only fills, such as a cache, is
            not looked at.

    Raises:
        ModelStateError: something is written in each pass; with the module.
    """
    with torch.no_grad():
        forward()
        # Held on to: what takes the place of a tensor that is gone may lie where that one lay.
        before = dict(_kept(model))
        forward()
        forward()
    for name, (tensor, version) in _kept(model):
        last, then = before.get(name, (None, 0))
        if last is not tensor or version != then:
            path, _, own = name.rpartition(".")
            kind = type(model.get_submodule(path)).__name__
            raise ModelStateError(
                f"{path or 'the model'} ({kind}) writes its tensor {own!r} in its forward, so that "
                "the model is no function of its parameters",
                hint="let the forward compute a new tensor, or write in train mode only: the inner "
                "loop runs in eval mode, but for batch norms",
            )


def _kept(model: nn.Module) -> Iterator[tuple[str, tuple[Tensor, int]]]:
    """Every tensor that a module keeps and no optimizer trains, and how often it was written."""
    for path, module in named_modules(model, duplicates=False):
        plain = {n: t for n, t in vars(module).items() if isinstance(t, Tensor)}
        for name, tensor in {**own_buffers(module), **plain}.items():
            yield joined(path, name), (tensor, cast("int", cast("Any", tensor)._version))
