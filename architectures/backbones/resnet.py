"""ResNets of any depth (arXiv 1512.03385): ImageNet's as timm's class, CIFAR's as a plain module.

timm's class has a stem of 64 channels that divides the resolution by four, and four stages; the
paper's networks for CIFAR have a stem of 16 channels that keeps it, and three.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from architectures.backbones.base import Backbone, Preset, UnknownPreset

Block = Literal["basic", "bottleneck"]
Shortcut = Literal["pad", "projection"]

_PAPER = "arXiv 1512.03385"
_EXTENDED = "ours, by the rule of arXiv 1512.03385"
_IMAGENET = re.compile(r"resnet-(\d+)(?:-(basic|bottleneck))?")
_CIFAR = re.compile(r"resnet-(\d+)-cifar(?:-(basic|bottleneck))?")

#: Weighted layers in one block, and how many times wider its output is than its inside.
_LAYERS: dict[str, int] = {"basic": 2, "bottleneck": 3}
_EXPANSION: dict[str, int] = {"basic": 1, "bottleneck": 4}
_IMAGENET_WIDTHS = (64, 128, 256, 512)
_CIFAR_WIDTHS = (16, 32, 64)
#: Two of the published networks do not follow the rule in ``imagenet_stages``.
_PUBLISHED_STAGES = {101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class CifarResNet(Backbone):
    """The paper's ResNet for small images (section 4.2).

    A 3 × 3 convolution of 16 channels, three stages that halve the resolution between them, the
    mean over positions, and a linear layer. Convolutions start as in arXiv 1502.01852 (fan-out).

    Args:
        depth: Weighted layers: 6 n + 2 with basic blocks, 9 n + 2 with bottlenecks.
        block: ``basic``, two 3 × 3 convolutions; ``bottleneck``, 1 × 1, 3 × 3 and 1 × 1 with an
            output four times wider (the stages of arXiv 1603.05027).
        num_classes: Classes.
        in_chans: Channels of an image.
        widths: Channels inside the blocks of the three stages; the stem has the first.
        shortcut: Where a block changes the shape: ``pad`` takes every other position and fills
            up with channels of zeros (the paper's option A, which adds no parameter);
            ``projection`` is a 1 × 1 convolution (option B).
        zero_init_last: Whether the last norm of every block starts at zero, as in
            arXiv 1706.02677, so that the block is the identity. The paper's does not.

    Raises:
        ValueError: there is no network of that depth, or an option is unknown.
    """

    def __init__(
        self,
        depth: int,
        *,
        block: Block = "basic",
        num_classes: int = 10,
        in_chans: int = 3,
        widths: Sequence[int] = _CIFAR_WIDTHS,
        shortcut: Shortcut = "pad",
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        self.arguments = {
            "depth": depth,
            "block": block,
            "num_classes": num_classes,
            "in_chans": in_chans,
            "widths": list(widths),
            "shortcut": shortcut,
            "zero_init_last": zero_init_last,
        }
        if block not in _LAYERS:
            raise ValueError(f"block={block!r}, expected 'basic' or 'bottleneck'")
        if shortcut not in ("pad", "projection"):
            raise ValueError(f"shortcut={shortcut!r}, expected 'pad' or 'projection'")
        if len(widths) != 3:
            raise ValueError(f"widths={list(widths)}, expected three, one for each stage")
        blocks = _cifar_blocks(depth, block)
        self.input_shape = (in_chans, 32, 32)
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU()
        before, stages = widths[0], list[nn.Sequential]()
        for index, width in enumerate(widths):
            after = width * _EXPANSION[block]
            stride = 1 if index == 0 else 2
            first = ResNetBlock(before, width, block, stride=stride, shortcut=shortcut)
            rest = (ResNetBlock(after, width, block) for _ in range(blocks - 1))
            stages.append(nn.Sequential(first, *rest))
            before = after
        self.layer1, self.layer2, self.layer3 = stages
        self.global_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        self._init_weights(zero_init_last)

    def _init_weights(self, zero_init_last: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, ResNetBlock) and zero_init_last:
                nn.init.zeros_(module.last_norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_chans, height, width)."""
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(self.global_pool(x).flatten(1))


class ResNetBlock(nn.Module):
    """``ReLU(shortcut(x) + F(x))``, where F is convolutions with batch norms between them.

    Args:
        channels: Channels of the input.
        width: Channels inside; the output of a bottleneck has four times as many.
        block: Kind of block.
        stride: Stride of its 3 × 3 convolution, the first of a basic block.
        shortcut: What brings the input to another shape.
    """

    def __init__(
        self, channels: int, width: int, block: Block, stride: int = 1, shortcut: Shortcut = "pad"
    ) -> None:
        super().__init__()
        out = width * _EXPANSION[block]
        if block == "basic":
            sizes = ((channels, width, 3, stride), (width, out, 3, 1))
        else:
            sizes = ((channels, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1))
        layers = list[nn.Module]()
        for before, after, kernel, step in sizes:
            conv = nn.Conv2d(before, after, kernel, stride=step, padding=kernel // 2, bias=False)
            layers += [conv, nn.BatchNorm2d(after), nn.ReLU()]
        self.branch = nn.Sequential(*layers[:-1])
        self.downsample = _shortcut(channels, out, stride, shortcut)
        self.act = nn.ReLU()

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The batch norm at the end of F."""
        norm = self.branch[-1]
        assert isinstance(norm, nn.BatchNorm2d)  # noqa: S101 - for the type checker; the constructor put it there
        return norm

    def forward(self, x: Tensor) -> Tensor:
        """Output (batch, channels', height', width') of input (batch, channels, height, width)."""
        return self.act(self.branch(x) + self.downsample(x))


class PadShortcut(nn.Module):
    """Every ``stride``-th position, and further channels of zeros: the paper's option A.

    Args:
        extra: Channels of zeros behind the input's.
        stride: Step in height and width.
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra = extra
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Output (batch, channels + extra, height / stride, width / stride)."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


def _shortcut(channels: int, out: int, stride: int, kind: Shortcut) -> nn.Module:
    if channels == out and stride == 1:
        return nn.Identity()
    if kind == "pad":
        return PadShortcut(out - channels, stride)
    projection = nn.Conv2d(channels, out, 1, stride=stride, bias=False)
    return nn.Sequential(projection, nn.BatchNorm2d(out))


def cifar_parameters(depth: int, block: Block, *, in_chans: int = 3, classes: int = 10) -> int:
    """How many parameters a CIFAR ResNet with parameter-free shortcuts has."""
    blocks = _cifar_blocks(depth, block)
    count, before = 9 * in_chans * 16 + 2 * 16, 16
    for width in _CIFAR_WIDTHS:
        after = width * _EXPANSION[block]
        count += _branch(before, width, block) + (blocks - 1) * _branch(after, width, block)
        before = after
    return count + (before + 1) * classes


def imagenet_parameters(stages: Sequence[int], block: Block, *, classes: int = 1000) -> int:
    """How many parameters a ResNet for ImageNet with projection shortcuts has."""
    count, before = 49 * 3 * 64 + 2 * 64, 64
    for blocks, width in zip(stages, _IMAGENET_WIDTHS, strict=True):
        after = width * _EXPANSION[block]
        count += _branch(before, width, block) + (blocks - 1) * _branch(after, width, block)
        # Stages after the first always change the resolution; the first only a bottleneck's width.
        count += before * after + 2 * after if before != after else 0
        before = after
    return count + (before + 1) * classes


def _branch(channels: int, width: int, block: Block) -> int:
    """Parameters of one block without its shortcut: convolutions, and two for each norm channel."""
    if block == "basic":
        return 9 * channels * width + 9 * width**2 + 4 * width
    return channels * width + 9 * width**2 + 4 * width**2 + 2 * (width + width + 4 * width)


def imagenet_stages(depth: int, block: Block) -> tuple[int, int, int, int]:
    """Blocks in each of the four stages of a network of ``depth`` weighted layers.

    n blocks are divided so: three each (for n < 12 a quarter) to the first and the last stage,
    the rest 2 : 3 to the two between them. The paper's networks of 18, 34 and 50 layers and the
    one of 200 of arXiv 1603.05027 are so; those of 101 and 152 are taken from its table 1.

    Raises:
        UnknownPreset: no network has that depth.
    """
    layers = _LAYERS[block]
    blocks, rest = divmod(depth - 2, layers)
    if rest or blocks < 4:
        least = 4 * layers + 2
        suffix = "" if block == _usual(depth) else f"-{block}"
        raise _wrong_depth(depth, least, layers, f"{block} blocks", "resnet-{}" + suffix)
    if block == "bottleneck" and depth in _PUBLISHED_STAGES:
        return _PUBLISHED_STAGES[depth]
    ends = min(3, blocks // 4)
    between = blocks - 2 * ends
    second = round(between * 2 / 5)
    return ends, second, between - second, ends


def _cifar_blocks(depth: int, block: Block) -> int:
    """Blocks in each of the three stages."""
    step = 3 * _LAYERS[block]
    blocks, rest = divmod(depth - 2, step)
    if rest or blocks < 1:
        suffix = "" if block == "basic" else "-bottleneck"
        raise _wrong_depth(
            depth, step + 2, step, f"three stages of {block} blocks", "resnet-{}-cifar" + suffix
        )
    return blocks


def _wrong_depth(depth: int, least: int, step: int, what: str, name: str) -> UnknownPreset:
    below = least + max(0, depth - least) // step * step
    near = (below,) if depth < least else (below, below + step)
    fewest = (least - 2) // step
    return UnknownPreset(
        f"a ResNet with {what} has {step} n + 2 layers with n ≥ {fewest}, and {depth} is none of "
        f"these depths; the nearest is {' or '.join(map(str, near))}",
        tuple(name.format(each) for each in near),
    )


def _usual(depth: int) -> Block:
    """The block of the paper's networks for ImageNet: bottlenecks from 50 layers on."""
    return "basic" if depth < 50 else "bottleneck"


def _as_block(name: str | None, default: Block) -> Block:
    if name is None:
        return default
    return "basic" if name == "basic" else "bottleneck"


def find_imagenet(name: str) -> Preset | None:
    """The ResNet for ImageNet that ``name`` stands for, or None if it is no such name.

    Raises:
        UnknownPreset: it is one, with a depth that no network has.
    """
    matched = _IMAGENET.fullmatch(name)
    if matched is None:
        return None
    depth = int(matched.group(1))
    block = _as_block(matched.group(2), _usual(depth))
    stages = imagenet_stages(depth, block)
    published = depth in (18, 34, 50, 101, 152) and block == _usual(depth)
    # timm names the kind of block by an architecture; the number of blocks is an argument.
    base = depth if published else {"basic": 18, "bottleneck": 50}[block]
    config: dict[str, Any] = {"layers": list(stages), "zero_init_last": False}
    count = imagenet_parameters(stages, block)
    source = f"{_PAPER}, table 1" if published else _EXTENDED
    return Preset(name, "timm", f"resnet{base}", config, count, source)


def find_cifar(name: str) -> Preset | None:
    """The ResNet for CIFAR that ``name`` stands for, or None if it is no such name.

    Raises:
        UnknownPreset: it is one, with a depth that no network has.
    """
    matched = _CIFAR.fullmatch(name)
    if matched is None:
        return None
    depth, block = int(matched.group(1)), _as_block(matched.group(2), "basic")
    count = cifar_parameters(depth, block)
    source = f"{_PAPER}, section 4.2" if block == "basic" else "arXiv 1603.05027, after activation"
    config: dict[str, Any] = {"depth": depth, "block": block}
    return Preset(name, "plain", "CifarResNet", config, count, source)


_LISTED_IMAGENET = (18, 34, 50, 101, 152)
_LISTED_CIFAR = (20, 32, 44, 56, 110, 1202)
PRESETS: tuple[Preset, ...] = tuple(
    found
    for found in (
        *(find_imagenet(f"resnet-{depth}") for depth in _LISTED_IMAGENET),
        *(find_cifar(f"resnet-{depth}-cifar") for depth in _LISTED_CIFAR),
    )
    if found is not None
)
