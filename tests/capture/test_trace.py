"""A whole-model trace is the model: it computes the same bits, and leaves no mark."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.capture import TensorSpec, Trace, is_atomic, trace_model
from surgery.errors import CaptureError
from tests import zoo
from tests.capture.compare import assert_same, run, tensors_in

ATTENTION = {functional.scaled_dot_product_attention, functional.softmax, torch.softmax, "softmax"}


@pytest.mark.parametrize("name", zoo.names())
def test_computes_the_same_bits_and_leaves_no_mark(name: str) -> None:
    model, example = zoo.build(name)
    before = _marks(model)
    generator = torch.get_rng_state()
    trace = trace_model(model, example.args, example.kwargs)
    assert torch.equal(torch.get_rng_state(), generator)
    assert _marks(model) == before
    assert not trace.assumptions
    assert not trace.constants
    inputs = list(tensors_in([example.args, example.kwargs]))
    with torch.no_grad():
        assert_same(run(trace, model, inputs), model(*example.args, **example.kwargs))


def _marks(model: nn.Module) -> list[Any]:
    """What a trace must not change: contents, flags, attributes, the sizes of containers."""
    marks: list[Any] = []
    for path, module in model.named_modules():
        held = {
            key: (id(value), len(value) if isinstance(value, (dict, list)) else None)
            for key, value in module.__dict__.items()
        }
        marks.append((path, held))
    contents = [(key, value.sum().item()) for key, value in model.state_dict().items()]
    return [*marks, *contents]


@pytest.mark.parametrize("name", ["llama", "bert", "timm_vit", "PixArtTransformer2DModel"])
def test_attention_is_visible(name: str) -> None:
    model, example = zoo.build(name)
    trace = trace_model(model, example.args, example.kwargs)
    assert any(node.target in ATTENTION for node in trace.graph.nodes)


def test_nodes_say_where_they_come_from() -> None:
    model, example = zoo.build("gpt2")
    trace = trace_model(model, example.args, example.kwargs)
    projections = [node for node in trace.graph.nodes if node.target is torch.addmm]
    assert len(projections) == 4 * model.config.n_layer
    first = projections[0]
    assert first.meta["owner"] == "transformer.h.0.attn.c_attn"
    assert first.meta["val"] == TensorSpec((24, 96), torch.float32, torch.device("cpu"))
    assert [argument.target for argument in first.all_input_nodes if argument.op == "get_attr"] == [
        "transformer.h.0.attn.c_attn.bias",
        "transformer.h.0.attn.c_attn.weight",
    ]
    assert first.meta["where"].file.endswith("transformers/pytorch_utils.py")


@pytest.mark.parametrize("name", ["llama", "t5", "UNet2DConditionModel", "timm_swin"])
def test_on_meta_the_graph_is_the_same(name: str) -> None:
    model, example = zoo.build(name)
    here = trace_model(model, example.args, example.kwargs)
    # A mask of ones asks nothing that meta could not answer the same way.
    kwargs = {key: _on_meta(value) for key, value in example.kwargs.items()}
    args = tuple(map(_on_meta, example.args))
    there = trace_model(model.to("meta"), args, kwargs)
    layers = [node.target for node in here.graph.nodes if node.op == "call_module"]
    assert [node.target for node in there.graph.nodes if node.op == "call_module"] == layers


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_routing_by_data(name: str) -> None:
    """On real weights the experts that are hit; on meta made-up ones, and the trace says so."""
    model, example = zoo.build(name)
    model.set_experts_implementation("eager")
    trace = trace_model(model, example.args, example.kwargs)
    assert not trace.assumptions
    inputs = list(tensors_in([example.args, example.kwargs]))
    with torch.no_grad():
        assert_same(run(trace, model, inputs), model(*example.args, **example.kwargs))
    kwargs = {key: _on_meta(value) for key, value in example.kwargs.items()}
    there = trace_model(model.to("meta"), (), kwargs)
    assert there.assumptions
    assert all(guard.kind == "data" for guard in there.assumptions)
    weights = [node.target for node in there.graph.nodes if node.op == "get_attr"]
    assert sum("experts.down_proj" in target for target in weights) == len(model.model.layers)


def test_too_expensive_data_is_made_up() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(8, 1 << 23, device="meta").to_empty(device="cpu")

        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if self.up(x).sum() > 0 else x - 1

    trace = trace_model(Wide(), (torch.ones(1, 8),))
    assert [guard.assumed for guard in trace.guards] == [True]


def test_multi_head_attention_is_taken_apart() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    trace = trace_model(layer, (torch.ones(1, 3, 8),))
    targets = [node.target for node in trace.graph.nodes]
    assert functional.scaled_dot_product_attention in targets
    assert "self_attn.in_proj_weight" in targets
    assert "linear1" in targets


def test_shared_modules_and_tied_weights_go_by_their_first_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    trace = trace_model(model, (torch.ones(1, 4),))
    assert [n.target for n in trace.graph.nodes if n.op == "call_module"] == ["0", "0"]


def test_training_mode_keeps_batch_statistics() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    state = copy.deepcopy(model.state_dict())
    trace_model(model, (torch.randn(8, 4),))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_an_input_cache_is_left_alone() -> None:
    from transformers import DynamicCache

    model, example = zoo.build("llama")
    cache = DynamicCache(config=model.config)
    trace_model(model, (), {**example.kwargs, "past_key_values": cache, "use_cache": True})
    assert cache.get_seq_length() == 0


def test_hidden_caches_are_recomputed() -> None:
    """LeViT keeps its biases in eval: a trace that read them would lose the parameter."""
    import timm

    model = timm.create_model("levit_128s", num_classes=4).eval()
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        model(image)
    trace = trace_model(model, (image,))
    assert not trace.constants
    used = {node.target for node in trace.graph.nodes if node.op == "get_attr"}
    assert {n for n, _ in model.named_parameters() if n.endswith("attention_biases")} <= used


def test_is_atomic() -> None:
    class Own(nn.Linear):
        pass

    assert is_atomic("a", Own(1, 1))
    assert is_atomic("a", nn.LayerNorm(2))
    assert not is_atomic("a", nn.MultiheadAttention(2, 1))
    assert not is_atomic("a", nn.Sequential(nn.Linear(1, 1)))


def test_an_error_names_the_module_and_the_line() -> None:
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(x.numpy() + 1)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    line = Inner.forward.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError, match=rf"cannot trace inner \(Inner\): .*:{line}: .*NumPy"):
        trace_model(Outer(), (torch.ones(1),))


def test_an_error_of_the_model_is_named_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    with pytest.raises(CaptureError, match="RuntimeError"):
        trace_model(model, (torch.ones(1, 4),))


def test_trace_is_exported() -> None:
    assert isinstance(trace_model(nn.ReLU(), (torch.ones(1),)), Trace)
