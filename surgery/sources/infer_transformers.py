"""Example inputs for models of transformers: from ``main_input_name``, the signature, the config.

Inputs of transformers bear names with fixed meanings. The table at the end says how each is made
from fields of the configuration; which of them a model needs follows from its signature.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery.sources.draw import Draw, Uninferable
from surgery.sources.libraries import attributes

LENGTH = 12
DECODER_LENGTH = 8
# Where a network takes any image size, this is enough for five halvings and two positions.
FREE_IMAGE_SIZE = 64
_FRAMES = 24


def infer(
    model: nn.Module, parameters: Mapping[str, inspect.Parameter], draw: Draw
) -> dict[str, Any]:
    """Keyword arguments for one call of ``model``.

    Args:
        model: A ``transformers.PreTrainedModel``.
        parameters: Parameters of its forward.
        draw: Where the values come from.
    """
    inputs = _Inputs(cast("Any", model), parameters, draw)
    return {name: inputs.make(name) for name in inputs.wanted()}


class _Inputs:
    def __init__(self, model: Any, parameters: Mapping[str, inspect.Parameter], draw: Draw) -> None:
        self.model = model
        self.config = model.config
        self.parameters = parameters
        self.draw = draw
        self.text = self.config.get_text_config()

    def wanted(self) -> list[str]:
        """The names of the inputs to give, in the order of the signature."""
        main = self.model.main_input_name
        names = {main} if isinstance(main, str) else set(cast("Iterable[str]", main))
        names &= set(self.parameters)
        names |= {name for name, value in self.parameters.items() if _required(value)}
        if "input_ids" in names:
            names |= self._modalities()
            names |= {"attention_mask", "bbox", "visual_feats", "visual_pos"} & set(self.parameters)
        if self._decodes():
            names.add("decoder_input_ids")
        if "past_values" in names:
            names |= _TIME_SERIES & set(self.parameters)
        if not names:
            raise Uninferable("its signature names no input")
        return [name for name in self.parameters if name in names]

    def make(self, name: str) -> Any:
        maker = _MAKERS.get(name)
        if maker is None:
            raise Uninferable(f"no rule makes {name!r}")
        return maker(self)

    def _decodes(self) -> bool:
        return bool(self.config.is_encoder_decoder) and "decoder_input_ids" in self.parameters

    def _modalities(self) -> set[str]:
        """Images or sounds a model of two towers needs beside its text.

        A model that splices them into the text has a placeholder token for them, and runs on text
        alone; one without needs them.
        """
        found: set[str] = set()
        for part, word, name in (
            ("vision_config", "image", "pixel_values"),
            ("audio_config", "audio", "input_features"),
        ):
            fields = attributes(self.config)
            spliced = any(word in key and "token" in key for key in fields)
            has_part = part in fields or f"{word}_size" in fields
            if has_part and name in self.parameters and not spliced:
                found.add(name)
        return found

    def field(self, *names: str) -> Any:
        """The first of ``names`` that is set in the configuration or in one nested in it."""
        for config in _configs(self.config):
            for name in names:
                value = getattr(config, name, None)
                if value is not None:
                    return value
        return None

    def require(self, *names: str) -> Any:
        value = self.field(*names)
        if value is None:
            raise Uninferable(f"its configuration has none of {', '.join(names)}")
        return value

    def vocabulary(self) -> int:
        size = getattr(self.text, "vocab_size", None) or self.field("vocab_size")
        if isinstance(size, int):
            return size
        raise Uninferable("its configuration has no vocab_size")

    def special(self) -> set[int]:
        return {
            token
            for config in _configs(self.config)
            for key, value in attributes(config).items()
            if key.endswith(("_token_id", "_token_index"))
            for token in (cast("list[Any]", value) if isinstance(value, list) else [value])
            if isinstance(token, int)
        }

    def length(self, wished: int) -> int:
        limit = self.field("max_position_embeddings", "n_positions", "max_target_positions")
        return min(wished, limit) if isinstance(limit, int) and limit > 0 else wished

    # One method for each kind of input.

    def input_ids(self) -> Tensor:
        length = self.length(LENGTH)
        ids = self.draw.ids(length, self.vocabulary(), self.special())
        end = getattr(self.text, "eos_token_id", None)
        if isinstance(end, int) and 0 <= end < self.vocabulary():
            # Some heads pool at the end token, and want as many in each row.
            ids[:, length - length // 6 - 1] = end
        return ids

    def attention_mask(self) -> Tensor:
        return self.draw.padding(self.length(LENGTH))

    def decoder_input_ids(self) -> Tensor:
        decoder = getattr(self.config, "decoder", None)
        size = getattr(decoder, "vocab_size", None) or self.vocabulary()
        return self.draw.ids(self.length(DECODER_LENGTH), size, self.special())

    def bbox(self) -> Tensor:
        corner = self.draw.integers(0, 400, self.draw.batch, self.length(LENGTH), 2)
        return torch.cat([corner, corner + 50], dim=-1)

    def image(self) -> Tensor:
        height, width = self._image_size()
        channels = self.field("num_channels", "in_channels", "in_chans") or 3
        frames = self.field("num_frames") if self._has_convolution(3) else None
        if frames is None and "num_frames" in attributes(self.config):
            frames = self.config.num_frames
        time = () if frames is None else (frames,)
        return self.draw.normal(self.draw.batch, *time, channels, height, width)

    def video(self) -> Tensor:
        height, width = self._image_size()
        channels = self.field("num_channels", "in_channels", "in_chans") or 3
        frames = self.field("frames_per_clip", "num_frames") or 2
        return self.draw.normal(self.draw.batch, frames, channels, height, width)

    def _image_size(self) -> tuple[int, int]:
        size = self.field("image_size", "crop_size", "input_size")
        if isinstance(size, dict):
            sides = cast("dict[str, int]", size)
            return sides["height"], sides["width"]
        if isinstance(size, (list, tuple)):
            found = [int(value) for value in cast("list[int]", size)]
            return (found[0], found[1]) if len(found) > 1 else (found[0], found[0])
        return (size, size) if isinstance(size, int) else (FREE_IMAGE_SIZE, FREE_IMAGE_SIZE)

    def _has_convolution(self, dimensions: int) -> bool:
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
        return any(isinstance(module, kind) for module in self.model.modules())

    def patches(self) -> Tensor:
        """Flattened patches (batch * patches, values) of a vision tower that takes them so."""
        side = self.require("patch_size")
        time = self.field("temporal_patch_size") or 1
        channels = self.field("in_channels", "in_chans", "num_channels") or 3
        rows = int(self.grid().prod(dim=1).sum())
        return self.draw.normal(rows, channels * time * side * side)

    def grid(self) -> Tensor:
        """Time, height and width, in patches, of each image: (batch, 3)."""
        side = 2 * (self.field("spatial_merge_size") or 1)
        return torch.tensor([[1, side, side]] * self.draw.batch)

    def sound(self) -> Tensor:
        """Raw samples, or spectrogram frames where the model takes those under the same name."""
        bins, frames = self.field("num_mel_bins"), self.field("max_length")
        if isinstance(bins, int) and isinstance(frames, int) and self._has_convolution(2):
            return self.draw.normal(self.draw.batch, frames, bins)
        strides = self.field("conv_stride", "upsampling_ratios", "downsampling_ratios")
        hop = math.prod(cast("list[int]", strides)) if isinstance(strides, (list, tuple)) else 384
        channels = self.field("audio_channels")
        shape = () if channels is None else (channels,)
        if channels is None and "acoustic" in self.config.model_type:
            shape = (1,)
        return self.draw.normal(self.draw.batch, *shape, hop * _FRAMES)

    def sound_features(self) -> Tensor:
        """Mel features: (batch, bins, frames) with learnt positions, else (batch, frames, bins)."""
        bins, positions = self.field("num_mel_bins"), self.field("max_source_positions")
        if isinstance(bins, int) and isinstance(positions, int):
            return self.draw.normal(self.draw.batch, bins, 2 * positions)
        width = self.require("feature_projection_input_dim", "input_feat_per_channel", *_MELS)
        return self.draw.normal(self.draw.batch, 4 * _FRAMES, width)

    def sound_mask(self) -> Tensor:
        features = self.sound_features()
        return torch.ones(features.shape[:2], dtype=torch.long)

    def history(self) -> Tensor:
        steps = self._past_steps()
        channels = self.field("num_input_channels")
        if channels is None:
            size = self.field("input_size")
            channels = size if isinstance(size, int) and size > 1 else None
        shape = (steps,) if channels is None else (steps, channels)
        return self.draw.normal(self.draw.batch, *shape)

    def _past_steps(self) -> int:
        context = self.require("context_length", "prediction_length")
        lags = self.field("lags_sequence")
        return context + (max(cast("list[int]", lags)) if lags else 0)

    def past_times(self) -> Tensor:
        return self.draw.normal(self.draw.batch, self._past_steps(), self._time_features())

    def future_times(self) -> Tensor:
        steps = self.require("prediction_length")
        return self.draw.normal(self.draw.batch, steps, self._time_features())

    def _time_features(self) -> int:
        return self.require("num_time_features")

    def observed(self) -> Tensor:
        return torch.ones_like(self.history())

    def future(self) -> Tensor:
        return self.draw.normal(self.draw.batch, self.require("prediction_length"))

    def visual_features(self) -> Tensor:
        width = self.require("visual_feat_dim", "visual_embedding_dim")
        return self.draw.normal(self.draw.batch, 4, width)

    def visual_positions(self) -> Tensor:
        return self.draw.normal(self.draw.batch, 4, 4).sigmoid()


def _required(parameter: inspect.Parameter) -> bool:
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return not variadic and parameter.default is parameter.empty


def _configs(config: Any) -> list[Any]:
    """The configuration and those nested in it, outermost first."""
    found = [config]
    for key in config.sub_configs:
        nested = getattr(config, key, None)
        if nested is not None:
            found += _configs(nested)
    return found


_MELS = ("num_mel_bins", "input_dim", "feature_size")

_TIME_SERIES = {
    "past_time_features",
    "past_observed_mask",
    "future_values",
    "future_time_features",
}

_MAKERS: dict[str, Callable[[_Inputs], Any]] = {
    "input_ids": _Inputs.input_ids,
    "attention_mask": _Inputs.attention_mask,
    "decoder_input_ids": _Inputs.decoder_input_ids,
    "bbox": _Inputs.bbox,
    "pixel_values": _Inputs.image,
    "pixel_values_videos": _Inputs.video,
    "hidden_states": _Inputs.patches,
    "grid_thw": _Inputs.grid,
    "input_values": _Inputs.sound,
    "input_features": _Inputs.sound_features,
    "input_features_mask": _Inputs.sound_mask,
    "past_values": _Inputs.history,
    "past_time_features": _Inputs.past_times,
    "past_observed_mask": _Inputs.observed,
    "future_values": _Inputs.future,
    "future_time_features": _Inputs.future_times,
    "visual_feats": _Inputs.visual_features,
    "visual_pos": _Inputs.visual_positions,
}
