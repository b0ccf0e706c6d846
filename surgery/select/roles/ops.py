"""What kind of computation a node of a trace is."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, cast

from torch import fx, nn

from surgery.capture.nodes import op_name, spec


class Kind(Enum):
    """Kinds of computation, as far as a role can depend on them."""

    VIEW = auto()
    """Moves elements about or changes their type: its first operand, rearranged."""
    JOIN = auto()
    """Puts tensors side by side, or picks from several."""
    ADD = auto()
    MULTIPLY = auto()
    BEND = auto()
    """An elementwise nonlinearity with one input."""
    GLU = auto()
    """Halves its input and multiplies one half by a nonlinearity of the other."""
    SOFTMAX = auto()
    PICK = auto()
    """Chooses the largest entries: topk, sort, argmax."""
    GATHER = auto()
    """Reads at positions that another operand names."""
    ATTEND = auto()
    """A fused attention: query, key and value are its first three operands."""
    MATMUL = auto()
    EINSUM = auto()
    LINEAR = auto()
    CONVOLVE = auto()
    LOOKUP = auto()
    """Rows of a table by index: an embedding."""
    NORMALISE = auto()
    MAKE = auto()
    """A new tensor with the size of another, none of its content."""
    PASS = auto()
    """Anything else: what comes out is a function of what goes in."""


def _table(kinds: dict[Kind, str]) -> dict[str, Kind]:
    return {name: kind for kind, names in kinds.items() for name in names.split()}


_KINDS = _table(
    {
        Kind.VIEW: """
            view reshape transpose permute swapaxes swapdims movedim moveaxis t T mT H mH adjoint
            flatten unflatten ravel squeeze unsqueeze expand expand_as broadcast_to contiguous
            clone detach alias chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split
            unbind getitem select narrow repeat repeat_interleave tile roll flip fliplr flipud
            rot90 pad constant_pad_nd as_strided view_as reshape_as unfold fold diagonal
            view_as_complex view_as_real real data pixel_shuffle pixel_unshuffle channel_shuffle
            index_select take_along_dim masked_select
            to type type_as float half bfloat16 double cpu cuda requires_grad
            dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout
            feature_alpha_dropout
            masked_fill fill_diagonal tril triu nan_to_num clamp clip clamp_min clamp_max
        """,
        Kind.JOIN: """
            cat concat concatenate stack hstack vstack dstack column_stack where setitem
            index_put index_copy index_add scatter scatter_add select_scatter slice_scatter
            masked_scatter copy index_fill scatter_reduce
        """,
        Kind.ADD: "add sub rsub subtract addcmul addcdiv lerp maximum minimum",
        Kind.MULTIPLY: "mul multiply div truediv divide true_divide",
        Kind.BEND: """
            relu relu6 gelu silu mish elu selu celu leaky_relu rrelu prelu hardswish hardsigmoid
            hardtanh sigmoid tanh softplus softsign logsigmoid log_sigmoid tanhshrink threshold
            softshrink hardshrink erf
        """,
        Kind.GLU: "glu",
        Kind.SOFTMAX: "softmax log_softmax softmin gumbel_softmax _safe_softmax _softmax",
        Kind.PICK: "topk sort argsort argmax kthvalue multinomial",
        Kind.GATHER: "gather",
        Kind.ATTEND: """
            scaled_dot_product_attention flash_attn_func flex_attention
            memory_efficient_attention _scaled_dot_product_flash_attention
            _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
            _scaled_dot_product_flash_attention_for_cpu
        """,
        Kind.MATMUL: """
            matmul mm bmm mv dot addmm baddbmm addbmm grouped_mm _grouped_mm grouped_mm_fallback
        """,
        Kind.EINSUM: "einsum",
        Kind.LINEAR: "linear",
        Kind.CONVOLVE: """
            conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
        """,
        Kind.LOOKUP: "embedding embedding_bag",
        Kind.MAKE: """
            empty_like full_like ones_like zeros_like rand_like randn_like new_empty new_full
            new_ones new_tensor new_zeros arange zeros ones full empty linspace tensor bernoulli
        """,
        Kind.NORMALISE: """
            layer_norm rms_norm group_norm batch_norm instance_norm normalize local_response_norm
            native_layer_norm native_group_norm
        """,
    }
)

ALIASES = frozenset(
    [
        "view",
        "view_as",
        "reshape",
        "transpose",
        "permute",
        "swapaxes",
        "swapdims",
        "movedim",
        "t",
        "T",
        "mT",
        "flatten",
        "unflatten",
        "squeeze",
        "unsqueeze",
        "expand",
        "chunk",
        "split",
        "unbind",
        "getitem",
        "select",
        "narrow",
        "diagonal",
        "detach",
        "data",
    ]
)
"""Views that share memory with their operand."""

# What a normalisation that is written out computes: a statistic, and a root to divide by.
STATISTICS = frozenset(
    [
        "mean",
        "var",
        "var_mean",
        "std",
        "std_mean",
        "norm",
        "vector_norm",
        "linalg_vector_norm",
        "sum",
    ]
)
ROOTS = frozenset(["rsqrt", "sqrt", "norm", "vector_norm", "linalg_vector_norm", "std", "std_mean"])

Convolution = nn.modules.conv._ConvNd  # pyright: ignore[reportPrivateUsage]


@dataclass(frozen=True)
class Windows:
    """The windows of a convolution: their size, the step from one to the next, its groups."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, layer: Convolution) -> Windows:
        """Those of a layer."""
        return cls(tuple(layer.kernel_size), tuple(layer.stride), layer.groups)

    @classmethod
    def of_call(cls, node: fx.Node, kernel: tuple[int, ...]) -> Windows:
        """Those of a call such as ``F.conv2d``, given the size of its kernel."""
        step, groups = argument(node, 3, "stride"), argument(node, 6, "groups")
        steps = tuple(cast("list[int]", step)) if isinstance(step, tuple | list) else ()
        stride = steps or (step if isinstance(step, int) else 1,) * len(kernel)
        return cls(kernel, stride, groups if isinstance(groups, int) else 1)

    @property
    def single(self) -> bool:
        """Whether each is one position, and none is left out."""
        return {*self.kernel, *self.stride} == {1}

    @property
    def tile(self) -> bool:
        """Whether they tile the input: as far apart as they are wide."""
        return self.kernel == self.stride and max(self.kernel) > 1


_NORMS = (
    nn.modules.batchnorm._NormBase,  # pyright: ignore[reportPrivateUsage]
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)


def module_kind(module: nn.Module) -> Kind:
    """The kind of an atomic layer that a trace shows as one node."""
    if isinstance(module, nn.Linear | nn.Bilinear):
        return Kind.LINEAR
    if isinstance(module, Convolution):
        return Kind.CONVOLVE
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return Kind.LOOKUP
    if isinstance(module, _NORMS):
        return Kind.NORMALISE
    return Kind.BEND if isinstance(module, nn.PReLU) else Kind.PASS


def op_kind(node: fx.Node) -> Kind:
    """The kind of a ``call_function`` or ``call_method`` node."""
    return _KINDS.get(op_name(node), Kind.PASS)


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor; empty if it is not one tensor."""
    found = spec(node)
    return () if found is None else found.shape


def argument(node: fx.Node, position: int, name: str) -> Any:
    """An argument given by position or by name; None if it was not given."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name)
