"""The models that coverage is measured on, each as small as its constructor allows.

``MODELS`` has one model of every timm module that registers any, and the transformers and
diffusers architectures of ``tests.sweep.models`` and ``tests.zoo``. ``registered()`` has every
model that timm registers.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import nn

from surgery.sources import Example, infer_example
from tests import zoo
from tests.sweep import models as sweep
from tests.sweep.models import Model

#: Parameters above which a model of timm is given one image rather than two.
_LARGE = 8e6
#: Given two whatever their size: torch 2.15 computes a wrong gradient through BatchNorm2d in eval
#: mode for one image whose gradient is a transposed tensor, in the unmodified model as well.
_TWO_IMAGES = frozenset({"efficientformer_l1"})


@dataclass(frozen=True)
class ZooModel:
    """A model of ``tests.zoo``."""

    name: str
    library: str

    def build(self) -> tuple[nn.Module, Example]:
        """The perturbed model in eval mode and the call to make."""
        return zoo.build(self.name)


@dataclass(frozen=True)
class TimmModel:
    """A model of timm.

    Attributes:
        name: As timm registers it.
        module: The timm module that does.
        config: Arguments of ``timm.create_model`` that make it small.
        side: Height and width of the images; by default what is inferred from its configuration.
    """

    name: str
    module: str
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    side: int | None = None
    library: str = "timm"

    def build(self) -> tuple[nn.Module, Example]:
        """The perturbed model in eval mode and the call to make."""
        import timm

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            made = timm.create_model(self.name, num_classes=10, **self.config)
        model = zoo.perturb(made).eval()
        large = sum(parameter.numel() for parameter in model.parameters()) > _LARGE
        one = large and self.name not in _TWO_IMAGES
        example = infer_example(model, batch=1 if one else 2)
        if self.side is not None:
            example = example.map(lambda images: images[..., : self.side, : self.side])
        return model, example


#: Depth and width of models that take them. Three blocks: enough for a matrix with two free rows.
_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
_TWO = (2, 2, 2, 2)
_SWIN = {"img_size": 64, "embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}

#: One model of every timm module. A number of blocks below two would leave nothing to mix.
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", _VIT),
    "byoanet": ("botnet50ts_256", {"img_size": 64}),
    "byobnet": ("gernet_s", {}),
    "cait": ("cait_xxs24_224", _VIT),
    "coat": ("coat_tiny", {"img_size": 64}),
    "convit": ("convit_tiny", {**_VIT, "depth": 4}),
    "convmixer": ("convmixer_768_32", {}),
    "convnext": ("test_convnext", {}),
    "cpubone": ("cpubone_nano", {}),
    "crossvit": ("crossvit_9_240", {}),
    "csatv2": ("csatv2", {}),
    "cspnet": ("cs3darknet_s", {}),
    "cspnext": ("cspnext_m", {}),
    "davit": (
        "davit_tiny",
        {"depths": _TWO, "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
    ),
    "deepseek_vit": (
        "deepseek_vit_412m",
        {"img_size": 84, "embed_dim": 64, "depth": 3, "num_heads": 2},
    ),
    "deit": ("deit_tiny_distilled_patch16_224", _VIT),
    "densenet": ("densenet121", {"growth_rate": 8, "block_config": (2, 2, 2, 2)}),
    "dla": ("dla46_c", {}),
    "dpn": ("dpn48b", {}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer": ("efficientformer_l1", {}),
    "efficientformer_v2": ("efficientformerv2_s0", {}),
    "efficientnet": ("test_efficientnet", {"channel_multiplier": 0.5, "depth_multiplier": 3.0}),
    "efficientvim": ("efficientvim_m1", {"embed_dim": (16, 32, 48)}),
    "efficientvit_mit": ("efficientvit_b0", {}),
    "efficientvit_msra": ("efficientvit_m0", {}),
    "eva": ("eva02_tiny_patch14_224", _VIT),
    "fasternet": ("fasternet_t0", {}),
    "fastvit": ("fastvit_t8", {}),
    "focalnet": ("focalnet_tiny_srf", {}),
    "gcvit": ("gcvit_xxtiny", {"img_size": 64}),
    "gemma4_vit": (
        "gemma4_vit_167m",
        {
            "img_size": 96,
            "embed_dim": 32,
            "depth": 3,
            "num_heads": 4,
            "head_dim": 8,
            "intermediate_size": 48,
            "position_embedding_size": 64,
        },
    ),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_c", {}),
    "hgnet": ("hgnetv2_b4", {}),
    "hiera": ("hiera_tiny_224", {"img_size": (64, 64), "embed_dim": 16, "stages": (2, 2, 3, 2)}),
    "hieradet_sam2": (
        "hieradet_small",
        {"stages": (2, 2, 3, 2), "global_att_blocks": (5,), "embed_dim": 16},
    ),
    "hrnet": ("hrnet_w18_small", {}),
    "iformer": ("iformer_t", {}),
    "inception_next": ("inception_next_atto", {}),
    "inception_resnet_v2": ("inception_resnet_v2", {}),
    "inception_v3": ("inception_v3", {}),
    "inception_v4": ("inception_v4", {}),
    "lcnetv2": ("lcnetv2_small", {"depths": (2, 2, 2, 3)}),
    "levit": ("levit_128s", {"img_size": 64}),
    "lowformer": ("lowformer_b0", {}),
    "mambaout": ("test_mambaout", {}),
    "maxxvit": ("coatnet_pico_rw_224", {"img_size": 64}),
    "metaformer": ("poolformer_s12", {}),
    "mlp_mixer": ("gmlp_ti16_224", {"img_size": 64}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "mobilenetv5": ("mobilenetv5_base", {"channel_multiplier": 0.25}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": ("mvitv2_tiny", {"img_size": 64}),
    "naflexvit": ("naflexvit_base_patch16_gap", {"embed_dim": 32, "depth": 3, "num_heads": 4}),
    "nasnet": ("nasnetalarge", {"num_features": 480, "stem_size": 32}),
    "nest": ("nest_tiny", {"img_size": 32}),
    "nextvit": ("nextvit_small", {}),
    "nfnet": ("nf_regnet_b0", {}),
    "pit": ("pit_ti_224", {"img_size": 64}),
    "pnasnet": ("pnasnet5large", {}),
    "pvt_v2": ("pvt_v2_b0", {"depths": _TWO, "embed_dims": (8, 16, 40, 64)}),
    "qwen3_vit": (
        "qwen3_vit_88m",
        {"img_size": 64, "embed_dim": 32, "depth": 3, "num_heads": 2, "pos_embed_grid_size": 8},
    ),
    "rdnet": ("rdnet_tiny", {"num_init_features": 16, "growth_rates": (8, 8, 8, 8, 8, 8, 8)}),
    "regnet": ("regnety_002", {}),
    "repghost": ("repghostnet_050", {}),
    "repvit": ("repvit_m0_9", {}),
    "res2net": ("res2net50_26w_4s", {"layers": _TWO, "channels": (16, 32, 48, 64)}),
    "resnest": ("resnest26d", {"channels": (16, 32, 48, 64)}),
    "resnet": (
        "resnet26",
        {"layers": (3, 2, 2, 2), "channels": (8, 16, 24, 32), "stem_width": 16},
    ),
    "resnetv2": ("resnetv2_34", {"channels": (16, 32, 48, 64)}),
    "rexnet": ("rexnet_100", {}),
    "selecsls": ("selecsls42", {}),
    "senet": ("legacy_seresnet18", {}),
    "sequencer": ("sequencer2d_s", {"img_size": 64}),
    "shvit": ("shvit_s1", {}),
    "sknet": ("skresnet34", {"channels": (32, 64, 96, 128)}),
    "starnet": ("starnet_s050", {}),
    "swiftformer": ("swiftformer_xs", {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {**_SWIN, "window_size": 2}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {**_SWIN, "window_size": 2}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", {**_SWIN, "window_size": 2}),
    "tiny_vit": (
        "tiny_vit_5m_224",
        {"embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), "depths": _TWO},
    ),
    "tnt": (
        "tnt_s_patch16_224",
        {
            "img_size": 64,
            "depth": 3,
            "embed_dim": 32,
            "inner_dim": 8,
            "num_heads_inner": 2,
            "num_heads_outer": 4,
        },
    ),
    "tresnet": ("tresnet_m", {"width_factor": 0.25}),
    "twins": (
        "twins_svt_small",
        {
            "img_size": 64,
            "embed_dims": (8, 16, 24, 32),
            "num_heads": (1, 2, 3, 4),
            "depths": _TWO,
        },
    ),
    "vgg": ("vgg11", {"mlp_ratio": 1 / 64}),
    "visformer": ("visformer_tiny", {"img_size": 64}),
    "vision_transformer": ("test_vit", {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 64}),
    "vision_transformer_relpos": ("test_vit_relpos", {}),
    "vision_transformer_sam": (
        "samvit_base_patch16_224",
        {**_VIT, "img_size": 64, "global_attn_indexes": (1,), "window_size": 4, "neck_chans": 16},
    ),
    "vitamin": ("vitamin_small_224", {"img_size": 64}),
    "volo": ("volo_d1_224", {"img_size": 64}),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
    "xception": ("legacy_xception", {}),
    "xception_aligned": ("xception41p", {}),
    "xcit": ("xcit_nano_12_p16_224", {**_VIT, "patch_size": 16}),
}

#: Side of the images where what timm says is more than the model needs.
_SIDES = {"convmixer": 32, "hieradet_sam2": 128, "naflexvit": 64}


def _models() -> list[Model]:
    """One model per timm module, then transformers, then diffusers."""
    timm = [
        TimmModel(name, module, config, _SIDES.get(module))
        for module, (name, config) in TIMM.items()
    ]
    tiny = [ZooModel(name, library) for name, (library, _) in zoo.TINY.items() if library != "timm"]
    others: list[Model] = [*tiny, *sweep.TRANSFORMERS, *sweep.DIFFUSERS]
    return [*timm, *sorted(others, key=lambda model: model.library == "diffusers")]


#: Name → model. No name is used by two libraries.
MODELS: dict[str, Model] = {model.name: model for model in _models()}

#: The few that the test suite examines every time.
FAST = (
    "resnet26",
    "test_vit",
    "swin_tiny_patch4_window7_224",
    "densenet121",
    "llama",
    "t5",
    "bert",
    "FluxTransformer2DModel",
    "UNet2DConditionModel",
    "SD3Transformer2DModel",
)

#: Arguments that narrow a model which takes them, the narrowest first. The last changes nothing.
_NARROWER: tuple[dict[str, Any], ...] = (
    {"img_size": 112, "embed_dim": 64, "depth": 3, "num_heads": 4},
    {"img_size": 224, "embed_dim": 64, "depth": 3, "num_heads": 4},
    {"embed_dim": 64, "depth": 3, "num_heads": 4},
    {**_SWIN, "window_size": 2},
    {"depths": _TWO, "embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)},
    {"depths": _TWO, "dims": (16, 32, 48, 64)},
    {"layers": _TWO, "channels": (16, 32, 48, 64)},
    {"channels": (16, 32, 48, 64)},
    {"channel_multiplier": 0.25},
    {"width_factor": 0.25},
    {"depths": _TWO},
    {"img_size": 64},
    {"mlp_ratio": 1 / 64},
    {},
)
#: Parameters above which a model is narrowed, and above which it is not built.
_WIDE, _TOO_WIDE = 3e6, 60e6


class TooLarge(Exception):
    """A model that nothing narrows to a size which fits the memory of a worker."""


@dataclass(frozen=True)
class RegisteredModel:
    """A model of timm, narrowed by whatever arguments it takes."""

    name: str
    module: str
    library: str = "timm"

    def build(self) -> tuple[nn.Module, Example]:
        """The perturbed model in eval mode and the call to make.

        Raises:
            TooLarge: no arguments narrow it enough.
        """
        if _parameters(self.name, {}) <= _WIDE:
            return TimmModel(self.name, self.module).build()
        tried = self._narrowed()
        if tried is None:
            raise TooLarge(f"{_parameters(self.name, {}) / 1e6:.0f}M parameters")
        return tried

    def _narrowed(self) -> tuple[nn.Module, Example] | None:
        for config in _NARROWER:
            try:
                if _parameters(self.name, config) > _TOO_WIDE:
                    continue
                model, example = TimmModel(self.name, self.module, config).build()
                with torch.no_grad():
                    model(*example.args, **example.kwargs)
            except Exception:
                if config:
                    continue
                raise
            return model, example
        return None


def _parameters(name: str, config: Mapping[str, Any]) -> int:
    import timm

    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10, **config)
    return sum(parameter.numel() for parameter in model.parameters())


@cache
def modules() -> dict[str, tuple[str, ...]]:
    """Every timm module that registers models → the names of those."""
    import timm

    listed = {module: tuple(timm.list_models(module=module)) for module in timm.list_modules()}
    return {module: names for module, names in listed.items() if names}


def registered() -> dict[str, Model]:
    """Every model that timm registers and ``MODELS`` has not, by name."""
    return {
        name: RegisteredModel(name, module)
        for module, names in modules().items()
        for name in names
        if name not in MODELS
    }
