"""Text for people: numbers in short form, like paths as one, rich renderables as plain text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

_WIDTH = 140


def human_count(count: int) -> str:
    """A count in short form: ``1.18 M``."""
    return _human(count, ("", "k", "M", "G", "T"), 1000)


def human_bytes(count: int) -> str:
    """A size in bytes in short form, in binary units: ``4.5 MiB``."""
    return _human(count, ("B", "KiB", "MiB", "GiB", "TiB"), 1024)


def _human(count: int, units: Sequence[str], base: int) -> str:
    value = float(count)
    for unit in units[:-1]:
        if abs(value) < base:
            return _with_unit(value, unit)
        value /= base
    return _with_unit(value, units[-1])


def _with_unit(value: float, unit: str) -> str:
    digits = f"{value:.0f}" if value == int(value) else f"{value:.3g}"
    return f"{digits} {unit}".rstrip()


def some(names: Iterable[str], shown: int = 3, *, cut: Callable[[str], str] = str) -> str:
    """The first of some names, and how many there are besides: ``a, b, c and 4 more``.

    Args:
        names: What is listed.
        shown: How many are named at most.
        cut: Bounds the length of those that are named, where strangers chose them.
    """
    listed = list(names)
    text = cut(", ".join(listed[:shown]))
    return text if len(listed) <= shown else f"{text} and {len(listed) - shown} more"


def collapse(paths: Sequence[str]) -> str:
    """Dotted paths that differ in numbers only, as one: ``layers.{0..5}.attn.qkv  (6 sites)``.

    Paths that are not alike in that way are joined with commas.
    """
    split = [path.split(".") for path in paths]
    if len(paths) == 1:
        return paths[0]
    if len({tuple("#" if part.isdigit() else part for part in parts) for parts in split}) > 1:
        return ", ".join(paths)
    columns = [sorted(set(column), key=_number_first) for column in zip(*split, strict=True)]
    shape = ".".join(_ranges(column) for column in columns)
    return f"{shape}  ({len(paths)} sites)"


def _number_first(part: str) -> tuple[int, str]:
    return (int(part), "") if part.isdigit() else (-1, part)


def _ranges(column: Sequence[str]) -> str:
    """``0, 1, 2, 5`` as ``{0..2,5}``; a single value as itself."""
    if len(column) == 1:
        return column[0]
    runs: list[list[int]] = []
    for number in map(int, column):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    inside = ",".join(str(r[0]) if len(r) == 1 else f"{r[0]}..{r[-1]}" for r in runs)
    return f"{{{inside}}}"


def render(view: Any, *, width: int = _WIDTH) -> str:
    """A rich renderable as plain text without colour, for ``str()`` and for files."""
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=width, color_system=None, soft_wrap=False)
    with console.capture() as captured:
        console.print(view)
    return captured.get().rstrip("\n")
