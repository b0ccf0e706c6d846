"""What each selector means, as pure functions of text and numbers.

Nothing here knows models: ``surgery.select`` gathers the facts about a site (its path, the
index of its layer, its sizes, ...) and asks these functions whether a selector holds. Each
function also refuses a selector that is malformed, so that a mistake in a rule file is found
when the file is read and not when the first model meets it.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import pairwise

from surgery.errors import RuleError
from surgery.registry import suggest
from surgery.rules.roles import GROUPS, PARTS, ROLES

ALTERNATIVES = 1_000
"""Most alternatives that the braces of one path pattern may stand for."""

LENGTH = 1_000
"""Most characters in one path pattern."""

SHAPE_KEYS = ("in", "out", "rank", "numel")
"""What ``shape`` can compare: input width, output width, dimensions, elements of the weight."""

STACKS = ("all", "auto", "largest")
"""The words ``stack`` knows; anything else is a path pattern."""

_LAYERS = re.compile(r"(-?[0-9]+)?(?:(:)(-?[0-9]+)?(?::(-?[0-9]+)?)?)?")
_COMPARISON = re.compile(r"(==|!=|>=|<=|>|<|)\s*([0-9]+)")
_COMPARE: Mapping[str, Callable[[int, int], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_CLASS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


def path_matches(pattern: str, path: str) -> bool:
    """Whether a dotted module path matches a glob or ``re:`` pattern, from end to end.

    In a glob, ``*`` stands for any characters within one segment, ``?`` for one character,
    ``[0-3]`` and ``[!0-3]`` for one character of a set, ``**`` for any number of whole segments
    (zero included), ``{a,b}`` for either text, dots and all. After ``re:`` comes a regular
    expression of Python's ``re`` that must match the whole path.

    Args:
        pattern: The pattern.
        path: Dotted path as in ``named_modules``; empty for the root.

    Raises:
        RuleError: the pattern is malformed.
    """
    compiled = _compile_path(pattern)
    if pattern.startswith("re:"):
        return compiled.fullmatch(path) is not None
    # With a dot after every segment, "**" is a plain repetition of segments.
    return compiled.fullmatch(f"{path}." if path else "") is not None


def check_path(pattern: str) -> str:
    """Return ``pattern`` if it is well formed.

    Raises:
        RuleError: it is not; the message says at which character.
    """
    _compile_path(pattern)
    return pattern


@lru_cache(maxsize=4096)
def _compile_path(pattern: str) -> re.Pattern[str]:
    if len(pattern) > LENGTH:
        raise RuleError(f"path {_short(pattern)} is longer than {LENGTH} characters")
    if pattern.startswith("re:"):
        return _compile_regex(pattern)
    if not pattern:
        raise RuleError(
            "the path pattern is empty", hint="'**' matches every path, the root's included"
        )
    _check_braces(pattern)
    alternatives: list[str] = []
    for glob in _expand(pattern):
        if len(alternatives) == ALTERNATIVES:
            raise RuleError(
                f"the braces of path {_short(pattern)} stand for more than {ALTERNATIVES} paths",
                hint="write a regular expression after 're:' instead",
            )
        alternatives.append("".join(_segments(pattern, glob)))
    return re.compile("|".join(dict.fromkeys(alternatives)), re.DOTALL)


def _compile_regex(pattern: str) -> re.Pattern[str]:
    source = pattern.removeprefix("re:")
    if not source:
        raise RuleError("nothing follows 're:'", hint="write a regular expression, as in 're:.*q'")
    try:
        return re.compile(source)
    except re.error as error:
        at = "" if error.pos is None else f" at character {error.pos + 1} after 're:'"
        raise RuleError(
            f"path {_short(pattern)} is not a regular expression: {error.msg}{at}"
        ) from None
    except (OverflowError, RecursionError) as error:
        raise RuleError(f"path {_short(pattern)} is not a regular expression: {error}") from None


def _check_braces(pattern: str) -> None:
    opened: list[int] = []
    for at, character in _outside_sets(pattern):
        if character == "{":
            opened.append(at)
        elif character == "}" and not opened:
            raise RuleError(
                f"path {_short(pattern)}: '}}' at character {at + 1} closes nothing",
                hint="write '[}]' for the character itself",
            )
        elif character == "}":
            opened.pop()
    if opened:
        raise RuleError(
            f"path {_short(pattern)}: '{{' at character {opened[-1] + 1} is never closed",
            hint="write '[{]' for the character itself",
        )


def _outside_sets(pattern: str) -> Iterator[tuple[int, str]]:
    """Positions and characters that do not stand within a ``[...]`` set."""
    at = 0
    while at < len(pattern):
        if pattern[at] == "[":
            at = _end_of_set(pattern, at, pattern)
            continue
        yield at, pattern[at]
        at += 1


def _end_of_set(text: str, start: int, pattern: str) -> int:
    """Position after the set that opens at ``start``. A ``]`` that comes first is literal."""
    first = start + 2 if text[start + 1 : start + 2] == "!" else start + 1
    end = text.find("]", first + 1)
    if end == -1:
        raise RuleError(
            f"path {_short(pattern)}: '[' at character {start + 1} is never closed",
            hint="write '[[]' for the character itself",
        )
    return end + 1


def _expand(pattern: str) -> Iterator[str]:
    """The patterns that the braces of ``pattern`` stand for, left to right. Braces balance."""
    start = next((at for at, character in _outside_sets(pattern) if character == "{"), None)
    if start is None:
        yield pattern
        return
    depth, cuts = 0, [start]
    for at, character in _outside_sets(pattern):
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 1:
            cuts.append(at)
        if character == "}" and depth == 0:
            cuts.append(at)
            break
    head, tail = pattern[:start], pattern[cuts[-1] + 1 :]
    for left, right in pairwise(cuts):
        yield from _expand(head + pattern[left + 1 : right] + tail)


def _segments(pattern: str, glob: str) -> Iterator[str]:
    """Regular expressions for the segments of a glob without braces."""
    for segment in _split(glob):
        if not segment:
            inside = "" if glob == pattern else f" (its alternative {_short(glob)})"
            raise RuleError(
                f"path {_short(pattern)}{inside} has an empty segment",
                hint="segments are separated by single dots; '**' stands for any number of them",
            )
        if segment == "**":
            yield r"(?:[^.]+\.)*"
        elif "**" in segment:
            raise RuleError(
                f"path {_short(pattern)}: '**' must be a whole segment, not a part of "
                f"{_short(segment)}",
                hint="write '*' within a segment, '**' between dots",
            )
        else:
            yield _segment(segment, pattern) + r"\."


def _split(glob: str) -> list[str]:
    """Split at the dots that do not stand within a set."""
    cuts = [-1, *(at for at, character in _outside_sets(glob) if character == "."), len(glob)]
    return [glob[left + 1 : right] for left, right in pairwise(cuts)]


def _segment(segment: str, pattern: str) -> str:
    parts: list[str] = []
    at = 0
    while at < len(segment):
        character = segment[at]
        if character == "[":
            end = _end_of_set(segment, at, pattern)
            parts.append(_set(segment[at + 1 : end - 1], pattern))
            at = end
            continue
        parts.append({"*": "[^.]*", "?": "[^.]"}.get(character, re.escape(character)))
        at += 1
    return "".join(parts)


def _set(body: str, pattern: str) -> str:
    """A ``[...]`` set as a regular expression; like ``*`` it never matches a dot."""
    negated = body.startswith("!")
    members = body[1:] if negated else body
    parts: list[str] = []
    for first, last in re.findall(r"(.)(?:-(.))?", members, re.DOTALL):
        if last and last < first:
            raise RuleError(f"path {_short(pattern)}: the range '{first}-{last}' runs backwards")
        parts.append(re.escape(first) + (f"-{re.escape(last)}" if last else ""))
    return f"(?!\\.)[{'^' if negated else ''}{''.join(parts)}]"


def layer_selected(spec: str, index: int, length: int) -> bool:
    """Whether a layer is one that ``spec`` selects.

    Args:
        spec: A Python slice (``"-8:"``, ``"::2"``, ``"4:20"``) or one index (``"3"``, ``"-1"``).
            As in Python, a slice may reach beyond the ends; an index beyond them selects nothing.
        index: Position of the layer in its stack, from 0.
        length: Number of layers in the stack.

    Raises:
        RuleError: the spec is malformed, or selects nothing in any stack.
    """
    chosen = parse_layers(spec)
    if isinstance(chosen, int):
        return index in (chosen, chosen + length) and 0 <= index < length
    return index in range(length)[chosen]


@lru_cache(maxsize=1024)
def parse_layers(spec: str) -> slice | int:
    """The slice or index that a ``layers`` text stands for.

    Raises:
        RuleError: the spec is malformed, or selects nothing in any stack.
    """
    match = _LAYERS.fullmatch(spec)
    if match is None or not spec or len(spec) > 64:
        raise RuleError(
            f"layers {_short(spec)} is neither an index nor a Python slice",
            hint='write an index such as 3 or -1, or a slice such as "-8:", "4:20" or "::2"',
        )
    start, colon, stop, step = match.groups()
    if colon is None:
        return int(start)
    if step is not None and int(step) == 0:
        raise RuleError(f"layers {spec!r}: the step of a slice cannot be 0")
    chosen = slice(*(None if part is None else int(part) for part in (start, stop, step)))
    # A slice that selects nothing both in a stack of one and in a huge one selects nothing in any.
    if not range(1)[chosen] and not range(10**20)[chosen]:
        raise RuleError(
            f"layers {spec!r} selects nothing, however many layers a stack has",
            hint="a slice runs from its first number up to, not including, its second",
        )
    return chosen


def shape_misfit(comparisons: Mapping[str, str], sizes: Mapping[str, int]) -> str | None:
    """Why a site's sizes do not satisfy a ``shape`` selector, or None if they do.

    Args:
        comparisons: Key of ``SHAPE_KEYS`` → comparison such as ``">=256"``; all must hold.
        sizes: Key → the site's size. A key the site has no size for is left out.

    Raises:
        RuleError: a comparison is malformed.
    """
    for key, comparison in comparisons.items():
        size = sizes.get(key)
        if size is None:
            return f"it has no size {key!r}"
        if not all(_COMPARE[sign](size, bound) for sign, bound in parse_comparison(comparison)):
            return f"{key!r} is {size}, not {comparison}"
    return None


def shape_matches(comparisons: Mapping[str, str], sizes: Mapping[str, int]) -> bool:
    """Whether a site's sizes satisfy a ``shape`` selector; see ``shape_misfit``."""
    return shape_misfit(comparisons, sizes) is None


@lru_cache(maxsize=1024)
def parse_comparison(text: str) -> tuple[tuple[str, int], ...]:
    """Split ``">=256, <1024"`` into signs and bounds. All of them must hold.

    Raises:
        RuleError: the text is malformed, or no number satisfies it.
    """
    terms = [_COMPARISON.fullmatch(term.strip()) for term in text.split(",")]
    found = tuple((term[1] or "==", int(term[2])) for term in terms if term is not None)
    if len(found) != len(terms) or len(text) > 64:
        raise RuleError(
            f"{_short(text)} is not a comparison",
            hint='write a number, or one of == != >= <= > < before it, as in ">=256"; '
            'a comma means and: ">=256, <1024"',
        )
    # Each bound and its neighbours: where a satisfiable set of comparisons first holds.
    candidates = {0, *(max(bound + step, 0) for _, bound in found for step in (-1, 0, 1))}
    candidates |= {number + len(found) for number in candidates}
    if not any(all(_COMPARE[sign](n, bound) for sign, bound in found) for n in candidates):
        raise RuleError(f"no number satisfies the comparison {text!r}")
    return found


def check_comparison(text: str) -> str:
    """A comparison in its one canonical spelling: ``"256"`` becomes ``"==256"``.

    Raises:
        RuleError: the text is malformed, or no number satisfies it.
    """
    return ", ".join(f"{sign}{bound}" for sign, bound in parse_comparison(text))


def role_matches(wanted: str, role: str) -> bool:
    """Whether a site with ``role`` is meant by ``wanted``.

    A role means itself and everything it is made of: ``attention.qkv`` covers a fused query-key-
    value projection as well as separate query, key and value projections, while ``attention.q``
    does not cover a fused one, which is more than a query. A group (``attention``) means all of
    its roles.
    """
    if wanted in GROUPS:
        return role == wanted or role.startswith(f"{wanted}.")
    whole = PARTS.get(wanted)
    if whole is None:
        return role == wanted
    return PARTS.get(role, frozenset((role,))) <= whole


def check_role(name: str) -> str:
    """Return ``name`` if it is a role or a group of roles.

    Raises:
        RuleError: it is neither.
    """
    if name in ROLES or name in GROUPS:
        return name
    raise RuleError(f"unknown role {_short(name)}", hint=suggest(name, (*GROUPS, *ROLES)))


def type_matches(wanted: str, cls: type) -> bool:
    """Whether a class or one of its bases bears the name ``wanted``.

    A plain name is compared with the names of the classes alone. A dotted one names the module
    too, or a package that module is in: ``torch.nn.Linear`` is found although the class lives in
    ``torch.nn.modules.linear``. Nothing is imported.
    """
    return any(_is_named(base, wanted) for base in cls.__mro__ if base is not object)


def _is_named(cls: type, wanted: str) -> bool:
    name = cls.__qualname__
    if wanted in (name, cls.__name__):
        return True
    if not wanted.endswith(f".{name}"):
        return False
    package = wanted.removesuffix(f".{name}")
    return cls.__module__ == package or cls.__module__.startswith(f"{package}.")


def check_type(name: str) -> str:
    """Return ``name`` if it can be the name of a class.

    Raises:
        RuleError: it cannot.
    """
    if _CLASS.fullmatch(name) is None:
        raise RuleError(
            f"{_short(name)} is not the name of a class",
            hint="write one such as Linear or torch.nn.Linear; "
            "globs and regular expressions belong in path",
        )
    return name


def stack_matches(wanted: str, path: str, *, largest: bool) -> bool:
    """Whether a stack of layers is meant by ``wanted``.

    Args:
        wanted: ``all`` (``auto`` means the same), ``largest``, or a path pattern.
        path: Path of the stack.
        largest: Whether no stack of the model is larger.
    """
    if wanted in ("all", "auto"):
        return True
    return largest if wanted == "largest" else path_matches(wanted, path)


def check_stack(wanted: str) -> str:
    """Return ``wanted`` if it is a word ``stack`` knows or a well-formed path pattern.

    Raises:
        RuleError: it is neither.
    """
    if wanted not in STACKS:
        check_path(wanted)
    return wanted


def _short(text: str) -> str:
    """``text`` quoted, its middle left out if it is long."""
    return repr(text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}")
