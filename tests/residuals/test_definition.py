"""What is a residual addition and what is none, on the smallest modules that show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.capture import capture, trace_model
from surgery.residuals import Findings, examine, place, residual_stacks

WIDTH = 8


class Net(nn.Module):
    """A few layers and a forward to be named."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.f = nn.Linear(WIDTH, WIDTH)
        self.g = nn.Linear(WIDTH, WIDTH)
        self.h = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.table = nn.Parameter(torch.ones(6, WIDTH))
        self.drop = nn.Dropout(0.5)
        self.made = forward

    def forward(self, x: Tensor) -> Any:
        return self.made(self, x)


class Images(nn.Module):
    """The same for feature maps."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.one = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.two = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.wide = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, stride=2)
        self.wider = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1)
        self.down = nn.Sequential(
            nn.Conv2d(WIDTH, 2 * WIDTH, 1, stride=2), nn.BatchNorm2d(2 * WIDTH)
        )
        self.norm = nn.BatchNorm2d(WIDTH)
        self.part = nn.Conv2d(WIDTH // 2, WIDTH // 2, 3, padding=1)
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.made = forward

    def forward(self, x: Tensor) -> Any:
        return self.made(self, x)


def tokens(forward: Callable[[Any, Tensor], Any], *, train: bool = False) -> Findings:
    module = Net(forward).train(train)
    return examine(trace_model(module, (torch.randn(2, 6, WIDTH),)).graph, module)


def images(forward: Callable[[Any, Tensor], Any]) -> Findings:
    module = Images(forward).eval()
    return examine(trace_model(module, (torch.randn(2, WIDTH, 6, 6),)).graph, module)


def in_place(net: Any, x: Tensor) -> Tensor:
    y = net.f(x)
    y += x
    return y


def builtin_sum(net: Any, x: Tensor) -> Tensor:
    return sum([net.f(x), x])  # pyright: ignore[reportReturnType]


def drop_path(net: Any, x: Tensor) -> Tensor:
    y = net.f(x)
    keep = y.new_empty((x.shape[0], 1, 1)).bernoulli_(0.9)
    return x + y.div(0.9) * keep


def opposite_order(net: Any, x: Tensor) -> Tensor:
    return net.g(F.gelu(net.f(x))) + x


RESIDUAL: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "pre-norm": (lambda net, x: x + net.f(net.norm(x)), "identity"),
    "post-norm": (lambda net, x: net.norm(x + net.f(x)), "identity"),
    "the branch first": (opposite_order, "identity"),
    "written in place": (in_place, "identity"),
    "sum()": (builtin_sum, "identity"),
    "dropout of the branch": (lambda net, x: x + net.drop(net.f(x)), "identity"),
    "DropPath written out": (drop_path, "identity"),
    "layer scale": (lambda net, x: x + net.scale * net.f(x), "identity"),
    "gate": (lambda net, x: x + torch.sigmoid(net.g(x[:, :1])) * net.f(x), "identity"),
    "torch.add with alpha": (lambda net, x: torch.add(x, net.f(x), alpha=0.5), "identity"),
    "alpha on the shortcut": (lambda net, x: torch.add(net.f(x), x, alpha=0.5), "scaled"),
    "scaled by a number": (lambda net, x: 0.7 * x + net.f(x), "scaled"),
    "scaled by a parameter": (lambda net, x: net.scale * x + net.f(x), "scaled"),
    "another type": (lambda net, x: x.double() + net.f(x).double(), "cast"),
    "rearranged": (
        lambda net, x: x.transpose(1, 2) + net.f(x).transpose(1, 2),
        "identity",
    ),
    "the first token": (lambda net, x: x[:, :1] + net.f(x).mean(1, keepdim=True), "identity"),
    "attention without weights": (
        lambda net, x: x + F.scaled_dot_product_attention(x, x, x),
        "identity",
    ),
    "Fourier mixing": (
        lambda net, x: x + torch.fft.fft2(x.to(torch.complex64)).real,
        "identity",
    ),
    "scaled afterwards": (lambda net, x: (x + net.f(x)) / 1.4, "identity"),
    "before a squeeze-excitation": (
        lambda net, x: (y := x + net.f(x)) * torch.sigmoid(net.g(y.mean(1, keepdim=True))),
        "identity",
    ),
    "before a modulation": (
        lambda net, x: net.norm(x + net.f(x)) * (1 + net.g(x[:, :1])) + net.h(x[:, :1]),
        "identity",
    ),
}


@pytest.mark.parametrize("case", RESIDUAL)
def test_a_residual(case: str):
    forward, kind = RESIDUAL[case]
    found = tokens(forward, train=case == "dropout of the branch")
    assert [residual.kind for residual in found.residuals] == [kind]


def gelu(net: Any, x: Tensor) -> Tensor:
    y = net.f(x)
    return net.g(0.5 * y * (1 + torch.tanh(0.8 * (y + 0.044715 * y**3))))


def grn(net: Any, x: Tensor) -> Tensor:
    y = net.f(x)
    norm = y.norm(dim=1, keepdim=True)
    return net.g(net.scale * (y * (norm / norm.mean(-1, keepdim=True))) + net.scale + y)


def rope(net: Any, x: Tensor) -> Tensor:
    q = net.f(x)
    half = torch.cat((-q[..., WIDTH // 2 :], q[..., : WIDTH // 2]), -1)
    return F.scaled_dot_product_attention(q * net.table + half * net.table, x, x)


def interleaved_rope(net: Any, x: Tensor) -> Tensor:
    q = net.f(x)
    even, odd = q[..., 0::2], q[..., 1::2]
    cos, sin = net.table[:, ::2], net.table[:, 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
    return F.scaled_dot_product_attention(turned, x, x)


def state_space(net: Any, x: Tensor) -> Tensor:
    u, z = net.f(x), net.g(x)
    y = torch.cumsum(net.h(u) * u, 1) + net.scale * u
    return y * F.silu(z)


def adapter(net: Any, x: Tensor) -> Tensor:
    low = F.linear(F.linear(x, net.table), net.table.T)
    return net.f(x) + 2.0 * low


def position_of_values(net: Any, x: Tensor) -> Tensor:
    """LePE: what is added to the attention is computed from its values."""
    v = net.f(x)
    attended = F.scaled_dot_product_attention(net.g(net.h(x)), x, v)
    return net.norm(attended) + F.linear(v, net.table.T @ net.table)


def false_ancestor(net: Any, x: Tensor) -> Tensor:
    return x + net.f(torch.ones(x.shape))


NOT_RESIDUAL: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "GELU as a polynomial": (gelu, "no weight layer"),
    "global response normalisation": (grn, "no weight layer"),
    "rotary embedding": (rope, "no weight layer"),
    "rotary embedding, interleaved": (interleaved_rope, "no weight layer"),
    "skip of a state space": (state_space, "not on the main stream"),
    "low-rank adapter": (adapter, "linear maps"),
    "parallel branches": (lambda net, x: net.f(x) + net.g(x), "parallel branches"),
    "position embedding": (lambda net, x: net.f(x) + net.table, "broadcast"),
    "position encoding of values": (position_of_values, "parallel branches"),
    "only its shape": (false_ancestor, "neither term"),
    "a tensor and itself": (lambda net, x: (y := net.f(x)) + y, "itself"),
    "a constant": (lambda net, x: net.f(x + 1), ""),
    "a difference": (lambda net, x: x - net.f(x), ""),
    "a product": (lambda net, x: x * net.f(x), ""),
    "concatenation": (lambda net, x: torch.cat((x, net.f(x)), -1), ""),
    "bias by the mean": (lambda net, x: x + net.f(x).mean(1, keepdim=True), "broadcast"),
}


@pytest.mark.parametrize("case", NOT_RESIDUAL)
def test_no_residual(case: str):
    forward, reason = NOT_RESIDUAL[case]
    found = tokens(forward)
    assert found.residuals == ()
    if reason:
        assert any(reason in other.reason for other in found.others), found.others
        assert all(other.where.partition(":")[0] == __file__ for other in found.others)
    else:
        assert found.others == ()


def pyramid(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    low = F.relu(net.two(F.relu(net.one(x))))
    high = net.wider(F.relu(net.wide(low)))
    up = F.interpolate(high[:, :WIDTH], scale_factor=2)
    return high, net.norm(low) * torch.sigmoid(up)


def hierarchical(net: Any, x: Tensor) -> Tensor:
    one, two = x.chunk(2, 1)
    one = net.part(one)
    return torch.cat((one, net.part(one + two)), 1)


def partial(net: Any, x: Tensor) -> Tensor:
    y = net.one(x)
    return torch.cat((y[:, :4] + x[:, :4], y[:, 4:]), 1)


MAPS: dict[str, tuple[Callable[[Any, Tensor], Any], list[str]]] = {
    "projection": (
        lambda net, x: F.relu(net.wider(F.relu(net.wide(x))) + net.down(x)),
        ["projection"],
    ),
    "projection after the activation": (
        lambda net, x: net.wider(F.relu(net.wide(y := F.relu(x)))) + net.down(y),
        ["projection"],
    ),
    "pooled": (
        lambda net, x: F.max_pool2d(x, 2) + net.one(F.max_pool2d(F.relu(net.two(x)), 2)),
        ["pooled"],
    ),
    "every second pixel": (
        lambda net, x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, WIDTH)) + net.wide(x),
        ["pooled"],
    ),
    "a pooling branch": (lambda net, x: x + (net.pool(y := net.norm(x)) - y), ["identity"]),
    "a BatchNorm beside convolutions": (
        lambda net, x: net.one(x) + net.two(x) + net.norm(x),
        ["projection"],
    ),
    "convolutions side by side": (lambda net, x: net.one(x) + net.two(x), []),
    "a pyramid": (pyramid, []),
    "parts of Res2Net": (hierarchical, []),
    "the first channels": (partial, ["identity"]),
}


@pytest.mark.parametrize("case", MAPS)
def test_feature_maps(case: str):
    forward, kinds = MAPS[case]
    assert [residual.kind for residual in images(forward).residuals] == kinds


PARALLEL: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "branches first": lambda net, x: net.f(y := net.norm(x)) + net.g(y) + x,
    "shortcut first": lambda net, x: x + net.f(y := net.norm(x)) + net.g(y),
    "shortcut between": lambda net, x: net.f(x) + x + net.g(x),
    "dropped out together": lambda net, x: x + net.drop(net.f(x) + net.g(x)),
}


@pytest.mark.parametrize("case", PARALLEL)
def test_parallel_branches_are_one_residual(case: str):
    (residual,) = tokens(PARALLEL[case]).residuals
    assert [branch.target for branch in residual.branches] == ["f", "g"]
    assert residual.source.op == "placeholder"
    assert residual.shortcut in residual.entry.all_input_nodes
    assert residual.node.users
    assert {user.op for user in residual.node.users} == {"output"}


def test_two_in_a_row_are_two():
    found = tokens(lambda net, x: (y := x + net.f(x)) + net.g(y))
    first, second = found.residuals
    assert second.source is first.node
    assert second.follows is first.node
    assert first.follows is None
    assert second.continues


def test_a_residual_around_others():
    found = tokens(lambda net, x: x + net.h((y := x + net.f(x)) + net.g(y)))
    assert [residual.source.name for residual in found.residuals] == ["x", "add", "x"]


def test_what_is_said_about_one():
    def forward(net: Any, x: Tensor) -> Tensor:
        y = net.f(x)
        y += 2 * x
        return y

    (residual,) = tokens(forward).residuals
    assert residual.in_place
    assert residual.kind == "scaled"
    assert residual.shortcut.name == "mul"
    assert residual.source.name == "x"
    assert [branch.target for branch in residual.branches] == ["f"]
    assert residual.shape == (2, 6, WIDTH)
    assert residual.dtype == torch.float32
    assert residual.owner == residual.block == ""
    line = forward.__code__.co_firstlineno + 2
    assert residual.where == f"{__file__}:{line}"


# -- across modules ------------------------------------------------------------------------------


class Output(nn.Module):
    """Adds what it is given, as BERT's do."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        return self.dense(y) + x


class Delegating(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.output = Output()

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.inner(x).relu(), x)


class Stacked(nn.Module):
    def __init__(self, block: Callable[[], nn.Module], *, shared: bool = False) -> None:
        super().__init__()
        blocks = [block()] * 3 if shared else [block() for _ in range(3)]
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_the_block_is_the_call_that_holds_the_branch():
    model = Stacked(Delegating)
    found = examine(trace_model(model, (torch.randn(2, WIDTH),)).graph, model)
    assert [each.owner for each in found.residuals] == [f"blocks.{i}.output" for i in range(3)]
    assert [each.block for each in found.residuals] == [f"blocks.{i}" for i in range(3)]
    (run,) = residual_stacks(found.residuals)
    assert run.sites == found.residuals
    layers = {f"blocks.{i}": i for i in range(3)}
    assert [place(each, layers) for each in found.residuals] == [0, 1, 2]
    assert place(found.residuals[0], {"other": 1}) is None


def test_a_shared_block_counts_as_often_as_it_runs():
    model = Stacked(Delegating, shared=True)
    found = examine(trace_model(model, (torch.randn(2, WIDTH),)).graph, model)
    assert [each.owner for each in found.residuals] == ["blocks.0.output"] * 3


class Activated(nn.Module):
    """A projection around layers and an activation that all blocks share."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.shortcut = nn.Linear(WIDTH, WIDTH)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.two(self.act(self.one(x))) + self.shortcut(x))


def test_a_shared_activation_does_not_end_the_call_around_it():
    act = nn.Sequential(nn.ReLU())
    model = Stacked(lambda: Activated(act))
    found = examine(trace_model(model, (torch.randn(2, WIDTH),)).graph, model)
    assert [each.block for each in found.residuals] == [f"blocks.{i}" for i in range(3)]
    assert {each.kind for each in found.residuals} == {"projection"}


def test_a_graph_with_children_as_leaves():
    block = Delegating()
    example = (torch.randn(2, WIDTH),)
    assert examine(capture(block, example).graph, block).residuals == ()
    captured = capture(block, example, inline=("output",))
    (residual,) = examine(captured.graph, block).residuals
    assert residual.shortcut.op == "placeholder"
    assert [branch.target for branch in residual.branches] == ["output.dense"]
    assert residual.owner == "output"


class Unknown(nn.Module):
    """Has no weight of its own to be known by."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0)


class Leaves(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mixer(self.norm(x))


@pytest.mark.parametrize(
    ("mixer", "count"),
    [
        (nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()), 1),
        (nn.AvgPool1d(3, 1, 1), 1),
        (Unknown(), 1),
        (nn.Sequential(nn.GELU(), nn.LayerNorm(WIDTH)), 0),
    ],
    ids=["weights", "pooling", "unknown", "no work"],
)
def test_a_leaf_is_judged_by_what_it_holds(mixer: nn.Module, count: int):
    block = Leaves(mixer)
    captured = capture(block, (torch.randn(2, 6, WIDTH),))
    assert len(examine(captured.graph, block).residuals) == count


def test_a_run_is_cut_where_the_shape_changes():
    def forward(net: Any, x: Tensor) -> Tensor:
        x = x + net.one(x)
        x = x + net.two(x)
        x = F.relu(net.wide(x))
        return x + net.wider(x)

    runs = residual_stacks(images(forward).residuals)
    assert [(len(run), run.shape) for run in runs] == [(2, (2, 8, 6, 6)), (1, (2, 16, 3, 3))]


def test_a_run_goes_on_through_a_reshape():
    def forward(net: Any, x: Tensor) -> Tensor:
        x = x + net.f(x)
        x = x.reshape(2, 3, 2, WIDTH)
        return x + net.g(x)

    (run,) = residual_stacks(tokens(forward).residuals)
    assert [site.shape for site in run.sites] == [(2, 6, WIDTH), (2, 3, 2, WIDTH)]


def test_a_run_is_cut_by_a_transposition():
    def forward(net: Any, x: Tensor) -> Tensor:
        x = (x + net.f(x)).transpose(1, 2)
        return x + net.g(x.transpose(1, 2)).transpose(1, 2)

    runs = residual_stacks(tokens(forward).residuals)
    assert [len(run) for run in runs] == [1, 1]
