"""Choosing, mixing, switching off and merging adapters, alone and from several threads."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import surgery
from surgery import LowRank, Path, Rule, adapters
from surgery.errors import ModelStateError
from surgery.passes.hosts import bank as hosts
from surgery.passes.hosts import bank_of


class Net(nn.Module):
    """Two layers and a convolution, optionally checkpointed."""

    def __init__(self, *, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.table = nn.Parameter(torch.randn(6, 6))
        self.second = nn.Linear(6, 6)
        self.reentrant = reentrant

    def body(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x)) @ self.table

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.second(self.body(x))
        return self.second(checkpoint(self.body, x, use_reentrant=self.reentrant))


def adapted(
    *, reentrant: bool | None = None, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Net:
    """A net with adapters a and b everywhere and c on its second layer only, a and b active."""
    torch.manual_seed(seed)
    net = Net(reentrant=reentrant).to(dtype)
    rules = [Rule(LowRank(rank=2, adapter=name), id=name) for name in "ab"]
    rules.append(Rule(LowRank(rank=1, adapter="c"), where=Path("second"), id="c"))
    surgery.apply(net, rules)
    with torch.no_grad():
        for tensor in adapters.parameters(net):
            tensor.normal_()
    adapters.activate(net, {"a": 1, "b": 1})
    return net


def by_hand(net: Net, mix: Mapping[str, float]) -> Callable[[Tensor], Tensor]:
    """The net with the mix written into plain weights."""
    weights: dict[str, Tensor] = {}
    tensors = dict(net.named_parameters())
    for name, prefix in (
        ("first.weight", "first.lowrank"),
        ("table", "lowrank.table"),
        ("second.weight", "second.lowrank"),
    ):
        weights[name] = tensors[name].detach().clone()
        for adapter, share in mix.items():
            key = f"{prefix}.{adapter}"
            if f"{key}.lora_A" in tensors:
                delta = tensors[f"{key}.lora_B"] @ tensors[f"{key}.lora_A"]
                weights[name] += share * delta.detach()

    def run(x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ weights["first.weight"].T + tensors["first.bias"])
        return hidden @ weights["table"] @ weights["second.weight"].T + tensors["second.bias"]

    return run


X = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def check(output: Tensor, net: Net, mix: Mapping[str, float]) -> None:
    # float64, sums of six products.
    torch.testing.assert_close(output, by_hand(net, mix)(X), rtol=1e-12, atol=1e-12)


def test_names_and_parameters() -> None:
    net = adapted()
    assert adapters.names(net) == ("a", "b", "c")
    assert len(list(adapters.parameters(net))) == 14
    assert {p.shape for p in adapters.parameters(net, "c")} == {(1, 6), (6, 1)}
    trainable = {id(p) for p in net.parameters() if p.requires_grad}
    assert {id(p) for p in adapters.parameters(net)} == trainable


@pytest.mark.parametrize("choice", ["a", "c", {"a": 0.7, "b": 0.3}, {"a": -1.0, "c": 2.0}, {}])
def test_activate(choice: adapters.Choice) -> None:
    net = adapted()
    adapters.activate(net, choice)
    mix = {choice: 1.0} if isinstance(choice, str) else dict(choice)
    assert adapters.active(net) == mix
    check(net(X), net, mix)
    check(copy.deepcopy(net)(X), net, mix)
    check(pickle.loads(pickle.dumps(net))(X), net, mix)  # noqa: S301


def test_activate_a_part() -> None:
    net = adapted()
    adapters.activate(net.second, "c")
    assert adapters.active(net) == {"a": 1.0, "b": 1.0, "c": 1.0}
    hidden = by_hand(net, {"a": 1, "b": 1})
    assert (net(X) - hidden(X)).abs().max() > 1e-3


def test_using_nests_and_ends() -> None:
    net = adapted()
    with adapters.using(net, {"a": 0.5, "b": 2.0}):
        check(net(X), net, {"a": 0.5, "b": 2.0})
        with adapters.disabled(net):
            check(net(X), net, {})
        with adapters.using(net, "c"):
            check(net(X), net, {"c": 1.0})
        check(net(X), net, {"a": 0.5, "b": 2.0})
    check(net(X), net, {"a": 1, "b": 1})
    with pytest.raises(ZeroDivisionError), adapters.disabled(net):
        _ = 1 / 0
    check(net(X), net, {"a": 1, "b": 1})


def test_using_concerns_one_model_and_not_its_copies() -> None:
    one, other = adapted(), adapted(seed=1)
    copied = copy.deepcopy(one)
    loaded = pickle.loads(pickle.dumps(one))  # noqa: S301
    with adapters.disabled(one):
        check(one(X), one, {})
        for net in (other, copied, loaded):
            check(net(X), net, {"a": 1, "b": 1})
        with adapters.using(copied, "b"):
            check(one(X), one, {})
            check(copied(X), copied, {"b": 1})


def test_adapters_of_two_applications_are_one_family() -> None:
    net = adapted()
    surgery.apply(net, Rule(LowRank(rank=1, adapter="late"), where=Path("first")))
    with torch.no_grad():
        for tensor in adapters.parameters(net, "late"):
            tensor.normal_()
    with adapters.using(net, {"late": 3.0, "c": 1.0}):
        check(net(X), net, {"late": 3.0, "c": 1.0})


def test_threads_with_different_mixes() -> None:
    net = adapted()
    mixes: list[dict[str, float]] = [{"a": 1.0}, {"b": 2.0}, {"a": 0.3, "c": 0.7}, {}]
    expected = [by_hand(net, mix)(X) for mix in mixes]
    barrier = threading.Barrier(len(mixes))
    wrong: list[str] = []

    def work(index: int) -> None:
        barrier.wait()
        for turn in range(200):
            with adapters.using(net, mixes[index]):
                output = net(X)
            if (output - expected[index]).abs().max() > 1e-12:
                wrong.append(f"thread {index}, turn {turn}")

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(mixes))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    check(net(X), net, {"a": 1, "b": 1})


def test_forward_runs_while_adapters_come_and_go() -> None:
    net = Net().double()
    expected = net(X).detach()
    stop = threading.Event()
    wrong: list[object] = []

    def work() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    difference = (net(X) - expected).abs().max().item()
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                wrong.append(error)
                return
            if difference > 1e-12:
                wrong.append(difference)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in range(100):
        surgery.apply(net, Rule(LowRank(rank=2)))
        surgery.undo(net)
    stop.set()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda net: adapters.activate(net, "d"), "no adapter 'd'"),
        (lambda net: adapters.activate(net, {"a": float("nan")}), "share of adapter 'a' is nan"),
        (lambda net: adapters.using(net, "aa").__enter__(), "no adapter 'aa'"),
        (lambda net: list(adapters.parameters(net, "x")), "no adapter 'x'"),
        (lambda net: adapters.merge(net, "x"), "no adapter 'x'"),
        (adapters.unmerge, "no adapter is merged"),
        (lambda net: adapters.merge(net.first), "carries no edit log"),
        (lambda net: adapters.names(nn.Linear(2, 2)), "has no adapters"),
    ],
)
def test_mistakes_are_told(act: Callable[[Net], object], message: str) -> None:
    with pytest.raises(ModelStateError, match=message):
        act(adapted())


def test_merged_adapters_cannot_be_switched() -> None:
    net = adapted()
    with adapters.disabled(net):
        adapters.merge(net, "a")
        with pytest.raises(ModelStateError, match="cannot be switched off or mixed"):
            net(X)
    for act in (
        lambda: adapters.activate(net, "b"),
        lambda: adapters.merge(net, "b"),
        lambda: adapters.disabled(net).__enter__(),
    ):
        with pytest.raises(ModelStateError, match=r"(?s)are merged.*unmerge"):
            act()
    check(net(X), net, {})  # the weights are what counts: the tensors beside them add nothing
    adapters.unmerge(net)
    check(net(X), net, {"a": 1, "b": 1})


@pytest.mark.parametrize("keep", ["memory", "none"])
@pytest.mark.parametrize("choice", [None, "c", {"a": 0.5, "b": -2.0}])
def test_merge_and_unmerge(choice: adapters.Choice | None, keep: str) -> None:
    net = adapted()
    stock = {name: value.clone() for name, value in net.state_dict().items()}
    mix = {"a": 1.0, "b": 1.0} if choice is None else choice
    mix = {mix: 1.0} if isinstance(mix, str) else dict(mix)
    expected = by_hand(net, mix)(X)
    adapters.merge(net, choice, keep_base=keep)  # type: ignore[arg-type]
    assert adapters.merged(net) == mix
    torch.testing.assert_close(net(X), expected, rtol=1e-12, atol=1e-12)
    merged = pickle.loads(pickle.dumps(net))  # noqa: S301
    torch.testing.assert_close(merged(X), expected, rtol=1e-12, atol=1e-12)
    for each in (net, merged):
        adapters.unmerge(each)
        assert adapters.merged(each) == {}
        after = each.state_dict()
        if keep == "memory":
            assert all(torch.equal(after[name], value) for name, value in stock.items())
        # A sum and a difference, each rounded: two roundings of numbers below 32.
        torch.testing.assert_close(after, stock, rtol=0, atol=2 * 32 * 2.0**-53)


def test_merge_is_all_or_nothing() -> None:
    net = adapted()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.second.to("meta")
    with pytest.raises(ModelStateError, match=r"weight of second is on the meta device"):
        adapters.merge(net)
    assert adapters.merged(net) == {}
    assert torch.equal(net.first.weight, before["first.weight"])


def test_merge_through_a_wrapper() -> None:
    net = adapted()
    expected = net(X)
    wrapper = nn.ModuleDict({"inner": net})
    adapters.merge(wrapper)
    torch.testing.assert_close(net(X), expected, rtol=1e-12, atol=1e-12)
    adapters.unmerge(wrapper)
    assert torch.equal(net(X), expected)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(2, 20),
    columns=st.integers(2, 40),
    rank=st.integers(1, 6),
    scale=st.floats(0.01, 30),
    magnitude=st.floats(1e-3, 1e3),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 1000),
)
def test_merged_equals_unmerged_within_the_stated_bound(
    rows: int,
    columns: int,
    rank: int,
    scale: float,
    magnitude: float,
    bias: bool,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """The bound is that of ``merge``'s docstring, evaluated in float64."""
    torch.manual_seed(seed)
    rank = min(rank, rows, columns)
    layer = nn.Linear(columns, rows, bias=bias)
    model = nn.Sequential(layer).to(dtype)
    surgery.apply(model, Rule(LowRank(rank=rank, alpha=scale * rank)))
    with torch.no_grad():
        for tensor in adapters.parameters(model):
            tensor.normal_(0, magnitude**0.5 / columns**0.5)
    x = torch.randn(3, columns).to(dtype)
    bank = bank_of(layer)
    assert bank is not None
    A, B = (factor.detach().double().abs() for factor in bank.adapters["default"].factors())
    W, X = layer.weight.detach().double().abs(), x.double().abs()
    sizes = X @ W.T + scale * X @ A.T @ B.T
    if bias:
        sizes += layer.bias.detach().double().abs()
    unmerged = model(x)
    adapters.merge(model)
    merged = model(x)
    difference = (merged.double() - unmerged.double()).abs()
    roundoff = torch.finfo(dtype).eps / 2
    smallest = torch.finfo(dtype).tiny * columns  # below it numbers lose digits
    bound = 2 * (columns + rank + 4) * roundoff * sizes + smallest
    finite = torch.isfinite(unmerged) & torch.isfinite(merged)
    assert (difference <= bound)[finite].all()


# Activation checkpointing runs a forward again, when the context may be gone.


def gradients(net: Net) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in net.named_parameters() if p.requires_grad}


def assert_same(one: dict[str, Tensor | None], other: dict[str, Tensor | None]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        expected = other[name]
        if gradient is None or expected is None:
            assert gradient is expected, name
        else:
            assert torch.equal(gradient, expected), name


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_what_is_active(reentrant: bool) -> None:
    plain, net = adapted(), adapted(reentrant=reentrant)
    for each in (plain, net):
        each(X.clone().requires_grad_()).sum().backward()
    assert_same(gradients(net), gradients(plain))


def test_checkpointing_in_the_context() -> None:
    plain, net = adapted(), adapted(reentrant=False)
    for each in (plain, net):
        with adapters.using(each, {"a": 0.5, "c": 2.0}):
            each(X.clone().requires_grad_()).sum().backward()
    assert_same(gradients(net), gradients(plain))


@pytest.mark.parametrize(
    ("forward", "backward"), [({"a": 2.0}, None), (None, {"a": 2.0}), ({"a": 2.0}, {"a": 1.0})]
)
def test_checkpointing_across_contexts_raises(
    forward: dict[str, float] | None, backward: dict[str, float] | None
) -> None:
    net = adapted(reentrant=False)
    adapters.activate(net, "a")

    def within(mix: dict[str, float] | None, run: Callable[[], object]) -> object:
        if mix is None:
            return run()
        with adapters.using(net, mix):
            return run()

    loss = within(forward, lambda: net(X.clone().requires_grad_()).sum())
    assert isinstance(loss, Tensor)
    with pytest.raises(CheckpointError):
        within(backward, loss.backward)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # there are none
def test_reentrant_checkpointing_refuses_a_context() -> None:
    net = adapted(reentrant=True).train()
    with (
        adapters.using(net, "a"),
        pytest.raises(ModelStateError, match="does not survive re-entrant checkpointing"),
    ):
        net(X.clone().requires_grad_())
    # Without gradients nothing is run again.
    with adapters.using(net, "a"), torch.no_grad():
        check(net.eval()(X), net, {"a": 1.0})


# Compiled.


@pytest.mark.parametrize("sees", [True, False], ids=["sees context", "as before 2.15"])
def test_compiled_model_follows_every_switch(sees: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "COMPILER_SEES_CONTEXT", sees)
    net = adapted()
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    check(compiled(X), net, {"a": 1, "b": 1})
    with adapters.using(net, {"a": 0.5, "c": 2.0}):
        check(compiled(X), net, {"a": 0.5, "c": 2.0})
    with adapters.disabled(net):
        check(compiled(X), net, {})
    adapters.activate(net, "b")
    check(compiled(X), net, {"b": 1.0})
    adapters.merge(net)
    torch.testing.assert_close(compiled(X), net(X), rtol=1e-12, atol=1e-12)
    adapters.unmerge(net)
    check(compiled(X), net, {"b": 1.0})
