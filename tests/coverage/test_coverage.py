"""A part of the coverage sweep, and proof that its checks can fail; ``make coverage`` does all."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from surgery.sources import Example
from tests.coverage import differences, reference, report
from tests.coverage.cases import FAST, MODELS, TIMM, modules
from tests.coverage.examine import examine
from tests.coverage.run import PAGE, RESULTS
from tests.sweep.measure import Failure, still

pytestmark = [
    # torchao and diffusers announce their own changes while they are imported.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize("name", FAST)
def test_a_model(name: str) -> None:
    result = examine(MODELS[name])
    assert {check: cause for check, cause in result.outcome.items() if cause != "ok"} == {}
    assert bool(result.refused) == (result.findings["residuals"] == 0)


def test_the_part_has_models_of_each_library() -> None:
    assert {MODELS[name].library for name in FAST} == set(report.LIBRARIES)


def test_every_timm_module_has_a_model() -> None:
    assert {module: name in modules()[module] for module, (name, _) in TIMM.items()} == (
        dict.fromkeys(modules(), True)
    )


def test_there_are_as_many_architectures_as_promised() -> None:
    libraries = [model.library for model in MODELS.values()]
    assert libraries.count("transformers") >= 25
    assert libraries.count("diffusers") >= 13


def test_the_page_shows_the_results_of_record() -> None:
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert record["models"]
    assert PAGE.read_text(encoding="utf-8") == report.page(record)


# -- the reference -----------------------------------------------------------------------------


class Chain(nn.Module):
    """Three blocks that take their state second and give it out first, beside something else."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4).double() for _ in range(3))
        self.between = 1.0
        for block in self.blocks:
            block.register_forward_hook(lambda *call: (call[2], "beside"))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x * self.between if self.between != 1.0 else x)
        return x


BLOCKS = ("blocks.0", "blocks.1", "blocks.2")
WEIGHTS = torch.tensor([[0.3, 0, 0], [-0.2, 0.7, 0], [0.5, 0.1, -0.4]], dtype=torch.float64)


@pytest.mark.parametrize("between", [1.0, 0.5])
def test_the_reference_is_the_formula(between: float) -> None:
    model = Chain()
    model.between = between
    x = torch.randn(2, 4, dtype=torch.float64)
    states: list[Tensor] = []
    expected = x
    for k, block in enumerate(model.blocks):
        states.append(expected * between)
        mixed = sum((WEIGHTS[k, j] * states[j] for j in range(k + 1)), torch.zeros(()))
        expected = states[-1] @ block.weight.T + block.bias + mixed
    with reference.mixing(model, Example((x,)), [reference.Stack(BLOCKS, WEIGHTS)]):
        found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)  # another order of sums


def test_the_reference_leaves_the_model_as_it_was() -> None:
    model, x = Chain(), torch.randn(2, 4, dtype=torch.float64)
    before = still(model, Example((x,)))
    with reference.mixing(model, Example((x,)), [reference.Stack(BLOCKS, WEIGHTS)]):
        assert not torch.equal(still(model, Example((x,)))[0], before[0])
    assert torch.equal(still(model, Example((x,)))[0], before[0])


def test_the_reference_knows_a_block_that_is_used_twice() -> None:
    model = Chain()
    model.blocks[2] = model.blocks[0]
    x = torch.randn(2, 4, dtype=torch.float64)
    states, state = list[Tensor](), x
    for k, block in enumerate(model.blocks):
        states.append(state)
        mixed = sum((WEIGHTS[k, j] * states[j] for j in range(k + 1)), torch.zeros(()))
        state = state @ block.weight.T + block.bias + mixed
    stack = reference.Stack(("blocks.0", "blocks.1", "blocks.0"), WEIGHTS)
    with reference.mixing(model, Example((x,)), [stack]):
        found = model(x)
    torch.testing.assert_close(found, state, rtol=1e-14, atol=1e-14)  # another order of sums


def test_the_reference_wants_the_blocks_in_order() -> None:
    model, example = Chain(), Example((torch.randn(2, 4, dtype=torch.float64),))
    backwards = reference.Stack(BLOCKS[::-1], WEIGHTS)
    with (
        pytest.raises(Failure, match="out of order"),
        reference.mixing(model, example, [backwards]),
    ):
        model(*example.args)


# -- finite differences ------------------------------------------------------------------------


def _loss_of(coefficients: Tensor) -> Tensor:
    return (coefficients.sin() * torch.logspace(-3, 0, len(coefficients))).sum()


def test_right_gradients_agree_with_differences() -> None:
    at = torch.linspace(-1, 1, 50, dtype=torch.float64, requires_grad=True)
    _loss_of(at).backward()
    worst, wrong = differences.compare(lambda: float(_loss_of(at.detach())), [at], 1.0)
    assert (wrong, worst < 1e-6) == ([], True)


@pytest.mark.parametrize("index", [0, 17, 49])
@pytest.mark.parametrize("factor", [0.0, 1.3, -1.0])
def test_one_wrong_gradient_among_many_is_found(index: int, factor: float) -> None:
    at = torch.linspace(-1, 1, 50, dtype=torch.float64, requires_grad=True)
    _loss_of(at).backward()
    assert at.grad is not None
    at.grad[index] *= factor
    _, wrong = differences.compare(lambda: float(_loss_of(at.detach())), [at], 1.0)
    assert any(index in mismatch.indices for mismatch in wrong)


def test_differences_leave_the_coefficients_as_they_were() -> None:
    at = torch.randn(5, dtype=torch.float64, requires_grad=True)
    before = at.detach().clone()
    _loss_of(at).backward()
    differences.compare(lambda: float(_loss_of(at.detach())), [at], 1.0)
    assert torch.equal(at.detach(), before)
