"""What a node of a captured graph does to its tensors, as far as a residual can depend on it."""

from __future__ import annotations

from enum import Enum, auto
from typing import cast

from torch import fx, nn

from surgery.capture.nodes import op_name


class Effect(Enum):
    """What a node does to the tensor it takes in."""

    CAST = auto()
    """Same elements, another type or device."""
    LAYOUT = auto()
    """Same elements, rearranged, repeated or padded."""
    PART = auto()
    """Some of the elements."""
    STRIDE = auto()
    """Every second element, say."""
    DROP = auto()
    """Dropout."""
    SCALE = auto()
    """Times or divided by something; ``flow`` decides by what."""
    ADD = auto()
    SUBTRACT = auto()
    POOL = auto()
    """Statistics over neighbours."""
    REDUCE = auto()
    """Statistics over whole axes."""
    NORM = auto()
    ACTIVATION = auto()
    WEIGHT = auto()
    """A weight layer, or a product that is one if an operand is a parameter."""
    MIX = auto()
    """Attention, FFT and the like: elements meet, without a weight."""
    LOOKUP = auto()
    """Rows of a table, chosen by index."""
    JOIN = auto()
    """Puts tensors side by side."""
    MAKE = auto()
    """A new tensor with the size of another, none of its content."""
    OTHER = auto()


def _table(effects: dict[Effect, str]) -> dict[str, Effect]:
    return {name: effect for effect, names in effects.items() for name in names.split()}


_EFFECTS = _table(
    {
        Effect.CAST: "to type type_as float half bfloat16 double cpu cuda detach clone contiguous",
        Effect.LAYOUT: """
            view reshape transpose permute swapaxes swapdims movedim moveaxis t T mT H mH adjoint
            flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to repeat tile
            repeat_interleave roll flip fliplr flipud rot90 pad constant_pad_nd view_as reshape_as
            pixel_shuffle pixel_unshuffle channel_shuffle view_as_complex view_as_real alias
            unfold fold positive
        """,
        Effect.PART: """
            chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split unbind getitem
            select narrow index_select take_along_dim gather masked_select diagonal real imag
        """,
        Effect.DROP: """
            dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
            feature_alpha_dropout
        """,
        Effect.SCALE: "mul multiply div truediv divide true_divide",
        Effect.ADD: "add iadd",
        Effect.SUBTRACT: "sub isub subtract rsub",
        Effect.POOL: """
            avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d
            adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
            adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d
            interpolate upsample
        """,
        Effect.REDUCE: "mean amax max",
        Effect.NORM: """
            layer_norm rms_norm group_norm batch_norm instance_norm normalize local_response_norm
            native_layer_norm native_group_norm
        """,
        Effect.ACTIVATION: """
            relu relu6 gelu silu mish elu selu celu leaky_relu rrelu prelu hardswish hardsigmoid
            hardtanh sigmoid tanh softplus softsign logsigmoid tanhshrink threshold softshrink
            hardshrink erf glu clamp clip
        """,
        Effect.WEIGHT: """
            linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d
            convolution bilinear matmul mm bmm mv dot addmm baddbmm addbmm grouped_mm _grouped_mm
            grouped_mm_fallback einsum
        """,
        Effect.MIX: """
            scaled_dot_product_attention flash_attn_func flex_attention fft_fft fft_fft2
            fft_fftn fft_rfft fft_rfft2 fft_rfftn fft_ifft fft_ifft2 fft_ifftn fft_irfft
            fft_irfft2 fft_irfftn fft_hfft fft_ihfft cumsum
        """,
        Effect.LOOKUP: "embedding embedding_bag",
        Effect.JOIN: "cat concat concatenate stack hstack vstack dstack column_stack",
        Effect.MAKE: """
            empty_like full_like ones_like zeros_like rand_like randn_like new_empty new_full
            new_ones new_tensor new_zeros arange zeros ones full empty linspace tensor bernoulli
        """,
    }
)

_CONVOLUTION = nn.modules.conv._ConvNd  # pyright: ignore[reportPrivateUsage]
_NORMS = (
    nn.modules.batchnorm._NormBase,  # pyright: ignore[reportPrivateUsage]
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_POOLS = (
    nn.modules.pooling._AvgPoolNd,  # pyright: ignore[reportPrivateUsage]
    nn.modules.pooling._MaxPoolNd,  # pyright: ignore[reportPrivateUsage]
    nn.modules.pooling._AdaptiveAvgPoolNd,  # pyright: ignore[reportPrivateUsage]
    nn.modules.pooling._AdaptiveMaxPoolNd,  # pyright: ignore[reportPrivateUsage]
    nn.modules.pooling._LPPoolNd,  # pyright: ignore[reportPrivateUsage]
    nn.Upsample,
)
_DROPOUT = nn.modules.dropout._DropoutNd  # pyright: ignore[reportPrivateUsage]


def effect_of(node: fx.Node, root: nn.Module) -> Effect:
    """What a node does. Products by a constant are told apart later, with their operands."""
    if node.op == "call_module":
        return module_effect(root.get_submodule(cast(str, node.target)))
    if node.op not in ("call_function", "call_method"):
        return Effect.OTHER
    return _EFFECTS.get(op_name(node), Effect.OTHER)


def module_effect(module: nn.Module) -> Effect:
    """What a module does that a graph shows as one node."""
    if isinstance(module, nn.Identity):
        return Effect.LAYOUT
    if isinstance(module, _DROPOUT):
        return Effect.DROP
    if isinstance(module, _NORMS):
        return Effect.NORM
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Effect.LOOKUP
    if isinstance(module, _POOLS):
        return Effect.POOL
    if isinstance(module, nn.PReLU) or _is_activation(module):
        return Effect.ACTIVATION
    if weight_layers(module):
        return Effect.WEIGHT
    inner = {module_effect(child) for child in module.children()}
    if inner:
        return _strongest(inner)
    # Scales and written normalisations hold vectors; of what holds nothing, nothing is known.
    return Effect.NORM if any(True for _ in module.parameters()) else Effect.OTHER


def _is_activation(module: nn.Module) -> bool:
    of_torch = type(module).__module__ == nn.modules.activation.__name__
    return of_torch and not any(True for _ in module.parameters())


def _strongest(effects: set[Effect]) -> Effect:
    for effect in (Effect.OTHER, Effect.ACTIVATION, Effect.POOL, Effect.NORM, Effect.DROP):
        if effect in effects:
            return effect
    return Effect.LAYOUT


def weight_layers(module: nn.Module) -> int:
    """How many modules in it hold a matrix or a kernel; embedding tables do not count."""
    return sum(_has_weight(inner) for inner in module.modules())


def _has_weight(module: nn.Module) -> bool:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag, *_NORMS)):
        return False
    if isinstance(module, (nn.Linear, _CONVOLUTION)):
        return True
    own = module.parameters(recurse=False)
    return any(sum(size > 1 for size in parameter.shape) > 1 for parameter in own)
