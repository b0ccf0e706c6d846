"""Every way a weight can be adapted computes what the module with the changed weight computes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import LowRank, Rule, adapters
from tests.passes.layers import KINDS, Kind, build

RANK, ALPHA = 2, 3.0
SCALE = ALPHA / RANK
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def adapt(module: nn.Module, **options: Any) -> surgery.Plan:
    plan = surgery.plan(module, Rule(LowRank(rank=RANK, alpha=ALPHA, **options)))
    plan.apply()
    return plan


def randomise(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in adapters.parameters(module):
            tensor.normal_()


def run(module: nn.Module, x: Tensor, training: bool, grad: bool) -> Tensor:
    module.train(training)
    with torch.set_grad_enabled(grad):
        return module(x)


def factors(module: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """A and B beside the layer or parameter at a path."""
    tensors = dict(module.named_parameters())
    holder, _, name = path.rpartition(".")
    layer, bare = f"{path}.lowrank.default", f"{holder}.lowrank.{name}.default"
    for prefix in (layer.removeprefix("."), bare.removeprefix(".")):
        if f"{prefix}.lora_A" in tensors:
            return tensors[f"{prefix}.lora_A"], tensors[f"{prefix}.lora_B"]
    raise AssertionError(f"no adapter at {path!r} among {list(tensors)}")


def weight_of(module: nn.Module, path: str) -> nn.Parameter:
    """The stock weight of a layer, or the parameter itself."""
    tensors = dict(module.named_parameters())
    if path in tensors:
        return tensors[path]
    prefix = f"{path}." if path else ""
    names = ("weight", "kernel", "parametrizations.weight.original")
    return next(tensors[prefix + name] for name in names if prefix + name in tensors)


def change(kind: Kind, A: Tensor, B: Tensor, weight: Tensor) -> Tensor:
    """s B A in the layout of the weight."""
    delta = SCALE * (B @ A)
    return delta.T if kind.transposed else delta.reshape(weight.shape)


def changed_by_hand(kind: Kind, stock: nn.Module, adapted: nn.Module) -> nn.Module:
    """The stock module with W + s B A written into its weights."""
    reference = copy.deepcopy(stock)
    with torch.no_grad():
        for path in kind.hosts:
            weight = weight_of(reference, path)
            delta = change(kind, *factors(adapted, path), weight)
            # A parametrised weight is twice its original, and the adapter stands beside the weight.
            weight += delta / 2 if hasattr(reference, "parametrizations") else delta
    return reference


@pytest.mark.parametrize("name", KINDS)
def test_hosts_are_the_expected_ones(name: str) -> None:
    module, _ = build(name)
    plan = adapt(module)
    found = {edit.site: edit.payload["places"][0][2] for edit in plan.edits}
    assert found == KINDS[name].hosts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_exact_at_init(name: str, dtype: torch.dtype) -> None:
    kind = KINDS[name]
    if dtype in (torch.bfloat16, torch.float16) and not kind.half:
        pytest.skip("the stock layer has no half-precision kernel on the CPU")
    for dropout in (0.0, 0.3) if kind.dropout else (0.0,):
        module, x = build(name, dtype)
        modes = [(training, grad) for training in (True, False) for grad in (True, False)]
        before = [run(module, x, *mode) for mode in modes]
        adapt(module, dropout=dropout)
        for mode, expected in zip(modes, before, strict=True):
            assert torch.equal(run(module, x, *mode), expected), (dropout, mode)


@pytest.mark.parametrize("name", KINDS)
def test_equals_the_module_with_changed_weights(name: str) -> None:
    kind = KINDS[name]
    module, x = build(name, torch.float64)
    stock = copy.deepcopy(module)
    before = module(x)
    adapt(module)
    randomise(module)
    reference = changed_by_hand(kind, stock, module)
    if x.is_floating_point():
        x.requires_grad_()
    output, expected = module(x), reference(x)
    # Sums of at most 100 products of numbers of size 10 in float64.
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    assert x.numel() == 0 or (output - before).abs().max() > 1e-3

    probe = torch.randn_like(output)
    (output * probe).sum().backward()
    input_grad = x.grad
    x.grad = None
    (expected * probe).sum().backward()
    if x.is_floating_point():
        torch.testing.assert_close(input_grad, x.grad, rtol=1e-10, atol=1e-10)
    for path in kind.hosts:
        A, B = factors(module, path)
        weight = weight_of(reference, path)
        assert weight.grad is not None
        grad = weight.grad / 2 if hasattr(reference, "parametrizations") else weight.grad
        grad = grad.T if kind.transposed else grad
        grad = grad if kind.stacked else grad.reshape(B.shape[-2], A.shape[-1])
        torch.testing.assert_close(A.grad, SCALE * (B.mT @ grad), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(B.grad, SCALE * (grad @ A.mT), rtol=1e-10, atol=1e-10)


def test_padding_row_is_not_trained() -> None:
    module, _ = build("embedding")
    adapt(module)
    randomise(module)
    module(torch.tensor([3, 3, 5])).sum().backward()
    _, B = factors(module, "")
    assert B.grad is not None
    assert torch.equal(B.grad[3], torch.zeros(RANK))
    assert B.grad[5].abs().min() > 0


@pytest.mark.parametrize("name", [name for name in KINDS if name != "parametrised"])
def test_merged_equals_unmerged_and_comes_back(name: str) -> None:
    module, x = build(name, torch.float64)
    adapt(module)
    randomise(module)
    expected = module(x)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    adapters.merge(module)
    torch.testing.assert_close(module(x), expected, rtol=1e-10, atol=1e-10)
    for path in KINDS[name].hosts:
        assert not torch.equal(weight_of(module, path), before[_key(module, path)])
    adapters.unmerge(module)
    assert torch.equal(module(x), expected)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def _key(module: nn.Module, path: str) -> str:
    wanted = weight_of(module, path)
    return next(name for name, tensor in module.named_parameters() if tensor is wanted)


@pytest.mark.parametrize("name", KINDS)
def test_identity_keys_copies_and_undo(name: str) -> None:
    module, x = build(name)
    before = module(x)
    classes = {path: type(each) for path, each in module.named_modules()}
    stock = {key: (value, value.data_ptr()) for key, value in module.named_parameters()}
    plan = adapt(module)
    parameters = dict(module.named_parameters())
    for key, (value, pointer) in stock.items():
        assert parameters[key] is value
        assert value.data_ptr() == pointer
        assert not value.requires_grad
    added = [key for key in parameters if key not in stock]
    assert sorted(added) == sorted(key for edit in plan.edits for key in edit.adds)
    assert set(module.state_dict()) == {*stock, *added}
    for path, cls in classes.items():
        assert isinstance(module.get_submodule(path), cls)

    randomise(module)
    changed = module(x)
    copied = copy.deepcopy(module)
    assert torch.equal(copied(x), changed)
    if name != "parametrised":  # torch refuses to pickle parametrised modules
        assert torch.equal(pickle.loads(pickle.dumps(module))(x), changed)  # noqa: S301
    randomise(copied)
    assert torch.equal(module(x), changed)

    surgery.undo(module)
    assert torch.equal(module(x), before)
    assert {path: type(each) for path, each in module.named_modules()} == classes
    assert dict(module.named_parameters()).keys() == stock.keys()
    assert all(value.requires_grad for value in module.parameters())
    assert "_surgery_record" not in vars(module)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.dropout])
def test_branch_that_could_drop_computes_the_same(name: str) -> None:
    """With a probability that never strikes, for layers that go another way without dropout."""
    kind = KINDS[name]
    module, x = build(name, torch.float64)
    stock = copy.deepcopy(module)
    adapt(module, dropout=1e-15)
    randomise(module)
    reference = changed_by_hand(kind, stock, module)
    torch.testing.assert_close(module.train()(x), reference(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.dropout])
def test_dropout_drops_and_keeps_the_mean(name: str) -> None:
    module, x = build(name, torch.float64)
    if x.numel() == 0:
        pytest.skip("nothing to drop")
    adapt(module, dropout=0.5)
    randomise(module)
    expected = module.eval()(x)
    module.train()
    with torch.no_grad():
        draws = torch.stack([module(x) for _ in range(800)])
    assert not torch.equal(draws[0], draws[1])
    # Five standard errors of the mean of 800 draws; inverted dropout is unbiased.
    error = 5 * draws.std(0) / 800**0.5 + 1e-9
    assert ((draws.mean(0) - expected).abs() <= error).float().mean() > 0.98


@pytest.mark.parametrize("name", KINDS)
def test_wider_adapter_beside_half_precision(name: str) -> None:
    if not KINDS[name].half:
        pytest.skip("the stock layer has no half-precision kernel on the CPU")
    module, x = build(name, torch.bfloat16)
    before = module(x)
    adapt(module, dtype="float32")
    assert all(tensor.dtype == torch.float32 for tensor in adapters.parameters(module))
    output = module(x)
    assert torch.equal(output, before)
    randomise(module)
    assert module(x).dtype == torch.bfloat16
    module(x).float().sum().backward()
    assert all(tensor.grad is not None for tensor in adapters.parameters(module))


@pytest.mark.parametrize("name", KINDS)
def test_autocast(name: str) -> None:
    module, x = build(name)
    with torch.autocast("cpu", torch.bfloat16):
        before = module(x)
    adapt(module)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), before)
    randomise(module)
    exact = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = module(x)
    assert output.dtype == before.dtype
    # bfloat16 has 8 bits: 2% of the largest output allows for a handful of roundings.
    scale = exact.abs().max().item() if exact.numel() else 0.0
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.03 * scale)
