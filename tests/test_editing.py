"""Apply is in place, all or nothing; undo puts everything back bit for bit."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path as FilePath
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import surgery
from surgery import LowRank, Path, Rule, Type
from surgery.editing import repeat
from surgery.errors import ModelStateError
from surgery.passes.base import ApplyContext
from surgery.record import Edit, Record, record_of


class Tower(nn.Module):
    """Embedding, convolution, linear layers and a tied head, all of which LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)
        self.layers = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids_BL: Tensor) -> Tensor:
        x_BLD = self.embed(ids_BL)
        x_BLD = self.mix(x_BLD.transpose(1, 2)).transpose(1, 2)
        return self.head(x_BLD + self.layers(x_BLD))


def tower(seed: int = 0) -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tower().eval()


def ids() -> Tensor:
    return torch.randint(11, (2, 5), generator=torch.Generator().manual_seed(1))


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = [(path, type(module)) for path, module in model.named_modules()]
    flags = [(name, p.requires_grad, id(p)) for name, p in model.named_parameters()]
    return tensors, classes, flags, sorted(vars(model))


def assert_restored(model: nn.Module, before: tuple[Any, ...]) -> None:
    after = snapshot(model)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][name], before[0][name]) for name in before[0])


def run(model: nn.Module) -> Tensor:
    """Outputs with parameters that all require gradients.

    torch folds a batched matrix product or not depending on whether an operand requires
    gradients, even under no_grad, and the two round differently. Freezing thus changes the last
    bits of any model, rewritten or not; what is compared here is the rewriting.
    """
    thawed = copy.deepcopy(model).requires_grad_(True)
    return thawed(ids())


def randomise(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lowrank" in name:
                p.normal_(generator=torch.Generator().manual_seed(2))


@settings(max_examples=25, deadline=None)
@given(
    paths=st.lists(
        st.sampled_from(["embed", "mix", "layers.0", "layers.2", "layers.*", "**"]),
        min_size=1,
        max_size=3,
        unique=True,
    ),
    rank=st.integers(1, 4),
    freeze=st.sampled_from(["model", "sites", "none"]),
    trained=st.lists(st.booleans(), min_size=7, max_size=7),
)
def test_undo_after_apply_is_the_identity(
    paths: Sequence[str], rank: int, freeze: Any, trained: Sequence[bool]
) -> None:
    model = tower()
    for parameter, flag in zip(model.parameters(), trained, strict=True):
        parameter.requires_grad_(flag)
    before, out = snapshot(model), run(model)
    for index, path in enumerate(paths):
        rule = Rule(LowRank(rank=rank, adapter=f"a{index}", freeze=freeze), where=Path(path))
        surgery.apply(model, rule)
    assert torch.equal(run(model), out)
    randomise(model)
    assert not torch.equal(run(model), out)
    surgery.undo(model)
    assert_restored(model, before)
    assert torch.equal(run(model), out)


def test_identity_of_untouched_parameters_keeps_an_optimizer_valid() -> None:
    model = tower()
    names = dict(model.named_parameters())
    pointers = {name: p.data_ptr() for name, p in names.items()}
    surgery.apply(model, Rule(LowRank(rank=2, freeze="none"), where=Type("Linear")))
    now = dict(model.named_parameters())
    assert all(now[name] is p for name, p in names.items())
    assert all(now[name].data_ptr() == pointers[name] for name in names)


def test_trained_stock_parameters_keep_their_values_through_undo() -> None:
    model = tower()
    surgery.apply(model, Rule(LowRank(rank=2, freeze="none"), where=Type("Linear")))
    with torch.no_grad():
        model.mix.weight.add_(1)
    trained = model.mix.weight.clone()
    surgery.undo(model)
    assert torch.equal(model.mix.weight, trained)


def test_undo_takes_back_the_newest_first_and_counts() -> None:
    model = tower()
    surgery.apply(model, Rule(LowRank(rank=2), where=Path("mix")))
    middle = snapshot(model)
    surgery.apply(model, Rule(LowRank(rank=2), where=Path("layers.0")))
    surgery.undo(model, last=1)
    assert_restored(model, middle)
    with pytest.raises(ModelStateError, match=r"last=2 is out of range: 1 "):
        surgery.undo(model, last=2)
    surgery.undo(model)
    with pytest.raises(ModelStateError, match="nothing to undo"):
        surgery.undo(model)


class Boom(RuntimeError):
    """Raised in the middle of an apply."""


@pytest.mark.parametrize("failing", [0, 1, 3])
def test_failure_in_the_middle_leaves_the_model_as_it_was(
    failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tower()
    before = snapshot(model)
    plain, calls = LowRank.apply, iter(range(100))

    def apply(self: LowRank, model: nn.Module, edit: Edit, context: ApplyContext) -> None:
        if next(calls) == failing:
            raise Boom
        plain(self, model, edit, context)

    monkeypatch.setattr(LowRank, "apply", apply)
    with pytest.raises(Boom):
        surgery.apply(model, Rule(LowRank(rank=2)))
    assert_restored(model, before)
    assert record_of(model) is None


def test_failure_while_freezing_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tower()
    before = snapshot(model)
    plan = surgery.plan(model, Rule(LowRank(rank=2)))
    monkeypatch.setattr(LowRank, "frozen", lambda *_: ["mix.bias", "no.such.parameter"])
    with pytest.raises(KeyError):
        plan.apply()
    assert_restored(model, before)


def test_undo_refuses_before_touching_anything_if_a_site_was_wrapped_since() -> None:
    from torch.nn.utils import parametrize

    model = tower()
    surgery.apply(model, Rule(LowRank(rank=2), where=Type("Linear")))
    parametrize.register_parametrization(model.layers[2], "bias", nn.Identity())
    before = [type(module) for module in model.modules()]
    with pytest.raises(ModelStateError, match=r"layers\.2.*became"):
        surgery.undo(model)
    assert [type(module) for module in model.modules()] == before
    assert record_of(model) is not None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])  # noqa: S301
def test_log_survives_deepcopy_and_pickle_and_undo_works_on_the_clone(clone: Any) -> None:
    model = tower()
    out = run(model)
    surgery.apply(model, Rule(LowRank(rank=2)))
    randomise(model)
    changed = run(model)
    other = clone(model)
    assert torch.equal(run(other), changed)
    surgery.undo(other)
    assert torch.equal(run(other), out)
    assert torch.equal(run(model), changed)


def test_repeat_on_a_model_built_anew_gives_the_same_model() -> None:
    model, fresh = tower(), tower()
    surgery.apply(model, Rule(LowRank(rank=2)))
    record = record_of(model)
    assert record is not None
    repeat(fresh, Record.from_dict(record.to_dict()))
    one, two = model.state_dict(), fresh.state_dict()
    assert list(one) == list(two)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert record_of(fresh) == record
    with pytest.raises(ModelStateError, match="rewritten already"):
        repeat(fresh, record)


MEASURE = """
import gc, torch
from torch import nn
import surgery
from surgery import LowRank, Rule

def tensor_bytes():
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())

model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)])
plan = surgery.plan(model, Rule(LowRank(rank=4)))
before = tensor_bytes()
plan.apply()
print(tensor_bytes() - before - plan.totals.added_bytes)
surgery.undo(model)
print(tensor_bytes() - before)
"""


def test_memory_grows_by_what_is_added_and_falls_back_on_undo() -> None:
    # In a process of its own: tensors that other tests leave behind are freed at any time.
    done = subprocess.run(
        [sys.executable, "-c", MEASURE],
        capture_output=True,
        text=True,
        check=True,
        cwd=FilePath(__file__).parents[1],
    )
    assert done.stdout.split() == ["0", "0"]


def test_forwards_run_while_another_thread_applies_and_undoes() -> None:
    model = tower().requires_grad_(False)
    wanted = model(ids())
    stop, wrong = threading.Event(), []

    def forwards() -> None:
        while not stop.is_set():
            try:
                if not torch.equal(model(ids()), wanted):
                    wrong.append("output")
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what we look for
                wrong.append(repr(error))

    threads = [threading.Thread(target=forwards) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        surgery.apply(model, Rule(LowRank(rank=2)))
        surgery.undo(model)
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 6), torch.ones(2, 4)),
        (Conv1D(6, 4), torch.ones(2, 4)),
        (nn.Conv1d(4, 6, 3), torch.ones(2, 4, 5)),
        (nn.Conv2d(4, 6, 3), torch.ones(2, 4, 5, 5)),
        (nn.Embedding(4, 6), torch.arange(4)),
        (nn.MultiheadAttention(4, 2), (torch.ones(2, 1, 4),) * 3),
    ],
    ids=lambda each: type(each).__name__ if isinstance(each, nn.Module) else "",
)
def test_a_forward_that_has_begun_outlives_the_class_it_belongs_to(
    layer: nn.Module, x: Any
) -> None:
    model = nn.ModuleDict({"layer": layer.eval()})
    given = x if isinstance(x, tuple) else (x,)
    wanted = layer(*given)
    surgery.apply(model, Rule(LowRank(rank=2), where=Path("**")))
    begun = type(layer).forward
    assert begun.__qualname__ != f"{type(layer).__name__}.forward"
    surgery.undo(model)
    torch.testing.assert_close(begun(layer, *given), wanted, rtol=0, atol=0)


def test_global_random_generator_is_untouched() -> None:
    model = tower()
    before = torch.get_rng_state()
    surgery.apply(model, Rule(LowRank(rank=2)))
    surgery.undo(model)
    assert torch.equal(before, torch.get_rng_state())


def test_requires_grad_is_restored_even_where_it_was_off() -> None:
    model = tower()
    model.mix.bias.requires_grad_(False)
    surgery.apply(model, Rule(LowRank(rank=2), where=Path("layers.*")))
    assert [n for n, p in model.named_parameters() if p.requires_grad and "lowrank" not in n] == []
    surgery.undo(model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["mix.bias"]
