"""Imported once by the server that every cell is forked from: what takes seconds to import."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings

#: Besides torch. The models' own modules, since transformers and diffusers import them late.
HEAVY = (
    "surgery.checkpoints",
    "surgery.passes.shortcuts",
    "surgery.planning",
    "timm",
    "timm.layers",
    "transformers.models.bert.modeling_bert",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.models.t5.modeling_t5",
    "diffusers.models.transformers.dit_transformer_2d",
    "diffusers.models.transformers.pixart_transformer_2d",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.transformers.transformer_sd3",
    "diffusers.models.unets.unet_2d_condition",
    "onnxruntime",
    "onnxscript",
    "torch._dynamo",
    "torch._functorch.aot_autograd",
    "torch._inductor.compile_fx",
    "torch.distributed.fsdp",
    "torch.export",
    "torch.nn.parallel",
    "torch.onnx",
    "tests.survival.rows",
    "tests.survival.worker",
)


def warm() -> None:
    """Rewrite the models once: what is learnt of a class is not learnt again in each cell."""
    from tests.survival.calls import rewire
    from tests.survival.models import SUBJECTS
    from tests.survival.reference import MAIN

    asked = os.environ.get("SURVIVAL_MODELS", "").split(",")
    for subject in (subject for subject in SUBJECTS if subject.name in asked):
        # A rewrite that is refused is refused again in its cells, where that is reported.
        with contextlib.suppress(Exception):
            rewire(subject.build(), subject.example(), MAIN)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for name in HEAVY:
        importlib.import_module(name)
    warm()
