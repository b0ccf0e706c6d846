"""The sixteen models of the survival table: tiny, perturbed, with dropout where they have it.

Each ``Subject`` says by hand which blocks are sites of its stacks and where the state goes in and
comes out, so that the reference owes nothing to what the library finds.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.sources.examples import Example
from tests import zoo
from tests.zoo import padding, perturb, randn

VOCAB = 96
DROP = 0.1


@dataclass(frozen=True)
class Stream:
    """One state that passes through the blocks.

    Attributes:
        argument: Name of the block's parameter that takes it.
        result: Where it is in what the block returns: an index, or None for the whole.
    """

    argument: str
    result: int | None = None


HIDDEN = (Stream("hidden_states"),)
X = (Stream("x"),)


@dataclass(frozen=True)
class Stack:
    """Blocks that share a history.

    Attributes:
        container: Path of the module that holds them, under which the coefficients live.
        sites: Paths of the blocks, in order.
        streams: The states that pass through each.
        segment: Number of the run within its container.
    """

    container: str
    sites: tuple[str, ...]
    streams: tuple[Stream, ...] = HIDDEN
    segment: int = 0

    @property
    def prefix(self) -> str:
        """What the names of its coefficients begin with."""
        return f"{self.container}.shortcuts.{self.segment}."


def run(container: str, indices: range, streams: tuple[Stream, ...] = HIDDEN) -> Stack:
    """The children of a container with these numbers, as one stack."""
    return Stack(container, tuple(f"{container}.{i}" for i in indices), streams)


@dataclass(frozen=True)
class Subject:
    """One model under test.

    Attributes:
        name: As in the table.
        library: "transformers", "diffusers" or "timm".
        make: Builds it, unperturbed.
        inputs: The call at (batch, size); size is the length of a text or the side of an image.
        sizes: The two (batch, size) it is called at; the first is what rules are applied with.
        stacks: Its stacks at block scope.
        quiet: Keyword arguments under which the call has no cache, for training and export.
        inductor: Compiled by inductor rather than aot_eager.
        generates: Whether it has ``generate``.
        double: Whether the unmodified model runs in float64.
        random: Whether it draws numbers in train mode.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Example]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    stacks: tuple[Stack, ...]
    quiet: dict[str, Any] = field(default_factory=dict[str, Any])
    inductor: bool = False
    generates: bool = False
    double: bool = True
    random: bool = True

    def build(self) -> nn.Module:
        """The stock model in eval mode and float32: the same bits every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(self.name.encode()))
            model = self.make()
        return perturb(model).eval()

    def example(self, number: int = 0, *, quiet: bool = False) -> Example:
        """The call at the first or the second size; ``quiet`` without a cache."""
        example = self.inputs(*self.sizes[number])
        return Example(example.args, {**example.kwargs, **self.quiet}) if quiet else example


def ids(batch: int, length: int, seed: int = 7) -> Tensor:
    """Token ids that differ between lengths from the first on."""
    return zoo.ids(batch, length, vocab=VOCAB, seed=seed + length)


def _text(batch: int, length: int) -> Example:
    mask = padding(batch, length)
    return Example((), {"input_ids": ids(batch, length), "attention_mask": mask})


def _translation(batch: int, length: int) -> Example:
    text = _text(batch, length)
    return Example((), {**text.kwargs, "decoder_input_ids": ids(batch, length - 4, seed=8)})


def _image(batch: int, side: int) -> Example:
    return Example((randn(batch, 3, side, side),))


def _transformers(config: str, model: str, **fields: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        special = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        return getattr(transformers, model)(getattr(transformers, config)(**special | fields))

    return make


def _decoder(name: str, config: str, model: str, *, double: bool = True, **fields: Any) -> Subject:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attention_dropout": DROP,
    }
    return Subject(
        name,
        "transformers",
        _transformers(config, model, **sizes | fields),
        _text,
        ((2, 12), (3, 7)),
        (run("model.layers", range(4)),),
        quiet={"use_cache": False},
        inductor=name == "Llama",
        generates=True,
        double=double,
    )


def _diffusers(model: str, **fields: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, model)(**fields)

    return make


def _latents(batch: int, side: int) -> Tensor:
    return randn(batch, 4, side, side)


def _prompt(batch: int) -> Tensor:
    return randn(batch, 6, 24, seed=8)


def _steps(batch: int) -> Tensor:
    return torch.tensor([3, 17, 8, 11])[:batch]


def _dit(batch: int, side: int) -> Example:
    labels = torch.tensor([1, 6, 2, 4])[:batch]
    return Example(
        (),
        {
            "hidden_states": _latents(batch, side),
            "timestep": _steps(batch),
            "class_labels": labels,
        },
    )


def _pixart(batch: int, side: int) -> Example:
    return Example(
        (),
        {
            "hidden_states": _latents(batch, side),
            "encoder_hidden_states": _prompt(batch),
            "timestep": _steps(batch),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            "encoder_attention_mask": padding(batch, 6),
        },
    )


def _sd3(batch: int, side: int) -> Example:
    return Example(
        (),
        {
            "hidden_states": _latents(batch, side),
            "encoder_hidden_states": _prompt(batch),
            "pooled_projections": randn(batch, 20, seed=9),
            "timestep": _steps(batch).float(),
        },
    )


def _flux(batch: int, side: int) -> Example:
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1)
    return Example(
        (),
        {
            "hidden_states": randn(batch, side * side, 8),
            "encoder_hidden_states": _prompt(batch),
            "pooled_projections": randn(batch, 20, seed=9),
            "timestep": torch.tensor([0.3, 0.7, 0.1, 0.9])[:batch],
            "img_ids": places.reshape(-1, 3).float(),
            "txt_ids": torch.zeros(6, 3),
            "guidance": torch.full((batch,), 3.5),
        },
    )


def _unet(batch: int, side: int) -> Example:
    return Example(
        (),
        {
            "sample": _latents(batch, side),
            "timestep": _steps(batch),
            "encoder_hidden_states": _prompt(batch),
        },
    )


def _timm(architecture: str, **arguments: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import timm

        return timm.create_model(architecture, num_classes=10, **arguments)

    return make


TWO_STREAMS = (Stream("encoder_hidden_states", 0), Stream("hidden_states", 1))
WIDTHS: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
}

SUBJECTS = (
    _decoder("Llama", "LlamaConfig", "LlamaForCausalLM"),
    _decoder("Qwen3", "Qwen3Config", "Qwen3ForCausalLM", head_dim=8),
    Subject(
        "GPT-2",
        "transformers",
        _transformers(
            "GPT2Config", "GPT2LMHeadModel", n_positions=64, n_embd=32, n_layer=3, n_head=4
        ),
        _text,
        ((2, 12), (3, 7)),
        (run("transformer.h", range(3)),),
        quiet={"use_cache": False},
        generates=True,
    ),
    Subject(
        "BERT",
        "transformers",
        _transformers(
            "BertConfig",
            "BertModel",
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=64,
        ),
        _text,
        ((2, 12), (3, 7)),
        (run("encoder.layer", range(3)),),
        quiet={"use_cache": False},
        inductor=True,
    ),
    Subject(
        "T5",
        "transformers",
        _transformers(
            "T5Config",
            "T5ForConditionalGeneration",
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_decoder_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
        ),
        _translation,
        ((2, 12), (3, 9)),
        (
            run("encoder.block", range(3), (Stream("hidden_states", 0),)),
            run("decoder.block", range(3), (Stream("hidden_states", 0),)),
        ),
        quiet={"use_cache": False},
        generates=True,
    ),
    _decoder(
        "Mixtral",
        "MixtralConfig",
        "MixtralForCausalLM",
        double=False,  # torch's grouped matrix product of the experts has no float64
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    Subject(
        "DiT",
        "diffusers",
        _diffusers(
            "DiTTransformer2DModel",
            **WIDTHS,
            out_channels=8,
            num_layers=3,
            norm_num_groups=8,
            num_embeds_ada_norm=10,
            dropout=DROP,
        ),
        _dit,
        ((2, 8), (3, 12)),
        (run("transformer_blocks", range(3)),),
    ),
    Subject(
        "PixArt",
        "diffusers",
        _diffusers(
            "PixArtTransformer2DModel",
            **WIDTHS,
            out_channels=8,
            num_layers=3,
            norm_num_groups=8,
            cross_attention_dim=32,
            caption_channels=24,
            use_additional_conditions=False,
            dropout=DROP,
        ),
        _pixart,
        ((2, 8), (3, 12)),
        (run("transformer_blocks", range(3)),),
    ),
    Subject(
        "SD3",
        "diffusers",
        _diffusers(
            "SD3Transformer2DModel",
            **WIDTHS,
            out_channels=4,
            num_layers=3,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=20,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
        ),
        _sd3,
        ((2, 8), (3, 12)),
        (run("transformer_blocks", range(3), TWO_STREAMS),),
        random=False,
    ),
    Subject(
        "Flux",
        "diffusers",
        _diffusers(
            "FluxTransformer2DModel",
            patch_size=1,
            in_channels=8,
            num_layers=3,
            num_single_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            guidance_embeds=True,
            axes_dims_rope=(4, 2, 2),
        ),
        _flux,
        ((2, 4), (3, 3)),
        (
            run("transformer_blocks", range(3), TWO_STREAMS),
            run("single_transformer_blocks", range(3), TWO_STREAMS),
        ),
        random=False,
    ),
    Subject(
        "UNet2DConditionModel",
        "diffusers",
        _diffusers(
            "UNet2DConditionModel",
            sample_size=16,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=3,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=24,
            attention_head_dim=8,
            norm_num_groups=8,
            dropout=DROP,
        ),
        _unet,
        ((2, 16), (3, 12)),
        (
            run("down_blocks.0.resnets", range(3), (Stream("input_tensor"),)),
            run("down_blocks.0.attentions", range(3), (Stream("hidden_states", 0),)),
            run("down_blocks.1.resnets", range(1, 3), (Stream("input_tensor"),)),
            run("mid_block.resnets", range(2), (Stream("input_tensor"),)),
            run("up_blocks.1.attentions", range(4), (Stream("hidden_states", 0),)),
        ),
    ),
    Subject(
        "ViT",
        "timm",
        _timm(
            "vit_tiny_patch16_224",
            img_size=32,
            patch_size=8,
            embed_dim=32,
            depth=4,
            num_heads=4,
            dynamic_img_size=True,
            proj_drop_rate=DROP,
            attn_drop_rate=DROP,
            drop_path_rate=2 * DROP,
        ),
        _image,
        ((2, 32), (3, 48)),
        (run("blocks", range(4), X),),
        inductor=True,
    ),
    Subject(
        "Swin",
        "timm",
        _timm(
            "swin_tiny_patch4_window7_224",
            img_size=64,
            window_size=4,
            embed_dim=16,
            depths=(2, 4),
            num_heads=(2, 4),
            proj_drop_rate=DROP,
            drop_path_rate=2 * DROP,
        ),
        _image,
        ((2, 64), (3, 64)),
        (run("layers.0.blocks", range(2), X), run("layers.1.blocks", range(4), X)),
    ),
    Subject(
        "ResNet-50",
        "timm",
        _timm(
            "resnet50",
            channels=(4, 8, 12, 16),
            stem_width=16,
            drop_rate=DROP,
            drop_path_rate=2 * DROP,
        ),
        _image,
        ((3, 64), (2, 96)),
        (
            run("layer1", range(1, 3), X),
            run("layer2", range(1, 4), X),
            run("layer3", range(1, 6), X),
            run("layer4", range(1, 3), X),
        ),
    ),
    Subject(
        "ConvNeXt",
        "timm",
        _timm("convnext_atto", depths=(2, 2, 3, 2), dims=(8, 16, 24, 32), drop_path_rate=2 * DROP),
        _image,
        ((2, 64), (3, 96)),
        tuple(run(f"stages.{i}.blocks", range(n), X) for i, n in enumerate((2, 2, 3, 2))),
    ),
    Subject(
        "EfficientNet",
        "timm",
        _timm(
            "test_efficientnet",
            channel_multiplier=0.5,
            depth_multiplier=3.0,
            drop_rate=DROP,
            drop_path_rate=2 * DROP,
        ),
        _image,
        ((3, 64), (2, 96)),
        tuple(run(f"blocks.{i}", range(1, 3), X) for i in range(5)),
    ),
)

NAMED = {subject.name: subject for subject in SUBJECTS}
