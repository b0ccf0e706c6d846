"""Calls of models whose example input is not inferred, by name of the class."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surgery.sources import Example


def _randn(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _hunyuan() -> Example:
    return Example(
        (),
        {
            "hidden_states": _randn(2, 4, 8, 8),
            "timestep": torch.tensor([3.0, 17.0]),
            "encoder_hidden_states": _randn(2, 6, 24, seed=8),
            "text_embedding_mask": torch.ones(2, 6),
            "encoder_hidden_states_t5": _randn(2, 6, 24, seed=9),
            "text_embedding_mask_t5": torch.ones(2, 6),
            "image_meta_size": torch.full((2, 6), 8.0),
            "style": torch.zeros(2, dtype=torch.long),
            "image_rotary_emb": (_randn(16, 8, seed=10), _randn(16, 8, seed=11)),
            "return_dict": False,
        },
    )


def _stable_audio() -> Example:
    return Example(
        (),
        {
            "hidden_states": _randn(2, 4, 16),
            "timestep": torch.tensor([3.0, 17.0]),
            "encoder_hidden_states": _randn(2, 6, 24, seed=8),
            "global_hidden_states": _randn(2, 1, 32, seed=9),
            "rotary_embedding": (_randn(17, 4, seed=10), _randn(17, 4, seed=11)),
        },
    )


def _mochi() -> Example:
    return Example(
        (),
        {
            "hidden_states": _randn(2, 4, 2, 8, 8),
            "encoder_hidden_states": _randn(2, 8, 24, seed=8),
            "timestep": torch.tensor([3.0, 17.0]),
            "encoder_attention_mask": torch.ones(2, 8, dtype=torch.bool),
        },
    )


def _uvit() -> Example:
    ids = torch.randint(0, 32, (2, 8, 8), generator=torch.Generator().manual_seed(7))
    return Example(
        (),
        {
            "input_ids": ids,
            "encoder_hidden_states": _randn(2, 6, 24, seed=8),
            "pooled_text_emb": _randn(2, 24, seed=9),
            "micro_conds": torch.tensor([[8.0, 8.0, 0.0, 0.0, 6.0]] * 2),
        },
    )


def _controlnet() -> Example:
    return Example(
        (),
        {
            "sample": _randn(2, 4, 16, 16),
            "timestep": torch.tensor([3, 17]),
            "encoder_hidden_states": _randn(2, 6, 24, seed=8),
            "controlnet_cond": _randn(2, 3, 32, 32, seed=9),
        },
    )


def _temporal_decoder() -> Example:
    return Example((), {"sample": _randn(2, 3, 16, 16), "num_frames": 2})


EXAMPLES: dict[str, Callable[[], Example]] = {
    "AutoencoderKLTemporalDecoder": _temporal_decoder,
    "ControlNetModel": _controlnet,
    "HunyuanDiT2DModel": _hunyuan,
    "MochiTransformer3DModel": _mochi,
    "StableAudioDiTModel": _stable_audio,
    "UVit2DModel": _uvit,
}
