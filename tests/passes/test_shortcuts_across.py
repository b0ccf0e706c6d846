from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import Rule, Shortcuts
from surgery.errors import CaptureError, ModelStateError, RuleError
from surgery.passes.streams import AcrossSegment, all_segments
from tests import zoo


def timm_model(name: str, size: int, **options) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        import timm

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = timm.create_model(name, num_classes=10, **options)
            x = torch.randn(2, 3, size, size)
        return zoo.perturb(model).eval(), x

    return build


def from_zoo(name: str) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        model, example = zoo.build(name)
        return model, example.args[0]

    return build


#: Model → how to build it, the axis of its channels, the matrix, and its number of sites and cuts.
MODELS = {
    "resnet50": (
        timm_model("resnet50", 48, layers=(3, 2, 3, 2), channels=(4, 8, 12, 16), stem_width=8),
        1,
        "(the model) layer1.0..layer4.1",
        10,
        4,
    ),
    "resnet18": (
        timm_model("resnet18", 48, channels=(4, 8, 12, 16), stem_width=8),
        1,
        "(the model) layer1.0..layer4.1",
        8,
        4,
    ),
    "swin": (
        timm_model(
            "swin_tiny_patch4_window7_224",
            32,
            img_size=32,
            window_size=2,
            embed_dim=16,
            depths=(2, 2, 2),
            num_heads=(2, 4, 8),
        ),
        -1,
        "layers 0.blocks.0..2.blocks.1",
        6,
        2,
    ),
    "convnext": (from_zoo("timm_convnext"), 1, "stages 0.blocks.0..3.blocks.0", 6, 3),
    "efficientnet": (from_zoo("timm_efficientnet"), 1, "blocks 0.0..4.1", 10, 5),
}


def rewired(name: str, **options) -> tuple[nn.Module, Tensor]:
    model, x = MODELS[name][0]()
    surgery.apply(model, Rule(Shortcuts(across="project", **options)), example=x)
    return model, x


def the_segment(model: nn.Module) -> tuple[str, AcrossSegment]:
    ((holder, _, segment),) = all_segments(model)
    assert isinstance(segment, AcrossSegment)
    return holder, segment


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    for parameter in the_segment(model)[1].parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.01 * noise.to(parameter.dtype))


# -- the formula, written out ---------------------------------------------------------------------


def pooled(x: Tensor, height: int, width: int) -> Tensor:
    """The mean over windows that cover an image, (batch, channels, height, width)."""
    rows, columns = x.shape[2:]

    def window(i: int, of: int, size: int) -> slice:
        return slice(i * size // of, -(-(i + 1) * size // of))

    cells = [
        [
            x[:, :, window(i, height, rows), window(j, width, columns)].mean((2, 3))
            for j in range(width)
        ]
        for i in range(height)
    ]
    return torch.stack([torch.stack(row, -1) for row in cells], -2)


def projected(x: Tensor, like: Tensor, weight: Tensor | None, axis: int) -> Tensor:
    """A state with the shape of another one: pooled, then mapped to its channels."""
    image = x if axis == 1 else x.movedim(-1, 1)
    height, width = like.shape[2:] if axis == 1 else like.shape[1:3]
    image = pooled(image, height, width)
    if weight is not None:
        image = torch.einsum("oc,bchw->bohw", weight, image)
    return image if axis == 1 else image.movedim(1, -1)


@contextmanager
def by_the_formula(stock: nn.Module, model: nn.Module, axis: int) -> Iterator[None]:
    """Hooks on the stock model's blocks that add Σ_j W_kj P(x_j) to what block k returns.

    The projections come in the order in which the state was seen to change its shape.
    """
    holder, segment = the_segment(model)
    weights = segment().detach()
    projections = [cut.weight for cut in segment.cuts]
    states: list[Tensor] = []
    passed: list[int] = []

    def bring(like: Tensor) -> None:
        if states and states[-1].shape != like.shape:
            weight = projections[len(passed)]
            states[:] = [
                projected(x, like, None if weight is None else weight.detach(), axis)
                for x in states
            ]
            passed.append(1)

    def note(index: int) -> Callable[..., None]:
        def hook(_, args):
            if index == 0:
                states.clear()
                passed.clear()
            bring(args[0])
            states.append(args[0])

        return hook

    def mix(index: int) -> Callable[..., Tensor]:
        def hook(_, __, y):
            bring(y)
            for j, x in enumerate(states):
                y = y + weights[index, j] * x
            return y

        return hook

    handles = []
    for index, member in enumerate(segment.members):
        block = stock.get_submodule(f"{holder}.{member}" if holder else member)
        handles += [
            block.register_forward_pre_hook(note(index)),
            block.register_forward_hook(mix(index)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    assert len(passed) == len(projections)


@pytest.mark.parametrize("name", MODELS)
class TestAcrossModels:
    @pytest.mark.parametrize("training", [False, True])
    def test_identity_start_changes_no_bit(self, name, training):
        build, _, key, sites, cuts = MODELS[name]
        model, x = build()
        stock = copy.deepcopy(model).train(training)
        surgery.apply(model, Rule(Shortcuts(init="identity", across="project")), example=x)
        model.train(training)
        assert {k: tuple(m.shape) for k, m in surgery.shortcuts(model).items()} == {
            key: (sites, sites)
        }
        assert len(the_segment(model)[1].cuts) == cuts
        outputs = []
        for each in (stock, model):
            torch.manual_seed(5)
            outputs.append(each(x))
        assert torch.equal(*outputs)
        kept = model.state_dict()
        assert all(torch.equal(value, kept[k]) for k, value in stock.state_dict().items())

    def test_random_coefficients_follow_the_formula(self, name):
        build, axis, *_ = MODELS[name]
        model, x = build()
        stock, x = copy.deepcopy(model).double(), x.double()
        model.double()
        surgery.apply(model, Rule(Shortcuts(across="project")), example=x)
        randomise(model)
        with torch.no_grad():
            found, before = model(x), stock(x)
            with by_the_formula(stock, model, axis):
                expected = stock(x)
        assert not torch.allclose(found, before, rtol=1e-3)
        # Both sides are float64; the order of sums differs, and pooling is written anew.
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_undo_takes_everything_back(self, name):
        model, x = MODELS[name][0]()
        before, keys = model(x), list(model.state_dict())
        classes = [type(module) for module in model.modules()]
        surgery.apply(model, Rule(Shortcuts(across="project")), example=x)
        assert not torch.equal(model(x), before)
        surgery.undo(model)
        assert torch.equal(model(x), before)
        assert list(model.state_dict()) == keys
        assert [type(module) for module in model.modules()] == classes
        assert not any(key.startswith("_surgery") for m in model.modules() for key in vars(m))

    def test_gradients_reach_coefficients_and_projections(self, name):
        model, x = rewired(name)
        randomise(model)
        model(x).square().sum().backward()
        _, segment = the_segment(model)
        for key, parameter in segment.named_parameters():
            assert parameter.grad is not None, key
            alone = 1 if key.endswith("logits") else 0  # a softmax of one entry has no gradient
            assert int((parameter.grad == 0).sum()) <= alone, key
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_gradient_agrees_with_differences():
    model, x = rewired("resnet18")
    randomise(model.double())
    x = x.double()
    _, segment = the_segment(model)
    model(x).square().sum().backward()
    for parameter, at in [(segment.topology.logits, 20), (segment.cuts[1].weight, (3, 2))]:
        step = 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[at] += sign * step
                values.append(float(model(x).square().sum()))
                parameter[at] -= sign * step
        difference = (values[0] - values[1]) / (2 * step)
        # A central difference in float64 is right to about 1e-7 of the size of the terms.
        assert math.isclose(float(parameter.grad[at]), difference, rel_tol=1e-4)


class TestProjections:
    def test_have_names_beside_the_coefficients(self):
        model, _ = rewired("swin")
        added = [name for name, _ in model.named_parameters() if "shortcuts" in name]
        assert added == [
            "layers.shortcuts.0.topology.logits",
            "layers.shortcuts.0.cuts.0.weight",
            "layers.shortcuts.0.cuts.1.weight",
        ]
        assert model.get_parameter(added[1]).shape == (32, 16)

    def test_are_seeded_by_the_recipe(self):
        def weights(seed: int) -> list[Tensor]:
            model, x = MODELS["convnext"][0]()
            recipe = surgery.Recipe(rules=(Rule(Shortcuts(across="project")),), seed=seed)
            surgery.apply(model, recipe, example=x)
            return [cut.weight.detach() for cut in the_segment(model)[1].cuts]

        before = torch.get_rng_state()
        first, again, other = weights(1), weights(1), weights(2)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(map(torch.equal, first, again))
        assert not any(map(torch.equal, first, other))
        assert len({float(weight[0, 0]) for weight in first}) == 3

    def test_take_part_in_weight_decay(self):
        model, _ = rewired("convnext")
        _, segment = the_segment(model)
        decayed, free = surgery.parameter_groups(model, weight_decay=0.1)
        assert [p is segment.topology.logits for p in free["params"]] == [True]
        assert any(p is segment.cuts[0].weight for p in decayed["params"])

    def test_follow_the_dtype_of_the_model(self):
        model, x = rewired("resnet18")
        model.to(torch.bfloat16)
        _, segment = the_segment(model)
        assert segment.cuts[0].weight.dtype == torch.bfloat16
        assert segment.topology.logits.dtype == torch.float32
        assert model(x.to(torch.bfloat16)).dtype == torch.bfloat16

    def test_another_size_of_image(self):
        model, _ = rewired("resnet18")
        randomise(model)
        stock = MODELS["resnet18"][0]()[0]
        y = torch.randn(3, 3, 50, 70)
        with torch.no_grad(), by_the_formula(stock, model, 1):
            expected = stock(y)
        # Two float32 networks whose sums are made in different orders.
        torch.testing.assert_close(model(y), expected, rtol=1e-3, atol=1e-4)


def test_a_stack_whose_first_block_changes_the_shape():
    model, x = MODELS["resnet18"][0]()
    before = model(x)
    where = surgery.Where(stack="layer2")
    rule = Rule(Shortcuts(across="project", init="identity"), where=where)
    surgery.apply(model, rule, example=x)
    assert list(surgery.shortcuts(model)) == ["layer2 0..1"]
    assert the_segment(model)[1].places == ((0, True),)
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("stack", [["layer1", "layer2"], ["layer3", "layer4"]])
def test_two_rules_one_after_the_other(stack):
    model, x = MODELS["resnet18"][0]()
    classes = [type(module) for module in model.modules()]
    rest = [name for name in ("layer1", "layer2", "layer3", "layer4") if name not in stack]
    outputs = [model(x)]
    for index, names in enumerate((stack, rest)):
        rule = Rule(Shortcuts(across="project"), where=surgery.Where(stack=names), id=str(index))
        surgery.apply(model, rule, example=x)
        outputs.append(model(x))
    assert len(surgery.shortcuts(model)) == 2
    assert not torch.equal(outputs[1], outputs[2])
    for left in (1, 0):
        surgery.undo(model, last=1)
        assert torch.equal(model(x), outputs[left])
    assert [type(module) for module in model.modules()] == classes


def test_edges_that_cross_cuts():
    model, x = rewired("swin", topology="static", edges="0:5, 1:4")
    stock = MODELS["swin"][0]()[0]
    with torch.no_grad(), by_the_formula(stock, model, -1):
        expected = stock(x)
    # Two float32 networks whose sums are made in different orders.
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stock(x), expected, rtol=1e-2)


def test_replace_between_blocks_that_hand_their_state_on():
    model, x = MODELS["swin"][0]()
    before = model(x)
    rule = Rule(Shortcuts(across="project", mode="replace", init="identity"))
    surgery.apply(model, rule, example=x)
    (matrix,) = surgery.shortcuts(model).values()
    assert torch.equal(matrix, torch.eye(6))
    assert torch.equal(model(x), before)


class TestUse:
    def test_save_and_restore(self, tmp_path):
        model, x = rewired("convnext")
        randomise(model)
        expected = model(x)
        surgery.save(model, tmp_path / "out")
        made = surgery.restore(tmp_path / "out", MODELS["convnext"][0]()[0])
        assert torch.equal(made(x), expected)
        surgery.undo(made)
        assert torch.equal(made(x), MODELS["convnext"][0]()[0](x))

    def test_pickle_and_deepcopy(self):
        model, x = rewired("resnet18")
        randomise(model)
        expected = model(x)
        unpickled = pickle.loads(pickle.dumps(model))  # noqa: S301  our own bytes
        for made in (copy.deepcopy(model), unpickled):
            assert torch.equal(made(x), expected)
            the_segment(made)[1].cuts[0].weight.data.zero_()
            assert not torch.equal(made(x), expected)
        assert torch.equal(model(x), expected)

    def test_freeze(self):
        model, x = rewired("swin")
        randomise(model)
        expected = model(x)
        surgery.apply(model, Rule(surgery.Freeze()), example=x)
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("name", ["resnet18", "swin", "efficientnet"])
    def test_gradient_checkpointing(self, name):
        model, x = rewired(name)
        randomise(model)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()  # its statistics would be updated twice
        found = []
        for enabled in (False, True):
            model.set_grad_checkpointing(enabled)
            model.zero_grad()
            torch.manual_seed(5)
            out = model(x)
            out.square().sum().backward()
            found.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert len(found[0]) == len(found[1])
        assert all(map(torch.equal, *found))

    def test_other_methods_of_the_model(self):
        model, x = rewired("resnet18")
        randomise(model)
        assert torch.equal(model.forward_head(model.forward_features(x)), model(x))

    def test_a_stage_by_itself_is_refused(self):
        model, _ = rewired("swin")
        with pytest.raises(CaptureError, match="SwinTransformerStage holds blocks whose shortcut"):
            model.layers[0](torch.randn(2, 8, 8, 16))
        surgery.undo(model)
        model.layers[0](torch.randn(2, 8, 8, 16))

    def test_a_hook_on_a_stage_is_refused(self):
        model, x = rewired("resnet18")
        handle = model.layer2.register_forward_hook(lambda *_: None)
        with pytest.raises(ModelStateError, match="layer2 of a rewired ResNet has a hook"):
            model(x)
        handle.remove()
        model(x)

    def test_a_stack_of_one_shape_needs_no_capture(self):
        model, example = zoo.build("timm_vit")
        rule = Rule(Shortcuts(across="project"))
        (edit,) = surgery.plan(model, rule, example=example).edits
        assert "captured" not in edit.payload


# -- hand-written chains --------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.in_place = False

    def forward(self, x: Tensor) -> Tensor:
        branch = torch.tanh(self.linear(self.norm(x)))
        return x.add_(branch) if self.in_place else x + branch


class Stages(nn.Module):
    def __init__(self, between: nn.Module, widths: tuple[int, int]) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block(widths[0]) for _ in range(2))
        self.between = between
        self.second = nn.ModuleList(Block(widths[1]) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.first:
            x = block(x)
        x = self.between(x)
        for block in self.second:
            x = block(x)
        return x


class Every(nn.Module):
    """Every second item of an axis."""

    def __init__(self, *axes: int) -> None:
        super().__init__()
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        for axis in self.axes:
            x = x.index_select(axis, torch.arange(0, x.shape[axis], 2))
        return x


def test_tokens_whose_width_changes():
    torch.manual_seed(0)
    model, x = Stages(nn.Linear(8, 12), (8, 12)).double(), torch.randn(2, 5, 8).double()
    stock = copy.deepcopy(model)
    surgery.apply(model, Rule(Shortcuts(across="project")), example=x)
    randomise(model)
    (segment,) = (segment for *_, segment in all_segments(model))
    assert segment.members == ("first.0", "first.1", "second.0", "second.1", "second.2")
    (cut,), weights = segment.cuts.children(), segment().detach()
    state, states = x, []
    for index, member in enumerate(segment.members):
        if index == 2:
            state = stock.between(state)
            states = [each @ cut.weight.T for each in states]
        states.append(state)
        made = stock.get_submodule(member)(state)
        state = made + sum(weights[index, j] * each for j, each in enumerate(states))
    # Both float64, the same sums in another order.
    torch.testing.assert_close(model(x), state, rtol=1e-12, atol=1e-12)


def test_stacks_of_one_shape_have_one_matrix_without_projections():
    model, x = Stages(nn.Tanh(), (8, 8)), torch.randn(2, 5, 8)
    before = model(x)
    surgery.apply(model, Rule(Shortcuts(across="project", init="identity")), example=x)
    assert [m.shape for m in surgery.shortcuts(model).values()] == [(5, 5)]
    assert not list(the_segment(model)[1].cuts)
    assert torch.equal(model(x), before)


REFUSED = [
    ("tokens", Stages(Every(1), (8, 8)), (2, 6, 8), "but not its number of tokens"),
    ("grows", Stages(nn.Upsample(scale_factor=2), (8, 16)), (2, 4, 8, 8), "may shrink"),
    ("ambiguous", Stages(Every(1, 2, 3), (8, 4)), (2, 8, 8, 8), "channels first or with its"),
    ("rank", Stages(nn.Flatten(1, 2), (8, 8)), (2, 4, 4, 8), "dimensions or the batch differ"),
]


@pytest.mark.parametrize(
    ("model", "shape", "message"), [case[1:] for case in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_changes_that_are_no_projection(model, shape, message):
    rule = Rule(Shortcuts(across="project"))
    with pytest.raises(RuleError, match=message) as caught:
        surgery.plan(model, rule, example=torch.randn(shape))
    assert "between first.1 and second.0 the state changes from float32[2, " in str(caught.value)


def test_replace_needs_blocks_that_hand_their_state_on():
    model, x = MODELS["resnet18"][0]()
    rule = Rule(Shortcuts(across="project", mode="replace"))
    with pytest.raises(RuleError, match=r"layer1\.0 changes the shape of the state and does not"):
        surgery.plan(model, rule, example=x)


def test_residual_scope_has_no_projections():
    model, x = MODELS["swin"][0]()
    rule = Rule(Shortcuts(across="project", scope="residual"))
    with pytest.raises(RuleError, match="needs scope: block"):
        surgery.plan(model, rule, example=x)


def pooling() -> tuple[nn.Module, Tensor]:
    """An image whose height, width and channels change between two stacks, and it rewired."""
    torch.manual_seed(0)
    model = Stages(nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(5, 7, 1)), (12, 6))
    x = torch.randn(2, 5, 8, 12)
    surgery.apply(model, Rule(Shortcuts(across="project")), example=x)
    randomise(model)
    return model, x


def test_compile():
    model, x = pooling()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    gradients = []
    for each in (model, compiled):
        model.zero_grad()
        each(x).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    # The order of the sums differs.
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)


def test_export():
    model, x = pooling()
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))


class Pair(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.other = Block(width), Block(width)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.one(x), self.other(y)


class Streams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Pair(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.sin(x)
        for layer in self.layers:
            x, y = layer(x, y)
        return x + y


class Turns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(Block(8) for _ in range(3))
        self.second = nn.ModuleList(Pair(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            x = second(first(x), x)[0]
        return x


UNFIT = [(Streams, "carry 2 streams side by side"), (Turns, "are called in turns")]


@pytest.mark.parametrize(("kind", "message"), UNFIT, ids=["streams", "turns"])
def test_stacks_that_make_no_chain(kind, message):
    with pytest.raises(RuleError, match=message):
        surgery.plan(kind(), Rule(Shortcuts(across="project")), example=torch.randn(2, 8))


def test_blocks_that_write_to_their_input_are_left_out():
    model, x = Stages(nn.Linear(8, 12), (8, 12)), torch.randn(2, 5, 8)
    model.second[1].in_place = True
    rule = Rule(Shortcuts(across="project", init="identity"))
    before = model(x)
    plan = surgery.plan(model, rule, example=x)
    (edit,) = plan.edits
    why = "it gives back the tensor it was given, changed in place or not at all"
    assert f"second.1 is left out: {why}" in edit.notes
    assert edit.payload["members"] == ["first.0", "first.1", "second.0", "second.2"]
    plan.apply()
    assert torch.equal(model(x), before)
