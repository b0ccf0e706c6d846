"""Presets as data: sizes of the papers, names with a depth in them, and what is said of others."""

from __future__ import annotations

import pytest
import torch

from architectures.backbones import MODULES, PRESETS, UnknownPreset, preset
from architectures.backbones.resnet import imagenet_stages

# Derived by hand from the formulas in docs/backbones.md; beside each, what its paper prints.
# ResNet for ImageNet: torchvision's counts. DiT: the authors' code also counts its fixed
# positions, (tokens, width), as a parameter; they are 98 304 to 294 912 more.
COUNTS = {
    "llama-tiny": (3_053_760, None),
    "llama-60m": (58_073_600, "60M"),
    "llama-130m": (134_105_856, "130M"),
    "llama-350m": (367_969_280, "350M"),
    "llama-1b": (1_339_082_752, "1B"),
    "dit-tiny": (2_586_372, None),
    "dit-s-2": (32_865_056, "33M"),
    "dit-b-2": (130_315_808, "130M"),
    "dit-l-2": (457_840_672, "458M"),
    "dit-xl-2": (674_834_720, "675M"),
    "resnet-18": (11_689_512, None),
    "resnet-34": (21_797_672, None),
    "resnet-50": (25_557_032, None),
    "resnet-101": (44_549_160, None),
    "resnet-152": (60_192_808, None),
    "resnet-20-cifar": (269_722, "0.27M"),
    "resnet-32-cifar": (464_154, "0.46M"),
    "resnet-44-cifar": (658_586, "0.66M"),
    "resnet-56-cifar": (853_018, "0.85M"),
    "resnet-110-cifar": (1_727_962, "1.7M"),
    "resnet-1202-cifar": (19_421_274, "19.4M"),
    "mlp-8": (144_010, None),
    "mlp-16": (278_154, None),
    "mlp-64": (1_083_018, None),
    "conv4-32": (32_901, None),
    "conv4-64": (121_093, None),
    "perceptron-40": (1_761, None),
}
# The names of LLaMA's sizes are names, not roundings: GaLore's own log prints 58.07M, 134.11M,
# 367.97M and 1339.08M.
LOGGED = {
    "llama-60m": "58.07",
    "llama-130m": "134.11",
    "llama-350m": "367.97",
    "llama-1b": "1339.08",
}

PATTERNS = {
    "resnet-20": ("timm", [2, 2, 3, 2]),
    "resnet-26-bottleneck": ("timm", [2, 2, 2, 2]),
    "resnet-200": ("timm", [3, 24, 36, 3]),
    "resnet-1202": ("timm", [3, 158, 236, 3]),
}

UNKNOWN = {
    "resnet-18-cifar": ("6 n \\+ 2 .*nearest is 14 or 20", ("resnet-14-cifar", "resnet-20-cifar")),
    "resnet-21-cifar-bottleneck": (
        "9 n \\+ 2 .*nearest is 20 or 29",
        ("resnet-20-cifar-bottleneck", "resnet-29-cifar-bottleneck"),
    ),
    "resnet-2-cifar": ("nearest is 8$", ("resnet-8-cifar",)),
    "resnet-51": ("3 n \\+ 2 layers with n ≥ 4.*nearest is 50 or 53", ("resnet-50", "resnet-53")),
    "resnet-52-bottleneck": ("nearest is 50 or 53", ("resnet-50", "resnet-53")),
    "resnet-4": ("2 n \\+ 2 layers with n ≥ 4.*nearest is 10$", ("resnet-10",)),
    "resnet-51-basic": ("nearest is 50 or 52", ("resnet-50-basic", "resnet-52-basic")),
    "mlp-0": ("at least one layer", ("mlp-1",)),
    "llama-60": ("there is no preset", ("llama-60m",)),
    "whatever": ("there is no preset", ()),
}


def test_every_preset_has_a_count_by_hand() -> None:
    assert set(COUNTS) == set(PRESETS)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_those_derived_by_hand(name: str) -> None:
    exact, printed = COUNTS[name]
    assert PRESETS[name].parameters == exact
    if name in LOGGED:
        assert f"{exact / 1e6:.2f}" == LOGGED[name]
    elif printed is not None:
        digits = len(printed.rstrip("M").partition(".")[2])
        assert f"{exact / 1e6:.{digits}f}M" == printed


def test_positions_bring_dit_to_the_authors_count() -> None:
    # DiT's repository prints 675,129,632 for XL/2: 16 × 16 positions of width 1152 among them.
    assert PRESETS["dit-xl-2"].parameters + 16 * 16 * 1152 == 675_129_632


@pytest.mark.parametrize("name", PATTERNS)
def test_a_depth_in_the_name(name: str) -> None:
    library, stages = PATTERNS[name]
    found = preset(name)
    assert (found.library, found.config["layers"]) == (library, stages)


def test_one_rule_gives_the_published_stages() -> None:
    published = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}
    assert {depth: imagenet_stages(depth, "basic") for depth in published} == published
    published = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}
    assert {depth: imagenet_stages(depth, "bottleneck") for depth in published} == published


@pytest.mark.parametrize(("block", "layers"), [("basic", 2), ("bottleneck", 3)])
def test_every_stage_has_a_block_and_the_depth_is_right(block: str, layers: int) -> None:
    for blocks in range(4, 401):
        stages = imagenet_stages(layers * blocks + 2, block)
        assert sum(stages) == blocks
        assert min(stages) >= 1


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_name_names_the_nearest(name: str) -> None:
    message, near = UNKNOWN[name]
    with pytest.raises(UnknownPreset, match=message) as caught:
        preset(name)
    assert caught.value.near[: len(near)] == near
    for each in caught.value.near:
        assert preset(each).name == each


@pytest.mark.parametrize(
    "name", ["resnet-8-cifar", "resnet-164-cifar-bottleneck", "mlp-1", "mlp-5"]
)
def test_counts_of_a_family_are_the_modules(name: str) -> None:
    found = preset(name)
    with torch.device("meta"):
        model = MODULES[found.cls](**found.config)
    assert sum(each.numel() for each in model.parameters()) == found.parameters
