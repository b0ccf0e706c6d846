"""The residual MLP: depth, what it computes, and its initialisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.backbones import ResidualMLP


def reference(x: Tensor, state: dict[str, Tensor], blocks: int, layers: int) -> Tensor:
    width = state["norm.weight"].numel()

    def norm(value: Tensor, at: str) -> Tensor:
        return F.layer_norm(value, (width,), state[f"{at}.weight"], state[f"{at}.bias"])

    x = x.flatten(1) @ state["embed.weight"].T + state["embed.bias"]
    for block in range(blocks):
        y = x
        for layer in range(layers):
            at = f"blocks.{block}.branch"
            y = norm(y, f"{at}.{3 * layer}").relu()
            y = y @ state[f"{at}.{3 * layer + 2}.weight"].T + state[f"{at}.{3 * layer + 2}.bias"]
        x = x + y
    return norm(x, "norm") @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize(("depth", "layers"), [(1, 1), (7, 1), (8, 2), (8, 4)])
def test_computes_what_it_says(depth: int, layers: int) -> None:
    model = ResidualMLP(depth, width=16, layers_per_block=layers).double()
    x = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    expected = reference(x, dict(model.state_dict()), depth // layers, layers)
    # float64 and the same sums in another order.
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    linear = sum(isinstance(each, nn.Linear) for each in model.blocks.modules())
    assert linear == depth


def test_weights_start_by_fan_in() -> None:
    model = ResidualMLP(4, width=128)
    for module in model.blocks.modules():
        if isinstance(module, nn.Linear):
            # 16 384 draws: the deviation of their deviation is 0.6 %, five of them 3 %.
            assert float(module.weight.detach().std()) == pytest.approx((2 / 128) ** 0.5, rel=0.03)
            assert not module.bias.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth=0, expected at least 1"),
        ({"depth": 4, "width": 0}, "width=0"),
        ({"depth": 63, "layers_per_block": 4}, "nearest are 60 and 64"),
        ({"depth": 1, "layers_per_block": 2}, "nearest are 2$"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ResidualMLP(**arguments)
