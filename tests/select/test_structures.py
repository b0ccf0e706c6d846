"""Structures that are easy to mistake, one small model each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.select import ModelMap, Role

D, L = 8, 5


class Net(nn.Module):
    """Linear layers by name, and a forward made of them that closes a residual branch."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor], **widths: tuple[int, int]) -> None:
        super().__init__()
        self.made = forward
        for name, (width, out) in widths.items():
            self.add_module(name, nn.Linear(width, out))

    def __getattr__(self, name: str) -> nn.Linear:
        return super().__getattr__(name)  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.made(self, x)


def square(*names: str) -> dict[str, tuple[int, int]]:
    return dict.fromkeys(names, (D, D))


def roles(model: nn.Module) -> dict[str, Role]:
    return dict(ModelMap(model.eval(), torch.randn(2, L, D)).roles)


def names(model: nn.Module) -> dict[str, str | None]:
    return {path: role.name for path, role in roles(model).items()}


def scores_reversed(net: Net, x: Tensor) -> Tensor:
    """Keys times queries, and a softmax over the rows: the query is the second factor."""
    scores = net.a(x) @ net.b(x).transpose(1, 2)
    return net.o(scores.softmax(1).transpose(1, 2) @ net.c(x))


def by_einsum(net: Net, x: Tensor) -> Tensor:
    scores = torch.einsum("bkd,bqd->bqk", net.a(x), net.b(x))
    return net.o(torch.einsum("bqk,bkd->bqd", scores.softmax(-1), net.c(x)))


def plain(net: Net, x: Tensor) -> Tensor:
    scores = net.a(x) @ net.b(x).mT * 0.1 + torch.ones(L, L).tril().log()
    return net.o(F.dropout(scores.float().softmax(-1), 0.1, net.training) @ net.c(x))


def capped(net: Net, x: Tensor) -> Tensor:
    scores = torch.tanh(net.a(x) @ net.b(x).mT / 5) * 5
    return net.o(scores.softmax(-1) @ net.c(x))


def relu_attention(net: Net, x: Tensor) -> Tensor:
    return net.o(F.relu(net.a(x) @ net.b(x).mT) @ net.c(x))


def linear_attention(net: Net, x: Tensor) -> Tensor:
    """The feature map is on query and key alone, and the value comes first in the product."""
    return net.o((net.c(x).mT @ F.relu(net.b(x)) @ F.relu(net.a(x)).mT).mT)


SEPARATE = {
    "plain": (plain, "qkv"),
    "key times query": (scores_reversed, "kqv"),
    "einsum": (by_einsum, "kqv"),
    "soft cap": (capped, "qkv"),
    "without softmax": (relu_attention, "qkv"),
    "linear attention": (linear_attention, "qkv"),
}


@pytest.mark.parametrize("case", SEPARATE)
def test_attentions(case: str):
    forward, letters = SEPARATE[case]
    expected = {name: f"attention.{letter}" for name, letter in zip("abc", letters, strict=True)}
    assert names(Net(forward, **square("a", "b", "c", "o"))) == {**expected, "o": "attention.out"}


def test_an_attention_without_feature_maps_cannot_be_told_apart():
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.o(net.a(x) @ (net.b(x).mT @ net.c(x)))

    found = roles(Net(forward, **square("a", "b", "c", "o")))
    assert [found[name].name for name in "abc"] == [None] * 3
    assert "cannot be told apart" in found["a"].reason


def test_an_attention_without_projections_labels_nothing_upstream():
    def forward(net: Net, x: Tensor) -> Tensor:
        state = x + net.enter(x)
        return net.out(F.scaled_dot_product_attention(state, net.k(state), net.v(state)))

    found = names(Net(forward, **square("enter", "k", "v", "out")))
    assert (found["k"], found["v"], found["out"]) == ("attention.k", "attention.v", "attention.out")
    assert found["enter"] not in ("attention.q", "attention.latent")


def test_what_compresses_queries_and_keys():
    def forward(net: Net, x: Tensor) -> Tensor:
        state = x + net.enter(x)
        query = net.q_up(F.layer_norm(net.q_down(state), (4,)))
        key, value = net.kv_up(net.kv_down(state)).chunk(2, -1)
        return net.out(F.scaled_dot_product_attention(query, key, value))

    widths = {"q_down": (D, 4), "q_up": (4, D), "kv_down": (D, 4), "kv_up": (4, 2 * D)}
    found = names(Net(forward, **widths, **square("enter", "out")))
    del found["enter"]
    assert found == {
        "q_down": "attention.latent",
        "q_up": "attention.q",
        "kv_down": "attention.latent",
        "kv_up": "attention.kv",
        "out": "attention.out",
    }


def test_what_gates_an_attention():
    def forward(net: Net, x: Tensor) -> Tensor:
        made = F.scaled_dot_product_attention(net.q(x), net.k(x), net.v(x))
        return net.out(made * net.gate(x).sigmoid())

    assert names(Net(forward, **square("q", "k", "v", "gate", "out")))["gate"] == "attention.gate"


def test_talking_heads_are_applied_to_scores():
    def forward(net: Net, x: Tensor) -> Tensor:
        query, key, value = (
            f(x).unflatten(-1, (2, -1)).transpose(1, 2) for f in (net.q, net.k, net.v)
        )
        scores = net.before((query @ key.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = net.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return net.out((weights @ value).transpose(1, 2).flatten(2))

    found = names(Net(forward, before=(2, 2), after=(2, 2), **square("q", "k", "v", "out")))
    assert (found["before"], found["after"]) == ("attention_scores", "attention_scores")
    assert [found[name] for name in "qkv"] == [f"attention.{letter}" for letter in "qkv"]


def test_a_product_of_activations_is_no_attention():
    """Outlook attention: weights made from the input, with no query and key to compare."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.out(net.weights(x).softmax(-1) @ net.values(x))

    model = Net(forward, weights=(D, L), **square("values", "out"))
    assert names(model) == {"weights": None, "values": None, "out": None}


def test_a_parallel_block_closes_with_a_layer_of_two_roles():
    def forward(net: Net, x: Tensor) -> Tensor:
        query, key, value, wide = net.enter(x).split([D, D, D, 12], -1)
        made = F.scaled_dot_product_attention(query, key, value)
        return net.leave(torch.cat([made, F.gelu(wide)], -1))

    found = roles(Net(forward, enter=(D, 3 * D + 12), leave=(D + 12, D)))
    assert found["enter"].names == ("attention.qkv", "mlp.in")
    assert found["leave"].names == ("attention.out", "mlp.out")
    assert found["enter"].slices["in"] == (3 * D, 3 * D + 12)


UNITS: dict[str, tuple[Callable[[Net, Tensor], Tensor], dict[str, str | None]]] = {
    "plain": (
        lambda net, x: net.b(F.gelu(net.a(x))),
        {"a": "mlp.in", "b": "mlp.out"},
    ),
    "squared": (
        lambda net, x: net.b(F.relu(net.a(x)).square()),
        {"a": "mlp.in", "b": "mlp.out"},
    ),
    "activation written out": (
        lambda net, x: net.b(net.a(x) * torch.sigmoid(1.702 * net.a(x))),
        {"a": "mlp.in", "b": "mlp.out"},
    ),
    "gated": (
        lambda net, x: net.c(net.a(x) * F.silu(net.b(x))),
        {"a": "mlp.in", "b": "mlp.gate", "c": "mlp.out"},
    ),
    "bilinear": (
        lambda net, x: net.c(net.a(x) * net.b(x)),
        {"a": None, "b": None, "c": "mlp.out"},
    ),
    "no nonlinearity": (lambda net, x: net.b(net.a(x)), {"a": None, "b": None}),
    "a gate is no branch": (
        lambda net, x: x * torch.sigmoid(net.b(F.relu(net.a(x)))),
        {"a": None, "b": None},
    ),
    "factors of other inputs": (
        lambda net, x: net.c(net.a(x) * torch.sigmoid(net.b(x.mean(1, keepdim=True)))),
        {"a": None, "b": None, "c": None},
    ),
}


@pytest.mark.parametrize("case", UNITS)
def test_feed_forward_units(case: str):
    forward, expected = UNITS[case]
    assert names(Net(forward, **square(*expected))) == expected


def test_a_perceptron_outside_a_residual_branch_is_none():
    model = nn.Sequential(nn.Linear(D, 12), nn.GELU(), nn.Linear(12, 3))
    assert names(model) == {"0": None, "2": "head"}


class Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.latent = nn.Parameter(torch.randn(1, 3, D))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        itself = self.attention(x, x, x, need_weights=False)[0]
        return itself, self.attention(self.latent.expand(len(x), -1, -1), x, x)[0]


def test_torchs_attention_packs_its_projections():
    found = roles(Multihead())
    packed = found["attention.in_proj_weight"]
    assert (packed.name, found["attention.out_proj"].name) == ("attention.qkv", "attention.out")
    assert packed.slices == {"q": (0, D), "k": (D, 2 * D), "v": (2 * D, 3 * D)}


def test_a_bias_made_from_the_query_is_no_output():
    """Decomposed relative positions, as in SAM: tables that meet the query, added as a mask."""

    class Decomposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(D, 3 * D)
            self.rows, self.columns = (nn.Parameter(torch.randn(L, D)) for _ in range(2))
            self.out = nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            query, key, value = self.qkv(x).chunk(3, -1)
            bias = query @ self.rows.mT + torch.einsum("bqd,kd->bqk", query, self.columns)
            return x + self.out(F.scaled_dot_product_attention(query, key, value, bias))

    found = names(Decomposed())
    assert (found["rows"], found["columns"]) == ("attention_bias", "attention_bias")
    assert (found["qkv"], found["out"]) == ("attention.qkv", "attention.out")


def test_keys_written_piece_by_piece():
    def forward(net: Net, x: Tensor) -> Tensor:
        key = x.new_empty(x.shape)
        key[..., : D // 2].copy_(net.left(x))
        key[..., D // 2 :] = net.right(x)
        return net.out(F.scaled_dot_product_attention(net.q(x), key, net.v(x)))

    found = names(Net(forward, left=(D, D // 2), right=(D, D // 2), **square("q", "v", "out")))
    assert (found["left"], found["right"]) == ("attention.k", "attention.k")


def test_roles_survive_low_rank_adapters():
    import surgery
    from surgery import LowRank, Rule
    from tests import zoo

    for name in ("gpt2", "mixtral", "timm_eva", "deberta-v2"):
        model, example = zoo.build(name)
        before = {path: role.names for path, role in ModelMap(model, example).roles.items()}
        surgery.apply(model, Rule(LowRank(rank=2)), example=example)
        after = ModelMap(model, example).roles
        assert {path: after[path].names for path in before} == before
