"""The networks that fast adaptation is measured with: four convolutions, and a small perceptron."""

from __future__ import annotations

import itertools

from torch import Tensor, nn

from architectures.backbones.base import Backbone, Preset

_SOURCE = "arXiv 1703.03400, section 5"
_HALVINGS = 4


class FourConvolutions(Backbone):
    """Four times convolution (3 × 3), batch norm, ReLU and max pooling (2 × 2), and a linear layer.

    The network of Matching Networks (arXiv 1606.04080) and MAML. Batch norms keep no running
    statistics, as in MAML's code: they normalise by the batch at hand in either mode.

    Args:
        filters: Channels of every convolution.
        in_chans: Channels of an image.
        num_classes: Classes.
        size: Height and width of an image; 16 or more, since it is halved four times.

    Raises:
        ValueError: a size is not positive, or ``size`` is below 16.
    """

    def __init__(
        self, *, filters: int = 64, in_chans: int = 3, num_classes: int = 5, size: int = 84
    ) -> None:
        super().__init__()
        self.arguments = {
            "filters": filters,
            "in_chans": in_chans,
            "num_classes": num_classes,
            "size": size,
        }
        _check_positive(self.arguments)
        if size < 2**_HALVINGS:
            raise ValueError(f"size={size}, expected at least {2**_HALVINGS}: it is halved 4 times")
        self.input_shape = (in_chans, size, size)
        widths = (in_chans, *[filters] * _HALVINGS)
        self.blocks = nn.Sequential(
            *(_block(before, after) for before, after in itertools.pairwise(widths))
        )
        self.head = nn.Linear(filters * (size >> _HALVINGS) ** 2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, num_classes) of images (batch, in_chans, size, size)."""
        return self.head(self.blocks(x).flatten(1))


class Perceptron(Backbone):
    """Linear layers with ReLU between them.

    Args:
        in_features: Elements of one sample.
        width: Width of the hidden layers.
        depth: Hidden layers.
        outputs: Values for one sample.

    Raises:
        ValueError: a size is not positive.
    """

    def __init__(
        self, *, in_features: int = 1, width: int = 40, depth: int = 2, outputs: int = 1
    ) -> None:
        super().__init__()
        self.arguments = {
            "in_features": in_features,
            "width": width,
            "depth": depth,
            "outputs": outputs,
        }
        _check_positive(self.arguments)
        self.input_shape = (in_features,)
        widths = (in_features, *[width] * depth)
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in itertools.pairwise(widths)
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Values (batch, outputs) of samples (batch, ...) with ``in_features`` elements."""
        x = x.flatten(1)
        for layer in self.layers:
            x = nn.functional.relu(layer(x))
        return self.head(x)


def _block(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, padding=1),
        nn.BatchNorm2d(after, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def _check_positive(arguments: dict[str, int]) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}={value}, expected at least 1")


PRESETS: tuple[Preset, ...] = (
    Preset("conv4-32", "plain", "FourConvolutions", {"filters": 32}, 32_901, _SOURCE),
    Preset("conv4-64", "plain", "FourConvolutions", {"filters": 64}, 121_093, _SOURCE),
    Preset("perceptron-40", "plain", "Perceptron", {"width": 40}, 1_761, _SOURCE),
)
