"""Docstrings of Python's standard library: a real task of text classification without a download.

Which package does a docstring come from? Modules belong to one part as a whole; names of packages
anywhere, and of modules as words, are masked.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from surgery.train.data.base import Data, need
from surgery.train.data.configs import DocstringsData
from surgery.train.data.records import Rows, made

#: A package needs so many modules, and so many docstrings in each part.
MIN_MODULES, MIN_DOCSTRINGS = 4, 30
_SHARE = 5
"""One docstring in so many is for validation, and as many for the test."""

Found = Mapping[str, Mapping[str, Sequence[str]]]
"""Package → module → its docstrings."""


def open_docstrings(config: DocstringsData, *, seed: int) -> Data:
    """The docstrings of the larger packages.

    Args:
        config: The ``data`` section.
        seed: Not used: parts depend on the names of modules only.

    Raises:
        DataError: this Python came without its standard library's source.
    """
    found = by_module(Path(sysconfig.get_path("stdlib")))
    train, validation, test = parts(found, config.most)
    return made(config, train, validation if config.part == "validation" else test)


def parts(found: Found, most: int) -> tuple[Rows, Rows, Rows]:
    """Training, validation and test part, with ``most`` training texts of a package at most.

    The other parts have 2/5 of that, so that no package dominates.
    """
    large = [package for package, modules in found.items() if len(modules) >= MIN_MODULES]
    divided = {package: _divided(found[package]) for package in large}
    packages = [p for p in large if min(map(len, divided[p])) >= MIN_DOCSTRINGS]
    need(
        len(packages) > 1,
        f"the standard library's source has {len(packages)} packages with enough docstrings",
        hint="this Python came without it; use data of kind records",
    )
    mask = masker(packages, found)
    shares = (most, max(1, most * 2 // 5), max(1, most * 2 // 5))
    train, validation, test = (
        Rows(
            "the standard library's docstrings",
            [mask(text) for p in packages for text in divided[p][part][:share]],
            None,
            [p for p in packages for _ in divided[p][part][:share]],
        )
        for part, share in enumerate(shares)
    )
    return train, validation, test


@functools.cache
def by_module(root: Path) -> Found:
    """The docstrings of every package under ``root`` but tests; read once in a process."""
    found: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for package in sorted(path.parent for path in root.glob("*/__init__.py")):
        if package.name in {"test", "site-packages"}:
            continue
        for source in sorted(package.rglob("*.py")):
            name = str(source.relative_to(root))
            if "test" not in name and (texts := _docstrings(source)):
                found[package.name][name] = texts
    return found


def _divided(modules: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str], list[str]]:
    """The different docstrings of training, validation and test modules, in a fixed order.

    Modules are taken in the order of a hash of their names until a part is full; one that would
    overfill it is left to the next.
    """
    left = sorted(modules, key=fixed_order)
    room = sum(map(len, modules.values())) / _SHARE
    chosen = [_taken(left, modules, room) for _ in range(2)]
    return _texts(modules, left), _texts(modules, chosen[0]), _texts(modules, chosen[1])


def _taken(left: list[str], modules: Mapping[str, Sequence[str]], room: float) -> list[str]:
    """Modules for one part; they are removed from ``left``."""
    taken: list[str] = []
    for name in list(left):
        if len(modules[name]) <= room:
            room -= len(modules[name])
            taken.append(name)
            left.remove(name)
    return taken


def _texts(modules: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[str]:
    return sorted({text for name in names for text in modules[name]}, key=fixed_order)


def fixed_order(text: str) -> str:
    """A sort key that looks random and is the same in every run."""
    return hashlib.sha256(text.encode()).hexdigest()


def masker(packages: Sequence[str], found: Found) -> Callable[[str], str]:
    """Replace what would give the answer away."""
    modules = {Path(name).stem for package in packages for name in found[package]}
    anywhere = "|".join(map(re.escape, packages))
    words = "|".join(map(re.escape, sorted(modules, key=len, reverse=True)))
    pattern = re.compile(rf"{anywhere}|\b(?:{words})\b", re.IGNORECASE)
    return lambda text: pattern.sub("this", text)


def _docstrings(source: Path) -> list[str]:
    """Docstrings of four words or more in one file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # old escapes in the library's own files
        try:
            tree = ast.parse(source.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            return []  # lib2to3 ships files that are broken on purpose
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in texts if text and len(text.split()) >= 4]
