"""What the sweep found on models that nothing was written for, each as the smallest case of it."""

from __future__ import annotations

from pathlib import Path as FilePath

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import CaptureError, LowRank, Path, Role, Rule, SourceError, adapters
from surgery.capture import trace_model
from surgery.select import ModelMap
from surgery.sources import describe, rebuild

pytestmark = [
    # torchao and diffusers announce their own changes while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class CachedBias(nn.Module):
    """Keeps what it computed from a parameter while it evaluates, as LeViT's attention does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.table @ self.table
        return x + self.cache["bias"]


def test_a_cache_of_the_forward_does_not_outlive_the_adapters_it_was_made_with() -> None:
    model, x = nn.Sequential(CachedBias()).eval(), torch.zeros(4, 4)
    before = model(x)
    surgery.apply(model, Rule(LowRank(rank=2), where=Path("0")))
    with torch.no_grad():
        for tensor in adapters.parameters(model):
            tensor.normal_()
    adapted = model(x)
    assert not torch.allclose(adapted, before)
    with adapters.disabled(model):
        assert torch.equal(model(x), before)
    assert torch.equal(model(x), adapted)
    surgery.undo(model)
    assert torch.equal(model(x), before)


def test_the_rows_of_a_mask_as_a_list_are_traced() -> None:
    class Lengths(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            lengths = mask.sum(dim=1).tolist()
            first = mask.tolist()[0][0]
            return torch.stack([row[: min(lengths)].sum() * first for row in x])

    x, mask = torch.randn(2, 5), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    graph = trace_model(Lengths(), (x, mask)).graph
    assert any(node.target == "item" for node in graph.nodes)


def test_infinity_in_a_configuration_survives_saving(tmp_path: FilePath) -> None:
    config = {
        "vocab_size": 96,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "state_size": 4,
        "num_heads": 4,
        "head_dim": 8,
        "n_groups": 2,
        "chunk_size": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    model = surgery.load("transformers:mamba2", config=config)
    limit = model.config.time_step_limit
    assert limit[1] == float("inf")
    surgery.apply(model, Rule(LowRank(rank=2)))
    surgery.save(model, tmp_path / "saved")
    assert tuple(surgery.restore(tmp_path / "saved").config.time_step_limit) == tuple(limit)


class ScaledConv(nn.Conv2d):
    """Has a second parameter of the rank of its weight, as the convolutions of NFNets have."""

    def __init__(self) -> None:
        super().__init__(3, 4, 3)
        self.gain = nn.Parameter(torch.randn(4, 1, 1, 1))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        return self._conv_forward(input, self.weight * self.gain, self.bias)


def test_other_parameters_of_an_adapted_layer_are_left_alone() -> None:
    model, x = nn.Sequential(ScaledConv()), torch.randn(2, 3, 8, 8)
    before = model(x)
    surgery.apply(model, Rule(LowRank(rank=2)))
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for tensor in adapters.parameters(model):
            tensor.normal_()
    A, B = (tensor.detach() for tensor in adapters.parameters(model))
    layer = model[0]
    weight = (layer._parameters["weight"] + (B @ A).view(4, 3, 3, 3)) * layer.gain
    expected = nn.functional.conv2d(x, weight, layer.bias)
    # float32 sums of 27 products.
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_a_feed_forward_beside_an_attention_is_one() -> None:
    class Parallel(nn.Module):
        """The shortcut meets the attention first and the feed-forward then, as in Cohere."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
            self.mix, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
            self.last = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            h = self.norm(x)
            return self.last(x + self.mix(h) + self.down(torch.relu(self.up(h))))

    roles = ModelMap(Parallel(), torch.randn(2, 5, 8)).roles
    assert (roles["up"].name, roles["down"].name) == ("mlp.in", "mlp.out")


def test_a_failed_trace_says_which_example_the_model_was_given() -> None:
    rule = Rule(LowRank(rank=2), where=Role("attention"))
    with pytest.raises(CaptureError, match=r"cannot be called with the example .*\[2, 7\]"):
        surgery.plan(nn.Sequential(nn.Linear(4, 4)), rule, example=torch.randn(2, 7))


def test_an_argument_that_the_name_of_a_timm_model_fixes() -> None:
    with pytest.raises(SourceError, match=r"'patch_size' is what timm's name 'mixer_s32_224'"):
        surgery.load("timm:mixer_s32_224", config={"patch_size": 8})


def test_a_configuration_with_more_than_the_constructor_takes_is_rebuilt() -> None:
    config = {
        "down_block_out_channels": [8, 16],
        "up_block_out_channels": [8, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "norm_num_groups": 4,
    }
    model = surgery.load("diffusers:AsymmetricAutoencoderKL", config=config)
    description = describe(model)
    assert description is not None
    assert list(rebuild(description).state_dict()) == list(model.state_dict())
