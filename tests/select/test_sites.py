"""What counts as a site, and its logical sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from surgery.select import ModelMap, Site
from tests import zoo


class Transposed(nn.Module):
    """Stores its weight (in, out), as HF's Conv1D does, and has no bias to tell."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class Straight(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(out, width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.matrix), x


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(3, 5))

    def forward(self) -> Tensor:
        return self.matrix


class Experts(nn.Module):
    def __init__(self, *, transposed: bool) -> None:
        super().__init__()
        up, down = (6, 4), (4, 3)
        self.up = nn.Parameter(torch.randn(2, *(up[::-1] if transposed else up)))
        self.down = nn.Parameter(torch.randn(2, *(down[::-1] if transposed else down)))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int] | None]] = {
    "linear": (lambda: nn.Linear(3, 5), (3, 5)),
    "convolution": (lambda: nn.Conv2d(3, 6, 3, groups=3), (3, 6)),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 5, 3), (3, 5)),
    "embedding": (lambda: nn.Embedding(7, 4), (7, 4)),
    "norm": (lambda: nn.LayerNorm(4), None),
    "matrix stored in, out": (lambda: Transposed(3, 5), (3, 5)),
    "matrix stored out, in": (lambda: Straight(3, 5), (3, 5)),
    "square": (lambda: Transposed(4, 4), (4, 4)),
    "cannot be told": (Broken, None),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(3, 5)), (3, 5)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_widths(case: str):
    make, expected = LAYERS[case]
    layer = make()
    site = Site("layer", layer)
    found = site.sizes
    assert (("in" in found, found.get("in"), found.get("out"))) == (
        (True, *expected) if expected else (False, None, None)
    )
    assert found["rank"] >= 1


def test_widths_of_a_bias_need_no_probe():
    from transformers.pytorch_utils import Conv1D

    sizes = Site("c_attn", Conv1D(96, 32)).sizes
    assert (sizes["in"], sizes["out"]) == (32, 96)


@pytest.mark.parametrize("transposed", [False, True])
def test_widths_of_experts(transposed: bool):
    model = nn.ModuleDict({"experts": Experts(transposed=transposed)})
    sites = ModelMap(model).by_path
    assert [sites[f"experts.{n}"].sizes["in"] for n in ("up", "down")] == [4, 3]
    assert [sites[f"experts.{n}"].sizes["out"] for n in ("up", "down")] == [6, 4]


def test_probing_changes_nothing():
    layer = Transposed(3, 5)
    before = layer.matrix
    _ = Site("layer", layer).sizes
    assert layer.matrix is before
    assert layer.matrix.device.type == "cpu"


def test_parameters_outside_layers_are_sites():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)})
    paths = {site.path: site.parameter for site in ModelMap(model).sites}
    assert paths["attention.in_proj_weight"] == "in_proj_weight"
    assert paths["attention.out_proj"] is None
    assert "linear.weight" not in paths


def test_experts_and_tokens_are_sites_and_containers_are_too():
    model, _ = zoo.build("mixtral")
    sites = ModelMap(model).by_path
    experts = sites["model.layers.0.mlp.experts.gate_up_proj"]
    assert (experts.parameter, experts.what) == ("gate_up_proj", "parameter of MixtralExperts")
    assert sites["model.layers.0"].weight is None
    assert sites["model.layers.0.mlp.gate"].parameter is None


def test_a_shared_module_is_one_site_with_every_path():
    shared = nn.Linear(4, 4)
    known = ModelMap(nn.ModuleDict({"a": shared, "b": shared}))
    assert [site.path for site in known.sites] == ["", "a"]
    assert known.aliases(known.by_path["b"]) == ("a", "b")


def test_planned_tensors_are_sites_of_their_rule():
    known = ModelMap(nn.ModuleDict({"a": nn.Linear(4, 4)}))
    later = known.with_created("first", ["a.lowrank.default.lora_A"])
    made = [site for site in later.sites if site.created_by == "first"]
    assert [(site.path, site.module) for site in made] == [
        ("a.lowrank.default.lora_A", known.by_path["a"].module)
    ]
    assert len(known.sites) == 2
