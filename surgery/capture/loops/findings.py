"""What a scan finds: the calls that run blocks, and what cannot be followed."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from typing import Literal

from surgery.capture.loops.values import NOTHING, Value

Kind = Literal["call", "through", "sequence", "whole", "view"]


@dataclass(frozen=True)
class Run:
    """A call that runs a block.

    Attributes:
        kind: How: the block is called; a function is given it; a function is given several; or a
            function is given modules that hold several each. A ``view`` runs none: it lists them.
        call: The call; its callee is what is to be wrapped.
        containers: The containers the block may be of.
        block: Python for the block, where the function is given something made around it.
    """

    kind: Kind
    call: ast.Call
    containers: frozenset[str]
    block: str | None = None

    @property
    def callee(self) -> ast.expr:
        """The expression to wrap."""
        return self.call.func


@dataclass(frozen=True)
class Trouble:
    """Something done to a block that cannot be followed.

    Attributes:
        why: What is done.
        node: Where.
        loop: The innermost loop around it.
        runs: Whether it may run the block, rather than only keep it.
        aside: It runs part of one block, outside of any loop: the model's own wiring (an embedding
            that lives in the first block), as long as the blocks are run elsewhere.
        inside: A function that another is handed calls the block, as a whole.
        containers: The containers of the block.
    """

    why: str
    node: ast.AST
    loop: ast.AST | None
    runs: bool
    containers: frozenset[str]
    aside: bool = False
    inside: bool = False


@dataclass
class Findings:
    """What one function does with the blocks it can reach.

    Attributes:
        runs: The calls to rewrite.
        around: Calls inside functions that another function is handed, which wraps those.
        troubles: What cannot be followed.
        returns: What it returns.
        aliases: Attributes of the driver it assigns.
    """

    runs: dict[ast.Call, Run] = field(default_factory=dict[ast.Call, Run])
    around: dict[ast.Call, Run] = field(default_factory=dict[ast.Call, Run])
    troubles: dict[tuple[ast.AST, str], Trouble] = field(
        default_factory=dict[tuple[ast.AST, str], Trouble]
    )
    returns: Value = NOTHING
    aliases: dict[str, Value] = field(default_factory=dict[str, Value])

    def runs_blocks(self) -> bool:
        """Whether a block is, or may be, run."""
        return bool(self.runs or self.around) or not self.is_clear()

    def is_clear(self) -> bool:
        """Whether every run of a block is one that was followed."""
        return not any(trouble.runs for trouble in self.troubles.values())
