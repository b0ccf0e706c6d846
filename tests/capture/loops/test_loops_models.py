"""Models beyond the zoo, in eval mode and in training with gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from surgery.sources.examples import Example
from tests import zoo
from tests.capture.compare import assert_same, tensors_in
from tests.capture.loops import runtimes
from tests.capture.loops.grafting import blocks_of, rewrite

Make = Callable[[], tuple[nn.Module, Example]]

_TEXT = {
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def _ids() -> torch.Tensor:
    return torch.randint(5, 96, (2, 12), generator=torch.Generator().manual_seed(3))


def _pixels(size: int, channels: int = 3) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(3))


def _bart() -> tuple[nn.Module, Example]:
    from transformers import BartConfig, BartModel

    sizes = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "max_position_embeddings": 32}
    heads = {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
    widths = {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}
    config = BartConfig(**sizes, **heads, **widths, **_TEXT)
    return BartModel(config), Example((), {"input_ids": _ids()})


def _clip() -> tuple[nn.Module, Example]:
    from transformers import CLIPConfig, CLIPModel

    shared = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    text = {**shared, "num_hidden_layers": 3, "max_position_embeddings": 32, **_TEXT}
    text.pop("decoder_start_token_id")
    vision = {**shared, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    return CLIPModel(config), Example((), {"input_ids": _ids(), "pixel_values": _pixels(16)})


def _swin() -> tuple[nn.Module, Example]:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 3], num_heads=[2, 4], window_size=4
    )
    return SwinModel(config), Example((), {"pixel_values": _pixels(32)})


def _timm(name: str, size: int = 32, **options: Any) -> Make:
    def make() -> tuple[nn.Module, Example]:
        import timm

        return timm.create_model(name, num_classes=4, **options), Example((_pixels(size),), {})

    return make


MODELS: dict[str, Make] = {
    "bart": _bart,
    "clip": _clip,
    "swin": _swin,
    "timm_maxvit": _timm("maxvit_rmlp_pico_rw_256", 64, img_size=64),
    "timm_cait": _timm("cait_xxs24_224", 32, img_size=32, embed_dim=32, num_heads=4, depth=4),
    "timm_xcit": _timm("xcit_nano_12_p16_224", 32, img_size=32, embed_dim=32, depth=3),
    "timm_beit": _timm(
        "beit_base_patch16_224", 32, img_size=32, embed_dim=32, num_heads=4, depth=3
    ),
    "timm_coat": _timm("coat_tiny", 64, img_size=64),
    "timm_regnet": _timm("regnety_002", 64),
}


WITHOUT = {"timm_coat"}
"""Models without gradient checkpointing."""


def build(name: str) -> tuple[nn.Module, Example]:
    if name not in MODELS:
        return zoo.build(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = MODELS[name]()
    return zoo.perturb(model).eval(), example


def ordered(model: nn.Module, seen: list[nn.Module]) -> None:
    """Every block ran once, and those of a stack in order."""
    ids = [id(block) for block in seen]
    for blocks in blocks_of(model):
        expected = [id(block) for block in blocks]
        assert [block for block in ids if block in expected] == expected


@pytest.mark.parametrize("name", MODELS)
def test_every_block_is_seen_and_nothing_changes(name: str) -> None:
    model, example = build(name)
    with torch.no_grad():
        before = model(*example.args, **example.kwargs)
        made = rewrite(model, "watch")
        runtimes.ran()
        after = model(*example.args, **example.kwargs)
    assert {reason for loops in made.values() for reason in loops.refused.values()} == set()
    assert len(blocks_of(model)) > 0
    ordered(model, runtimes.ran())
    assert_same(before, after)


def checkpointed(model: nn.Module) -> None:
    """Switch gradient checkpointing on, the way each library does it."""
    switches = (
        "activation_checkpointing_enable",
        "enable_gradient_checkpointing",
        "set_grad_checkpointing",
    )
    (name,) = (name for name in switches if hasattr(model, name))
    getattr(model, name)()


def step(model: nn.Module, example: Example) -> dict[str, torch.Tensor]:
    """Gradients of every parameter after one step in training mode."""
    torch.manual_seed(5)
    model.zero_grad()
    kwargs = dict(example.kwargs)
    if "use_cache" in getattr(getattr(model, "config", None), "__dict__", {}):
        kwargs["use_cache"] = False
    found = list(tensors_in(model.train()(*example.args, **kwargs)))
    sum(tensor.float().square().mean() for tensor in found if tensor.requires_grad).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", [name for name in (*zoo.names(), *MODELS) if name not in WITHOUT])
@pytest.mark.filterwarnings("ignore:.*use_reentrant.*:UserWarning")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_with_gradient_checkpointing_every_block_is_still_seen(name: str) -> None:
    model, example = build(name)
    checkpointed(model)
    expected = step(model, example)
    rewrite(model, "watch")
    runtimes.ran()
    found = step(model, example)
    ids = {id(block) for block in runtimes.ran()}
    assert {id(block) for blocks in blocks_of(model) for block in blocks} <= ids
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
