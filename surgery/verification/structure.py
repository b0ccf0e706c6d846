"""What can be checked without calling the model: names, shapes, ties, classes, sizes, NaN."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from surgery import progress
from surgery.capture.graft import grafts, stock_class
from surgery.record import Record
from surgery.table import human_bytes, human_count
from surgery.tree import named_modules, named_parameters
from surgery.verification.outputs import not_finite
from surgery.verification.report import Row


def keys(model: nn.Module, stock: nn.Module, inserted: AbstractSet[str]) -> Iterator[Row]:
    """Whether the state dict still has the stock keys, in order, and nothing unexpected."""
    old = _state(stock)
    new = {key: value for key, value in _state(model).items() if key not in inserted}
    lost = [key for key in old if key not in new]
    gained = [key for key in new if key not in old]
    check = "state-dict keys"
    if lost or gained:
        parts = [_count(len(lost), "stock key", "lost")] if lost else []
        if gained:
            parts.append(f"{_count(len(gained), 'key')} that no edit names: {gained[0]}")
        yield Row(check, "broken", where=(lost or gained)[0], detail=", ".join(parts))
    else:
        yield _same_order(check, list(old), list(new), len(inserted))
    yield _same_shapes(old, new)


def _same_order(check: str, old: list[str], new: list[str], added: int) -> Row:
    if old == new:
        return Row(check, "equal", detail=f"{len(old)} stock keys, {added} added")
    moved = next(key for key, other in zip(old, new, strict=True) if key != other)
    return Row(check, "broken", where=moved, detail="stock keys in another order")


def _same_shapes(old: dict[str, Any], new: dict[str, Any]) -> Row:
    for key, value in old.items():
        was, now = _layout(value), _layout(new.get(key, value))
        if was != now:
            return Row("shapes and dtypes", "broken", where=key, detail=f"{was} became {now}")
    return Row("shapes and dtypes", "equal")


def ties(model: nn.Module, stock: nn.Module, inserted: AbstractSet[str]) -> Row:
    """Whether the same stock parameters are tied to one another as before."""
    old, new = _tied(stock, inserted), _tied(model, inserted)
    for group in sorted(old ^ new, key=sorted):
        was = "were tied and are not" if group in old else "are tied and were not"
        return Row("ties", "broken", where=", ".join(sorted(group)), detail=was)
    return Row("ties", "equal", detail=_count(len(old), "group") if old else "")


def log(model: nn.Module, record: Record, fresh: nn.Module | None) -> Row:
    """Whether the model carries what its edit log says: every tensor, every graft."""
    check = "edit log"
    for name, rule in record.added.items():
        if tensor_named(model, name) is None:
            detail = f"rule {rule!r} inserted it, the model lacks it"
            return Row(check, "broken", where=name, detail=detail)
    if fresh is not None:
        modules = dict(named_modules(model))
        for path, expected in named_modules(fresh):
            found = modules.get(path)
            if found is None or _make(found) != _make(expected):
                was = "missing" if found is None else f"{_shown(found)}, not {_shown(expected)}"
                return Row(check, "broken", where=path or "the model", detail=was)
    return Row(check, "ok", detail=_count(len(record.edits), "edit"))


def identity(moved: tuple[str, ...], count: int) -> Row:
    """Whether undo gives back the very parameter objects that the rewritten model holds."""
    if moved:
        detail = _count(len(moved), "stock parameter", "replaced by another object")
        return Row("parameter identity", "broken", where=moved[0], detail=detail)
    return Row("parameter identity", "equal", detail=_count(count, "stock parameter"))


def sizes(model: nn.Module, stock: nn.Module) -> Iterator[Row]:
    """Parameters and bytes before and after."""
    before, after = (sum(p.numel() for p in side.parameters()) for side in (stock, model))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    yield Row(
        "parameters",
        "info",
        detail=f"{human_count(before)} before, {human_count(after)} after, "
        f"{human_count(trainable)} trainable",
    )
    was, now = (human_bytes(_nbytes(side)) for side in (stock, model))
    yield Row("memory of weights", "info", detail=f"{was} before, {now} after")


def finite_weights(model: nn.Module) -> Iterator[Row]:
    """Every parameter, and every persistent buffer, that holds NaN; parameters also infinity."""
    found = False
    for name, tensor in progress.track(dict(_weights(model)).items(), "looking for NaN"):
        wrong = not_finite(tensor, nan_only=not isinstance(tensor, nn.Parameter))
        if wrong is None:
            continue
        found = True
        count, first = wrong
        detail = f"NaN or infinite: {count} of {tensor.numel()} values, first at {first}"
        yield Row("finite weights", "broken", where=name, detail=detail)
    if not found:
        yield Row("finite weights", "ok")


def quantised(model: nn.Module) -> list[str]:
    """Names of the parameters that are made of several tensors, as torchao's are."""
    every = named_parameters(model, duplicates=False)
    return [name for name, tensor in every if is_traceable_wrapper_subclass(tensor)]


def tensor_named(model: nn.Module, name: str) -> Tensor | None:
    """The parameter or buffer of a dotted name, or None."""
    path, _, key = name.rpartition(".")
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        children = cast("dict[str, nn.Module | None]", module.__dict__["_modules"])
        module = children.get(part)
        if module is None:
            return None
    own = {**module.__dict__["_buffers"], **module.__dict__["_parameters"]}
    return cast("Tensor | None", own.get(key))


def _state(model: nn.Module) -> dict[str, Any]:
    return model.state_dict(keep_vars=True)


def _layout(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__


def _tied(model: nn.Module, inserted: AbstractSet[str]) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in named_parameters(model):
        if name not in inserted:
            groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


def _make(module: nn.Module) -> tuple[type, tuple[type, ...]]:
    return stock_class(module), grafts(module)


def _shown(module: nn.Module) -> str:
    mixins = "".join(f" + {mixin.__name__}" for mixin in grafts(module))
    return f"{stock_class(module).__name__}{mixins}"


def _nbytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*named_parameters(model, duplicates=False), *model.named_buffers()):
        if not is_traceable_wrapper_subclass(tensor):
            yield name, tensor


def _count(number: int, noun: str, rest: str = "") -> str:
    plural = "" if number == 1 else "s"
    return f"{number} {noun}{plural} {rest}".rstrip()
