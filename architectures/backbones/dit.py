"""DiT in the sizes of its paper (arXiv 2212.09748, table 1), with patches of 2 × 2.

The class is diffusers' ``DiTTransformer2DModel``. It gives every block an embedder of timestep and
label of its own, where the paper's network has one for all: a preset is built with one set of
embedder parameters, registered in every block. It is built with the paper's initialisation too,
since diffusers' class is made to be loaded and zeroes nothing.
"""

from __future__ import annotations

from typing import Any

from architectures.backbones.base import Preset

CLASS = "DiTTransformer2DModel"

#: Sinusoidal features of a timestep, before the embedder's two linear layers.
FREQUENCIES = 256
#: name → width, layers, attention heads.
_SIZES = {
    "dit-s-2": (384, 12, 6),
    "dit-b-2": (768, 12, 12),
    "dit-l-2": (1024, 24, 16),
    "dit-xl-2": (1152, 28, 16),
}


def parameters(
    width: int, layers: int, *, patch: int, channels: int, out_channels: int, classes: int
) -> int:
    """How many distinct parameters a DiT has whose blocks share one embedder.

    Per block 4 d² + 4 d (attention), 8 d² + 5 d (MLP) and 6 d² + 6 d (modulation). Beside them:
    patches p² c d + d; timesteps 256 d + d² + 2 d; labels (classes + 1) d, the last row standing
    for "no label"; the last layer 2 d² + 2 d and p² c' d + p² c'. Positions are sines, and no
    parameter; the authors' code counts their (tokens, d) as one that is not trained.
    """
    block = 18 * width**2 + 15 * width
    patches = patch**2 * channels * width + width
    embedder = FREQUENCIES * width + width**2 + 2 * width + (classes + 1) * width
    last = 2 * width**2 + 2 * width + patch**2 * out_channels * (width + 1)
    return layers * block + patches + embedder + last


def _preset(
    name: str,
    width: int,
    layers: int,
    heads: int,
    *,
    size: int,
    channels: int,
    out_channels: int,
    source: str,
) -> Preset:
    patch, classes = 2, 1000
    config: dict[str, Any] = {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "num_layers": layers,
        "sample_size": size,
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": out_channels,
        "num_embeds_ada_norm": classes,
        "norm_eps": 1e-6,
    }
    count = parameters(
        width, layers, patch=patch, channels=channels, out_channels=out_channels, classes=classes
    )
    return Preset(name, "diffusers", CLASS, config, count, source)


def _paper(name: str, width: int, layers: int, heads: int) -> Preset:
    # Latents of a 256 × 256 image; noise and variance are predicted, four channels each.
    return _preset(
        name,
        width,
        layers,
        heads,
        size=32,
        channels=4,
        out_channels=8,
        source="arXiv 2212.09748 (DiT), table 1",
    )


#: For grey images of 8 × 8 with ten classes. The table has the rows of ImageNet's classes all the
#: same: DiTPipeline takes row 1000 for "no label" whatever the model says.
_TINY = _preset(
    "dit-tiny",
    128,
    8,
    4,
    size=8,
    channels=1,
    out_channels=1,
    source="ours, to run on a CPU",
)

PRESETS: tuple[Preset, ...] = (_TINY, *(_paper(name, *sizes) for name, sizes in _SIZES.items()))
