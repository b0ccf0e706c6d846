"""Whether the name of a child that a pass adds is free."""

from __future__ import annotations

from torch import nn

from surgery.errors import Conflict


def check_name(module: nn.Module, path: str, name: str, *, what: str, leave_out: str) -> None:
    """Raise if a module has something of its own under a name.

    Args:
        module: The module; what a pass added under the name before is the caller's to look for.
        path: Its path, for the message.
        name: The name.
        what: What would go there, such as ``adapters``.
        leave_out: What ``except:`` could leave out, such as ``the module``.

    Raises:
        Conflict: it has an attribute, a child, a parameter or a buffer of that name.
    """
    state = module.__dict__
    registered = (state, state["_modules"], state["_parameters"], state["_buffers"])
    inherited = (vars(cls) for cls in type(module).__mro__)
    if any(name in names for names in (*registered, *inherited)):
        raise Conflict(
            f"{path or 'the model'} has an attribute {name!r} of its own, which is where {what} "
            "would go",
            hint=f"rename it, or leave {leave_out} out with except:",
        )
