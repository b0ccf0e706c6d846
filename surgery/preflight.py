"""Refuse, before anything is planned, a model in a state that a rewrite would not survive.

Wrappers copy what they need when they are built: a compiled model its graph, DDP its gradient
buckets, FSDP its shards. A rewrite underneath would be ignored or break them. Each refusal names
the order that works.
"""

from __future__ import annotations

from functools import cache

from torch import nn

from surgery.capture.graft import mark
from surgery.errors import Conflict, ModelStateError
from surgery.record import record_of
from surgery.tree import named_modules

# Module prefix of a class in the MRO → (what it is, the order that works). Nothing is imported.
_WRAPPERS: dict[str, tuple[str, str]] = {
    "torch._dynamo.eval_frame": (
        "compiled by torch.compile",
        "rewrite the model first, then compile it (the original is model._orig_mod)",
    ),
    "torch.nn.parallel.distributed": (
        "wrapped by DistributedDataParallel",
        "rewrite the model first, then wrap it (the original is model.module)",
    ),
    "torch.nn.parallel.data_parallel": (
        "wrapped by DataParallel",
        "rewrite the model first, then wrap it (the original is model.module)",
    ),
    "torch.distributed.fsdp": (
        "sharded by FSDP",
        "rewrite the model first, on the meta device if it does not fit, then shard it",
    ),
    "torch.distributed._composable": (
        "under a composable torch.distributed wrapper",
        "rewrite the model first, then apply the wrapper",
    ),
    "torch.jit": (
        "a TorchScript module, whose code cannot be changed",
        "rewrite the Python model first, then script or trace it",
    ),
    "deepspeed": ("wrapped by DeepSpeed", "rewrite the model first, then initialise DeepSpeed"),
}
_REWRITERS: dict[str, str] = {
    "peft": "call unload() or merge_and_unload() on the PEFT model first, or read its adapter "
    "with surgery.load_adapter",
}


def preflight(model: nn.Module) -> None:
    """Check that a model can be rewritten as it is.

    Raises:
        ModelStateError: it is compiled, wrapped, sharded or offloaded; the hint says what to do.
        Conflict: another tool has rewritten it already.
    """
    carries_graft: str | None = None
    for path, module in named_modules(model, duplicates=False):
        where = path or type(model).__name__
        _refuse_class(type(module), where)
        _refuse_state(module, where)
        if carries_graft is None and mark(module) is not None:
            carries_graft = where
    if carries_graft is not None and record_of(model) is None:
        raise ModelStateError(
            f"{carries_graft} is rewritten, but this model has no edit log",
            hint="pass the whole model that was rewritten, not a part of it",
        )


def _refuse_class(cls: type, where: str) -> None:
    found = _foreign(cls)
    if found is None:
        return
    prefix, name = found
    if prefix in _REWRITERS:
        raise Conflict(
            f"{where} is a {name} of {prefix}: the model was already rewritten by another tool",
            hint=_REWRITERS[prefix],
        )
    what, order = _WRAPPERS[prefix]
    raise ModelStateError(f"{where} is {what} ({name})", hint=order)


@cache
def _foreign(cls: type) -> tuple[str, str] | None:
    """The known wrapper or rewriter a class belongs to, and the name of that class."""
    for parent in cls.__mro__:
        for prefix in (*_WRAPPERS, *_REWRITERS):
            if parent.__module__ == prefix or parent.__module__.startswith(f"{prefix}."):
                return prefix, parent.__qualname__
    return None


def _refuse_state(module: nn.Module, where: str) -> None:
    state = module.__dict__
    if state.get("_compiled_call_impl") is not None:
        raise ModelStateError(
            f"{where} was compiled in place by module.compile()",
            hint="rewrite the model first, then call compile()",
        )
    hook = state.get("_hf_hook")
    if hook is not None and _offloads(hook):
        raise ModelStateError(
            f"{where} carries an accelerate hook that offloads its weights",
            hint="rewrite the model before dispatch_model / device_map, or dispatch it without "
            "offloading; or remove the hooks with accelerate.hooks.remove_hook_from_submodules",
        )


def _offloads(hook: object) -> bool:
    """Whether an accelerate hook, or one of a SequentialHook, moves weights off its device."""
    state = vars(hook)
    nested = state.get("hooks", ())
    return bool(state.get("offload")) or any(_offloads(each) for each in nested)
