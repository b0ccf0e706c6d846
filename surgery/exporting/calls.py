"""A model as a function from tensors to tensors, for compilers that trace one call of it."""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, cast

import torch
from pydantic import Strict
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten_with_path, tree_unflatten

from surgery.capture.graft import stock_class
from surgery.errors import ExportError
from surgery.sources import Example
from surgery.verification.outputs import leaves

#: What may differ between calls. ``batch``: rows; ``length``: tokens of sequences; ``image``:
#: height and width of images (batch, channels, height, width).
Varies = Literal["batch", "length", "image"]
Varying = Annotated[tuple[Varies, ...], Strict(False)]

Outputs = dict[str, Tensor]


class TensorFunction(nn.Module, ABC):
    """A model as a function from named tensors to named tensors.

    Args:
        model: The model.
        example: A call of this function: tensors only, none of them nested.
        names: Names of the inputs in order, those of positional ones first.
    """

    def __init__(self, model: nn.Module, example: Example, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        # Copies: of a view torch.export would note what it is a view of.
        self.example = example.map(lambda tensor: tensor.detach().clone())
        self.names = tuple(names)

    @abstractmethod
    def compute(self, given: Sequence[Tensor]) -> Outputs:
        """The outputs by name for the inputs in order."""

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Outputs:
        """The outputs by name."""
        return self.compute([*args, *(kwargs[name] for name in self.names[len(args) :])])

    def call(self, example: Example) -> Outputs:
        """The outputs for a call of this function, without gradients."""
        fresh = example.map(lambda tensor: tensor.detach().clone())
        with torch.no_grad():
            return self(*fresh.args, **fresh.kwargs)

    def signed(self) -> Self:
        """This function under a signature of its own.

        torch.export names inputs after the signature, and looks them up by these names.
        """

        def forward(self: TensorFunction, *args: Tensor, **kwargs: Tensor) -> Outputs:
            return TensorFunction.forward(self, *args, **kwargs)

        word = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, word) for name in ("self", *self.names)]
        cast("Any", forward).__signature__ = inspect.Signature(parameters)
        kind = type(self)
        self.__class__ = cast("Any", type(kind.__name__, (kind,), {"forward": forward}))
        return self.eval()


class ModelFunction(TensorFunction):
    """Calls a model with the tensors of a call and returns the tensors it returns, by path.

    What the call gives besides tensors is fixed. ``use_cache`` is False where the model has it:
    a cache is no tensor.

    Args:
        model: The model.
        example: The call.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        quiet = {"use_cache": False} if takes(model, "use_cache") else {}
        flat, form = _flat(example, quiet)
        slots = [isinstance(leaf, Tensor) for _, leaf in flat]
        named = zip(_names(model, [path for path, _ in flat]), slots, strict=True)
        names = [name for name, slot in named if slot]
        super().__init__(model, _taken(example, names), names)
        self.quiet, self.form, self.slots = quiet, form, slots
        self.fixed = [None if slot else leaf for (_, leaf), slot in zip(flat, slots, strict=True)]
        self.signed()

    def compute(self, given: Sequence[Tensor]) -> Outputs:
        """What the model returns, for the tensors of a call in order."""
        left = iter(given)
        flat = [
            next(left) if slot else leaf for slot, leaf in zip(self.slots, self.fixed, strict=True)
        ]
        args, kwargs = cast("tuple[Any, dict[str, Any]]", tree_unflatten(flat, self.form))
        return tensors(self.model(*args, **kwargs))

    def taken(self, example: Example) -> Example:
        """The call of this function for a call of the model of the same form.

        Raises:
            ExportError: it is of another form, for example with another number of list entries.
        """
        _, form = _flat(example, self.quiet)
        if form != self.form:
            raise ExportError(
                "the example has lists with one entry for each row of the batch, which are fixed "
                "in the export",
                hint="let nothing vary: -O dynamic=[]",
            )
        return _taken(example, self.names)


def _taken(example: Example, names: Sequence[str]) -> Example:
    """The tensors of a call: by position where they were, the others by name."""
    positional = len(Example(example.args).tensors())
    found = example.tensors()
    named = dict(zip(names[positional:], found[positional:], strict=True))
    return Example(tuple(found[:positional]), named)


def _flat(example: Example, quiet: Mapping[str, Any]) -> tuple[list[tuple[Any, Any]], TreeSpec]:
    return tree_flatten_with_path((example.args, {**example.kwargs, **quiet}))


def _names(model: nn.Module, paths: Sequence[tuple[Any, ...]]) -> list[str]:
    """A name for each leaf of a call: ``pixel_values``, ``added_cond_kwargs_text_embeds``."""
    positions = [int(path[1].idx) for path in paths if path[0].idx == 0]
    words = positional_names(model, max(positions, default=-1) + 1)
    names: list[str] = []
    for path in paths:
        side, first, rest = path[0], path[1], path[2:]
        top = words[int(first.idx)] if side.idx == 0 else str(first.key)
        keys = [str(getattr(key, "key", getattr(key, "idx", ""))) for key in rest]
        name = re.sub(r"\W", "_", "_".join([top, *keys]))
        names.append(name if name not in names else f"{name}_{len(names)}")
    return names


def tensors(output: object) -> Outputs:
    """Every tensor of a structured output by its path."""
    return {path: leaf for path, leaf in leaves(output).items() if isinstance(leaf, Tensor)}


def takes(model: nn.Module, name: str) -> bool:
    """Whether the model's forward has a parameter of this name."""
    return name in _signature(model)


def positional_names(model: nn.Module, count: int) -> list[str]:
    """The names under which a model's forward takes its first ``count`` arguments."""
    parameters = [
        item.name
        for item in _signature(model).values()
        if item.kind in (item.POSITIONAL_ONLY, item.POSITIONAL_OR_KEYWORD)
    ]
    named = parameters[:count]
    return [*named, *(f"input_{index}" for index in range(len(named), count))]


def _signature(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    forward = inspect.unwrap(cast("Any", stock_class(model)).forward)
    parameters = dict(inspect.signature(forward).parameters)
    parameters.pop("self", None)
    return parameters


def varied(example: Example, varying: Iterable[Varies]) -> Example:
    """A call whose varying sizes are at least 2, since compilers take 1 for a constant.

    Raises:
        ExportError: there is nothing of that kind in the call.
    """
    wanted = set(varying)
    if "batch" in wanted and example.batch() is None:
        raise ExportError(
            "the tensors of the example share no leading dimension to be a batch",
            hint="name what may vary: -O dynamic=[length], or -O dynamic=[] for nothing",
        )
    if "batch" in wanted and example.batch() == 1:
        example = example.resized(batch=2)
    if "length" in wanted and min(example.lengths(), default=2) < 2:
        raise ExportError(
            "the example has a sequence of one token, from which a compiler cannot tell that "
            "the length may vary",
            hint="pass an example of two tokens or more",
        )
    if "image" in wanted and not any(map(_is_image, example.tensors())):
        raise ExportError(
            "the example has no image: no floating tensor (batch, channels, height, width)"
        )
    return example


def dynamic_dimensions(example: Example, varying: Iterable[Varies]) -> dict[int, dict[int, Varies]]:
    """Which dimensions of which tensors may vary.

    Returns:
        ``id`` of a tensor of the example → dimension → what it counts.
    """
    wanted = set(varying)
    batch, lengths = example.batch(), example.lengths()
    found: dict[int, dict[int, Varies]] = {}
    for tensor in example.tensors():
        dims: dict[int, Varies] = {}
        rows = tensor.ndim > 0 and tensor.shape[0] == batch
        if "batch" in wanted and rows:
            dims[0] = "batch"
        if "length" in wanted and rows and tensor.ndim in (2, 3) and tensor.shape[1] in lengths:
            dims[1] = "length"
        if "image" in wanted and _is_image(tensor):
            dims[2] = dims[3] = "image"
        found[id(tensor)] = dims
    return found


def further_calls(example: Example, varying: Iterable[Varies]) -> list[tuple[str, Example]]:
    """Calls of other sizes, to check an export with, each with what to call it."""
    wanted = set(varying)
    found: list[tuple[str, Example]] = []
    if "batch" in wanted:
        size = example.batch() or 0
        found += [(f"batch {n}", example.resized(batch=n)) for n in (1, size + 1)]
    lengths = example.lengths()
    if "length" in wanted and lengths and min(lengths) >= 3:
        cut = min(lengths) // 3
        found.append((f"{cut} tokens less", example.resized(shorten=cut)))
    if "image" in wanted:
        found.append(("images twice as high", example.map(_taller)))
    return found


def _is_image(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_floating_point()


def _taller(tensor: Tensor) -> Tensor:
    return tensor.repeat(1, 1, 2, 1) if _is_image(tensor) else tensor
