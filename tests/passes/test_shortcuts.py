from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import Rule, Shortcuts
from surgery.passes.streams import all_segments
from tests import zoo

#: Zoo models with two or more blocks in a row, and the runs that are rewired.
RUNS = {
    "llama": {"model.layers 0..3": 4},
    "gpt2": {"transformer.h 0..2": 3},
    "bert": {"encoder.layer 0..2": 3},
    "t5": {"encoder.block 0..2": 3, "decoder.block 0..2": 3},
    "mixtral": {"model.layers 0..2": 3},
    "whisper": {"model.encoder.layers 0..2": 3, "model.decoder.layers 0..2": 3},
    "DiTTransformer2DModel": {"transformer_blocks 0..2": 3},
    "SD3Transformer2DModel": {"transformer_blocks 0..2": 3},
    "FluxTransformer2DModel": {"transformer_blocks 0..1": 2, "single_transformer_blocks 0..1": 2},
    "UNet2DConditionModel": {
        "down_blocks.0.attentions 0..1": 2,
        "down_blocks.0.resnets 0..1": 2,
        "up_blocks.1.attentions 0..2": 3,
        "mid_block.resnets 0..1": 2,
    },
    "timm_vit": {"blocks 0..2": 3},
    "timm_swin": {"layers.0.blocks 0..1": 2, "layers.1.blocks 0..1": 2},
    "timm_convnext": {"stages.2.blocks 0..2": 3},
    "timm_eva": {"blocks 0..2": 3},
}


def outputs(value: object) -> Iterator[Tensor]:
    """Every tensor of a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from outputs(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from outputs(item)


def call(model: nn.Module, example: surgery.Example) -> list[Tensor]:
    with torch.no_grad():
        return [t for t in outputs(model(*example.args, **example.kwargs)) if t.is_floating_point()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for _, _, segment in all_segments(model):
        for parameter in segment.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data.add_(0.01 * noise)


@contextmanager
def by_the_formula(stock: nn.Module, rewired: nn.Module) -> Iterator[None]:
    """Hooks on the blocks of the stock model that add Σ_j W_kj x_j to what block k returns."""
    handles = []
    for holder, _, segment in all_segments(rewired):
        weights = segment().detach()
        states: list[list[Tensor]] = []
        names = [stream.name for stream in segment.streams]
        spots = [stream.result for stream in segment.streams]
        for index, member in enumerate(segment.members):
            block = stock.get_submodule(f"{holder}.{member}" if holder else member)

            def note(_, args, kwargs, index=index, states=states, names=names):
                if index == 0:
                    states.clear()
                given = [kwargs[name] if name in kwargs else args[0] for name in names]
                states.append(given)

            def mix(_, __, made, index=index, states=states, weights=weights, spots=spots):
                def mixed(y: Tensor | None, stream: int) -> Tensor | None:
                    if y is None:
                        return None
                    for j in range(index + 1):
                        y = y + weights[index, j].to(y.dtype) * states[j][stream]
                    return y

                if isinstance(made, Tensor):
                    return mixed(made, 0)
                parts = list(made)
                for stream, spot in enumerate(spots):
                    at = spot[0] if spot else 0
                    parts[at] = mixed(parts[at], stream)
                return tuple(parts)

            handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
            handles.append(block.register_forward_hook(mix))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", RUNS)
class TestAcrossModels:
    def test_identity_start_changes_no_bit(self, name):
        model, example = zoo.build(name)
        before = call(model, example)
        surgery.apply(model, Rule(Shortcuts(init="identity")), example=example)
        found = surgery.shortcuts(model)
        assert {key: len(matrix) for key, matrix in found.items()} == RUNS[name]
        assert all(not matrix.any() for matrix in found.values())
        assert same(call(model, example), before)

    def test_random_coefficients_follow_the_formula(self, name):
        model, example = zoo.build(name)
        if name == "mixtral":
            model.set_experts_implementation("eager")  # the grouped kernel has no float64
        stock = copy.deepcopy(model).double()
        example = example.map(lambda t: t.double() if t.is_floating_point() else t)
        model.double()
        before = call(model, example)
        surgery.apply(model, Rule(Shortcuts(init="identity")), example=example)
        randomise(model)
        after = call(model, example)
        with by_the_formula(stock, model):
            expected = call(stock, example)
        assert not same(after, before)
        for one, other in zip(after, expected, strict=True):
            # Both sides are float64; only the order of a sum of a few terms differs.
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)

    def test_undo_takes_everything_back(self, name):
        model, example = zoo.build(name)
        before, keys = call(model, example), list(model.state_dict())
        classes = [type(module) for module in model.modules()]
        surgery.apply(model, Rule(Shortcuts()), example=example)
        assert not same(call(model, example), before)
        surgery.undo(model)
        assert same(call(model, example), before)
        assert list(model.state_dict()) == keys
        assert [type(module) for module in model.modules()] == classes
        assert not any(key.startswith("_surgery") for m in model.modules() for key in vars(m))


def rewired(name: str = "llama", **options) -> tuple[nn.Module, surgery.Example]:
    model, example = zoo.build(name)
    surgery.apply(model, Rule(Shortcuts(**options)), example=example)
    randomise(model)
    return model, example


def test_uniform_start_is_the_authors():
    model, _ = rewired("timm_vit")
    surgery.undo(model)
    surgery.apply(model, Rule(Shortcuts()))
    (matrix,) = surgery.shortcuts(model).values()
    expected = torch.tensor([[1, 0, 0], [1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(matrix, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["add", "replace"])
def test_identity_start_at_depth_48(dtype, mode):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(16) for _ in range(48))).to(dtype)
    x = torch.randn(4, 16, dtype=dtype)
    before = model(x)
    surgery.apply(model, Rule(Shortcuts(init="identity", mode=mode)), example=x)
    assert torch.equal(model(x), before)


def test_every_coefficient_with_company_gets_a_gradient():
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(16) for _ in range(6)))
    x = torch.randn(4, 16)
    surgery.apply(model, Rule(Shortcuts(init="identity")), example=x)
    model(x).square().sum().backward()
    (logits,) = [p for name, p in model.named_parameters() if "shortcuts" in name]
    assert logits.numel() == 21
    gradient = logits.grad
    assert gradient is not None
    assert not gradient[0]  # alone in its softmax
    assert gradient[1:].all()


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


def test_block_replace_puts_the_mixture_in_the_place_of_the_shortcut():
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(8) for _ in range(4))).double()
    blocks = list(model)
    x = torch.randn(3, 8, dtype=torch.float64)
    surgery.apply(model, Rule(Shortcuts(mode="replace")), example=x)
    randomise(model)
    (matrix,) = surgery.shortcuts(model).values()
    states = [x]
    for k, block in enumerate(blocks):
        branch = torch.tanh(block.linear(block.norm(states[k])))
        states.append(branch + sum(matrix[k, j] * states[j] for j in range(k + 1)))
    torch.testing.assert_close(model(x), states[-1], rtol=1e-12, atol=1e-12)


def test_the_list_of_blocks_looks_as_before():
    model, _ = rewired("llama")
    layers = model.model.layers
    assert len(layers) == 4
    assert len(list(layers)) == 4
    assert layers[-1] is list(layers)[3]
    assert len(layers[1:3]) == 2
    assert type(layers[1:3]) is nn.ModuleList
    assert isinstance(layers, nn.ModuleList)


def test_parameters_have_names_beside_the_blocks():
    model, _ = rewired("llama")
    added = [name for name, _ in model.named_parameters() if "shortcuts" in name]
    assert added == ["model.layers.shortcuts.0.topology.logits"]
    assert model.get_parameter(added[0]).numel() == 10


def test_coefficients_stay_in_float32():
    model, example = rewired("llama")
    model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    coefficients = [p for name, p in model.named_parameters() if "shortcuts" in name]
    assert all(p.dtype == torch.float32 for p in coefficients)
    assert call(model, example)[0].dtype == torch.bfloat16


def test_parameter_groups_keep_coefficients_out_of_decay():
    model, _ = rewired("bert")
    decayed, free = surgery.parameter_groups(model, weight_decay=0.1)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert len(free["params"]) == 1
    both = len(decayed["params"]) + len(free["params"])
    assert both == len(list(model.parameters()))
    assert len(surgery.parameter_groups(zoo.build("bert")[0], weight_decay=0.1)) == 1


def test_hidden_states_are_those_after_mixing():
    model: Any
    model, example = rewired("llama")
    seen: list[Tensor] = []

    def note(_, args):
        seen.append(args[0])

    for layer in model.model.layers:
        layer.register_forward_pre_hook(note)
    with torch.no_grad():
        found = model(*example.args, **example.kwargs, output_hidden_states=True).hidden_states
    assert len(found) == 5
    assert all(map(torch.equal, found[:4], seen))


def test_cached_generation_equals_uncached():
    model, _ = rewired("llama")
    ids = torch.randint(5, 90, (2, 7))
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(ids, use_cache=True, **options)
    assert cached.shape == (2, 13)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_pickle_and_deepcopy():
    model, example = rewired("bert")
    expected = call(model, example)
    unpickled = pickle.loads(pickle.dumps(model))  # noqa: S301  our own bytes
    for made in (copy.deepcopy(model), unpickled):
        assert same(call(made, example), expected)
        for _, _, segment in all_segments(made):
            segment.topology.logits.data.zero_()
        assert not same(call(made, example), expected)
    assert same(call(model, example), expected)


def test_save_and_restore(tmp_path):
    model, example = rewired("t5")
    expected = call(model, example)
    surgery.save(model, tmp_path / "out")
    made = surgery.restore(tmp_path / "out")
    assert same(call(made, example), expected)
    surgery.undo(made)
    assert same(call(made, example), call(zoo.build("t5")[0], example))


def test_verify_holds_the_identity_start_to_exactness():
    model, example = zoo.build("bert")
    surgery.apply(model, Rule(Shortcuts(init="identity")), example=example)
    report = surgery.verify(model, example)
    report.check()
    assert report.contract.kind == "exact"


def test_a_part_of_a_stack_can_be_rewired():
    model, example = zoo.build("llama")
    surgery.apply(model, Rule(Shortcuts(), where=surgery.Layers("1:")), example=example)
    assert list(surgery.shortcuts(model)) == ["model.layers 1..3"]


def test_two_parts_of_a_stack_by_two_applications():
    model, example = zoo.build("llama")
    before = call(model, example)
    surgery.apply(model, Rule(Shortcuts(), where=surgery.Layers(":2")), example=example)
    first = call(model, example)
    surgery.apply(model, Rule(Shortcuts(), where=surgery.Layers("2:")), example=example)
    assert list(surgery.shortcuts(model)) == ["model.layers 0..1", "model.layers 2..3"]
    surgery.undo(model, last=1)
    assert same(call(model, example), first)
    surgery.undo(model)
    assert same(call(model, example), before)


def test_blocks_as_attributes():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block1, self.block2, self.block3 = Block(8), Block(8), Block(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.block1(x)
            x = self.block2(x)
            return self.block3(x)

    model, x = Net(), torch.randn(2, 8)
    stock = copy.deepcopy(model)
    surgery.apply(model, Rule(Shortcuts()), example=x)
    randomise(model)
    with by_the_formula(stock, model), torch.no_grad():
        expected = stock(x)
    torch.testing.assert_close(model(x), expected)
    surgery.undo(model)
    assert torch.equal(model(x), stock(x))


STATIC = [
    ("0:2", [[0, 0, 0], [1, 0, 0], [0, 0, 0]]),
    ("0:1, 1:2, 2:3", [[1, 0, 0], [0, 1, 0], [0, 0, 1]]),
    (((0.5, 0.0, 0.0), (0.25, 0.0, 0.0), (0.0, 0.0, 2.0)), [[0.5, 0, 0], [0.25, 0, 0], [0, 0, 2]]),
]


@pytest.mark.parametrize(("edges", "matrix"), STATIC)
def test_static_topologies(edges, matrix):
    model, _ = rewired("timm_vit", topology="static", edges=edges)
    (found,) = surgery.shortcuts(model).values()
    assert torch.equal(found, torch.tensor(matrix))


class TestFreeze:
    def test_constants_change_no_bit(self):
        model, example = rewired("bert")
        before = call(model, example)
        surgery.apply(model, Rule(surgery.Freeze()), example=example)
        assert same(call(model, example), before)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert not any("shortcuts" in name for name in trained)
        surgery.undo(model, last=1)
        assert same(call(model, example), before)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert any("shortcuts" in name for name in trained)

    def test_verified(self):
        """The coefficients that constants stand in for are left out, and nothing else is."""
        model, example = rewired("bert")
        surgery.apply(model, Rule(surgery.Freeze()), example=example)
        rule = Rule(surgery.LowRank(rank=2), where=surgery.Role("attention.q"))
        surgery.apply(model, rule, example=example)
        report = surgery.verify(model, example)
        assert report.ok, report
        rows = {row.check: row for row in report.rows}
        assert rows["inserted tensors reached by gradient"].detail == "6 of 6"
        (told,) = [u for u in report.unchecked if "constants in its place" in u.reason]
        assert told.reason.startswith("encoder.layer.shortcuts.0.topology.")

    def test_small_edges_are_dropped_and_the_change_is_told(self):
        model, example = rewired("bert")
        (matrix,) = surgery.shortcuts(model).values()
        before = call(model, example)
        plan = surgery.plan(model, Rule(surgery.Freeze(threshold=0.3)), example=example)
        (note,) = plan.edits[0].notes
        plan.apply()
        (left,) = surgery.shortcuts(model).values()
        assert torch.equal(left, torch.where(matrix.abs() >= 0.3, matrix, 0))
        assert 0 < int((left != 0).sum()) < int((matrix != 0).sum())
        after = call(model, example)
        differences = [a - b for a, b in zip(after, before, strict=True)]
        apart, norm = (
            math.sqrt(sum(float(t.double().square().sum()) for t in group))
            for group in (differences, before)
        )
        assert f"{apart / norm:.2e}" in note

    def test_saved_and_restored(self, tmp_path):
        model, example = rewired("bert")
        surgery.apply(model, Rule(surgery.Freeze(threshold=0.3)), example=example)
        expected = call(model, example)
        surgery.save(model, tmp_path / "out")
        made = surgery.restore(tmp_path / "out")
        assert same(call(made, example), expected)


class Plain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x))


class Branching(Block):
    """A block whose own code nobody can rewrite or trace, and need not be."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) * float(x.detach().sum() > 0)


BAD = [
    ("no residuals", lambda: nn.Sequential(*(Plain(8) for _ in range(3))), {}, "no residual add"),
    ("one block", lambda: nn.Sequential(nn.Linear(8, 8), Block(8)), {}, "matched nothing"),
    (
        "upper triangle",
        lambda: nn.Sequential(*(Block(8) for _ in range(2))),
        {"topology": "static", "edges": ((0.0, 1.0), (0.0, 0.0))},
        "triang",
    ),
    (
        "wrong size",
        lambda: nn.Sequential(*(Block(8) for _ in range(2))),
        {"topology": "static", "edges": ((0.0,),)},
        "2",
    ),
    (
        "edge out of range",
        lambda: nn.Sequential(*(Block(8) for _ in range(2))),
        {"topology": "static", "edges": "0:5"},
        "0:5",
    ),
    (
        "static identity",
        lambda: nn.Sequential(*(Block(8) for _ in range(2))),
        {"topology": "static", "edges": "0:1", "init": "identity"},
        "identity",
    ),
    (
        "constant identity",
        lambda: nn.Sequential(*(Block(8) for _ in range(2))),
        {"init": "identity", "parameterization": "constant"},
        "constant",
    ),
    (
        "option of another topology",
        lambda: nn.Sequential(*(Block(8) for _ in range(2))),
        {"topology": "denseformer", "temperature": 0.1},
        "temperature",
    ),
]


@pytest.mark.parametrize(
    ("build", "options", "told"), [case[1:] for case in BAD], ids=[c[0] for c in BAD]
)
def test_bad_input_is_refused(build, options, told):
    model, x = build(), torch.randn(2, 8)
    keys = list(model.state_dict())
    with pytest.raises(surgery.SurgeryError, match=told):
        surgery.apply(model, Rule(Shortcuts(**options)), example=x)
    assert list(model.state_dict()) == keys
    assert type(model) is nn.Sequential


def test_unknown_topology():
    with pytest.raises(surgery.RuleError, match="did you mean 'ancre'"):
        Shortcuts(topology="ancer")


def test_plain_blocks_on_request():
    model, x = nn.Sequential(*(Plain(8) for _ in range(3))), torch.randn(2, 8)
    surgery.apply(model, Rule(Shortcuts(plain_blocks=True)), example=x)
    assert list(surgery.shortcuts(model)) == ["(the model) 0..2"]


def test_a_second_rule_on_the_same_stack_is_a_conflict():
    model, example = rewired("llama")
    with pytest.raises(surgery.Conflict, match=r"the shortcuts of model\.layers\.0"):
        surgery.plan(model, Rule(Shortcuts()), example=example)
    fresh, example = zoo.build("llama")
    rules = [Rule(Shortcuts(), id="one"), Rule(Shortcuts(), id="two")]
    with pytest.raises(surgery.Conflict, match="'one' and 'two'"):
        surgery.plan(fresh, rules, example=example)


def test_blocks_that_do_not_follow_one_another():
    model, example = zoo.build("llama")
    with pytest.raises(surgery.RuleError, match="do not follow one another"):
        surgery.plan(model, Rule(Shortcuts(), where=surgery.Layers("::2")), example=example)


def test_a_checkpoint_of_another_depth_is_refused(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 8)
    deep, flat = (nn.Sequential(*(Block(8) for _ in range(depth))) for depth in (4, 3))
    surgery.apply(deep, Rule(Shortcuts()), example=x)
    surgery.save(deep, tmp_path / "out")
    before = flat(x)
    with pytest.raises(surgery.CheckpointError):
        surgery.restore(tmp_path / "out", model=flat)
    assert torch.equal(flat(x), before)
    assert type(flat) is nn.Sequential


def test_a_skipped_block_is_noticed():
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.skip = False
            self.blocks = nn.ModuleList(Block(8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for index, block in enumerate(self.blocks):
                if self.skip and index == 1:
                    continue
                x = block(x)
            return x

    model, x = Skipping(), torch.randn(2, 8)
    surgery.apply(model, Rule(Shortcuts()), example=x)
    model(x)
    model.skip = True
    with pytest.raises(surgery.SurgeryError, match=r"block '2'.*block '1' comes next"):
        model(x)


def test_a_block_that_gives_back_its_input_is_refused():
    class Writing(Block):
        def forward(self, x: Tensor) -> Tensor:
            x += torch.tanh(self.linear(x))
            return x

    model, x = nn.Sequential(*(Writing(8) for _ in range(3))), torch.randn(2, 8)
    with pytest.raises(surgery.RuleError, match="the tensor it was given, changed in place"):
        surgery.apply(model, Rule(Shortcuts()), example=x)


def test_a_block_that_writes_into_its_input_is_noticed():
    class Writing(Block):
        def forward(self, x: Tensor) -> Tensor:
            made = x + torch.tanh(self.linear(x))
            x.zero_()
            return made

    model, x = nn.Sequential(*(Writing(8) for _ in range(3))), torch.randn(2, 8)
    surgery.apply(model, Rule(Shortcuts()), example=x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="modified in place"):
        model(x.clone())


def test_blocks_that_cannot_be_traced_need_not_be():
    model, x = nn.Sequential(*(Branching(8) for _ in range(3))), torch.randn(2, 8)
    before = model(x)
    surgery.apply(model, Rule(Shortcuts(init="identity", plain_blocks=True)), example=x)
    assert torch.equal(model(x), before)


def test_the_plan_shows_the_code():
    model, example = zoo.build("llama")
    code = surgery.plan(model, Rule(Shortcuts()), example=example).code()
    assert "LlamaModel.forward" in code
    assert "steps(decoder_layer)(" in code["LlamaModel.forward"]


def test_two_lists_that_share_code_share_a_class():
    model, _ = rewired("timm_swin")
    first, second = (model.layers[stage].blocks for stage in (0, 1))
    assert type(first) is type(second)


#: Models whose additions have states of one shape, and their number of sites.
SITES = {
    "llama": {"model.layers 0..3": 8},
    "gpt2": {"transformer.h 0..2": 6},
    "bert": {"encoder.layer 0..2": 6},
    "t5": {"encoder.block 0..2": 6, "decoder.block 0..2": 9},
    "mixtral": {"model.layers 0..2": 6},
    "timm_vit": {"blocks 0..2": 6},
    "timm_convnext": {"stages.2.blocks 0..2": 3},
}


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("mode", ["add", "replace"])
class TestEveryResidual:
    def test_identity_start_changes_no_bit(self, name, mode):
        model, example = zoo.build(name)
        before = call(model, example)
        rule = Rule(Shortcuts(scope="residual", mode=mode, init="identity"))
        surgery.apply(model, rule, example=example)
        found = surgery.shortcuts(model)
        assert {key: len(matrix) for key, matrix in found.items()} == SITES[name]
        for matrix in found.values():
            start = torch.eye(len(matrix)) if mode == "replace" else torch.zeros_like(matrix)
            assert torch.equal(matrix, start)
        assert same(call(model, example), before)
        randomise(model)
        assert not same(call(model, example), before)
        surgery.undo(model)
        assert same(call(model, example), before)


def residual_reference(model: Any, ids: Tensor, matrix: Tensor, mode: str) -> Tensor:
    """A Llama written out, with every residual addition a site."""
    inner = model.model
    x = inner.embed_tokens(ids)
    length = ids.shape[1]
    positions = torch.arange(length)[None]
    rotary = inner.rotary_emb(x, positions)
    mask = torch.full((length, length), -math.inf, dtype=x.dtype).triu(1)[None, None]
    states: list[Tensor] = []

    def add(shortcut: Tensor, branch: Tensor) -> Tensor:
        states.append(shortcut)
        mixed = sum(c * s for c, s in zip(matrix[len(states) - 1], states, strict=False))
        return branch + mixed + (shortcut if mode == "add" else 0)

    for layer in inner.layers:
        attention = layer.self_attn(
            layer.input_layernorm(x), position_embeddings=rotary, attention_mask=mask
        )[0]
        x = add(x, attention)
        x = add(x, layer.mlp(layer.post_attention_layernorm(x)))
    return model.lm_head(inner.norm(x))


@pytest.mark.parametrize("mode", ["add", "replace"])
@pytest.mark.parametrize("init", ["uniform", "identity"])
def test_every_residual_follows_the_formula(mode, init):
    model, example = zoo.build("llama")
    model.double()
    ids = example.kwargs["input_ids"]
    stock = copy.deepcopy(model)
    surgery.apply(model, Rule(Shortcuts(scope="residual", mode=mode, init=init)), example=(ids,))
    randomise(model)
    (matrix,) = surgery.shortcuts(model).values()
    with torch.no_grad():
        expected = residual_reference(stock, ids, matrix.double(), mode)
        found = model(ids).logits
    # Both sides are float64; the sums have a handful of terms.
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


class TestResidualScopeInUse:
    def test_cached_generation_equals_uncached(self):
        model, _ = rewired("llama", scope="residual")
        ids = torch.randint(5, 90, (2, 7))
        options = {"max_new_tokens": 6, "do_sample": False}
        cached = model.generate(ids, use_cache=True, **options)
        assert torch.equal(cached, model.generate(ids, use_cache=False, **options))

    def test_hidden_states_are_tensors(self):
        model, example = rewired("t5", scope="residual")
        with torch.no_grad():
            found = model(*example.args, **example.kwargs, output_hidden_states=True)
        states = (*found.encoder_hidden_states, *found.decoder_hidden_states)
        assert all(isinstance(state, Tensor) for state in states)

    def test_save_restore_and_undo(self, tmp_path):
        model, example = rewired("bert", scope="residual")
        expected = call(model, example)
        surgery.save(model, tmp_path / "out")
        made = surgery.restore(tmp_path / "out")
        assert same(call(made, example), expected)
        surgery.undo(made)
        assert same(call(made, example), call(zoo.build("bert")[0], example))

    def test_pickle_and_deepcopy(self):
        model, example = rewired("bert", scope="residual")
        expected = call(model, example)
        unpickled = pickle.loads(pickle.dumps(model))  # noqa: S301  our own bytes
        for made in (copy.deepcopy(model), unpickled):
            assert same(call(made, example), expected)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_gradient_checkpointing(self, reentrant):
        model, example = rewired("llama", scope="residual", mode="replace")
        model.train()

        def gradients() -> dict[str, Tensor]:
            model.zero_grad()
            model(**example.kwargs, use_cache=False).logits.square().mean().backward()
            return {name: p.grad.clone() for name, p in model.named_parameters()}

        expected = gradients()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients()
        assert any("shortcuts" in name for name in found)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name], msg=name)

    def test_a_block_called_by_itself_is_an_error(self):
        model, _ = rewired("timm_vit", scope="residual")
        with pytest.raises(surgery.CaptureError, match="outside of its stack"):
            model.blocks[0](torch.randn(1, 17, 32))

    def test_the_plan_shows_the_generated_forward(self):
        model, example = zoo.build("llama")
        code = surgery.plan(model, Rule(Shortcuts(scope="residual")), example=example).code()
        (name,) = [key for key in code if key.startswith("LlamaDecoderLayer.forward")]
        assert "add_states(" in code[name]

    def test_streams_side_by_side_are_refused(self):
        model, example = zoo.build("FluxTransformer2DModel")
        with pytest.raises(surgery.RuleError, match="scope: block"):
            surgery.apply(model, Rule(Shortcuts(scope="residual")), example=example)
