"""Adapters in whole models of three libraries: exact at init, and right when they are not zero."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import surgery
from surgery import LowRank, Path, Rule, Type, adapters
from surgery.sources import Example
from tests import zoo

pytestmark = [
    # torchao and diffusers announce their own changes while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

RANK, ALPHA = 2, 3.0
# Of each library the families that differ in how their weights are used.
MODELS = [
    "llama",
    "gemma3_text",
    "gpt2",
    "bert",
    "t5",
    "deberta-v2",
    "whisper",
    "UNet2DConditionModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "AutoencoderKL",
    "timm_vit",
    "timm_swin",
    "timm_convnext",
    "timm_eva",
    "timm_efficientnet",
]
MOE = ["mixtral", "qwen3_moe"]


def leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)


def run(model: nn.Module, example: Example) -> list[Tensor]:
    output = model(*example.args, **example.kwargs)
    return [leaf for leaf in leaves(output) if leaf.is_floating_point()]


def same(ones: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def build(name: str, dtype: torch.dtype) -> tuple[nn.Module, Example]:
    model, example = zoo.build(name)
    return model.to(dtype), example.to(dtype=dtype)


def randomise(model: nn.Module, scale: float = 0.1) -> None:
    with torch.no_grad():
        for tensor in adapters.parameters(model):
            tensor.normal_(0, scale)


def write_by_hand(model: nn.Module, adapted: nn.Module, plan: surgery.Plan) -> None:
    """Add s B A to the weights of the stock model, as the keys of the adapted one say."""
    tensors = dict(adapted.named_parameters())
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for edit in plan.edits:
            A, B = (tensors[name] for name in edit.adds)
            bare = edit.site in weights
            weight = weights[edit.site if bare else f"{edit.site}.weight"]
            delta = ALPHA / RANK * (B @ A)
            # GPT-2 stores some weights the other way round.
            transposed = not bare and type(model.get_submodule(edit.site)).__name__ == "Conv1D"
            weight += delta.T if transposed else delta.reshape(weight.shape)


@pytest.mark.parametrize("name", [*MODELS, *MOE])
def test_whole_model(name: str) -> None:
    # grouped_mm, which the experts' stock forward calls, knows no float64.
    dtype, tolerance = (torch.float32, 1e-4) if name in MOE else (torch.float64, 1e-10)
    model, example = build(name, dtype)
    stock = copy.deepcopy(model).requires_grad_(True)
    before = run(model, example)
    plan = surgery.plan(model, Rule(LowRank(rank=RANK, alpha=ALPHA)))
    plan.apply()
    assert same(run(model, example), before)

    randomise(model)
    write_by_hand(stock, model, plan)
    output = run(model, example)
    for one, other in zip(output, run(stock, example), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
    assert any((one - other).abs().max() > 1e-3 for one, other in zip(output, before, strict=True))

    sum(leaf.sum() for leaf in output if leaf.requires_grad).backward()  # type: ignore[union-attr]
    sum(leaf.sum() for leaf in run(stock, example) if leaf.requires_grad).backward()  # type: ignore[union-attr]
    reached = {n for n, p in stock.named_parameters() if p.grad is not None}
    for edit in plan.edits:
        weight = edit.site if edit.site in dict(stock.named_parameters()) else f"{edit.site}.weight"
        for added in edit.adds:
            assert (model.get_parameter(added).grad is not None) == (weight in reached), added

    surgery.undo(model)
    assert same(run(model, example), before)
    assert list(model.state_dict()) == list(stock.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "bert", "timm_vit"])
def test_half_precision_models_are_exact_in_both_modes(name: str, dtype: torch.dtype) -> None:
    model, example = build(name, dtype)

    def outputs(training: bool) -> list[Tensor]:
        torch.manual_seed(0)
        return run(model.train(training), example)

    before = [outputs(training) for training in (True, False)]
    surgery.apply(model, Rule(LowRank(rank=RANK)))
    for training, expected in zip((True, False), before, strict=True):
        assert same(outputs(training), expected)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MOE)
def test_experts_in_every_implementation(name: str, implementation: str) -> None:
    model, example = build(name, torch.float32)
    model.set_experts_implementation(implementation)  # type: ignore[operator]
    stock = copy.deepcopy(model)
    before = run(model, example)
    rule = Rule(LowRank(rank=RANK, alpha=ALPHA), where=Path("**.experts.*"))
    plan = surgery.plan(model, rule)
    assert {len(spec.shape) for edit in plan.edits for spec in edit.adds.values()} == {3}
    plan.apply()
    assert same(run(model, example), before)
    randomise(model)
    write_by_hand(stock, model, plan)
    for one, other in zip(run(model, example), run(stock, example), strict=True):
        # float32 through three layers.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_experts_are_formed_once_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.passes.hosts import weight as hosts

    model, example = build("mixtral", torch.float32)
    model.set_experts_implementation("eager")  # type: ignore[operator]
    surgery.apply(model, Rule(LowRank(rank=RANK), where=Path("**.experts.*")))
    formed = 0
    original = hosts.changed_weight

    def counted(*args: Any) -> Tensor:
        nonlocal formed
        formed += 1
        return original(*args)

    monkeypatch.setattr(hosts, "changed_weight", counted)
    run(model, example)
    assert formed == 2 * 3  # two weights in three layers, however many experts read them


def test_generate() -> None:
    model, example = build("llama", torch.float32)
    generate: Any = model.generate
    options = {"max_new_tokens": 8, "do_sample": False}
    before = generate(**example.kwargs, **options)
    surgery.apply(model, Rule(LowRank(rank=RANK), where=Type("Linear")))
    assert torch.equal(generate(**example.kwargs, **options), before)
    randomise(model, 0.5)
    changed = generate(**example.kwargs, **options)
    assert not torch.equal(changed, before)
    assert torch.equal(generate(**example.kwargs, use_cache=False, **options), changed)
    with adapters.disabled(model):
        assert torch.equal(generate(**example.kwargs, **options), before)
    adapters.merge(model)
    assert torch.equal(generate(**example.kwargs, **options), changed)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> dict[str, Tensor]:
        model, example = build(name, torch.float32)
        surgery.apply(model, Rule(LowRank(rank=RANK), where=Path("**.layers.**")))
        torch.manual_seed(0)
        randomise(model)
        if checkpointed:
            enable: Any = model.gradient_checkpointing_enable
            enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            require: Any = model.enable_input_require_grads
            require()
        model.train()
        # Two forwards before one backward.
        total = run(model, example)[0].sum() + run(model, example)[0].square().sum()
        total.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name_, gradient in plain.items():
        # The sums run in another order.
        torch.testing.assert_close(checkpointed[name_], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["timm_vit", "qwen3_moe"])
def test_compiles_whole(name: str) -> None:
    model, example = build(name, torch.float32)
    if hasattr(model, "config"):
        model.config.use_cache = False  # type: ignore[union-attr]
    surgery.apply(model, Rule(LowRank(rank=RANK)))
    randomise(model)
    torch._dynamo.reset()
    counters.clear()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    for one, other in zip(run(compiled, example), run(model, example), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    run(compiled, example)[0].sum().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    run(model, example)[0].sum().backward()
    for name_, gradient in found.items():
        expected = model.get_parameter(name_).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1


def test_layers_share_one_compilation() -> None:
    """Compiled layer by layer, twelve like layers are traced as often as in the stock model."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(torch.relu(self.up(x)))

    @torch.no_grad()
    def graphs(rules: list[Rule]) -> int:
        model = nn.Sequential(*(Block() for _ in range(12)))
        if rules:
            surgery.apply(model, rules)
        torch._dynamo.reset()
        counters.clear()
        for block in model:
            block.compile(backend="aot_eager", fullgraph=True)
        x = torch.randn(2, 8)
        model(x)
        if rules:
            with adapters.using(model, {"default": 0.5}):
                model(x)
        return counters["stats"]["unique_graphs"]

    assert graphs([]) == 1
    # One more for the mix of this call.
    assert graphs([Rule(LowRank(rank=2))]) == 2
    # Layers scaled in another way are another graph, each shared by its six layers.
    first, last = Path("{0,1,2,3,4,5}.*"), Path("{6,7,8,9,10,11}.*")
    halves = [
        Rule(LowRank(rank=2, alpha=4), where=first, id="first"),
        Rule(LowRank(rank=2, alpha=8), where=last, id="last"),
    ]
    assert graphs(halves) <= 4
