"""Small models of the kinds that are exported, rewritten and with random coefficients."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import surgery
from surgery.passes.streams import all_segments
from tests.zoo import ids, padding, perturb

LLAMA = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DIT = {
    "sample_size": 8,
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("preset:llama-tiny", LLAMA),
    "dit": ("preset:dit-tiny", DIT),
    "mlp": ("preset:mlp-8", {"width": 16}),
    "resnet": ("preset:resnet-20-cifar", {"in_chans": 1, "widths": [4, 8, 8]}),
    "vit": (
        "timm:vit_tiny_patch16_224",
        {"depth": 3, "embed_dim": 24, "num_heads": 3, "img_size": 32, "num_classes": 5},
    ),
}


def stock(name: str) -> nn.Module:
    spec, config = CASES[name]
    return perturb(surgery.load(spec, config=config)).eval()


def rewired(name: str, **options: Any) -> nn.Module:
    """The model with learned shortcuts in every stack, whose coefficients are random."""
    return rewire(stock(name), **options)


def rewire(model: nn.Module, *, example: Any = None, **options: Any) -> nn.Module:
    rule = surgery.Rule(surgery.Shortcuts(**options), where=surgery.Stack("all"))
    return randomise(surgery.apply(model, rule, example=example))


def randomise(model: nn.Module) -> nn.Module:
    """Give all coefficients random values, so that a mixture that is left out is noticed."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for *_, segment in all_segments(model):
            for name, parameter in segment.named_parameters():
                scale = 0.02 if name.endswith("logits") else 0.3
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    """The model with LoRA beside every linear layer, with random factors."""
    rule = surgery.Rule(surgery.LowRank(rank=2, **options), where=surgery.Type("Linear"))
    surgery.apply(model, rule)
    return stirred(model)


def stirred(model: nn.Module) -> nn.Module:
    """Give the factors of all adapters random values, so that one that is left out is noticed."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in surgery.adapters.parameters(model):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def text(batch: int = 2, length: int = 9) -> dict[str, torch.Tensor]:
    return {"input_ids": ids(batch, length), "attention_mask": padding(batch, length)}
