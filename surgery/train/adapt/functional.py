"""A model as a function of its parameters: in what mode it runs, and whether it is one.

In the inner loop, unless asked otherwise, every module is in eval mode but batch norms, which
normalise by the samples of the episode at hand (the support set when adapting, the query set when
judging) and record nothing. With ``statistics: running`` they use what they have recorded before,
which the inner loop never changes. Dropout is off unless it is asked for.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery import mirrors
from surgery.errors import ModelStateError, SurgeryError
from surgery.sources.libraries import BUILD_ERRORS
from surgery.train.adapt.inner import Tensors
from surgery.train.objectives.base import first_line
from surgery.train.statistics import normalisations, unrecorded
from surgery.tree import named_modules, own_buffers, own_parameters

Statistics = Literal["episode", "running"]

_ONE_BY_ONE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


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
    # Without statistics an instance norm takes those of each sample, whatever the mode.
    norms = {
        id(norm)
        for norm in normalisations(model)
        if norm.running_mean is None and not isinstance(norm, _ONE_BY_ONE)
    }
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
    """Refuse a model whose forward writes into tensors that it keeps, its parameters among them.

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
        before = {(id(module), own): found for _, module, own, found in _kept(model)}
        forward()
        forward()
    for path, module, own, (tensor, version) in _kept(model):
        last, then = before.get((id(module), own), (None, 0))
        if last is not tensor or version != then:
            raise ModelStateError(
                f"{path or 'the model'} ({type(module).__name__}) writes its tensor {own!r} in its "
                "forward, so that the model is no function of its parameters",
                hint="leave inner.dropout out: it puts every module into train mode"
                if model.training
                else "let the forward compute a new tensor, or write in train mode only: the inner "
                "loop runs in eval mode, but for batch norms",
            )


@contextmanager
def refusing(model: nn.Module) -> Generator[None]:
    """Say of an error within the model's forward which module it comes from.

    Raises:
        ModelStateError: something in the block cannot be done with the model.
    """
    try:
        yield
    except SurgeryError:
        raise
    except BUILD_ERRORS as error:
        raise ModelStateError(
            f"{_raising(model, error)} does not work in an inner loop: {first_line(error)}",
            hint="its forward runs on the samples of one task, with the batch norms over them, and "
            "is differentiated twice; with few shots use inner.statistics: running",
        ) from error


def _raising(model: nn.Module, error: BaseException) -> str:
    """The innermost module of the model whose code an error passed through."""
    paths = {id(module): path for path, module in named_modules(model, duplicates=False)}
    found = f"the model ({type(model).__name__})"
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and paths.get(id(owner)):
            found = f"{paths[id(owner)]} ({type(owner).__name__})"
    return found


_REGISTERED = ("_parameters", "_buffers", "_modules")


def _kept(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, tuple[Tensor, int]]]:
    """Every tensor that a module keeps, with the module and its path, and how often written."""
    for path, module in named_modules(model, duplicates=False):
        for own, tensor in _tensors(module):
            yield path, module, own, (tensor, cast("int", cast("Any", tensor)._version))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, buffers, plain attributes, and what lies in attributes that hold several."""
    yield from own_parameters(module).items()
    yield from own_buffers(module).items()
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield name, value
            continue
        inside: Any = ()
        if isinstance(value, dict) and name not in _REGISTERED:
            inside = cast("dict[object, object]", value).items()
        elif isinstance(value, list | tuple):
            inside = enumerate(cast("list[object]", value))
        for key, each in inside:
            # Recurrent layers list their parameters, which are looked at by name.
            if isinstance(each, Tensor) and not isinstance(each, nn.Parameter):
                yield f"{name}[{key!r}]", each
