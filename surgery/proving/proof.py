"""What ``prove`` found, for people and for programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surgery.errors import ContractBroken
from surgery.table import render

if TYPE_CHECKING:
    from rich.console import Group

#: How a tensor, or a file, of the result is accounted for; the last three are failures.
Verdict = Literal[
    "equal",
    "cast",
    "merged",
    "changed",
    "converted",
    "new",
    "built",
    "unaccounted",
    "lost",
    "wrong file",
]
FAILURES: tuple[Verdict, ...] = ("unaccounted", "lost", "wrong file")

_MEANINGS: dict[Verdict, str] = {
    "equal": "bit for bit the source's",
    "cast": "the source's in another dtype, bit for bit",
    "merged": "the source's with adapters added, computed again",
    "changed": "the source's as its rule changes it, computed again",
    "converted": "the source's adapter beside what its start took out, computed again",
    "new": "made by a rule; no source has it",
    "built": "a buffer that no checkpoint holds, as its library builds it",
    "unaccounted": "nothing that is known explains it",
    "lost": "in the source and nowhere in the result",
    "wrong file": "missing, altered, or not written with the rest",
}
_HINTS: dict[Verdict, str] = {
    "wrong file": "files changed after they were written: export again, or do not trust them",
    "unaccounted": "weights that were trained since are not the source's: name the folder of the "
    "run, and with adapter= what was merged",
    "lost": "name the model that was exported as the source, not a larger one",
}
_SHOWN = 10


@dataclass(frozen=True)
class Finding:
    """One tensor or file.

    Attributes:
        name: Its name.
        verdict: How it is accounted for.
        detail: By what, or why it is not.
    """

    name: str
    verdict: Verdict
    detail: str = ""

    @property
    def ok(self) -> bool:
        """Whether it is accounted for."""
        return self.verdict not in FAILURES


@dataclass(frozen=True)
class Proof:
    """The outcome of ``prove``. ``print(proof)`` shows it as a table.

    Attributes:
        result: The folder or file that was looked at.
        source: What it was held against.
        files: Number of files whose size and SHA-256 are the ones that were written.
        findings: One for every tensor of the result, and for whatever is wrong.
        unchecked: What was not looked at, and why.
    """

    result: Path
    source: Path
    files: int
    findings: tuple[Finding, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every file and every tensor is accounted for."""
        return not self.failures

    @property
    def failures(self) -> tuple[Finding, ...]:
        """What is not accounted for."""
        return tuple(each for each in self.findings if not each.ok)

    @property
    def counts(self) -> dict[str, int]:
        """Verdict → how many."""
        return dict(Counter(each.verdict for each in self.findings))

    def check(self) -> None:
        """Raise unless ``ok``.

        Raises:
            ContractBroken: naming what is not accounted for.
        """
        if self.ok:
            return
        lines = [f"    {e.name}: {e.verdict}: {e.detail}" for e in self.failures[:_SHOWN]]
        more = len(self.failures) - len(lines)
        rest = [f"    and {more} more"] if more > 0 else []
        raise ContractBroken(
            f"{self.result} is not accounted for by {self.source}:\n" + "\n".join([*lines, *rest]),
            hint=next(hint for verdict, hint in _HINTS.items() if verdict in self.counts),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {
            "ok": self.ok,
            "result": str(self.result),
            "source": str(self.source),
            "files": self.files,
            "counts": self.counts,
            "findings": [asdict(each) for each in self.findings],
            "unchecked": list(self.unchecked),
        }

    def __rich__(self) -> Group:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table("verdict", "count", "meaning", "first", title=f"against {self.source}")
        for verdict, meaning in _MEANINGS.items():
            held = [each for each in self.findings if each.verdict == verdict]
            if held:
                style = "bold red" if verdict in FAILURES else "green"
                first = f"{held[0].name} ({held[0].detail})" if held[0].detail else held[0].name
                table.add_row(Text(verdict, style=style), str(len(held)), meaning, Text(first))
        whole = Text(f"{self.files} files have the size and the SHA-256 they were written with")
        failures = [Text(f"{e.verdict}: {e.name}: {e.detail}") for e in self.failures[:_SHOWN]]
        left = [Text(f"unchecked: {each}") for each in self.unchecked]
        said = (
            "everything is accounted for" if self.ok else f"{len(self.failures)} not accounted for"
        )
        style = "green" if self.ok else "bold red"
        return Group(table, whole, *failures, *left, Text(said, style=style))

    def __str__(self) -> str:
        return render(self)
