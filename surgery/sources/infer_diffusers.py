"""Example inputs for models of diffusers: from the signature, the layers and the config.

What a model takes is in its signature; how wide each input is, in fields of its configuration that
the library names alike across models. Whether the main input is an image, a video or a sequence
follows from the kind of convolution in the model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.sources.draw import Draw, Uninferable

TEXT_LENGTH = 8
_GRID = 4
_FRAMES = 5
# Enough for three halvings of an image, and for the group norms at the bottom.
_IMAGE = 32


def infer(
    model: nn.Module, parameters: Mapping[str, inspect.Parameter], draw: Draw
) -> dict[str, Any]:
    """Keyword arguments for one call of ``model``.

    Args:
        model: A ``diffusers.ModelMixin``.
        parameters: Parameters of its forward.
        draw: Where the values come from.
    """
    inputs = _Inputs(model, parameters, draw)
    made = {name: inputs.make(name) for name in inputs.wanted()}
    if not made:
        raise Uninferable("its signature names no input")
    return made


class _Inputs:
    def __init__(
        self, model: nn.Module, parameters: Mapping[str, inspect.Parameter], draw: Draw
    ) -> None:
        self.model = model
        self.config = cast("Mapping[str, Any]", cast("Any", model).config)
        self.parameters = parameters
        self.draw = draw
        self.batch = draw.batch

    def wanted(self) -> list[str]:
        return [
            name
            for name, parameter in self.parameters.items()
            if parameter.default is parameter.empty or self._used(name)
        ]

    def _used(self, name: str) -> bool:
        """Whether an input with a default is one the model cannot do without."""
        if name in _CONDITIONAL:
            return _CONDITIONAL[name](self)
        return name in _ALWAYS

    def make(self, name: str) -> Any:
        maker = _MAKERS.get(name)
        if maker is None:
            raise Uninferable(f"no rule makes {name!r}")
        return maker(self)

    def field(self, *names: str) -> Any:
        """The first of ``names`` that is set in the configuration."""
        return next(
            (self.config[name] for name in names if self.config.get(name) is not None), None
        )

    def require(self, *names: str) -> Any:
        value = self.field(*names)
        if value is None:
            raise Uninferable(f"its configuration has none of {', '.join(names)}")
        return value

    def has(self, kind: type[nn.Module]) -> bool:
        return any(isinstance(module, kind) for module in self.model.modules())

    # The main input.

    def packed(self) -> bool:
        """Whether the model takes a sequence of patches, with their places given beside it."""
        return bool({"img_ids", "img_shapes", "num_frames"} & set(self.parameters))

    def latents(self) -> Tensor:
        channels = self._channels()
        if self.packed():
            return self.draw.normal(self.batch, self._places(), channels)
        if "proj_embedding" in self.parameters:
            return self.draw.normal(self.batch, channels)
        if not self.has(nn.Conv2d) and not self.has(nn.Conv3d) and self.has(nn.Conv1d):
            return self.draw.normal(self.batch, channels, 4 * _GRID)
        height, width = self._latent_size()
        if self.field("sample_frames") is not None and not self.has(nn.Conv3d):
            return self.draw.normal(self.batch, self._frames(), channels, height, width)
        if self._is_video():
            return self.draw.normal(self.batch, channels, self._frames(), height, width)
        return self.draw.normal(self.batch, channels, height, width)

    def _channels(self) -> int:
        return self.require("in_channels", "embedding_dim", "num_channels_latents")

    def _is_video(self) -> bool:
        patch = self.field("patch_size")
        frames = self.field("patch_size_t", "num_frames", "sample_frames", "video_length")
        deep = isinstance(patch, (list, tuple)) and len(cast("list[int]", patch)) == 3
        return self.has(nn.Conv3d) or deep or frames is not None

    def _frames(self) -> int:
        step = self.field("patch_size_t", "temporal_compression_ratio") or 1
        given = self.field("video_length")
        return given if isinstance(given, int) else _FRAMES if step == 1 else 2 * step

    def _places(self) -> int:
        return _GRID * _GRID * (_FRAMES if "num_frames" in self.parameters else 1)

    def _patch(self) -> int:
        patch = self.field("patch_size")
        if isinstance(patch, (list, tuple)):
            return int(cast("list[int]", patch)[-1])
        return patch if isinstance(patch, int) else 1

    def _latent_size(self) -> tuple[int, int]:
        height, width = self.field("sample_height"), self.field("sample_width")
        if isinstance(height, int) and isinstance(width, int):
            return height, width
        size = self.field("sample_size")
        # A cropped table of positions takes any size below it; a plain one only its own.
        if size is None or self.field("pos_embed_max_size") is not None:
            size = min(size or 2 * _GRID * self._patch(), 2 * _GRID * self._patch())
        if isinstance(size, (list, tuple)):
            found = cast("list[int]", size)
            return int(found[0]), int(found[-1])
        return size, size

    def sample(self) -> Tensor:
        """What a UNet or an autoencoder takes: (batch, channels, [frames,] height, width)."""
        channels = self.field("in_channels", "audio_channels") or 3
        levels = len(self.field("block_out_channels", "down_block_types") or (0,))
        encodes = "timestep" not in self.parameters and "timestep_ratio" not in self.parameters
        if self.has(nn.Conv1d) and not self.has(nn.Conv2d) and not self.has(nn.Conv3d):
            ratios = cast("list[int]", self.field("downsampling_ratios") or [4, 4, 4])
            size = math.prod(ratios) * _GRID if encodes else int(self.field("sample_size") or 64)
            return self.draw.normal(self.batch, channels, size)
        side = max(_IMAGE, 2**levels) if encodes else 2 ** max(levels, 3)
        moves = self.field("motion_max_seq_length") is not None
        if self.has(nn.Conv3d) or moves or "added_time_ids" in self.parameters:
            return self._clip(channels, side, encodes)
        return self.draw.normal(self.batch, channels, side, side)

    def _clip(self, channels: int, side: int, encodes: bool) -> Tensor:
        if "added_time_ids" in self.parameters:
            return self.draw.normal(self.batch, 2, channels, side, side)
        frames = 1 + 2 * int(self.field("temporal_compression_ratio") or 4) if encodes else 2
        return self.draw.normal(self.batch, channels, frames, side, side)

    # What conditions it.

    def text(self) -> Tensor:
        width = self.require(*_TEXT_WIDTHS)
        if isinstance(width, (list, tuple)):
            width = cast("list[int]", width)[0]
        length = self.field("num_embeddings", "max_text_seq_length") or TEXT_LENGTH
        return self.draw.normal(self.batch, length, int(width))

    def text_mask(self) -> Tensor:
        return self.draw.padding(self.text().shape[1])

    def timestep(self) -> Tensor:
        if self.packed():
            return torch.linspace(0.25, 0.75, self.batch)
        steps = self.field("num_embeds_ada_norm") or 1000
        return self.draw.integers(1, min(int(steps), 1000), self.batch)

    def labels(self) -> Tensor:
        classes = self.field("num_embeds_ada_norm", "num_class_embeds")
        if classes is not None:
            return self.draw.integers(0, int(classes), self.batch)
        return self.draw.normal(self.batch, self.require("projection_class_embeddings_input_dim"))

    def has_labels(self) -> bool:
        if self.field("num_class_embeds", "class_embed_type") is not None:
            return True
        zero = self.field("norm_type") == "ada_norm_zero"
        return zero and self.field("num_embeds_ada_norm") is not None

    def pooled(self) -> Tensor:
        return self.draw.normal(self.batch, self.require("pooled_projection_dim"))

    def guidance(self) -> Tensor:
        return torch.full((self.batch,), 3.5)

    def embedding(self) -> Tensor:
        return self.draw.normal(self.batch, self.require("embedding_dim"))

    def _axes(self) -> int:
        return len(cast("list[int]", self.field("axes_dims_rope", "axes_dim") or [0, 0, 0]))

    def image_places(self) -> Tensor:
        places = torch.zeros(_GRID * _GRID, self._axes())
        rows, columns = torch.meshgrid(torch.arange(_GRID), torch.arange(_GRID), indexing="ij")
        places[:, 1], places[:, 2] = rows.flatten(), columns.flatten()
        return places

    def text_places(self) -> Tensor:
        return torch.zeros(self.text().shape[1], self._axes())

    def image_shapes(self) -> list[list[tuple[int, int, int]]]:
        return [[(1, _GRID, _GRID)] for _ in range(self.batch)]

    def sizes(self) -> Tensor:
        return torch.full((self.batch, 2), 64.0)

    def corners(self) -> Tensor:
        return torch.zeros(self.batch, 2)

    def times(self) -> Tensor:
        return torch.tensor([[6.0, 127.0, 0.02]] * self.batch)

    def control(self) -> Tensor:
        side = self.sample().shape[-1] * 8
        return self.draw.normal(self.batch, self.field("conditioning_channels") or 3, side, side)

    def has_additions(self) -> bool:
        return self.field("addition_embed_type") is not None or self._sized()

    def _sized(self) -> bool:
        """Whether the adaptive norm of the model looks for a resolution in these arguments."""
        return "use_additional_conditions" in self.config

    def additions(self) -> dict[str, Tensor | None]:
        if self._sized():
            if not self.config["use_additional_conditions"]:
                return {"resolution": None, "aspect_ratio": None}
            ratio = torch.ones(self.batch, 1)
            return {"resolution": self.sizes(), "aspect_ratio": ratio}
        kind = self.field("addition_embed_type")
        if kind != "text_time":
            raise Uninferable(f"no rule makes the added conditions of {kind!r}")
        total = int(self.require("projection_class_embeddings_input_dim"))
        width = total - 6 * int(self.require("addition_time_embed_dim"))
        times = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]] * self.batch)
        return {"text_embeds": self.draw.normal(self.batch, width), "time_ids": times}


# Widths of the text embedding, those that stand for a projected input before those inside.
_TEXT_WIDTHS = (
    "encoder_hid_dim",
    "caption_channels",
    "joint_attention_dim",
    "text_embed_dim",
    "text_dim",
    "cap_feat_dim",
    "embedding_dim",
    "cross_attention_dim",
)

_ALWAYS = {
    "hidden_states",
    "sample",
    "timestep",
    "encoder_hidden_states",
    "encoder_hidden_states_mask",
    "encoder_attention_mask",
    "pooled_projections",
    "img_ids",
    "txt_ids",
    "img_shapes",
    "num_frames",
    "height",
    "width",
}

_CONDITIONAL: dict[str, Callable[[_Inputs], bool]] = {
    "class_labels": _Inputs.has_labels,
    "guidance": lambda inputs: bool(inputs.field("guidance_embeds")),
    "added_cond_kwargs": _Inputs.has_additions,
    "encoder_hidden_states": lambda inputs: inputs.field(*_TEXT_WIDTHS) is not None,
    "pooled_projections": lambda inputs: inputs.field("pooled_projection_dim") is not None,
    "encoder_attention_mask": lambda inputs: inputs.field(*_TEXT_WIDTHS) is not None,
    "num_frames": lambda inputs: "height" in inputs.parameters,
}

_MAKERS: dict[str, Callable[[_Inputs], Any]] = {
    "hidden_states": _Inputs.latents,
    "sample": _Inputs.sample,
    "encoder_hidden_states": _Inputs.text,
    "encoder_hidden_states_mask": _Inputs.text_mask,
    "encoder_attention_mask": _Inputs.text_mask,
    "timestep": _Inputs.timestep,
    "class_labels": _Inputs.labels,
    "pooled_projections": _Inputs.pooled,
    "guidance": _Inputs.guidance,
    "proj_embedding": _Inputs.embedding,
    "img_ids": _Inputs.image_places,
    "txt_ids": _Inputs.text_places,
    "img_shapes": _Inputs.image_shapes,
    "num_frames": lambda inputs: _FRAMES,
    "height": lambda inputs: _GRID,
    "width": lambda inputs: _GRID,
    "original_size": _Inputs.sizes,
    "target_size": _Inputs.sizes,
    "crop_coords": _Inputs.corners,
    "added_time_ids": _Inputs.times,
    "controlnet_cond": _Inputs.control,
    "added_cond_kwargs": _Inputs.additions,
}
