"""CIFAR's ResNet: depths, shortcuts and initialisation, against an independent reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.backbones import CifarResNet
from architectures.backbones.resnet import PadShortcut, ResNetBlock

BLOCKS = ["basic", "bottleneck"]
SHORTCUTS = ["pad", "projection"]


def weighted_layers(model: nn.Module) -> int:
    """Convolutions and linear layers that are on the main path."""
    return sum(
        isinstance(module, (nn.Conv2d, nn.Linear)) and "downsample" not in name
        for name, module in model.named_modules()
    )


@pytest.mark.parametrize(
    ("block", "depth"), [("basic", 8), ("basic", 56), ("bottleneck", 11), ("bottleneck", 164)]
)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_depth_counts_weighted_layers(block: str, depth: int, shortcut: str) -> None:
    with torch.device("meta"):
        model = CifarResNet(depth, block=block, shortcut=shortcut)
    assert weighted_layers(model) == depth


def normed(x: Tensor, state: dict[str, Tensor], at: str) -> Tensor:
    mean, var = state[f"{at}.running_mean"], state[f"{at}.running_var"]
    scale = state[f"{at}.weight"] / torch.sqrt(var + 1e-5)
    return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{at}.bias"][:, None, None]


def reference(x: Tensor, state: dict[str, Tensor], blocks: int, shortcut: str) -> Tensor:
    """Section 4.2 of the paper with basic blocks, written from the state dict alone."""
    x = normed(F.conv2d(x, state["conv1.weight"], padding=1), state, "bn1").relu()
    for stage in (1, 2, 3):
        for index in range(blocks):
            at, step = f"layer{stage}.{index}", 2 if stage > 1 and index == 0 else 1
            weight = state[f"{at}.branch.0.weight"]
            y = normed(F.conv2d(x, weight, stride=step, padding=1), state, f"{at}.branch.1").relu()
            y = F.conv2d(y, state[f"{at}.branch.3.weight"], padding=1)
            y = normed(y, state, f"{at}.branch.4")
            if step == 2 and shortcut == "pad":
                kept = x[:, :, ::2, ::2]
                x = torch.cat([kept, torch.zeros_like(kept)], dim=1)
            elif step == 2:
                x = F.conv2d(x, state[f"{at}.downsample.0.weight"], stride=2)
                x = normed(x, state, f"{at}.downsample.1")
            x = (x + y).relu()
    return F.linear(x.mean((2, 3)), state["fc.weight"], state["fc.bias"])


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("side", [8, 32])
def test_computes_what_the_paper_says(shortcut: str, side: int) -> None:
    model = CifarResNet(14, shortcut=shortcut).double()
    x = torch.randn(4, 3, side, side, dtype=torch.float64)
    model(x)  # running statistics other than 0 and 1
    model.eval()
    expected = reference(x, dict(model.state_dict()), 2, shortcut)
    # float64 and the same sums in another order.
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_pad_shortcut_adds_zeros_behind() -> None:
    x = torch.randn(2, 3, 5, 5)
    y = PadShortcut(2, 2)(x)
    assert y.shape == (2, 5, 3, 3)
    assert torch.equal(y[:, :3], x[:, :, ::2, ::2])
    assert not y[:, 3:].any()


def test_convolutions_start_by_fan_out_and_norms_at_one() -> None:
    model = CifarResNet(20)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * 9
            # 432 draws or more: the deviation of their deviation is below 4 %, five of them 20 %.
            assert float(module.weight.detach().std()) == pytest.approx(
                (2 / fan_out) ** 0.5, rel=0.2
            )
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all())
            assert not module.bias.any()


@pytest.mark.parametrize("block", BLOCKS)
def test_zero_init_last_makes_blocks_the_identity(block: str) -> None:
    model = CifarResNet(20, block=block, zero_init_last=True)
    for module in model.modules():
        if isinstance(module, ResNetBlock) and isinstance(module.downsample, nn.Identity):
            x = torch.randn(2, module.branch[0].in_channels, 4, 4).relu()
            assert torch.equal(module(x), x)
    assert bool((CifarResNet(20, block=block).layer1[0].last_norm.weight == 1).all())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 18}, "nearest is 14 or 20"),
        ({"depth": 20, "block": "wide"}, "block='wide', expected"),
        ({"depth": 20, "shortcut": "A"}, "shortcut='A', expected"),
        ({"depth": 20, "widths": [16, 32]}, "expected three"),
    ],
)
def test_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CifarResNet(**arguments)
