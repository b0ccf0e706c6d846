from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from surgery.optim import MODES, GaLoreAdamW, state_elements

TALL, WIDE, SQUARE = (9, 5), (5, 9), (6, 6)


class Reference:
    """GaLore in numpy, as the paper writes it, for one weight; moments through explicit powers."""

    def __init__(self, weight, *, rank, gap, scale, mode, lr, betas, eps, decay) -> None:
        self.weight = weight.astype(np.float64)
        self.rank, self.gap, self.scale, self.mode = rank, gap, scale, mode
        self.lr, self.betas, self.eps, self.decay = lr, betas, eps, decay
        self.step = 0
        self.history: list[np.ndarray] = []

    def project(self, gradient):
        m, n = gradient.shape
        right_first = self.mode == "right" or (self.mode, m >= n) in {
            ("std", True),
            ("reverse_std", False),
        }
        if self.step % self.gap == 0:
            u, _, vh = np.linalg.svd(gradient)
            left, right = u[:, : self.rank].copy(), vh[: self.rank].copy()
            for index in range(self.rank if self.step else 0):
                left[:, index] *= np.sign(left[:, index] @ self.left[:, index])
                right[index] *= np.sign(right[index] @ self.right[index])
            self.left, self.right = left, right
        if self.mode == "full":
            return self.left.T @ gradient @ self.right.T
        return gradient @ self.right.T if right_first else self.left.T @ gradient

    def back(self, low):
        if self.mode == "full":
            return self.left @ low @ self.right
        # The side that was projected is the one whose length is now the rank.
        if low.shape[0] == self.weight.shape[0]:
            return low @ self.right
        return self.left @ low

    def update(self, gradient) -> None:
        self.history.append(self.project(gradient))
        self.step += 1
        beta1, beta2 = self.betas
        ages = np.arange(self.step)[::-1]
        first = sum(beta1**age * low for age, low in zip(ages, self.history, strict=True))
        second = sum(beta2**age * low**2 for age, low in zip(ages, self.history, strict=True))
        first *= (1 - beta1) / (1 - beta1**self.step)
        second *= (1 - beta2) / (1 - beta2**self.step)
        normal = first / (np.sqrt(second) + self.eps)
        change = self.lr * (self.scale * self.back(normal) + self.decay * self.weight)
        self.weight = self.weight - change


def gradients(shape: tuple[int, int], count: int) -> list[torch.Tensor]:
    """Gradients with singular values far apart, so that their order is beyond doubt."""
    draw = torch.Generator().manual_seed(5)
    spread = torch.diag(2.0 ** -torch.arange(min(shape), dtype=torch.float64))
    found = []
    for _ in range(count):
        u, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), generator=draw).double())
        v, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), generator=draw).double())
        found.append(u @ spread @ v.mT)
    return found


def weight_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    draw = torch.Generator().manual_seed(7)
    return nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype))


def projected(*parameters: nn.Parameter, **options) -> GaLoreAdamW:
    kept = {key: options.pop(key) for key in ("rank", "gap", "scale", "mode") if key in options}
    return GaLoreAdamW([{"params": list(parameters), **kept}], **options)


# --- against the reference ------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_eight_steps_with_two_renewals_equal_the_reference(mode, shape, fused) -> None:
    settings = {"rank": 3, "gap": 3, "scale": 0.4, "mode": mode}
    weight = weight_of(shape)
    reference = Reference(
        weight.detach().numpy(), **settings, lr=0.1, betas=(0.8, 0.95), eps=1e-6, decay=0.3
    )
    optimizer = projected(
        weight, **settings, lr=0.1, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.3, fused=fused
    )
    for gradient in gradients(shape, 8):
        weight.grad = gradient
        optimizer.step()
        reference.update(gradient.numpy())
        # Float64 on both sides, with a margin for moments that cross zero. The first signs of the
        # singular vectors differ between the two libraries, and must not matter.
        np.testing.assert_allclose(weight.detach().numpy(), reference.weight, rtol=1e-9, atol=1e-10)
    assert optimizer.state[weight]["age"] == 2


def test_a_group_without_rank_is_torchs_adamw() -> None:
    ours, theirs = [weight_of(TALL), weight_of((7,))], [weight_of(TALL), weight_of((7,))]
    optimizer = GaLoreAdamW(ours, lr=0.05, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    adamw = torch.optim.AdamW(
        theirs, lr=0.05, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, fused=True
    )
    draw = torch.Generator().manual_seed(1)
    for _ in range(4):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=draw, dtype=torch.float64)
            other.grad = mine.grad.clone()
        optimizer.step()
        adamw.step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_full_rank_is_adamw_in_rotated_coordinates() -> None:
    weight, steps = weight_of(TALL), gradients(TALL, 6)
    options = {"lr": 0.1, "eps": 1e-8, "weight_decay": 0.2}
    optimizer = projected(weight, rank=5, gap=100, scale=1.0, **options)
    weight.grad = steps[0]
    start = weight.detach().clone()
    optimizer.step()
    rotation = optimizer.state[weight]["right"]
    turned = nn.Parameter(start @ rotation.mT)
    adamw = torch.optim.AdamW([turned], **options)
    for index, gradient in enumerate(steps):
        if index:
            weight.grad = gradient
            optimizer.step()
        turned.grad = gradient @ rotation.mT
        adamw.step()
        torch.testing.assert_close(weight @ rotation.mT, turned, rtol=1e-9, atol=1e-10)


def test_full_rank_is_adamw_itself_where_the_rotation_permutes() -> None:
    weight, other = weight_of(SQUARE), weight_of(SQUARE)
    optimizer = projected(weight, rank=6, gap=2, scale=1.0, lr=0.1, eps=1e-8)
    adamw = torch.optim.AdamW([other], lr=0.1, eps=1e-8, weight_decay=0.0)
    values = torch.tensor([3.0, 1.0, 6.0, 2.0, 5.0, 4.0], dtype=torch.float64)
    for step in range(5):
        weight.grad = torch.diag(values * (1 + step))
        other.grad = weight.grad.clone()
        optimizer.step()
        adamw.step()
        torch.testing.assert_close(weight, other, rtol=1e-9, atol=1e-9)


def test_bfloat16_weights_have_bfloat16_moments_and_bases() -> None:
    weight = weight_of((24, 16), torch.bfloat16)
    precise = nn.Parameter(weight.detach().double())
    options = {"rank": 4, "gap": 2, "lr": 1e-2}
    optimizer, exact = projected(weight, **options), projected(precise, **options)
    for gradient in gradients((24, 16), 5):
        weight.grad = gradient.bfloat16()
        precise.grad = weight.grad.double()
        optimizer.step()
        exact.step()
    state = optimizer.state[weight]
    assert {state[key].dtype for key in ("right", "exp_avg", "exp_avg_sq")} == {torch.bfloat16}
    # Five updates of at most 1e-2 · 0.25 · √4 each; bfloat16 keeps weights of order 1 to 2^-8.
    torch.testing.assert_close(weight.double(), precise, rtol=2**-7, atol=5e-3)


# --- what the update is made of -------------------------------------------------------------


def test_the_projection_sees_the_accumulated_gradient() -> None:
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    layers = [nn.Linear(5, 9, bias=False, dtype=torch.float64) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [projected(layer.weight, rank=2, lr=0.1) for layer in layers]
    (layers[0](inputs).square().sum() / 8).backward()
    for part in inputs.chunk(4):
        (layers[1](part).square().sum() / 8).backward()
    for optimizer in optimizers:
        optimizer.step()
    # The sum is made in another order, in float64.
    torch.testing.assert_close(layers[0].weight, layers[1].weight, rtol=1e-9, atol=1e-12)


def test_moments_are_kept_when_the_bases_change() -> None:
    weight, steps = weight_of(TALL), gradients(TALL, 3)
    optimizer = projected(weight, rank=2, gap=2, lr=0.1)
    for gradient in steps[:2]:
        weight.grad = gradient
        optimizer.step()
    before = copy.deepcopy(optimizer.state[weight])
    weight.grad = steps[2]
    optimizer.step()
    after = optimizer.state[weight]
    assert not torch.allclose(before["right"], after["right"])
    low = steps[2] @ after["right"].mT
    torch.testing.assert_close(after["exp_avg"], 0.9 * before["exp_avg"] + 0.1 * low)
    assert after["step"] == 3


def test_a_gradient_of_zeros_waits_for_one_that_has_singular_vectors() -> None:
    weight, steps = weight_of(TALL), gradients(TALL, 2)
    start = weight.detach().clone()
    optimizer = projected(weight, rank=2, lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight, start * 0.95, rtol=1e-15, atol=0)
    assert optimizer.state[weight] == {}
    weight.grad = steps[0]
    optimizer.step()
    state = optimizer.state[weight]
    _, _, vh = torch.linalg.svd(steps[0], full_matrices=False)
    assert torch.equal(state["right"], vh[:2])
    assert (state["age"], state["step"].item()) == (1, 1)


def test_a_due_renewal_waits_out_a_gradient_of_zeros() -> None:
    weight, steps = weight_of(TALL), gradients(TALL, 3)
    optimizer = projected(weight, rank=2, gap=1, lr=0.1)
    weight.grad = steps[0]
    optimizer.step()
    first = optimizer.state[weight]["right"].clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(optimizer.state[weight]["right"], first)
    weight.grad = steps[1]
    optimizer.step()
    assert not torch.allclose(optimizer.state[weight]["right"], first)


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    moved, still = weight_of(TALL), weight_of(TALL)
    optimizer = projected(moved, still, rank=2, lr=0.1, weight_decay=0.1)
    moved.grad = gradients(TALL, 1)[0]
    optimizer.step()
    assert torch.equal(still, weight_of(TALL))
    assert not torch.equal(moved, weight_of(TALL))


def test_a_closure_is_called_with_gradients_on() -> None:
    weight = weight_of(TALL)
    optimizer = projected(weight, rank=2, lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert second < first


# --- state ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_a_resumed_run_has_the_same_bits(mode, stop: int) -> None:
    def made() -> tuple[nn.Parameter, nn.Parameter, GaLoreAdamW]:
        weight, bias = weight_of(TALL, torch.float32), weight_of((5,), torch.float32)
        groups = [
            {"params": [weight], "rank": 2, "gap": 3, "mode": mode},
            {"params": [bias], "weight_decay": 0.1},
        ]
        return weight, bias, GaLoreAdamW(groups, lr=0.1)

    def step(weight, bias, optimizer, gradient) -> None:
        weight.grad, bias.grad = gradient.float(), gradient[0].float()
        optimizer.step()

    steps = gradients(TALL, 8)
    straight, resumed = made(), made()
    for gradient in steps:
        step(*straight, gradient)
    for gradient in steps[:stop]:
        step(*resumed, gradient)
    file = io.BytesIO()
    torch.save((resumed[0].data, resumed[1].data, resumed[2].state_dict()), file)
    file.seek(0)
    weight_data, bias_data, state = torch.load(file, weights_only=True)
    weight, bias, optimizer = made()
    weight.data.copy_(weight_data)
    bias.data.copy_(bias_data)
    optimizer.load_state_dict(state)
    for gradient in steps[stop:]:
        step(weight, bias, optimizer, gradient)
    assert torch.equal(weight, straight[0])
    assert torch.equal(bias, straight[1])


def test_a_copy_and_a_pickle_go_on_like_the_original() -> None:
    weight, steps = weight_of(TALL), gradients(TALL, 2)
    optimizer = projected(weight, rank=2, lr=0.1)
    weight.grad = steps[0]
    optimizer.step()
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):  # noqa: S301
        (copied,) = again.param_groups[0]["params"]
        copied.grad = steps[1]
        again.step()
        weight_now = weight.detach().clone()
        fresh = copy.deepcopy(optimizer)
        (fresh_weight,) = fresh.param_groups[0]["params"]
        fresh_weight.grad = steps[1]
        fresh.step()
        assert torch.equal(copied, fresh_weight)
        assert not torch.equal(copied, weight_now)


@pytest.mark.parametrize("mode", MODES)
def test_bytes_of_the_state_are_those_of_the_formula(mode) -> None:
    shapes = [(40, 16), (16, 40), (24, 24), (32, 4)]
    weights = [weight_of(shape, torch.float32) for shape in shapes]
    optimizer = projected(*weights, rank=8, mode=mode)
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    storages = [
        value.untyped_storage().nbytes()
        for weight in weights
        for value in optimizer.state[weight].values()
        if isinstance(value, torch.Tensor)
    ]
    elements = sum(state_elements(shape, 8, mode) for shape in shapes)
    assert sum(storages) == 4 * elements + 4 * len(shapes)  # a step count each


def test_less_memory_than_adamw() -> None:
    assert state_elements((1376, 512), 128) < 0.32 * 2 * 1376 * 512


# --- convergence ----------------------------------------------------------------------------


def learned(target: torch.Tensor, mode: str, gap: int) -> float:
    """Loss after 150 steps over the loss at the start, with rank 4."""
    inputs = torch.randn(128, 16, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(torch.zeros(24, 16))
    optimizer = projected(weight, rank=4, gap=gap, scale=1.0, mode=mode, lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = (inputs @ (weight - target).mT).square().mean()
        loss.backward()
        optimizer.step()
        cosine.step()
        losses.append(loss.item())
    return losses[-1] / losses[0]


def low_rank(rank: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(24, rank, generator=draw) @ torch.randn(rank, 16, generator=draw)


@pytest.mark.parametrize("mode", MODES)
def test_a_target_of_low_rank_is_learned(mode) -> None:
    assert learned(low_rank(3), mode, gap=10) < 1e-3


def test_renewed_bases_reach_a_target_of_higher_rank_and_fixed_ones_do_not() -> None:
    assert learned(low_rank(12), "std", gap=10) < 0.02
    assert learned(low_rank(12), "std", gap=1000) > 0.2


# --- refused --------------------------------------------------------------------------------


def test_a_vector_is_not_projected() -> None:
    with pytest.raises(ValueError, match=r"only real matrices are projected, got shape \(5,\)"):
        projected(weight_of((5,)), rank=2)


def test_a_stack_of_matrices_is_not_projected() -> None:
    with pytest.raises(ValueError, match=r"got shape \(2, 5, 5\)"):
        projected(weight_of((2, 5, 5)), rank=2)


@pytest.mark.parametrize("options", [{"rank": 2}, {}], ids=["projected", "plain"])
def test_a_sparse_gradient_is_refused(options) -> None:
    table = nn.Embedding(9, 5, sparse=True)
    optimizer = projected(table.weight, **options)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        optimizer.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_projection_of_a_gradient_that_is_not_finite_is_refused(value) -> None:
    weight = weight_of(TALL)
    optimizer = projected(weight, rank=2)
    weight.grad = gradients(TALL, 1)[0]
    weight.grad[3, 1] = value
    with pytest.raises(RuntimeError, match="not finite"):
        optimizer.step()
    assert torch.equal(weight, weight_of(TALL))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"rank": 0}, "rank must be a positive whole number, got 0"),
        ({"rank": 2.5}, "rank must be a positive whole number, got 2.5"),
        ({"rank": 2, "gap": 0}, "gap must be a positive whole number, got 0"),
        ({"rank": 2, "scale": 0.0}, "scale must be positive, got 0.0"),
        ({"rank": 2, "mode": "top"}, "mode must be one of std, reverse_std, left, right, full"),
        ({"gap": 20}, "a group has gap but no rank"),
        ({"rank": 2, "lr": -1.0}, "lr must be 0 or more"),
        ({"rank": 2, "betas": (0.9, 1.0)}, "betas must be"),
    ],
)
def test_an_option_out_of_range_is_refused(options, told) -> None:
    with pytest.raises(ValueError, match=told):
        projected(weight_of(TALL), **options)


@pytest.mark.parametrize(
    "other", [{"rank": 3}, {"rank": 2, "mode": "full"}, {}], ids=["rank", "mode", "plain"]
)
def test_the_state_of_another_structure_is_refused(other) -> None:
    weight = weight_of(TALL)
    optimizer = projected(weight, rank=2)
    weight.grad = gradients(TALL, 1)[0]
    optimizer.step()
    with pytest.raises(ValueError, match="saved with"):
        projected(weight_of(TALL), **other).load_state_dict(optimizer.state_dict())
