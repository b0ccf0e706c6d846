"""What every topology promises: its matrix, its precision, where it starts, what it refuses."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

from architectures.shortcuts import Ancre, DenseFormer, History, Mixer, Static, Topology
from surgery.registry import TOPOLOGIES
from tests.architectures.shortcuts.toys import plain

K = 5
GOLDEN = Path(__file__).parent / "golden"

TOPOLOGY: dict[str, Callable[..., Topology]] = {
    "ancre": lambda **to: Ancre(K, **to),
    "ancre outgoing": lambda **to: Ancre(K, normalization="outgoing", **to),
    "ancre identity": lambda **to: Ancre(K, init="identity", **to),
    "ancre outgoing identity": lambda **to: Ancre(
        K, init="identity", normalization="outgoing", temperature=0.5, **to
    ),
    "ancre constant": lambda **to: Ancre(K, parameterization="constant", **to),
    "static": lambda **to: Static(K, edges="0:2, 2:3=-0.5", **to),
    "static with weights of y": lambda **to: Static(
        2, edges=[[0.5, 0.0, 2.0], [0.25, 1.0, 1.0]], **to
    ),
    "denseformer": lambda **to: DenseFormer(K, **to),
}
LEARNED = [name for name in TOPOLOGY if "constant" not in name and "static" not in name]


def moved(topology: Topology) -> Topology:
    with torch.no_grad():
        for parameter in topology.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return topology


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", TOPOLOGY)
def test_the_matrix_is_lower_triangular_and_zero_outside_its_support(name: str) -> None:
    topology = moved(TOPOLOGY[name]())
    weights, sites = topology(), topology.sites
    assert weights.dtype == torch.float32
    assert weights.shape in {(sites, sites), (sites, sites + 1)}
    support = torch.zeros(sites, sites, dtype=torch.bool)
    for site, row in enumerate(topology.support):
        support[site, list(row)] = True
    assert torch.equal(weights[:, :sites][~support], torch.zeros(int((~support).sum())))
    assert not support.triu(1).any()


@pytest.mark.parametrize("name", TOPOLOGY)
def test_registered_by_name(name: str) -> None:
    topology = TOPOLOGY[name]()
    assert isinstance(topology, TOPOLOGIES.get(name.split(maxsplit=1)[0]))


@pytest.mark.parametrize(("normalization", "dim"), [("incoming", 1), ("outgoing", 0)])
@pytest.mark.parametrize("parameterization", ["softmax", "constant"])
def test_ancre_sums_to_one(normalization: str, dim: int, parameterization: str) -> None:
    topology = Ancre(K, normalization=normalization, parameterization=parameterization)
    lengths = torch.arange(1, K + 1) if dim == 1 else torch.arange(K, 0, -1)
    expected = (1 / lengths).unsqueeze(dim).expand(K, K).tril()
    torch.testing.assert_close(topology(), expected, rtol=1e-6, atol=0)  # one float32 division
    torch.testing.assert_close(moved(topology)().sum(dim), torch.ones(K), rtol=1e-6, atol=0)


def test_ancre_counts_one_logit_per_coefficient() -> None:
    for normalization in ("incoming", "outgoing"):
        (logits,) = Ancre(K, normalization=normalization).parameters()
        assert logits.shape == (K * (K + 1) // 2,)
    assert not list(Ancre(K, parameterization="constant").parameters())


@pytest.mark.parametrize("normalization", ["incoming", "outgoing"])
@pytest.mark.parametrize("init", ["uniform", "identity"])
def test_ancre_trains_every_coefficient_but_the_single_one(normalization: str, init: str) -> None:
    topology = Ancre(K, init=init, normalization=normalization)
    (topology() * torch.randn(K, K)).sum().backward()
    gradient = topology.logits.grad
    assert gradient is not None
    single = 0 if normalization == "incoming" else len(gradient) - 1
    assert gradient[single] == 0
    assert torch.count_nonzero(gradient) == len(gradient) - 1


@pytest.mark.parametrize("name", ["ancre identity", "ancre outgoing identity"])
@pytest.mark.parametrize("moves", [False, True])
def test_identity_starts_at_zero_in_every_bit(name: str, moves: bool) -> None:
    topology = TOPOLOGY[name]()
    if moves:  # wherever the logits started, if they are where they started
        topology.logits.data.normal_()
        topology.initial_logits.copy_(topology.logits)
    bits = topology().detach().view(torch.int32)
    assert torch.equal(bits, torch.zeros(K, K, dtype=torch.int32))


def test_denseformer_starts_at_the_identity() -> None:
    weights = DenseFormer(K)()
    assert torch.equal(weights, torch.cat((torch.zeros(K, K), torch.ones(K, 1)), dim=1))


def test_denseformer_averages_what_the_blocks_gave() -> None:
    """Against the paper's own form, x_{k+1} = Σ_j α_kj X_j over the outputs of the blocks."""
    topology = moved(DenseFormer(K).double())
    blocks = [torch.nn.Linear(4, 4).double() for _ in range(K)]
    x = torch.randn(3, 4, dtype=torch.float64)
    outputs, state = [x], x
    for site, alpha in enumerate(topology.averages.split([k + 2 for k in range(K)])):
        outputs.append(blocks[site](state))
        state = sum(a * output for a, output in zip(alpha, outputs, strict=True))
    ours = plain(blocks, topology(), topology.support, x)[-1]
    torch.testing.assert_close(ours, state, rtol=1e-12, atol=1e-13)  # float64 rounding


@pytest.mark.parametrize("normalization", ["incoming", "outgoing"])
def test_ancre_reproduces_the_golden_vectors(normalization: str) -> None:
    golden = load_file(GOLDEN / f"ancre_{normalization}.safetensors")
    sites = sum(name.startswith("weight.") for name in golden)
    logits = torch.cat([golden[f"logits.{k:02d}"] for k in range(sites)])
    topology = Ancre(sites, normalization=normalization)
    # The parameters are float32 by rule; called with float64 ones it computes in float64.
    weights = functional_call(topology, {"logits": logits, "temperature": golden["tau"]}, ())
    history, x = History(weights, topology.support), golden["x0"]
    for k in range(sites):
        x = history.enter(x)
        x = history.leave(x + torch.tanh(x @ golden[f"weight.{k:02d}"].T))
        torch.testing.assert_close(x, golden[f"out.{k:02d}"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", TOPOLOGY)
@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda t: t.to(torch.bfloat16), torch.float32),
        (lambda t: t.half(), torch.float32),
        (lambda t: t.to(device="cpu", dtype=torch.float16), torch.float32),
        (lambda t: t.double(), torch.float64),
        (lambda t: t.double().bfloat16(), torch.float32),
        (lambda t: t.double().float(), torch.float32),
    ],
)
def test_never_narrower_than_float32(
    name: str, change: Callable[[Topology], Topology], dtype: torch.dtype
) -> None:
    topology = moved(TOPOLOGY[name]())
    before = {key: value.clone() for key, value in topology.state_dict().items()}
    parameters = list(topology.parameters())
    holder = change(torch.nn.Sequential(topology))[0]
    assert {value.dtype for value in topology.state_dict().values()} == {dtype}
    assert all(torch.equal(topology.state_dict()[key].float(), before[key]) for key in before)
    assert holder().dtype == dtype
    assert all(one is other for one, other in zip(topology.parameters(), parameters, strict=True))


@pytest.mark.parametrize("name", TOPOLOGY)
def test_loads_a_narrow_checkpoint_in_float32(name: str) -> None:
    saved = {key: value.bfloat16() for key, value in moved(TOPOLOGY[name]()).state_dict().items()}
    topology = TOPOLOGY[name]()
    topology.load_state_dict(saved, assign=True)
    for key, value in topology.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, saved[key].float())


@pytest.mark.parametrize("name", TOPOLOGY)
def test_meta_then_real(name: str) -> None:
    meta = TOPOLOGY[name](device="meta")
    assert meta().is_meta
    meta.to_empty(device="cpu").reset_parameters()
    assert torch.equal(meta(), TOPOLOGY[name]()())


@pytest.mark.parametrize("name", TOPOLOGY)
def test_copies_pickles_and_state_dicts_are_independent(name: str) -> None:
    topology = moved(TOPOLOGY[name]())
    weights = topology().detach().clone()
    loaded = TOPOLOGY[name]()
    loaded.load_state_dict(topology.state_dict())
    copies = [copy.deepcopy(topology), pickle.loads(pickle.dumps(topology)), loaded]  # noqa: S301
    for tensor in [*topology.parameters(), *topology.buffers()]:
        tensor.data.fill_(7.0)
    for each in copies:
        assert torch.equal(each(), weights)


@pytest.mark.parametrize(
    ("edges", "matrix"),
    [
        ("0:2, 2:3", [[0, 0, 0], [1, 0, 0], [0, 0, 1]]),
        (" 0:1=0.5,1:3 = -2e-1 ", [[0.5, 0, 0], [0, 0, 0], [0, -0.2, 0]]),
        ([[1, 0, 0], [0, 2, 0], [0, 0, 3]], [[1, 0, 0], [0, 2, 0], [0, 0, 3]]),
    ],
)
def test_static_reads_both_notations(
    edges: str | list[list[float]], matrix: list[list[float]]
) -> None:
    topology = Static(3, edges=edges)
    assert torch.equal(topology(), torch.tensor(matrix, dtype=torch.float32))
    assert not list(topology.parameters())
    expected = tuple(tuple(j for j in range(3) if row[j]) for row in matrix)
    assert topology.support == expected


REFUSED = [
    (lambda: Ancre(0), "one site or more, got 0"),
    (lambda: Ancre(3, init="zero"), "init 'zero': expected 'uniform' or 'identity'"),
    (lambda: Ancre(3, temperature=0.0), "temperature must be positive, got 0.0"),
    (lambda: Ancre(3, temperature=float("nan")), "temperature must be positive"),
    (lambda: Ancre(3, normalization="both"), "'incoming' or 'outgoing', got 'both'"),
    (lambda: Ancre(3, parameterization="hadamard"), "'softmax' or 'constant', got 'hadamard'"),
    (lambda: Ancre(3, parameterization="constant", init="identity"), "stay at zero for ever"),
    (lambda: DenseFormer(3, init="uniform"), "init 'uniform': expected 'identity'"),
    (lambda: Static(3, edges="0:2", init="identity"), "its coefficients are constants"),
    (lambda: Static(3, edges=""), "no edge in ''"),
    (lambda: Static(3, edges="0-2"), "cannot read edge '0-2'"),
    (lambda: Static(3, edges="0:2=x"), "coefficient of edge '0:2=x' is not a number"),
    (lambda: Static(3, edges="0:2=nan"), "coefficient of edge '0:2=nan' is not finite"),
    (lambda: Static(3, edges="2:2"), "edge '2:2' is outside the stack"),
    (lambda: Static(3, edges="0:4"), "with 3 sites the states are 0 to 3"),
    (lambda: Static(3, edges="0:2, 0:2=3"), "edge 0:2 is given twice"),
    (lambda: Static(2, edges=[[1, 0, 0]]), "matrix is 1 x 3, but the stack has 2 sites"),
    (lambda: Static(2, edges=[]), "matrix is 0 x 0"),
    (lambda: Static(2, edges=[[1], [1, 0]]), "matrix is 2 x 1 or 2,"),
    (lambda: Static(2, edges=[[1, 1], [1, 1]]), "not lower triangular: entry (0, 1) is 1"),
    (lambda: Static(1, edges=[[float("inf")]]), "entry (0, 0) of the matrix is inf"),
]


@pytest.mark.parametrize(("build", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refuses(build: Callable[[], Topology], message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        build()
    assert message in str(caught.value)


@pytest.mark.parametrize("name", TOPOLOGY)
@pytest.mark.parametrize(("diagonal", "shown"), [(0.0, 0.0), (1.0, 0.0), (-1.0, 1.0)])
def test_mixer_adds_its_diagonals(name: str, diagonal: float, shown: float) -> None:
    topology = moved(TOPOLOGY[name]())
    mixer = Mixer(topology, diagonal=diagonal, shown=shown)
    sites = topology.sites
    eye = torch.eye(sites)
    weights: Tensor = mixer()
    assert type(weights) is Tensor
    assert torch.equal(weights[:, :sites], topology()[:, :sites] + diagonal * eye)
    assert torch.equal(weights[:, sites:], topology()[:, sites:])
    matrix = mixer.matrix()
    assert not matrix.requires_grad
    assert torch.equal(matrix, weights[:, :sites] + shown * eye)
    matrix.fill_(9.0)
    assert torch.equal(mixer(), weights)
    if diagonal:
        assert all(site in row for site, row in enumerate(mixer.support))
    else:
        assert mixer.support == topology.support
