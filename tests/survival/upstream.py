"""Rows that unmodified models fail: the only excuses there are.

Each says what the unmodified model has to raise for the excuse to hold, and why in words. Llama,
BERT, ViT and ResNet-50 may not be here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Upstream:
    """One known cause.

    Attributes:
        raised: A part of the error of the unmodified model.
        cause: What the table says.
    """

    raised: str
    cause: str


UPSTREAM = {
    ("DiT", "fsdp2"): Upstream(
        "mixed torch.Tensor and DTensor",
        "diffusers: DiTTransformer2DModel.forward reads `transformer_blocks[0].norm1.emb` outside "
        "of that block's forward, where FSDP2 has not gathered it.",
    ),
    ("T5", "onnx"): Upstream(
        "Cannot view a tensor with shape",
        "torch.onnx: the attention of T5 is decomposed into a view of a tensor whose strides do "
        "not allow it.",
    ),
    ("Mixtral", "onnx"): Upstream(
        "No ONNX function found for <OpOverload(op='transformers.grouped_mm_fallback'",
        "torch.onnx has no translation of the grouped matrix product that transformers runs the "
        "experts with.",
    ),
    ("PixArt", "onnx"): Upstream(
        "Op (Squeeze) [ShapeInferenceError]",
        "torch.onnx writes a Squeeze over a dimension of 16 for PixArtTransformer2DModel; "
        "onnxruntime refuses the file.",
    ),
}
