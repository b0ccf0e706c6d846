"""BlockIAF and LayerIAF: the authors' numbers, their sizes, the Jacobian, the inverse."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from architectures.mirror import BlockIAF, LayerIAF, MirrorMap

GOLDEN = Path(__file__).parents[2] / "golden" / "block_iaf.safetensors"

# What a model can hold: a scalar, convolutions of one to three dimensions, experts.
SHAPES = [(), (4, 3, 5), (2, 3, 2, 2), (3, 2, 2, 2, 2), (3, 4, 5), (6,), (1,), (4, 6)]
OWNERS = [0, 1, 1, 2, 3, 3, 3, 4]


def numbers(shapes: list[tuple[int, ...]], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def randomised(made: MirrorMap, seed: int = 1) -> MirrorMap:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.requires_grad_(False)


def of(kind: type[MirrorMap], **options: object) -> MirrorMap:
    return kind(SHAPES, owners=OWNERS, options=kind.Options(**options), dtype=torch.float64)


CASES = {
    "blocks of four": lambda: of(BlockIAF),
    "blocks of three": lambda: of(BlockIAF, blocks=3, shrink=(2, 3)),
    "one block": lambda: of(BlockIAF, blocks=8),
    "a block per module": lambda: of(BlockIAF, blocks="module", shrink=(2,)),
    "layer_iaf": lambda: of(LayerIAF),
}


@pytest.fixture(params=CASES, ids=str)
def made(request: pytest.FixtureRequest) -> MirrorMap:
    return CASES[request.param]()


# The authors' numbers.


def authors_state(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict by our names: they name by parameter, we number."""
    inputs = [key for key in sorted(golden) if key.startswith("in.")]
    names = [key[6:].replace(".", "_") for key in inputs]
    blocks = [names[:4], names[4:8], names[8:]]
    state: dict[str, Tensor] = {}
    first = f"map.blk_IARs.{'-'.join(blocks[0])}"
    sizes = [golden[key].numel() for key in inputs[:4]]
    for ours, theirs in (("log_scale", "log_weight"), ("shift", "bias")):
        parts = golden[f"{first}.{theirs}"].split(sizes)
        for index, part in enumerate(parts):
            state[f"first.{index}.{ours}"] = part.view(golden[inputs[index]].shape)
    for number, block in enumerate(blocks[1:]):
        for key in ("weight", "bias"):
            value = golden[f"map.blk_IARs.{'-'.join(block)}.{key}"]
            state[f"autoregressors.{number}.{key}"] = value
    layer = re.compile(r"map\.layer_(encoders|decoders)\.(\w+)\.mlp\.(\d+)\.(.+)")
    head = re.compile(r"map\.layer_decoders\.(\w+)\.(log_scale|shift)\.0\.(.+)")
    for key, value in golden.items():
        if found := layer.fullmatch(key):
            kind, name, number, rest = found.groups()
            index = names.index(name) - (4 if kind == "decoders" else 0)
            state[f"{kind}.{index}.layers.{int(number) // 2}.{rest}"] = value
        if found := head.fullmatch(key):
            state[f"decoders.{names.index(found[1]) - 4}.{found[2]}.{found[3]}"] = value
    return state


def test_the_authors_numbers() -> None:
    golden = load_file(GOLDEN)
    keys = [key for key in sorted(golden) if key.startswith("in.")]
    inputs = [golden[key] for key in keys]
    made = BlockIAF([tuple(each.shape) for each in inputs], dtype=torch.float64)
    made.load_state_dict(authors_state(golden))  # strict: every tensor has a place
    outputs = made(*inputs)
    for key, output in zip(keys, outputs, strict=True):
        # The order of sums differs, no more: a few units in the last place of float64.
        torch.testing.assert_close(output, golden[f"out.{key[3:]}"], rtol=1e-9, atol=1e-14)
    for back, given in zip(made.dual(*outputs), inputs, strict=True):
        torch.testing.assert_close(back, given, rtol=1e-9, atol=1e-14)


def test_the_sizes_of_the_authors_network() -> None:
    """The 4-conv net with 64 filters, 5-way: the counts that were derived from their code."""
    shapes: list[tuple[int, ...]] = []
    for width in (3, 64, 64, 64):
        shapes += [(64, width, 3, 3), (64,), (64,), (64,)]
    shapes += [(5, 1600), (5,)]
    made = BlockIAF(shapes, device="meta")

    def count(part: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    assert sum(torch.Size(shape).numel() for shape in shapes) == 121_093
    assert count(made.encoders) == 66_117
    assert count(made.decoders) == 3_285_937
    # That of the first block is a scale and a shift for each of its 1920 numbers.
    assert count(made.first) == 2 * 1920
    assert count(made.autoregressors) + count(made.first) == 95_481
    assert count(made) == 66_117 + 3_285_937 + 95_481 == 3_447_535
    assert round(count(made) / 121_093, 1) == 28.5


# The published formulas once more, written apart from the code, for shapes the golden numbers lack.


def kron(x: Tensor, parts: dict[str, Tensor], of: str) -> Tensor:
    """A Kronecker-linear layer as one matrix: the product of those of its modes, row-major."""
    matrix = torch.ones(1, 1, dtype=x.dtype)
    for mode in range(parts[f"{of}.bias"].dim()):
        matrix = torch.kron(matrix, parts[f"{of}.weights.{mode}"])
    return (matrix @ x.flatten()).view(parts[f"{of}.bias"].shape) + parts[f"{of}.bias"]


def by_formula(made: MirrorMap, blocks: list[list[int]], layers: int, z: list[Tensor]) -> Any:
    parts, phi = made.state_dict(), list[Tensor]()
    seen = torch.zeros(0, dtype=torch.float64)
    for number, block in enumerate(blocks):
        if number:
            hidden = parts[f"autoregressors.{number - 1}.weight"] @ seen
            hidden = hidden + parts[f"autoregressors.{number - 1}.bias"]
        for i in block:
            if number == 0:
                log_scale, shift = parts[f"first.{i}.log_scale"], parts[f"first.{i}.shift"]
            else:
                of = f"decoders.{i - len(blocks[0])}"
                entry = f"{of}.layers.0" if layers > 1 else f"{of}.shift"
                width = math.prod(
                    parts[f"{entry}.weights.{mode}"].shape[1]
                    for mode in range(parts[f"{entry}.bias"].dim())
                )
                x, hidden = hidden[:width].relu(), hidden[width:]
                for layer in range(layers - 1):
                    x = kron(x, parts, f"{of}.layers.{layer}").relu()
                log_scale = kron(x, parts, f"{of}.log_scale").view(z[i].shape)
                shift = kron(x, parts, f"{of}.shift").view(z[i].shape)
            phi.append(z[i] * log_scale.exp() + shift)
        for i in block if block is not blocks[-1] else []:
            e = z[i]
            for layer in range(layers):
                e = kron(e, parts, f"encoders.{i}.layers.{layer}").relu()
            seen = torch.cat([seen, e.flatten()])
    return phi


BLOCKS: dict[str, tuple[list[list[int]], int]] = {
    "blocks of four": ([[0, 1, 2, 3], [4, 5, 6, 7]], 3),
    "blocks of three": ([[0, 1, 2], [3, 4, 5], [6, 7]], 2),
    "one block": ([[0, 1, 2, 3, 4, 5, 6, 7]], 3),
    "a block per module": ([[0], [1, 2], [3], [4, 5, 6], [7]], 1),
    "layer_iaf": ([[0], [1], [2], [3], [4], [5], [6], [7]], 3),
}


@pytest.mark.parametrize("case", CASES)
def test_the_published_formulas(case: str) -> None:
    made, z = randomised(CASES[case]()), numbers(SHAPES)
    for output, expected in zip(made(*z), by_formula(made, *BLOCKS[case], z), strict=True):
        # The order of sums differs.
        torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)


# Structure.


def test_it_starts_as_the_identity_in_every_bit(made: MirrorMap) -> None:
    made.start(torch.Generator().manual_seed(0))
    given = numbers(SHAPES)
    assert all(map(torch.equal, made(*given), given))
    assert all(map(torch.equal, made.dual(*given), given))


def test_what_it_starts_with_is_random_but_for_the_heads() -> None:
    made = of(BlockIAF)
    made.start(torch.Generator().manual_seed(0))
    zero = {name for name, p in made.named_parameters() if not p.any()}
    heads = {n for n, _ in made.named_parameters() if re.search(r"first|log_scale|shift", n)}
    assert zero == heads


def test_the_jacobian_is_block_lower_triangular_with_a_positive_diagonal() -> None:
    made = randomised(of(BlockIAF, blocks=3, shrink=(2,)))
    given = numbers(SHAPES)
    blocks = [n // 3 for n in range(len(SHAPES))]
    jacobian = jacrev(made, argnums=tuple(range(len(SHAPES))))(*given)
    below = 0.0
    for i, row in enumerate(jacobian):
        for j, part in enumerate(row):
            matrix = part.reshape(given[i].numel(), given[j].numel())
            if i == j:
                assert torch.equal(matrix, matrix.diagonal().diag())
                assert bool((matrix.diagonal() > 0).all())
            elif blocks[j] >= blocks[i]:
                assert not matrix.any()
            else:
                below = max(below, float(matrix.abs().max()))
    assert below > 1e-4  # the blocks do depend on one another


def test_the_inverse_gives_back_the_duals(made: MirrorMap) -> None:
    randomised(made)
    given = numbers(SHAPES)
    for back, dual in zip(made.dual(*made(*given)), given, strict=True):
        # Closed form: rounding alone, of sums over encoders.
        torch.testing.assert_close(back, dual, rtol=1e-11, atol=1e-11)


def test_one_is_the_same_as_all(made: MirrorMap) -> None:
    randomised(made)
    given = numbers(SHAPES)
    for index, value in enumerate(made(*given)):
        assert torch.equal(made.one(index, *given), value)


def test_one_takes_its_own_decoder_alone() -> None:
    made, given, calls = randomised(of(BlockIAF)), numbers(SHAPES), list[int]()
    for number, decoder in enumerate(made.decoders):
        decoder.register_forward_hook(lambda *_, number=number: calls.append(number))
    made.one(6, *given)
    assert calls == [2]


def test_layer_iaf_is_block_iaf_with_blocks_of_one_tensor() -> None:
    layer, block = of(LayerIAF), of(BlockIAF, blocks=1)
    randomised(layer)
    block.load_state_dict(layer.state_dict())
    given = numbers(SHAPES)
    assert all(map(torch.equal, layer(*given), block(*given)))
    assert not torch.equal(layer(*given)[1], given[1])


def test_gradients_are_right_and_right_again() -> None:
    shapes = [(2, 3), (3,), (2,)]
    made = randomised(
        BlockIAF(shapes, options=BlockIAF.Options(blocks=1, shrink=(2,)), dtype=torch.float64)
    )
    names = [name for name, _ in made.named_parameters()]
    # Away from the kinks of the ReLUs, where a difference quotient means nothing.
    values = [p.detach().clone().requires_grad_() for p in made.parameters()]
    given = [each.requires_grad_() for each in numbers(shapes)]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        state = dict(zip(names, tensors[3:], strict=True))
        return functional_call(made, state, tensors[:3])

    assert torch.autograd.gradcheck(call, (*given, *values))
    assert torch.autograd.gradgradcheck(call, (*given, *values))


def test_tasks_run_side_by_side(made: MirrorMap) -> None:
    randomised(made)
    given = [torch.stack([a, b]) for a, b in zip(numbers(SHAPES), numbers(SHAPES, 5), strict=True)]
    together = vmap(made)(*given)
    for task in range(2):
        alone = made(*(each[task] for each in given))
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one, other[task], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ([], {}, "at least one tensor, got 0"),
        ([(3, 0)], {}, r"shape \[3, 0\] has no numbers"),
        ([(3,)], {"blocks": 0}, "blocks=0"),
        ([(3,)], {"shrink": ()}, r"shrink has factors of 1 or more, got \(\)"),
        ([(3,)], {"shrink": (2, 0)}, r"got \(2, 0\)"),
    ],
)
def test_what_cannot_be_built(
    shapes: list[tuple[int, ...]], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BlockIAF(shapes, options=BlockIAF.Options(**options))
