"""Stacks whose every residual addition is a site: the blocks' own forwards are rewired.

Each block gets a generated forward, see `block_edit`. The code that calls the blocks hands on the
states, as it does where only whole blocks are sites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from surgery.capture.blocks import capture_blocks
from surgery.capture.graft import check_graftable, graft, grafts, ungraft
from surgery.capture.relay import Rewired, forward_mixin, rewired_class
from surgery.errors import CaptureError, RuleError
from surgery.passes.streams.block_edit import BlockEdit, Mode, owners_inlined, plan_block
from surgery.passes.streams.runs import Run
from surgery.residuals import Residual, find_residuals
from surgery.select import ModelMap

_NAME = "RewiredBlock"


@dataclasses.dataclass(frozen=True)
class BlockPlan:
    """What is to become of one block's forward.

    Attributes:
        path: The block.
        key: Which generated class it gets; blocks of one source share it.
        edit: What is done to its captured forward.
        inline: The children that perform its additions.
    """

    path: str
    key: str
    edit: BlockEdit
    inline: tuple[str, ...]

    @property
    def sites(self) -> int:
        """How many residual additions it has."""
        return len(self.edit.sites)

    def dump(self) -> dict[str, Any]:
        """As JSON-able data."""
        return dataclasses.asdict(self)

    @staticmethod
    def load(data: Mapping[str, Any]) -> BlockPlan:
        """Back from ``dump``."""
        made = dict(data["edit"])
        edit = BlockEdit(
            made["mode"], tuple(made["owners"]), tuple(made["streams"]), made["scaled"]
        )
        return BlockPlan(data["path"], data["key"], edit, tuple(data["inline"]))

    def code(self) -> str:
        """The generated forward, as captured from the example; empty before any capture."""
        return "\n\n".join(variant.source for variant in self.mixin().surgery_shared.variants)

    def mixin(self) -> type[Rewired]:
        """The class that carries the generated forward."""
        return rewired_class(_NAME, self.key, self.edit, self.inline)


def plan_sites(run: Run, sites: ModelMap, mode: Mode, *, scaled: bool) -> tuple[BlockPlan, ...]:
    """Capture the blocks of a run and find their residual additions.

    Args:
        run: The blocks.
        sites: The model's facts.
        mode: What becomes of the shortcuts.
        scaled: Whether the topology also weighs what an addition adds up.

    Raises:
        CaptureError: a block cannot be traced, or an addition not be rewired.
        RuleError: the states do not have one shape.
    """
    residuals = sites.residuals.residuals
    inline = {path: owners_inlined(path, residuals) for path in run.layers}
    example = sites.resolved_example
    model = sites.model
    captures = capture_blocks(model, example.args, example.kwargs, paths=run.layers, inline=inline)
    firsts: list[Residual] = []
    plans: list[BlockPlan] = []
    for path in run.layers:
        block, made = model.get_submodule(path), captures[path]
        check_graftable(block, path)
        try:
            found = find_residuals(made.graph, block)
            edit = plan_block(made, found, mode=mode, scaled=scaled)
            _check_one_stream(path, edit)
            key = forward_mixin(_NAME, made, block, edit).surgery_key
        except CaptureError as error:
            raise CaptureError(f"{path}: {error.message}", hint=error.hint) from error
        # Within a block a state may be reshaped; what enters the next one is of one shape again.
        firsts.append(found[0])
        plans.append(BlockPlan(path, key, edit, inline[path]))
    _check_shapes(run, firsts)
    return tuple(plans)


def graft_blocks(model: nn.Module, plans: Sequence[BlockPlan]) -> None:
    """Give the blocks their generated forwards; none of them if one cannot have it."""
    for plan in plans:
        check_graftable(model.get_submodule(plan.path), plan.path)
    once = {plan.path: plan for plan in plans}  # a block may be called more often (ALBERT)
    for path, plan in once.items():
        graft(model.get_submodule(path), plan.mixin())


def ungraft_blocks(model: nn.Module, plans: Sequence[BlockPlan]) -> None:
    """Give the blocks their own forwards back."""
    for plan in plans:
        block, mixin = model.get_submodule(plan.path), plan.mixin()
        if mixin in grafts(block):
            ungraft(block, mixin)


def _check_one_stream(path: str, edit: BlockEdit) -> None:
    streams = len(set(edit.sites))
    if streams > 1:
        raise RuleError(
            f"{path} carries {streams} streams side by side, each with residual additions of its "
            "own, which do not make one row of sites",
            hint="use scope: block, where the state is all streams together",
        )


def _check_shapes(run: Run, found: Sequence[Residual]) -> None:
    shapes = list(dict.fromkeys(f"{residual.dtype} {list(residual.shape)}" for residual in found))
    if len(shapes) > 1:
        raise RuleError(
            f"the residual additions of {run.layers[0]} to {run.layers[-1]} have states of "
            f"different shapes ({', '.join(shapes[:3])}), which cannot be added to one another",
            hint="use scope: block, whose states have one shape",
        )
