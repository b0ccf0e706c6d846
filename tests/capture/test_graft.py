"""The class of a module changes in place; everything else about it stays."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from surgery.capture.graft import check_graftable, graft, grafts, mark, stock_class, ungraft
from surgery.errors import ModelStateError


class Twice:
    """Doubles the output."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)  # type: ignore[misc]


class PlusOne:
    """Adds one to the output."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1  # type: ignore[misc]


class SelfPickling(nn.Linear):
    """A class that pickles itself in a way of its own."""

    def __reduce__(self) -> Any:
        return (nn.Identity, ())


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(3, 3)


def x() -> Tensor:
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


def test_object_keys_class_name_and_isinstance_stay(layer: nn.Linear) -> None:
    weight, identity, keys = layer.weight, id(layer), list(layer.state_dict())
    plain = layer(x())
    graft(layer, Twice)
    assert torch.equal(layer(x()), 2 * plain)
    assert (id(layer), list(layer.state_dict())) == (identity, keys)
    assert layer.weight is weight
    assert isinstance(layer, nn.Linear)
    assert (type(layer).__name__, type(layer).__module__) == ("Linear", nn.Linear.__module__)
    assert stock_class(layer) is nn.Linear
    assert grafts(layer) == (Twice,)


def test_grafts_stack_and_come_off_in_any_order(layer: nn.Linear) -> None:
    plain = layer(x())
    graft(layer, Twice)
    graft(layer, PlusOne)
    assert torch.equal(layer(x()), 2 * plain + 1)
    ungraft(layer, Twice)
    assert torch.equal(layer(x()), plain + 1)
    ungraft(layer, PlusOne)
    assert type(layer) is nn.Linear
    assert mark(layer) is None


def test_like_grafts_share_one_class_and_code_object() -> None:
    one, two = nn.Linear(3, 3), nn.Linear(5, 2)
    graft(one, Twice)
    graft(two, Twice)
    assert type(one) is type(two)
    assert type(one).forward.__code__ is type(two).forward.__code__


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))  # noqa: S301 - written one call earlier


@pytest.mark.parametrize("clone", [copy.deepcopy, pickled])
def test_deepcopy_and_pickle_keep_the_graft_and_are_independent(layer: nn.Linear, clone) -> None:
    graft(layer, Twice)
    other = clone(layer)
    assert type(other) is type(layer)
    assert torch.equal(other(x()), layer(x()))
    with torch.no_grad():
        other.weight.zero_()
    assert not torch.equal(other(x()), layer(x()))


def test_class_with_its_own_pickling_says_so() -> None:
    layer = SelfPickling(3, 3)
    graft(layer, Twice)
    with pytest.raises(ModelStateError, match=r"SelfPickling pickles itself .*\n.*surgery\.save"):
        pickle.dumps(layer)


def test_hooks_run_and_see_the_grafted_output(layer: nn.Linear) -> None:
    seen: list[Tensor] = []
    layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    plain = layer(x())
    graft(layer, Twice)
    layer(x())
    assert len(seen) == 2
    assert torch.equal(seen[1], 2 * plain)


def test_twice_the_same_and_never_grafted_are_errors(layer: nn.Linear) -> None:
    with pytest.raises(ModelStateError, match="Linear does not carry Twice"):
        ungraft(layer, Twice)
    graft(layer, Twice)
    with pytest.raises(ModelStateError, match="Linear already carries Twice"):
        graft(layer, Twice)


def test_instance_forward_is_refused_since_it_would_hide_the_graft(layer: nn.Linear) -> None:
    layer.forward = x  # type: ignore[method-assign]
    with pytest.raises(ModelStateError, match=r"encoder\.0: this Linear has a forward of its own"):
        check_graftable(layer, "encoder.0")
    with pytest.raises(ModelStateError, match="forward of its own"):
        graft(layer, Twice)
    assert type(layer) is nn.Linear


def test_graft_goes_beneath_accelerate_hooks_and_off_again(layer: nn.Linear) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    plain = layer(x())
    hooks.add_hook_to_module(layer, hooks.ModelHook())
    graft(layer, Twice)
    assert torch.equal(layer(x()), 2 * plain)
    ungraft(layer, Twice)
    assert torch.equal(layer(x()), plain)
    graft(layer, Twice)
    hooks.remove_hook_from_module(layer)
    assert torch.equal(layer(x()), 2 * plain)


def test_class_changed_by_somebody_else_since_is_named(layer: nn.Linear) -> None:
    graft(layer, Twice)
    sharded = type("FSDPLinear", (FSDPModule, type(layer)), {})
    layer.__class__ = sharded
    assert grafts(layer) == (Twice,)
    with pytest.raises(ModelStateError, match=r"became FSDPLinear after it was rewritten"):
        ungraft(layer, Twice)
