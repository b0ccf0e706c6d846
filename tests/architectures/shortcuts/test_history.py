"""The mixing of states: its sums, its gradients in every way autograd can be asked, its errors."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from architectures.shortcuts import Ancre, DenseFormer, History, Mixer, Static, weighted_sum
from tests.architectures.shortcuts.toys import Block, Stack, mixed, perturb, plain

WIDTH = 4
DOUBLE = torch.float64
#: Sums of at most 48 float64 terms of order one, in another order.
CLOSE: dict[str, float] = {"rtol": 1e-10, "atol": 1e-11}

MIXER: dict[str, Callable[[int], Mixer]] = {
    "ancre": lambda K: Mixer(Ancre(K, temperature=0.1)),
    "ancre identity, replace": lambda K: Mixer(Ancre(K, init="identity"), diagonal=1.0),
    "ancre outgoing": lambda K: Mixer(Ancre(K, normalization="outgoing"), diagonal=-1.0, shown=1.0),
    "static": lambda K: Mixer(Static(K, edges=f"0:2, 1:{K}=0.5")),
    "denseformer": lambda K: Mixer(DenseFormer(K)),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pair(name: str, K: int = 5) -> tuple[Stack, Stack, Tensor]:
    """Ours, the same by plain autograd, and an input."""
    ours = Stack(MIXER[name](K), WIDTH).double()
    perturb(ours)
    theirs = copy.deepcopy(ours)
    theirs.plain = True
    return ours, theirs, torch.randn(3, WIDTH, dtype=DOUBLE, requires_grad=True)


def wanted(stack: Stack, x: Tensor) -> list[Tensor]:
    return [x, *(p for p in stack.parameters() if p.requires_grad)]


def loss(output: Tensor) -> Tensor:
    return output.square().sum()


def same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(
            torch.zeros(()).double() if one is None else one,
            torch.zeros(()).double() if other is None else other,
            **CLOSE,
        )


def eager(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(loss(stack(x)), wanted(stack, x))


def retained(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    total = loss(stack(x))
    torch.autograd.grad(total, wanted(stack, x), retain_graph=True)
    return torch.autograd.grad(3 * total, wanted(stack, x))


def two_forwards(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    first, second = stack(x), stack(2 * x)
    return torch.autograd.grad(loss(first) + loss(second * first), wanted(stack, x))


def double_backward(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    first = torch.autograd.grad(loss(stack(x)), wanted(stack, x), create_graph=True)
    return torch.autograd.grad(sum(loss(each) for each in first), wanted(stack, x))


def batched(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    seeds = torch.linspace(-1, 1, 4 * x.numel(), dtype=DOUBLE).view(4, *x.shape)
    return torch.autograd.grad(stack(x), wanted(stack, x), seeds, is_grads_batched=True)


def not_reentrant(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    output = checkpoint(stack, x, use_reentrant=False)
    return torch.autograd.grad(loss(output), wanted(stack, x))


def reentrant(stack: Stack, x: Tensor) -> Sequence[Tensor | None]:
    leaves = wanted(stack, x)
    for leaf in leaves:
        leaf.grad = None
    loss(checkpoint(stack, x, use_reentrant=True)).backward()
    return [leaf.grad for leaf in leaves]


def checkpointed_blocks(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    blocks = [
        lambda state, block=block: checkpoint(block, state, use_reentrant=False)
        for block in stack.blocks
    ]
    run = plain if stack.plain else mixed
    output = run(blocks, stack.mixer(), stack.mixer.support, x)[-1]
    return torch.autograd.grad(loss(output), wanted(stack, x))


def every_state_is_an_output(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    run = plain if stack.plain else mixed
    states = run(stack.blocks, stack.mixer(), stack.mixer.support, x)
    return torch.autograd.grad(sum(loss(state) for state in states), wanted(stack, x))


def of_the_states(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    run = plain if stack.plain else mixed
    states = run(stack.blocks, stack.mixer(), stack.mixer.support, x)
    return torch.autograd.grad(loss(states[-1]), states)


def coefficients_only(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    leaves = [x, *stack.mixer.parameters()]
    return torch.autograd.grad(loss(stack(x)), leaves[-1:])


def from_the_middle(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    """Two backward passes over parts of one graph; the first leaves gradients that went unread."""
    run = plain if stack.plain else mixed
    states = run(stack.blocks, stack.mixer(), stack.mixer.support, x)
    torch.autograd.grad(loss(states[-1]), [states[-2]], retain_graph=True)
    return torch.autograd.grad(loss(states[2]), [x, *stack.blocks[0].parameters()])


def without_input(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(loss(stack(x.detach())), wanted(stack, x)[1:])


def frozen_coefficients(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    stack.mixer.requires_grad_(False)
    return eager(stack, x)


def frozen_blocks(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    stack.blocks.requires_grad_(False)
    return eager(stack, x)


def first_blocks_without_grad(stack: Stack, x: Tensor) -> Sequence[Tensor | None]:
    """Some states are registered where autograd is off: they are pushed to, not pulled."""
    blocks = [block if i else torch.no_grad()(block) for i, block in enumerate(stack.blocks)]
    weights, support = stack.mixer(), stack.mixer.support
    leaves = [p for p in wanted(stack, x)[1:] if not any(p is q for q in blocks_of(stack, 1))]
    if stack.plain:
        output = plain(blocks, weights, support, x.detach())[-1]
        return torch.autograd.grad(loss(output), leaves, allow_unused=True)
    history = History(weights, support)
    with torch.no_grad():
        state = history.enter(x)
    state = history.leave(blocks[0](state))
    for block in blocks[1:]:
        state = history.leave(block(history.enter(state)))
    return torch.autograd.grad(loss(state), leaves, allow_unused=True)


def blocks_of(stack: Stack, count: int) -> list[Tensor]:
    return [p for block in list(stack.blocks)[:count] for p in block.parameters()]


def by_torch_func(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return loss(functional_call(stack, parameters, (x,)))

    return [*grad(call)(dict(stack.named_parameters()), x.detach()).values()]


def by_hessian(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    return [hessian(lambda x: loss(stack(x)))(x.detach())]


def by_vmap(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    return [vmap(stack)(x.detach())]


def forward_mode(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
        tangent: Any = forward_ad.unpack_dual(stack(dual)).tangent
        return [tangent.clone()]


def by_make_fx(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    traced = make_fx(lambda x: torch.autograd.grad(loss(stack(x)), [x])[0])(x)
    return [traced(2 * x.detach().requires_grad_())]


def exported(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    program = torch.export.export(stack, (x.detach(),))
    return [program.module()(2 * x.detach())]


def inference(stack: Stack, x: Tensor) -> Sequence[Tensor]:
    with torch.inference_mode():
        return [stack(x.detach())]


WAYS = [
    eager,
    retained,
    two_forwards,
    double_backward,
    batched,
    not_reentrant,
    reentrant,
    checkpointed_blocks,
    every_state_is_an_output,
    of_the_states,
    coefficients_only,
    from_the_middle,
    without_input,
    frozen_coefficients,
    frozen_blocks,
    first_blocks_without_grad,
    by_torch_func,
    by_hessian,
    by_vmap,
    forward_mode,
    by_make_fx,
    exported,
    inference,
]


# torch's own decompositions for forward mode are scripted when first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MIXER)
def test_equals_plain_autograd(way: Callable[[Stack, Tensor], Any], name: str) -> None:
    ours, theirs, x = pair(name)
    same(way(ours, x), way(theirs, x))


@pytest.mark.parametrize("name", MIXER)
def test_forward_equals_the_formula(name: str) -> None:
    ours, theirs, x = pair(name)
    assert not torch.equal(ours(x), ours.blocks[0](x))
    same([ours(x)], [theirs(x)])
    same([pickle.loads(pickle.dumps(ours))(x)], [theirs(x)])  # noqa: S301


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[list[int]], list[bool], int]:
    """Support, what is frozen (x, coefficients, one per block), and a seed."""
    K = draw(st.integers(1, 5))
    support = [[j for j in range(k + 1) if draw(st.booleans())] for k in range(K)]
    frozen = draw(st.lists(st.booleans(), min_size=K + 2, max_size=K + 2))
    return support, frozen, draw(st.integers(0, 2**16))


@settings(deadline=None, max_examples=60)
@given(networks(), st.sampled_from(["once", "retain", "double", "inputs"]))
def test_any_support_and_any_frozen_part(
    network: tuple[list[list[int]], list[bool], int], how: str
) -> None:
    support, frozen, number = network
    torch.manual_seed(number)
    K = len(support)
    blocks = nn.ModuleList([Block(WIDTH) for _ in range(K)]).double()
    x = torch.randn(2, WIDTH, dtype=DOUBLE, requires_grad=not frozen[0])
    weights = torch.randn(K, K, dtype=DOUBLE, requires_grad=not frozen[1])
    for block, still in zip(blocks, frozen[2:], strict=True):
        block.requires_grad_(not still)
    leaves = [t for t in (x, weights, *blocks.parameters()) if t.requires_grad]

    def gradients(run: Callable[..., list[Tensor]]) -> Sequence[Tensor | None]:
        states = run(blocks, weights, support, x)
        total = loss(states[-1]) + states[K // 2].sum()
        if not total.requires_grad:
            return [total]
        if how == "inputs":
            return torch.autograd.grad(total, leaves[:1], allow_unused=True)
        first = torch.autograd.grad(
            total, leaves, allow_unused=True, retain_graph=True, create_graph=how == "double"
        )
        if how == "once":
            return first
        if how == "retain":
            return torch.autograd.grad(2 * total, leaves, allow_unused=True)
        terms = [loss(g) for g in first if g is not None and g.requires_grad]
        if not terms:
            return first
        return torch.autograd.grad(sum(terms), leaves, allow_unused=True)

    same(gradients(mixed), gradients(plain))


def test_gradcheck() -> None:
    K = 3
    ours, _, x = pair("ancre", K)

    def call(x: Tensor, weights: Tensor) -> Tensor:
        return mixed(ours.blocks, weights, [[0], [0], [0, 2]], x)[-1]

    weights = torch.randn(K, K, dtype=DOUBLE, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x, weights))
    assert torch.autograd.gradgradcheck(call, (x, weights))


def test_weighted_sum_gradcheck() -> None:
    base, *states = (torch.randn(2, 3, dtype=DOUBLE, requires_grad=True) for _ in range(4))
    row = torch.randn(3, dtype=DOUBLE, requires_grad=True)

    def call(base: Tensor, row: Tensor, *states: Tensor) -> Tensor:
        return weighted_sum(base, row, states)

    assert torch.autograd.gradcheck(call, (base, row, *states))
    assert torch.autograd.gradgradcheck(call, (base, row, *states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalization", ["incoming", "outgoing"])
@pytest.mark.parametrize("trains", [True, False])
def test_identity_is_exact_at_depth_48(
    dtype: torch.dtype, normalization: Any, trains: bool
) -> None:
    K = 48
    stack = Stack(Mixer(Ancre(K, init="identity", normalization=normalization)), 16).to(dtype)
    perturb(stack.blocks, 0.1)
    x = torch.randn(2, 16, dtype=dtype)
    with torch.set_grad_enabled(trains):
        states = mixed(stack.blocks, stack.mixer(), stack.mixer.support, x)
    expected = [x]
    for block in stack.blocks:
        expected.append(block(expected[-1]))
    assert expected[-1].isfinite().all()
    assert all(torch.equal(one, other) for one, other in zip(states, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_replace_with_one_on_the_current_state_is_torchs_addition(dtype: torch.dtype) -> None:
    states = [torch.randn(3, 50, dtype=dtype) * 10 for _ in range(4)]
    branch = torch.randn(3, 50, dtype=dtype)
    row = torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert torch.equal(weighted_sum(branch, row, states), branch + states[-1])


@pytest.mark.parametrize("init", ["uniform", "identity"])
@pytest.mark.parametrize("normalization", ["incoming", "outgoing"])
def test_every_coefficient_of_a_real_softmax_has_a_gradient(init: Any, normalization: Any) -> None:
    stack = Stack(Mixer(Ancre(6, init=init, normalization=normalization)), WIDTH)
    loss(stack(torch.randn(3, WIDTH))).backward()
    gradient = stack.mixer.topology.logits.grad
    assert gradient.count_nonzero() == len(gradient) - 1


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("base", DTYPES)
@pytest.mark.parametrize("state", DTYPES)
def test_mixed_dtypes_promote_as_torch_does(base: torch.dtype, state: torch.dtype) -> None:
    y = torch.randn(4, 5).to(base).requires_grad_()
    x = torch.randn(4, 5).to(state).requires_grad_()
    weights = torch.tensor([[0.3]], requires_grad=True)

    def gradients(output: Tensor) -> Sequence[Tensor]:
        return [output, *torch.autograd.grad(output.sum(), (y, x, weights))]

    history = History(weights, [[0]])
    history.enter(x)
    pulled = gradients(history.leave(y))
    pushed = gradients(weighted_sum(y, weights[0], [x]))
    for output, grad_y, grad_x, grad_weights in (pulled, pushed):
        assert output.dtype == (y + x).dtype
        assert (grad_y.dtype, grad_x.dtype) == (base, state)
        exact = y.double() + weights.double() * x.double()
        # One rounding of the sum to the narrower dtype, and float32 before it.
        unit = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)
        torch.testing.assert_close(output.double(), exact, rtol=unit, atol=unit)
        torch.testing.assert_close(
            grad_weights[0, 0].double(), x.double().sum(), rtol=1e-6, atol=1e-6
        )


def test_sums_are_rounded_once() -> None:
    """Ninety-six states whose bfloat16 partial sums would each lose what is added."""
    base = torch.full((8,), 256.0, dtype=torch.bfloat16)
    states = [torch.full((8,), 0.5, dtype=torch.bfloat16)] * 96
    total = weighted_sum(base, torch.ones(96), states)
    assert torch.equal(total, torch.full((8,), 304.0, dtype=torch.bfloat16))


def test_the_block_gets_the_state_and_its_gradient_is_that_of_the_block() -> None:
    """A hook on what the block was given sees what flows through the block, nothing else."""
    ours, _, x = pair("ancre", 2)
    history = History(ours.mixer(), ours.mixer.support)
    given_to_block = history.enter(x)
    assert given_to_block.data_ptr() == x.data_ptr()
    y = ours.blocks[0](given_to_block)
    output = history.leave(y)
    (through_block,) = torch.autograd.grad(loss(output), given_to_block, retain_graph=True)
    (through_y,) = torch.autograd.grad(loss(output), y, retain_graph=True)
    (expected,) = torch.autograd.grad(y, given_to_block, through_y)
    same([through_block], [expected])


def test_threads_share_one_graph() -> None:
    ours, theirs, x = pair("ancre")
    expected, total = eager(theirs, x), loss(ours(x))
    wrong: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                same(torch.autograd.grad(total, wanted(ours, x), retain_graph=True), expected)
        except BaseException as error:  # noqa: BLE001 - reported by the test
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_skipped_site_is_not_mixed() -> None:
    ours, _, x = pair("ancre", 4)
    weights = ours.mixer().detach()
    history = History(weights, ours.mixer.support)
    first = history.leave(ours.blocks[0](history.enter(x, 0)))
    third = history.leave(ours.blocks[2](history.enter(first, 2)))
    expected = ours.blocks[2](first) + weights[2, 0] * x + weights[2, 2] * first
    same([third], [expected])


def test_states_are_dropped_after_their_last_use() -> None:
    weights = torch.ones(3, 3).tril()
    history = History(weights, [[0], [0], [2]])
    alive: list[weakref.ref[Tensor]] = []
    for _ in range(3):
        state = torch.randn(4)
        alive.append(weakref.ref(state))
        history.enter(state)
        history.leave(torch.randn(4))
        del state
    # State 1 is in no sum, and state 0 in none after site 1.
    assert [each() is None for each in alive] == [True, True, True]


@pytest.mark.parametrize("way", [eager, from_the_middle, coefficients_only, double_backward])
def test_a_backward_leaves_nothing_behind(way: Callable[[Stack, Tensor], Any]) -> None:
    ours, _, x = pair("ancre")
    gc.collect()
    gc.disable()
    try:
        outputs: list[weakref.ref[Tensor]] = []
        hook = ours.blocks[3].register_forward_hook(
            lambda _module, _args, output: outputs.append(weakref.ref(output))
        )
        way(ours, x)
        hook.remove()
        assert outputs
        if way is double_backward:  # a graph of a graph is a cycle, in torch itself too
            gc.collect()
        assert all(each() is None for each in outputs)
    finally:
        gc.enable()


def test_gradients_put_aside_go_when_the_backward_ends() -> None:
    ours, _, x = pair("ancre")
    history = History(ours.mixer(), ours.mixer.support)
    state = x
    for block in ours.blocks:
        state = history.leave(block(history.enter(state)))
    aside: Any = history._aside
    torch.autograd.grad(loss(state), ours.blocks[4].linear.weight, retain_graph=True)
    assert aside._of == {}


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_a_block_that_writes_into_its_input_is_noticed(grad_enabled: bool) -> None:
    ours, _, x = pair("ancre")
    history = History(ours.mixer(), ours.mixer.support)
    with torch.set_grad_enabled(grad_enabled):
        entered = history.enter(x * 1.0)
        entered += 1.0
        with pytest.raises(RuntimeError, match="state 0 was modified in place between"):
            history.leave(entered)


def test_a_gradient_that_is_written_into_is_noticed() -> None:
    ours, _, x = pair("ancre")
    history = History(ours.mixer(), ours.mixer.support)
    y = ours.blocks[0](history.enter(x))
    y.register_hook(lambda gradient: gradient.mul_(2.0))
    output = history.leave(y)
    with pytest.raises(RuntimeError, match="after site 0 was modified in place"):
        torch.autograd.grad(loss(output), x)


def test_order_of_sites_is_kept() -> None:
    history = History(torch.ones(2, 2).tril(), [[0], [0, 1]])
    x = torch.zeros(3)
    with pytest.raises(RuntimeError, match="cannot leave a site"):
        history.leave(x)
    history.enter(x)
    with pytest.raises(RuntimeError, match="site 0 was entered last and not left yet"):
        history.enter(x)
    history.leave(x)
    with pytest.raises(RuntimeError, match="cannot enter site 0 of 2"):
        history.enter(x, 0)
    history.enter(x)
    history.leave(x)
    with pytest.raises(RuntimeError, match="cannot enter site 2 of 2"):
        history.enter(x)


def test_shapes_must_agree() -> None:
    history = History(torch.ones(1, 1), [[0]])
    history.enter(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"state 0 has shape \(3, 2\).* shape \(2, 2\)"):
        history.leave(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"1 states and coefficients of shape \(2,\)"):
        weighted_sum(torch.zeros(2), torch.ones(2), [torch.zeros(2)])
