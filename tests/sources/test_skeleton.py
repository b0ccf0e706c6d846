"""A skeleton is the loaded model without its weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm.models
import torch
from torch import nn

import surgery
from surgery.checkpoints.inventory import take
from surgery.sources import describe, skeleton
from surgery.sources.skeleton import parameters_on_meta
from tests.zoo import build, perturb


def saved(name: str, folder: Path) -> Path:
    if name.startswith("timm:"):
        model = perturb(surgery.load(name, config={"num_classes": 5}))
        timm.models.save_for_hf(model, str(folder), safe_serialization=True)  # type: ignore[arg-type]
    else:
        build(name)[0].save_pretrained(folder)  # type: ignore[operator]
    return folder


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "name",
    ["llama", "t5", "bert", "DiTTransformer2DModel", "timm:resnet18", "timm:vit_tiny_patch16_224"],
)
def test_is_what_load_gives(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "saved")
    loaded = surgery.load(folder, dtype=dtype)
    made = skeleton(folder, dtype=dtype, stored_dtype=torch.float32)
    assert type(made) is type(loaded)
    assert describe(made) == describe(loaded)
    wanted, found = take(loaded), take(made)
    assert found.ties == wanted.ties
    assert [(n, t.dtype, t.shape) for n, t in found.state.items()] == [
        (n, t.dtype, t.shape) for n, t in wanted.state.items()
    ]
    assert all(parameter.is_meta for parameter in made.parameters())
    assert found.transient.keys() == wanted.transient.keys()
    for path, buffer in wanted.transient.items():
        assert torch.equal(found.transient[path], buffer)
    flags = [(path, module.training) for path, module in loaded.named_modules()]
    assert [(path, module.training) for path, module in made.named_modules()] == flags


def test_one_tensor_stays_one() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            weight = nn.Parameter(torch.ones(3), requires_grad=False)
            self.one, self.two = weight, weight
            self.layer, self.other = nn.Linear(2, 2), nn.Linear(2, 2)
            self.other.weight = self.layer.weight
            self.register_buffer("scale", torch.ones(2))

    with parameters_on_meta():
        made = Shared()
    assert made.one is made.two
    assert made.other.weight is made.layer.weight
    assert not made.one.requires_grad
    assert all(parameter.is_meta for parameter in made.parameters())
    assert torch.equal(made.get_buffer("scale"), torch.ones(2))
    assert not nn.Linear(2, 2).weight.is_meta
