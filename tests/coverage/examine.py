"""Everything that coverage checks of one model.

python -m tests.coverage.examine test_vit       # one model, in this process
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery import Rule, Stack, SurgeryError, adapters
from surgery.capture import trace_model
from surgery.passes.shortcuts import Shortcuts
from surgery.passes.streams.segment import Segment, all_segments
from surgery.residuals import find_residuals
from surgery.sources import Example
from tests.coverage import differences, reference
from tests.coverage.cases import MODELS, TooLarge, registered
from tests.sweep import lowrank_sweep
from tests.sweep.measure import (
    Failure,
    Widened,
    backward,
    cause,
    distance,
    leaves,
    noise,
    run,
    same,
    scalar,
    still,
    use_plain_experts,
)
from tests.sweep.models import Model

TEMPERATURE = 0.01
REASSIGNED = Rule(
    Shortcuts(
        topology="ancre", scope="block", mode="add", init="identity", temperature=TEMPERATURE
    ),
    where=Stack("all"),
    id="reassigned",
)
#: Largest difference to the reference in float64, relative to the output.
BOUND = 1e-10
#: The same for dL/dW, relative to its largest entry: sums over whole states.
GRADIENT_BOUND = 1e-6
#: Steps of differences along A and B. Large gradients need small ones, and models that round to
#: float32 within, or choose experts, larger ones.
_STEPS = (1e-6, 1e-8, 1e-10, 1e-12, 1e-5, 1e-4, 1e-3)


@dataclass
class Result:
    """What came of one model.

    Attributes:
        name: As in ``MODELS``, or as timm registers it.
        library: "timm", "transformers" or "diffusers".
        module: The timm module.
        outcome: Check → "ok" or the cause of its failure.
        findings: What was measured on the way.
        refused: Why ``shortcuts`` refuses the model; empty if it does not.
        tracebacks: Of the checks that failed by an unforeseen exception.
        seconds: The time it took.
    """

    name: str
    library: str
    module: str = ""
    outcome: dict[str, str] = field(default_factory=dict[str, str])
    findings: dict[str, Any] = field(default_factory=dict[str, Any])
    refused: str = ""
    tracebacks: dict[str, str] = field(default_factory=dict[str, str])
    seconds: float = 0.0

    def passed(self, prefix: str) -> bool:
        """Whether every check whose name begins like this was made and held."""
        found = [value for name, value in self.outcome.items() if name.startswith(prefix)]
        return bool(found) and set(found) == {"ok"}


class Subject(lowrank_sweep.Subject):
    """One model, and what is made of it once."""

    @cached_property
    def reassigned(self) -> nn.Module:
        """A copy with its shortcuts reassigned. The last check undoes it."""
        return surgery.apply(self.stock, REASSIGNED, example=self.example, copy=True)

    @cached_property
    def wide(self) -> tuple[nn.Module, Example]:
        """The stock model in float64 and its call."""
        double = copy.deepcopy(self.stock).double()
        use_plain_experts(double)
        return double, self.example.to(dtype=torch.float64)

    @cached_property
    def random(self) -> nn.Module:
        """The reassigned model in float64, with random coefficients."""
        double, example = self.wide
        model = surgery.apply(double, REASSIGNED, example=example, copy=True).double()
        with torch.no_grad():
            generator = torch.Generator().manual_seed(5)
            for tensor in coefficients(model):
                noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.add_(0.7 * TEMPERATURE * noise)
        return model


def coefficients(model: nn.Module) -> list[Tensor]:
    """The logits of every stack."""
    return [tensor for *_, segment in all_segments(model) for tensor in segment.parameters()]


# -- low-rank ----------------------------------------------------------------------------------


def lowrank_differences(subject: Subject) -> None:
    """A central difference along random A and B agrees with their gradients."""
    double, example = subject.wide
    model = surgery.apply(double, lowrank_sweep.EVERYWHERE, example=example, copy=True)
    lowrank_sweep.randomise(model)
    with torch.no_grad():
        for tensor in adapters.parameters(model):
            tensor.mul_(0.1)  # so that deep models without norms stay where they are smooth
    with Widened():
        loss = _differentiated(model, example)
    trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
    generator = torch.Generator().manual_seed(7)
    signs = [
        p.grad.sign() * torch.rand(p.shape, generator=generator, dtype=p.dtype) for p in trained
    ]
    expected = sum(float((p.grad * sign).sum()) for p, sign in zip(trained, signs, strict=True))
    found: list[float] = []
    off = math.inf
    for step in _STEPS:
        with Widened():
            found.append(_difference(loss, trained, signs, step))
        off = min(off, abs(found[-1] - expected) / abs(expected))
        if off <= 0.1 * differences.TOLERANCE:
            break
    subject.findings["lowrank_differences"] = off
    if off > differences.TOLERANCE:
        # A quantiser's gradient (straight through) is none of what it computes, adapted or not.
        own = _own_gradient_off(subject)
        if own > differences.TOLERANCE:
            subject.findings["own_gradient_off"] = own
            return
        raise Failure(f"the gradient along A and B is {expected:.6g}, differences are {found}")


def _difference(
    loss: Callable[[], float], at: list[Tensor], along: list[Tensor], step: float
) -> float:
    sides: list[float] = []
    with torch.no_grad():
        for move in (step, -2 * step):
            for tensor, direction in zip(at, along, strict=True):
                tensor.add_(direction, alpha=move)
            sides.append(loss())
        for tensor, direction in zip(at, along, strict=True):
            tensor.add_(direction, alpha=step)
    return (sides[0] - sides[1]) / (2 * step)


def _differentiated(model: nn.Module, example: Example) -> Callable[[], float]:
    """Accumulate gradients as ``backward`` does; returns what it differentiated, as a function."""
    model.train().eval()  # models that keep what they made of their weights forget it
    outputs = run(model, example)
    live = [leaf.requires_grad for leaf in outputs]
    scalar(outputs).backward()

    def loss() -> float:
        model.train().eval()
        kept = zip(still(model, example), live, strict=True)  # a model may detach some outputs
        return float(scalar([leaf.requires_grad_() for leaf, lives in kept if lives]).detach())

    return loss


# -- shortcuts ---------------------------------------------------------------------------------


class Refused(Exception):
    """The pass has nothing to do on this model, or cannot do it, and says so."""


def shortcuts_apply(subject: Subject) -> None:
    """The pass finds stacks and rewrites the code that goes through them."""
    start = time.perf_counter()
    try:
        segments = list(all_segments(subject.reassigned))
    except SurgeryError as error:
        raise Refused(f"{type(error).__name__}: {error}") from None
    subject.findings["apply_seconds"] = round(time.perf_counter() - start, 3)
    subject.findings["stacks"] = {
        f"{holder}.{number}": len(segment.members) for holder, number, segment in segments
    }
    subject.findings["streams"] = max((len(each.streams) for *_, each in segments), default=0)
    if not segments:
        raise Failure("nothing was reassigned")


def shortcuts_exact(subject: Subject) -> None:
    """Coefficients that start at zero change no bit of the output."""
    model = subject.reassigned
    after = still(model, subject.example)
    if not same(after, subject.before):
        raise Failure(f"outputs differ by {distance(after, subject.before):.1e}")


def shortcuts_reach(subject: Subject) -> None:
    """Right after the rewrite every parameter and every free coefficient has a gradient."""
    stock = copy.deepcopy(subject.stock)
    backward(stock, subject.example)
    model = subject.reassigned
    model.zero_grad()
    backward(model, subject.example)
    now = dict(model.named_parameters())
    for name, parameter in stock.named_parameters():
        had = parameter.grad is not None and bool(parameter.grad.any())
        gradient = now[name].grad
        if had and (gradient is None or not gradient.any()):
            raise Failure(f"no gradient reaches {name}")
    for path, number, segment in all_segments(model):
        for parameter in segment.parameters():
            if parameter.grad is None:
                raise Failure(f"no gradient reaches the coefficients of {path}.{number}")
            free = len(parameter) - 1  # the single entry of the first softmax is constant
            live = int((parameter.grad != 0).sum())
            if live < free:
                subject.findings["without_gradient"] = (
                    subject.findings.get("without_gradient", 0) + free - live
                )


def shortcuts_algebra(subject: Subject) -> None:
    """With random coefficients it computes y_k + Σ_j W_kj x_j, as hooks on the stock model do."""
    (double, example), model = subject.wide, subject.random
    stacks = [_stack(holder, segment) for holder, _, segment in all_segments(model)]
    with Widened():
        base = still(double, example)
        found = still(model, example)
        with reference.mixing(double, example, stacks):
            expected = still(double, example)
            worst = distance(found, expected)
            floor = noise(double, example, expected) if worst > BOUND else 0.0
    if distance(found, base) < 1e-6:
        raise Failure("random coefficients change nothing in the output")
    subject.findings["shortcuts_deviation"] = worst
    if worst > BOUND:
        raise Failure(f"differs from the formula by {worst:.1e}; the model's noise is {floor:.1e}")


def _stack(holder: str, segment: Segment, weights: Tensor | None = None) -> reference.Stack:
    prefix = f"{holder}." if holder else ""
    blocks = tuple(prefix + name for name in segment.members)
    with torch.no_grad():
        return reference.Stack(blocks, segment() if weights is None else weights)


def shortcuts_gradients(subject: Subject) -> None:
    """dL/dW is that of the formula under plain autograd, entry by entry."""
    (double, example), model = subject.wide, subject.random
    stacks: dict[str, reference.Stack] = {}
    for holder, number, segment in all_segments(model):
        with torch.no_grad():
            weights = segment()
        stack = _stack(holder, segment, weights.clone().requires_grad_())
        stacks[f"{holder}.{number}"] = stack
    with Widened():
        with _matrices(model) as made:
            backward(model, example)
        with reference.mixing(double, example, list(stacks.values())):
            backward(double, example)
    double.zero_grad()
    worst = 0.0
    for key, stack in stacks.items():
        expected = stack.weights.grad
        if expected is None or any(weights.grad is None for weights in made[key]):
            raise Failure(f"no gradient reaches the matrix of {key}")
        ours = sum(weights.grad for weights in made[key])
        free = _free(model, key)
        off = float(((ours - expected) * free).abs().max() / (expected * free).abs().max())
        worst = max(worst, off)
    subject.findings["gradient_deviation"] = worst
    if worst > GRADIENT_BOUND:
        raise Failure(f"dL/dW differs from the formula's by {worst:.1e}")


def _free(model: nn.Module, key: str) -> Tensor:
    """One where the matrix of a segment may change, zero where it is constant."""
    segments = {f"{holder}.{number}": segment for holder, number, segment in all_segments(model)}
    support = segments[key].support
    mask = torch.zeros(len(support), len(support), dtype=torch.float64)
    for k, row in enumerate(support):
        mask[k, list(row)] = 1.0
    return mask


@contextmanager
def _matrices(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """The matrices that a forward within it uses, with their gradients after a backward."""
    made: dict[str, list[Tensor]] = {}

    def keep(key: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, weights: Tensor) -> None:
            weights.retain_grad()
            made.setdefault(key, []).append(weights)

        return hook

    handles = [
        segment.register_forward_hook(keep(f"{holder}.{number}"))
        for holder, number, segment in all_segments(model)
    ]
    yield made
    for handle in handles:
        handle.remove()


def shortcuts_differences(subject: Subject) -> None:
    """Central differences agree with the gradient of every coefficient."""
    (_, example), model = subject.wide, subject.random
    model.zero_grad()
    logits = coefficients(model)
    subject.findings["coefficients"] = sum(tensor.numel() for tensor in logits)
    with Widened():
        loss = _differentiated(model, example)
        worst, wrong = differences.compare(loss, logits, TEMPERATURE)
    subject.findings["differences"] = worst
    if wrong and (off := _own_gradient_off(subject)) > differences.TOLERANCE:
        subject.findings["own_gradient_off"] = off
        return
    if wrong:
        first = wrong[0]
        raise Failure(
            f"{len(wrong)} groups of coefficients are off by up to {worst:.1e}, such as "
            f"{first.indices[:4]}: gradient {first.expected:.6g}, difference {first.found:.6g}"
        )


def _own_gradient_off(subject: Subject) -> float:
    """How far torch's gradient of the unmodified model is off a difference along it."""
    double, example = subject.wide
    double.zero_grad()
    with Widened():
        loss = _differentiated(double, example)
        trained = [p for p in double.parameters() if p.grad is not None]
        along = [p.grad / p.grad.abs().max().clamp(min=1e-30) for p in trained]
        expected = sum(float((p.grad * way).sum()) for p, way in zip(trained, along, strict=True))
        found = [_difference(loss, trained, along, step) for step in (1e-8, 1e-7, 1e-6)]
    double.zero_grad()
    return min(abs(each - expected) for each in found) / abs(expected)


def shortcuts_undo(subject: Subject) -> None:
    """Undo brings back every bit, key, flag and class."""
    model = subject.reassigned
    with torch.no_grad():
        for tensor in coefficients(model):
            tensor.normal_()
    surgery.undo(model)
    if not same(still(model, subject.example), subject.before):
        raise Failure("outputs differ after undo")
    for one, other in zip(model.modules(), subject.stock.modules(), strict=True):
        if type(one) is not type(other):
            raise Failure(f"a {type(other).__name__} is a {type(one).__name__} after undo")
    old, new = subject.stock.state_dict(), model.state_dict()
    if list(old) != list(new) or not all(_equal(new[name], old[name]) for name in old):
        raise Failure("the state dict differs after undo")
    flags = [(n, p.requires_grad) for n, p in subject.stock.named_parameters()]
    if flags != [(n, p.requires_grad) for n, p in model.named_parameters()]:
        raise Failure("requires_grad differs after undo")


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return list(map(str, leaves(one))) == list(map(str, leaves(other)))


def residuals(subject: Subject) -> None:
    """How many residual additions the library finds."""
    trace = trace_model(subject.stock, subject.example.args, subject.example.kwargs)
    found = find_residuals(trace.graph, subject.stock)
    subject.findings["residuals"] = len(found)


BUILD = lowrank_sweep.builds
LOWRANK: dict[str, Callable[[Any], None]] = {
    "lowrank_exact": lowrank_sweep.exact,
    "lowrank_algebra": lowrank_sweep.algebra,
    "lowrank_gradients": lowrank_sweep.gradients,
    "lowrank_differences": lowrank_differences,
    "lowrank_undo": lowrank_sweep.undoes,
}
SHORTCUTS: dict[str, Callable[[Any], None]] = {
    "shortcuts_exact": shortcuts_exact,
    "shortcuts_reach": shortcuts_reach,
    "shortcuts_algebra": shortcuts_algebra,
    "shortcuts_gradients": shortcuts_gradients,
    "shortcuts_differences": shortcuts_differences,
    "shortcuts_undo": shortcuts_undo,
}


def examine(model: Model) -> Result:
    """Check one model. A model that does not build, or is refused, is spared the rest."""
    start = time.perf_counter()
    result = Result(model.name, model.library, vars(model).get("module", ""))
    with _quiet():
        subject = Subject(model, result.findings)
        if _check(result, "builds", BUILD, subject):
            _check(result, "residuals", residuals, subject)
            _check_shortcuts(result, subject)
            for name, check in LOWRANK.items():
                _check(result, name, check, subject)
    result.seconds = round(time.perf_counter() - start, 2)
    return result


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings; what follows hears them again."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _check_shortcuts(result: Result, subject: Subject) -> None:
    if not _check(result, "shortcuts_apply", shortcuts_apply, subject):
        return
    for name, check in SHORTCUTS.items():
        if not _check(result, name, check, subject) and name == "shortcuts_exact":
            return


def _check(result: Result, name: str, check: Callable[[Any], None], subject: Subject) -> bool:
    try:
        check(subject)
    except Refused as error:
        result.refused = str(error)
        return False
    except TooLarge as error:
        result.outcome[name] = f"too large for a worker: {error}"
    except Exception as error:  # noqa: BLE001 - every cause belongs into the table
        result.outcome[name] = cause(error)
        result.tracebacks[name] = traceback.format_exc(limit=-12)
    else:
        result.outcome[name] = "ok"
    return result.outcome[name] == "ok"


def find(name: str) -> Model:
    """The model of a name."""
    return MODELS[name] if name in MODELS else registered()[name]


def main() -> int:
    """Examine the models that are named and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    failed = 0
    for name in parser.parse_args().names:
        result = examine(find(name))
        sys.stdout.write(json.dumps(asdict(result), indent=1).replace("\\n", "\n") + "\n")
        failed += any(outcome != "ok" for outcome in result.outcome.values())
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
