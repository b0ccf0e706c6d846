"""What adapters do around an optimizer's step: their rules, found and attached."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from architectures.adapters import Adapter, Method, Ranges, Sliced
from surgery.errors import ModelStateError
from surgery.optim.rule import Attached, Factors, StepRule
from surgery.passes.base import passes_of
from surgery.passes.hosts import CHILD, Bank, Banks
from surgery.passes.hosts.folding import Fold
from surgery.passes.links import links_of
from surgery.passes.lowrank import LowRank
from surgery.record import Record, rewritten
from surgery.registry import STEP_RULES
from surgery.tree import children, named_modules


@dataclass(frozen=True)
class Prepared:
    """The rules that ``prepare`` attached to an optimizer; none if no method has one."""

    attached: tuple[Attached, ...]

    @property
    def rules(self) -> tuple[StepRule, ...]:
        """One rule for all adapters of one name, method and options."""
        return tuple(each.rule for each in self.attached)

    def detach(self) -> None:
        """Leave the optimizer as it was. What the rules kept is gone with its next state dict."""
        for each in self.attached:
            each.detach()


def prepare(model: nn.Module, optimizer: Optimizer) -> Prepared:
    """Have a model's adapters do what their method does around each step of an optimizer.

    RefLoRA, RefLoRA-S, ScaLoRA, LoRA-Pro, AltLoRA and NoRA+ are LoRA with something done to
    gradients or factors when the optimizer steps. It is done by hooks of the optimizer, so the
    training loop stays as it is::

        optimizer = torch.optim.AdamW(surgery.adapters.parameters(model), lr=1e-4)
        surgery.adapters.prepare(model, optimizer)

    Adapters of other methods need nothing and get nothing. Call it after the model was wrapped,
    sharded or given to ``accelerator.prepare``, with the optimizer that steps; gradients must be
    final when it does: accumulate, unscale, clip, step.

    Args:
        model: A rewritten model, or what wraps it.
        optimizer: A torch optimizer, or accelerate's wrapper of one. Adapters none of whose tensors
            it holds are passed over.

    Returns:
        What was attached, with a ``detach``. What a rule keeps is saved and restored in the
        optimizer's state dict.

    Raises:
        ModelStateError: the optimizer is no torch optimizer, or has the rule already, or holds no
            adapter or half of one; adapters are merged; the model is not the whole rewritten one;
            or the rule does not work with this optimizer or these weights.
    """
    stepping = _torch_optimizer(optimizer)
    found = list(_found(model))
    if not found:
        return Prepared(())
    held = {id(each) for group in stepping.param_groups for each in group["params"]}
    trained = [each for each in found if held & {id(p) for p in each.method.parameters()}]
    if not trained:
        raise ModelStateError(
            f"the optimizer holds none of the tensors of the {len(found)} adapters with a rule for "
            "its steps",
            hint="give it surgery.adapters.parameters(model), after the model was wrapped or "
            "sharded, which makes new parameters",
        )
    rules = _rules(trained)
    attached: list[Attached] = []
    try:
        attached.extend(rule.attach(stepping) for rule in rules)
    except BaseException:
        Prepared(tuple(attached)).detach()
        raise
    return Prepared(tuple(attached))


@dataclass(frozen=True, eq=False)
class _Found:
    """A method with a step rule in a model."""

    name: str
    adapter: str
    method: Method
    fold: Fold

    @property
    def kind(self) -> tuple[Any, ...]:
        """Adapters of one kind have one rule."""
        return self.method.step_rule, self.adapter, dataclasses.astuple(self.method.options)

    def factors(self, *, fold: bool) -> Factors:
        method = self.method
        return Factors(
            self.name,
            method.lora_A,
            method.lora_B,
            method.scaling,
            fold=self.fold if fold else None,
            base_dtype=self.fold.weight.dtype if fold else None,
        )


def _rules(found: list[_Found]) -> list[StepRule]:
    kinds: dict[tuple[Any, ...], list[_Found]] = {}
    for each in found:
        kinds.setdefault(each.kind, []).append(each)
    rules: list[StepRule] = []
    for alike in kinds.values():
        method = alike[0].method
        rule = cast("type[StepRule]", STEP_RULES.get(cast("str", method.step_rule)))
        factors = [each.factors(fold=rule.folds) for each in alike]
        rules.append(rule(factors, **_step_options(method, rule)))
    return rules


def _step_options(method: Method, rule: type[StepRule]) -> dict[str, Any]:
    """The method's options that its rule takes; the others are about the start alone."""
    taken = inspect.signature(rule).parameters
    names = [each.name for each in dataclasses.fields(method.options) if each.name in taken]
    return {name: getattr(method.options, name) for name in names}


def _found(model: nn.Module) -> Iterator[_Found]:
    """Every method with a step rule, once, in module order."""
    root, record = rewritten(model)
    copies = _copies(record)
    seen: set[int] = set()
    for path, module, bank in _banks(root):
        if id(bank) in seen:
            continue
        seen.add(id(bank))
        for adapter, given in bank.adapters.items():
            for part, method, ranges in _methods(given):
                if method.step_rule is None:
                    continue
                if links_of(method):
                    raise ModelStateError(
                        f"adapter {adapter!r} of {path} is mapped by a mirror map, and what its "
                        "method does around a step would write to duals as if they were factors",
                        hint="map adapters of a method without a step rule, such as lora",
                    )
                if bank.merged is not None:
                    raise ModelStateError(
                        "adapters are merged into the weights, so none of them can be trained",
                        hint="call surgery.adapters.unmerge(model) first",
                    )
                kept = copies[_join(path, bank.parameter), adapter]
                fold = Fold(module, path, bank, adapter, method, ranges, kept)
                yield _Found(_join(fold.name, adapter, part), adapter, method, fold)


def _methods(adapter: Adapter) -> Iterator[tuple[str, Method, Ranges | None]]:
    """Name of the slice if any, method, and its rows."""
    if isinstance(adapter, Sliced):
        for name, (ranges, method) in adapter.parts.items():
            yield name, method, ranges
    elif isinstance(adapter, Method):
        yield "", adapter, None


def _banks(root: nn.Module) -> Iterator[tuple[str, nn.Module, Bank]]:
    """Every bank with each module that has it."""
    for path, module in named_modules(root, duplicates=False):
        child = children(module).get(CHILD)
        if isinstance(child, Bank):
            yield path, module, child
        elif isinstance(child, Banks):
            for bank in cast("dict[str, Bank]", children(child)).values():
                yield path, module, bank


def _copies(record: Record) -> dict[tuple[str, str], dict[str, Tensor] | None]:
    """(Weight, adapter) → where the weight is to be copied to for undo, None for nowhere."""
    found: dict[tuple[str, str], dict[str, Tensor] | None] = {}
    for operation in record.operations:
        passes = passes_of(operation)
        for edit in operation.edits:
            made = passes[edit.rule]
            if isinstance(made, LowRank):
                kept = operation.kept if made.keep_base == "memory" else None
                found.update({(thing, made.adapter): kept for thing in edit.uses})
    return found


def _torch_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose ``step`` changes parameters, out of accelerate's wrapper of it.

    Raises:
        ModelStateError: it is something else, such as DeepSpeed's.
    """
    inner: Any = optimizer
    # An object can be of accelerate's class only if accelerate has been imported.
    accelerate = sys.modules.get("accelerate.optimizer")
    while accelerate is not None and isinstance(inner, accelerate.AcceleratedOptimizer):
        inner = inner.optimizer
    if isinstance(inner, Optimizer):
        return inner
    raise ModelStateError(
        f"{type(inner).__module__}.{type(inner).__qualname__} is no torch.optim.Optimizer, so "
        "nothing can be done around its steps",
        hint="train with DDP or FSDP2 and an optimizer of torch instead of DeepSpeed's",
    )


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
