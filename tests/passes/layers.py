"""Small modules, one for every way a weight can be adapted, with an input for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize


class Conv1D(nn.Module):
    """GPT-2's layer: a weight stored in x out, multiplied as it is."""

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.nf = out
        self.weight = nn.Parameter(torch.randn(width, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class Untransposed(nn.Module):
    """The same by another operator, with a weight of another name."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(width, out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.kernel


class StandardisedConv(nn.Conv2d):
    """Computes with another weight than the one it has, as timm's ScaledStdConv2d does."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(input, weight, self.bias)


class ScaledEmbedding(nn.Embedding):
    """Scales what it looked up, as Gemma's does."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * torch.tensor(5.0, dtype=self.weight.dtype)


class OffsetEmbedding(nn.Embedding):
    """Looks up other rows than it was asked for, as OPT's and BART's do."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input + 2)


class ScaledLinear(nn.Linear):
    """Scales its output by calling the plain layer's forward."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return super().forward(input) * 3


class SquaredLinear(nn.Linear):
    """Multiplies with the square of its weight: no branch beside it could be right."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return functional.linear(input, self.weight.square(), self.bias)


class WeightReader(nn.Module):
    """Multiplies with the weight of a child that it never calls, as timm's EVA does."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 9)

    def forward(self, x: Tensor) -> Tensor:
        if self.qkv.weight.dtype == torch.int8:
            raise TypeError("quantised")
        layer = self.qkv
        return functional.linear(x, layer.weight, layer.bias)


class Experts(nn.Module):
    """Two stacks of matrices, read one expert at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 6))
        self.down = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for expert in range(3):
            hidden = functional.relu(functional.linear(x, self.up[expert]))
            total = total + functional.linear(hidden, self.down[expert])
        return total


class Attention(nn.Module):
    """nn.MultiheadAttention, which reads its projections' weights and calls neither."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x, need_weights=False)[0]


class Doubled(nn.Module):
    """A parametrization: twice the original."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def _parametrised() -> nn.Module:
    layer = nn.Linear(6, 5)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def _contiguous(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape)


def _across(*shape: int) -> Callable[[], Tensor]:
    """An input that cannot be flattened without a copy."""
    return lambda: torch.randn(shape).transpose(0, 1).contiguous().transpose(0, 1)


def _indices(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 10, shape)


@dataclass(frozen=True)
class Kind:
    """One way of being adapted.

    Attributes:
        make: The layer, or a module with layers.
        x: Its input.
        hosts: Host of every place that gets an adapter, by path.
        transposed: Whether the weight is stored columns x rows.
        stacked: Whether leading dimensions count matrices.
        dropout: Whether the low-rank branch can drop inputs.
        half: Whether the stock layer runs in half precision on the CPU.
    """

    make: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    hosts: dict[str, str]
    transposed: bool = False
    stacked: bool = False
    dropout: bool = True
    half: bool = True


def _kind(make: Callable[[], nn.Module], x: Callable[[], Tensor], host: str, **more: Any) -> Kind:
    return Kind(make, x, {"": host}, **more)


KINDS: dict[str, Kind] = {
    "linear": _kind(lambda: nn.Linear(6, 5), _contiguous(2, 3, 6), "linear"),
    "linear of a vector": _kind(lambda: nn.Linear(6, 5), _contiguous(6), "linear"),
    "linear of an image": _kind(lambda: nn.Linear(6, 5), _contiguous(2, 3, 4, 6), "linear"),
    "linear without bias": _kind(lambda: nn.Linear(6, 5, bias=False), _contiguous(2, 6), "linear"),
    "linear of a view": _kind(lambda: nn.Linear(6, 5), _across(2, 3, 6), "linear"),
    "linear, empty": _kind(lambda: nn.Linear(6, 5), _contiguous(0, 6), "linear"),
    "scaled linear": _kind(lambda: ScaledLinear(6, 5), _contiguous(2, 6), "linear"),
    "squared linear": _kind(
        lambda: SquaredLinear(6, 5), _contiguous(2, 6), "weight", dropout=False
    ),
    "parametrised": _kind(_parametrised, _contiguous(2, 6), "linear"),
    "Conv1D": _kind(lambda: Conv1D(5, 6), _contiguous(2, 3, 6), "output", transposed=True),
    "square Conv1D": _kind(lambda: Conv1D(6, 6), _contiguous(2, 6), "output", transposed=True),
    "x @ W": _kind(lambda: Untransposed(6, 5), _contiguous(2, 6), "output", transposed=True),
    "conv1d": _kind(
        lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=1), _contiguous(2, 4, 11), "conv1d"
    ),
    "conv2d": _kind(
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=1, padding_mode="circular"),
        _contiguous(2, 4, 6, 5),
        "conv2d",
    ),
    "conv2d, one image": _kind(
        lambda: nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect", bias=False),
        _contiguous(4, 6, 5),
        "conv2d",
    ),
    "grouped conv2d": _kind(
        lambda: nn.Conv2d(6, 4, 3, groups=2, padding=1), _contiguous(2, 6, 5, 5), "conv2d"
    ),
    "depthwise conv2d": _kind(
        lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1), _contiguous(2, 4, 5, 5), "conv2d"
    ),
    "conv3d": _kind(
        lambda: nn.Conv3d(2, 4, 2, padding_mode="replicate", padding=1, groups=2),
        _contiguous(2, 2, 3, 4, 3),
        "conv3d",
        half=False,
    ),
    "standardised conv2d": _kind(
        lambda: StandardisedConv(4, 6, 3), _contiguous(2, 4, 5, 5), "weight", dropout=False
    ),
    "transposed conv2d": _kind(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2),
        _contiguous(2, 4, 5, 5),
        "weight",
        dropout=False,
    ),
    "embedding": _kind(lambda: nn.Embedding(10, 6, padding_idx=3), _indices(2, 7), "embedding"),
    "scaled embedding": _kind(lambda: ScaledEmbedding(10, 6), _indices(2, 7), "embedding"),
    "offset embedding": _kind(lambda: OffsetEmbedding(12, 6), _indices(2, 7), "embedding"),
    "embedding bag": _kind(lambda: nn.EmbeddingBag(10, 6), _indices(3, 4), "weight", dropout=False),
    "read by another": Kind(WeightReader, _contiguous(2, 6), {"qkv": "weight"}, dropout=False),
    "experts": Kind(
        Experts,
        _contiguous(4, 6),
        {"up": "weight", "down": "weight"},
        stacked=True,
        dropout=False,
    ),
    # Its fast path hands the weights of its children to one fused operator.
    "encoder layer": Kind(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True),
        _contiguous(2, 5, 8),
        {
            "self_attn.in_proj_weight": "weight",
            "self_attn.out_proj": "weight",
            "linear1": "weight",
            "linear2": "weight",
        },
        dropout=False,
    ),
    "attention": Kind(
        Attention,
        _contiguous(2, 5, 8),
        {"mha.in_proj_weight": "weight", "mha.out_proj": "weight"},
        dropout=False,
    ),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A module of a kind in a dtype, with every parameter random, and its input."""
    kind = KINDS[name]
    module = kind.make()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    x = kind.x()
    return module.to(dtype), x.to(dtype) if x.is_floating_point() else x
