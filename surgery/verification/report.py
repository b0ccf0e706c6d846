"""What ``verify`` found, for people and for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from surgery.errors import ContractBroken
from surgery.record import Contract
from surgery.table import render

if TYPE_CHECKING:
    from rich.console import Group

#: ``equal``: bit for bit. ``within``: within the contract's bounds. ``drift``: differs, as it
#: may after training. ``changed``: differs, as the contract says. ``info``: a measurement.
Result = Literal["equal", "within", "ok", "broken", "drift", "changed", "info"]

_STYLES: dict[str, str] = {
    "equal": "green",
    "within": "green",
    "ok": "green",
    "broken": "bold red",
    "drift": "yellow",
}


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        check: What was checked.
        result: How it came out.
        worst: The largest absolute deviation, where there is something to compare.
        where: Where that is: output path and index, or parameter name.
        detail: Anything else, in a few words.
    """

    check: str
    result: Result
    worst: float | None = None
    where: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Unchecked:
    """Something that was not checked, and why."""

    check: str
    reason: str


@dataclass(frozen=True)
class Report:
    """The outcome of ``verify``. ``print(report)`` shows it as a table.

    Attributes:
        contract: What the rewrites promise together; None after training, when they promise
            nothing.
        rows: Every check that was made.
        unchecked: Every check that was not, with the reason.
    """

    contract: Contract | None
    rows: tuple[Row, ...]
    unchecked: tuple[Unchecked, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing that was checked is broken."""
        return not self.broken

    @property
    def broken(self) -> tuple[Row, ...]:
        """The checks that failed."""
        return tuple(row for row in self.rows if row.result == "broken")

    @property
    def drifted(self) -> bool:
        """Whether what was inserted has been trained, so that no contract applies."""
        return self.contract is None

    def check(self) -> None:
        """Raise unless ``ok``.

        Raises:
            ContractBroken: naming every check that failed and where.
        """
        if self.ok:
            return
        lines = "\n".join(f"    {row.check}: {_place(row)}" for row in self.broken)
        raise ContractBroken(
            f"the model is not what its rewrites promised (contract {self._promise()}):\n{lines}",
            hint="surgery.undo(model) takes the rewrites back",
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-able data."""
        return {
            "ok": self.ok,
            "contract": None if self.contract is None else str(self.contract),
            "drifted": self.drifted,
            "rows": [asdict(row) for row in self.rows],
            "unchecked": [asdict(entry) for entry in self.unchecked],
        }

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        verdict = "nothing broken" if self.ok else f"{len(self.broken)} broken"
        table = Table(
            "check", "result", "worst", "where", "detail", title=f"verify: {self._promise()}"
        )
        for row in self.rows:
            worst = "" if row.worst is None else f"{row.worst:.3g}"
            result = Text(row.result, style=_STYLES.get(row.result, ""))
            table.add_row(row.check, result, worst, Text(row.where or ""), Text(row.detail))
        left = [Text(f"unchecked: {each.check}: {each.reason}") for each in self.unchecked]
        style = "green" if self.ok else "bold red"
        return Group(table, *left, Text(verdict, style=style))

    def __str__(self) -> str:
        return render(self)

    def _promise(self) -> str:
        return "drift after training" if self.contract is None else str(self.contract)


def _place(row: Row) -> str:
    parts = [row.detail] if row.detail else []
    if row.worst is not None:
        parts.append(f"off by {row.worst:.3g}")
    if row.where is not None:
        parts.append(f"at {row.where}")
    return " ".join(parts)
