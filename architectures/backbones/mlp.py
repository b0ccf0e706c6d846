"""A residual MLP of any depth: the plainest network with residual connections."""

from __future__ import annotations

import re

from torch import Tensor, nn

from architectures.backbones.base import Backbone, Preset, UnknownPreset

_SOURCE = "ours, blocks of arXiv 1603.05027"
_NAME = re.compile(r"mlp-(\d+)")
#: Depths that are listed by name; any other works too.
_LISTED = (8, 16, 64)
_WIDTH, _FEATURES, _CLASSES = 128, 64, 10


class ResidualMLP(Backbone):
    """Linear layers in pre-activation residual blocks, ``x + W ReLU(LayerNorm(x))``.

    A linear layer in front brings samples to ``width``, a norm and a linear layer behind give
    logits. Weights in the blocks start as in arXiv 1502.01852 (fan-in), biases at zero.

    Args:
        depth: Linear layers in residual blocks; a multiple of ``layers_per_block``.
        width: Width of the blocks.
        in_features: Elements of one sample, whatever its shape.
        num_classes: Classes.
        layers_per_block: Linear layers in one block, each behind a norm and a ReLU.

    Raises:
        ValueError: a size is not positive, or ``depth`` is no multiple of ``layers_per_block``.
    """

    def __init__(
        self,
        depth: int,
        *,
        width: int = _WIDTH,
        in_features: int = _FEATURES,
        num_classes: int = _CLASSES,
        layers_per_block: int = 1,
    ) -> None:
        super().__init__()
        self.arguments = {
            "depth": depth,
            "width": width,
            "in_features": in_features,
            "num_classes": num_classes,
            "layers_per_block": layers_per_block,
        }
        for name, value in self.arguments.items():
            if value < 1:
                raise ValueError(f"{name}={value}, expected at least 1")
        if depth % layers_per_block:
            below = depth - depth % layers_per_block
            near = [str(near) for near in (below, below + layers_per_block) if near]
            raise ValueError(
                f"depth={depth} is no multiple of layers_per_block={layers_per_block}; "
                f"the nearest are {' and '.join(near)}"
            )
        self.input_shape = (in_features,)
        self.embed = nn.Linear(in_features, width)
        self.blocks = nn.Sequential(
            *(ResidualBlock(width, layers_per_block) for _ in range(depth // layers_per_block))
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of samples (batch, ...) with ``in_features`` elements."""
        return self.head(self.norm(self.blocks(self.embed(x.flatten(1)))))


class ResidualBlock(nn.Module):
    """``x + F(x)``, where F is ``layers`` times norm, ReLU and linear.

    Args:
        width: Width of input and output.
        layers: Linear layers.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(
                module
                for _ in range(layers)
                for module in (nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, width))
            )
        )
        for module in self.branch:
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Output (..., width) of input (..., width)."""
        return x + self.branch(x)


def parameters(depth: int, width: int, features: int, classes: int) -> int:
    """How many parameters a residual MLP has: per layer w² + w (linear) and 2 w (norm)."""
    outside = (features + 1) * width + 2 * width + (width + 1) * classes
    return depth * (width**2 + 3 * width) + outside


def find(name: str) -> Preset | None:
    """The residual MLP that ``name`` stands for, or None if it is no name of this family.

    Raises:
        UnknownPreset: it is one, with a depth of zero.
    """
    matched = _NAME.fullmatch(name)
    if matched is None:
        return None
    depth = int(matched.group(1))
    if depth < 1:
        raise UnknownPreset(f"{name!r}: a residual MLP has at least one layer", ("mlp-1",))
    count = parameters(depth, _WIDTH, _FEATURES, _CLASSES)
    return Preset(name, "plain", "ResidualMLP", {"depth": depth}, count, _SOURCE)


PRESETS: tuple[Preset, ...] = tuple(
    found for depth in _LISTED if (found := find(f"mlp-{depth}")) is not None
)
