"""Keep a rewritten model from being saved as if it were not rewritten.

``save_pretrained`` of transformers, diffusers and the hub client writes a config and a state
dict. Neither says how the forward was rewritten, so the stock class would load the folder as the
old architecture and say nothing. While a rewrite is in force ``save_pretrained`` raises; once the
stock weights alone compute what the model computes, as after a merge, it writes those.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from surgery.capture.graft import check_graftable, graft, grafts, stock_class, ungraft
from surgery.errors import ExportError
from surgery.passes.base import Pass, in_force
from surgery.record import Edit, Record, added_names, record_of
from surgery.registry import PASSES
from surgery.tree import named_modules, named_parameters

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object

_TO_UNDO = "undo the rewrites"


class GuardedModel(_Module):
    """Put over the class of a rewritten model that has ``save_pretrained``."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Save the stock tensors, if they alone are the model.

        Raises:
            ExportError: they are not.
        """
        record = record_of(self) or Record()
        apart = next(iter(not_baked(self, record)), None)
        if apart is not None:
            raise ExportError(
                f"{stock_class(self).__name__}.save_pretrained would write a folder that loads "
                f"as the model without its rewrites, such as that of {apart.site} "
                f"({apart.summary})",
                hint="surgery.save(model, folder) keeps them, and surgery.export(model, folder, "
                f"format=...) writes them for others; or {to_settle(apart) or _TO_UNDO}, and call "
                "save_pretrained again",
            )
        added = added_names(self)

        def leave_out(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
            for name in added:
                state.pop(prefix + name, None)

        hook = self.register_state_dict_post_hook(leave_out)  # pyright: ignore[reportUnknownMemberType]
        try:
            return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]
        finally:
            hook.remove()


class GuardedPart(_Module):
    """Put over the class of a part that has ``save_pretrained`` and holds a rewrite."""

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """Always raises ExportError: only the whole model knows its rewrites."""
        raise ExportError(
            f"this {stock_class(self).__name__} is a part of a rewritten model, and "
            "save_pretrained would write a folder that loads without the rewrites",
            hint="save the whole model with surgery.save, or undo its rewrites first",
        )


def guard(model: nn.Module, edits: Sequence[Edit]) -> None:
    """Guard the model and its parts that hold one of the edits, and no others.

    Args:
        model: The root.
        edits: All edits in force.
    """
    sites = [name for edit in edits for name in (edit.site, *edit.uses)]
    for path, module in named_modules(model, duplicates=False):
        if not _publishes(stock_class(module)):
            continue
        mixin = GuardedModel if module is model else GuardedPart
        wanted = any(path in ("", site) or site.startswith(f"{path}.") for site in sites)
        present = mixin in grafts(module)
        if wanted and not present:
            graft(module, mixin)
        if present and not wanted:
            ungraft(module, mixin)


def check_unguardable(model: nn.Module) -> None:
    """Raise what taking the guards off would raise.

    Raises:
        ModelStateError: a guarded module was wrapped since.
    """
    for path, module in named_modules(model, duplicates=False):
        if {GuardedModel, GuardedPart} & set(grafts(module)):
            check_graftable(module, path or stock_class(module).__name__)


def not_baked(model: nn.Module, record: Record) -> list[Edit]:
    """The edits in force that the stock weights alone do not express."""
    return [
        edit for made, edit, context in in_force(record) if not made.baked(model, edit, context)
    ]


def to_settle(edit: Edit) -> str:
    """How to have stock weights alone express an edit, in a few words; empty if nothing does."""
    return cast("type[Pass]", PASSES.get(edit.pass_name)).settled_by


def first_baked(model: nn.Module, record: Record) -> Edit | None:
    """The first edit in force that is in the stock weights themselves, as after a merge."""
    apart = not_baked(model, record)
    baked = (edit for edit in record.edits if edit not in apart)
    return next((edit for edit in baked if not within_inserted(model, record, edit)), None)


def within_inserted(model: nn.Module, record: Record, edit: Edit) -> bool:
    """Whether all that an edit uses was inserted by edits, such as the factors of adapters."""
    inserted = {name for each in record.edits for name in each.adds}
    used = edit.uses.keys() & {name for name, _ in named_parameters(model)}
    return bool(used) and used <= inserted


@cache
def _publishes(cls: type) -> bool:
    return any("save_pretrained" in vars(parent) for parent in cls.__mro__)
