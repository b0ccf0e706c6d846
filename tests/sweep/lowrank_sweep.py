"""Low-rank adapters and roles on models that nothing in the library was written for.

    python -m tests.sweep.lowrank_sweep                    # every model, as a table
    python -m tests.sweep.lowrank_sweep beit cait --roles  # those whose name contains one of these

Each model is perturbed, so that no zero gate hides a branch, and then each check of ``CHECKS``
runs on copies of it. Exits with 1 if any fails.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.utils import parametrize

import surgery
from surgery import LowRank, Role, Rule, adapters
from surgery.select import ModelMap
from surgery.sources import Example
from tests.sweep.measure import (
    Failure,
    backward,
    cause,
    distance,
    noise,
    same,
    still,
    use_plain_experts,
)
from tests.sweep.models import CASES, Model

RANK, ALPHA = 2, 3.0
EVERYWHERE = Rule(LowRank(rank=RANK, alpha=ALPHA), id="everywhere")
BY_ROLE = Rule(LowRank(rank=RANK, alpha=ALPHA), where=Role("attention", "mlp"), id="by-role")
#: Largest difference to the model whose weights are W + s·BA, in float64, relative to the output.
BOUND = 1e-10


def randomise(model: nn.Module) -> None:
    """Draw A and B of every adapter."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for tensor in adapters.parameters(model):
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(0.1 * noise)


def write_by_hand(stock: nn.Module, adapted: nn.Module, edits: tuple[Any, ...]) -> None:
    """Add s·BA to the weights of ``stock``, as the names and shapes of ``adapted`` say."""
    tensors = dict(adapted.named_parameters())
    for edit in edits:
        A, B = (tensors[name] for name in edit.adds)
        delta = ALPHA / RANK * (B @ A)
        with torch.no_grad():
            _add(stock, _weight_name(edit), delta)


def _weight_name(edit: Any) -> str:
    """The weight an edit puts an adapter beside."""
    return next(name for name, use in edit.uses.items() if use == "extend")


def _add(stock: nn.Module, name: str, delta: Tensor) -> None:
    path, _, parameter = name.rpartition(".")
    layer = stock.get_submodule(path)
    if parametrize.is_parametrized(layer, parameter):
        parametrize.remove_parametrizations(layer, parameter, leave_parametrized=True)
    weight = getattr(layer, parameter)
    # GPT-2 stores some weights the other way round.
    transposed = type(layer).__name__ == "Conv1D"
    weight += delta.T if transposed else delta.reshape(weight.shape)


@dataclass
class Subject:
    """One model under test, and what is measured on it once."""

    case: Model
    findings: dict[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def _built(self) -> tuple[nn.Module, Example]:
        return self.case.build()

    @property
    def stock(self) -> nn.Module:
        return self._built[0]

    @property
    def example(self) -> Example:
        return self._built[1]

    @cached_property
    def before(self) -> list[Tensor]:
        return still(self.stock, self.example)

    @cached_property
    def plan(self) -> surgery.Plan:
        return surgery.plan(self.stock, EVERYWHERE, example=self.example)

    def adapted(self) -> nn.Module:
        """A copy with adapters everywhere."""
        return surgery.apply(self.stock, EVERYWHERE, example=self.example, copy=True)

    def compare(self, model: nn.Module) -> None:
        """Raise unless a model whose B is zero computes every bit that the stock model does.

        torch chooses some kernels by whether a weight requires a gradient, even where none is
        computed. If the bits differ, those of the stock model with the flags of ``model`` count.
        """
        after = still(model, self.example)
        if same(after, self.before):
            return
        frozen = copy.deepcopy(self.stock)
        now = dict(model.named_parameters())
        for name, parameter in frozen.named_parameters():
            parameter.requires_grad_(now[name].requires_grad)
        if not same(after, still(frozen, self.example)):
            raise Failure(f"outputs differ by {distance(after, self.before):.1e}")
        self.findings["flags_alone"] = distance(after, self.before)

    @cached_property
    def map(self) -> ModelMap:
        return ModelMap(self.stock, self.example)


def builds(subject: Subject) -> None:
    """It loads, an example is inferred, and two calls agree bit for bit."""
    subject.findings["parameters"] = sum(p.numel() for p in subject.stock.parameters())
    if not subject.before:
        raise Failure("the output has no floating tensor")
    if not all(t.isfinite().all() for t in subject.before):
        raise Failure("the stock output is not finite")
    if not same(still(subject.stock, subject.example), subject.before):
        raise Failure("the stock model differs from one call to the next")


def exact(subject: Subject) -> None:
    """Adapters everywhere change no bit of the output."""
    subject.findings["sites"] = len(subject.plan.edits)
    subject.compare(subject.adapted())


def by_role(subject: Subject) -> None:
    """Adapters on attention and feed-forward layers, found by role, change no bit either."""
    wanted = ("attention.", "mlp.")
    named = [role for role in subject.map.roles.values() if (role.name or "").startswith(wanted)]
    subject.findings["by_role"] = len(named)
    rule = BY_ROLE if named else replace(BY_ROLE, optional=True)
    model = surgery.apply(subject.stock, rule, example=subject.example, copy=True)
    subject.compare(model)


def algebra(subject: Subject) -> None:
    """With random A and B it computes what the model with the weights W + s·BA computes."""
    double = copy.deepcopy(subject.stock).double()
    use_plain_experts(double)
    example = subject.example.to(dtype=torch.float64)
    adapted = copy.deepcopy(double)
    edits = surgery.plan(adapted, EVERYWHERE, example=example)
    edits.apply()
    randomise(adapted)
    reference = copy.deepcopy(double)
    write_by_hand(reference, adapted, edits.edits)
    expected, found = still(reference, example), still(adapted, example)
    worst = distance(found, expected)
    subject.findings["deviation"] = worst
    if distance(found, still(double, example)) < 1e-6:
        raise Failure("random adapters change nothing in the output")
    if worst <= BOUND:
        return
    floor = noise(reference, example, expected)
    subject.findings["noise"] = floor
    if worst > 20 * floor:
        raise Failure(f"differs from W + s·BA by {worst:.1e}; the model's own noise is {floor:.1e}")


def gradients(subject: Subject) -> None:
    """A gradient reaches the A and B of every weight that has one in the stock model."""
    model = subject.adapted()
    randomise(model)
    backward(model, subject.example)
    stock = copy.deepcopy(subject.stock).requires_grad_(True)
    backward(stock, subject.example)
    reached = {
        name
        for name, parameter in stock.named_parameters(remove_duplicate=False)
        if parameter.grad is not None and parameter.grad.any()
    }
    tensors = dict(model.named_parameters())
    for edit in subject.plan.edits:
        weight = _weight_name(edit)
        path, _, parameter = weight.rpartition(".")
        inner = f"{path}.parametrizations.{parameter}."
        live = weight in reached or any(name.startswith(inner) for name in reached)
        for name in edit.adds:
            gradient = tensors[name].grad
            if live and (gradient is None or not gradient.any()):
                raise Failure(f"no gradient reaches {name}")
    frozen = [n for n, p in model.named_parameters() if "lowrank" not in n and p.grad is not None]
    if frozen:
        raise Failure(f"the frozen {frozen[0]} has a gradient")


def verifies(subject: Subject) -> None:
    """``surgery.verify`` finds nothing broken in what ``apply`` did."""
    report = surgery.verify(subject.adapted(), subject.example)
    subject.findings["unchecked"] = [f"{item.check}: {item.reason}" for item in report.unchecked]
    if not report.ok:
        raise Failure("; ".join(str(row) for row in report.broken[:3]))


def undoes(subject: Subject) -> None:
    """Undo brings back every bit, key, flag and class."""
    model = subject.adapted()
    randomise(model)
    surgery.undo(model)
    if not same(still(model, subject.example), subject.before):
        raise Failure("outputs differ after undo")
    undone = surgery.apply(subject.stock, EVERYWHERE, example=subject.example, copy=True)
    surgery.undo(undone)
    for one, other in zip(undone.modules(), subject.stock.modules(), strict=True):
        if type(one) is not type(other):
            raise Failure(f"a {type(other).__name__} is a {type(one).__name__} after undo")
    old, new = subject.stock.state_dict(), undone.state_dict()
    if list(old) != list(new) or not all(torch.equal(new[name], old[name]) for name in old):
        raise Failure("the state dict differs after undo")
    flags = [(n, p.requires_grad) for n, p in subject.stock.named_parameters()]
    if flags != [(n, p.requires_grad) for n, p in undone.named_parameters()]:
        raise Failure("requires_grad differs after undo")


def saves(subject: Subject) -> None:
    """Save, restore: the same bits, and undo works on what was restored."""
    model = subject.adapted()
    randomise(model)
    expected = still(model, subject.example)
    with tempfile.TemporaryDirectory() as folder:
        surgery.save(model, Path(folder) / "saved")
        restored = surgery.restore(Path(folder) / "saved")
    if restored.training:
        restored.eval()
    if not same(still(restored, subject.example), expected):
        raise Failure("outputs differ after save and restore")
    surgery.undo(restored)
    if not same(still(restored, subject.example), subject.before):
        raise Failure("outputs differ after save, restore and undo")


def copies(subject: Subject) -> None:
    """A deep copy computes the same and shares nothing."""
    model = subject.adapted()
    randomise(model)
    expected = still(model, subject.example)
    twin = copy.deepcopy(model)
    if not same(still(twin, subject.example), expected):
        raise Failure("the copy computes something else")
    with torch.no_grad():
        for tensor in adapters.parameters(twin):
            tensor.zero_()
    if not same(still(model, subject.example), expected):
        raise Failure("changing the copy changed the original")
    subject.compare(twin)


def merges(subject: Subject) -> None:
    """Merged it computes nearly the same, and unmerged again exactly the same."""
    model = subject.adapted()
    randomise(model)
    expected = still(model, subject.example)
    adapters.merge(model)
    worst = distance(still(model, subject.example), expected)
    subject.findings["merged"] = worst
    adapters.unmerge(model)
    if not same(still(model, subject.example), expected):
        raise Failure("outputs differ after merge and unmerge")
    if worst > 1e-3:
        raise Failure(f"merged differs from unmerged by {worst:.1e}")


CHECKS: tuple[Callable[[Subject], None], ...] = (
    builds,
    exact,
    by_role,
    algebra,
    gradients,
    undoes,
    saves,
    copies,
    merges,
    verifies,
)


@dataclass
class Result:
    """What came of one model: check → "ok" or the cause of its failure."""

    name: str
    library: str
    seconds: float
    outcome: dict[str, str]
    findings: dict[str, Any]
    roles: dict[str, tuple[str, str]]

    @property
    def ok(self) -> bool:
        return set(self.outcome.values()) == {"ok"}


def examine(case: Model, *, roles: bool = True) -> Result:
    """Run every check on one model. A failed first check spares the others."""
    start = time.perf_counter()
    subject = Subject(case)
    outcome: dict[str, str] = {}
    for check in CHECKS:
        try:
            check(subject)
            outcome[check.__name__] = "ok"
        except Exception as error:  # noqa: BLE001 - every cause belongs into the table
            outcome[check.__name__] = cause(error)
        if outcome.get("builds") != "ok":
            break
    told = _roles(subject) if roles and outcome.get("by_role") == "ok" else {}
    elapsed = time.perf_counter() - start
    return Result(case.name, case.library, elapsed, outcome, subject.findings, told)


def _roles(subject: Subject) -> dict[str, tuple[str, str]]:
    """Site → role (or "-") and reason, for every site a low-rank adapter fits."""
    made = LowRank(rank=RANK)
    sites = [site for site in subject.map.sites if made.accepts(site).ok]
    found = {site.path: subject.map.role(site) for site in sites}
    return {path: ("+".join(role.names) or "-", role.reason) for path, role in found.items()}


def table(results: list[Result]) -> Table:
    """One row per model, one column per check."""
    shown = Table(title="low-rank adapters on models never seen before")
    for heading in ("model", "sites", "roles", "algebra", *(c.__name__ for c in CHECKS), "s"):
        shown.add_column(heading, overflow="fold")
    for result in results:
        marks = [_mark(result.outcome.get(check.__name__)) for check in CHECKS]
        numbers = [result.findings.get(key, "") for key in ("sites", "by_role", "deviation")]
        texts = [f"{n:.0e}" if isinstance(n, float) else str(n) for n in numbers]
        shown.add_row(result.name, *texts, *marks, f"{result.seconds:.0f}")
    return shown


def _mark(outcome: str | None) -> str:
    return " " if outcome is None else "[green]ok[/]" if outcome == "ok" else "[red]FAIL[/]"


def main() -> int:
    """Parse the command line, examine, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of model names; every model by default")
    parser.add_argument("--library", choices=["timm", "transformers", "diffusers"])
    parser.add_argument("--json", type=Path, help="write the results there as well")
    parser.add_argument("--roles", action="store_true", help="print the role of every site")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 150)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    results: list[Result] = []
    for case in CASES.values():
        if options.library not in (None, case.library):
            continue
        if options.names and not any(part in case.name for part in options.names):
            continue
        result = examine(case)
        results.append(result)
        _report(console, result, roles=options.roles)
        gc.collect()
        if options.json:
            data = [vars(each) for each in results]
            options.json.write_text(json.dumps(data, indent=1), encoding="utf-8")
    console.print(table(results))
    failed = [result for result in results if not result.ok]
    console.print(f"{len(results) - len(failed)} of {len(results)} models pass every check")
    return 1 if failed else 0


def _report(console: Console, result: Result, *, roles: bool) -> None:
    mark = "ok" if result.ok else "FAIL"
    console.print(f"{mark} {result.library}:{result.name} ({result.seconds:.1f} s)", markup=False)
    for check, outcome in result.outcome.items():
        if outcome != "ok":
            console.print(f"    {check}: {outcome}", markup=False)
    for path, (role, reason) in result.roles.items() if roles else ():
        console.print(f"    {path}: {role} ({reason})", markup=False)


if __name__ == "__main__":
    sys.exit(main())
