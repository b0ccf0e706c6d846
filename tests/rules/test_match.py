from __future__ import annotations

import fnmatch
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from surgery.errors import RuleError
from surgery.rules import match

PATHS = [
    # pattern, paths it matches, paths it does not match
    ("fc", ["fc"], ["fcx", "a.fc", "fc.a", ""]),
    ("*", ["a", "blocks"], ["a.b", ""]),
    ("**", ["", "a", "a.b.c"], []),
    ("a.**", ["a", "a.b", "a.b.c"], ["", "ab", "b.a"]),
    ("**.a", ["a", "b.a", "b.c.a"], ["", "ba", "a.b"]),
    ("**.**", ["", "a", "a.b"], []),
    ("a.**.b", ["a.b", "a.x.b", "a.x.y.b"], ["ab", "a.bx", "a.xb"]),
    ("**.layers.0.**", ["layers.0", "m.layers.0.q"], ["layers.00.q", "layers.1.q", "xlayers.0"]),
    ("*.q*", ["a.q", "a.q_proj"], ["a.b.q", "q", "a.xq"]),
    ("q?", ["q1", "qk"], ["q", "qkv", "q."]),
    ("l.[0-3]", ["l.0", "l.3"], ["l.4", "l.-", "l.01"]),
    ("l.[!0-3]", ["l.4", "l.x"], ["l.0", "l.", "l.44"]),
    ("l.[]x]", ["l.]", "l.x"], ["l.y"]),
    ("a[.]b", [], ["a.b", "a[.]b"]),
    ("a[[*]b", ["a[b", "a*b"], ["aab"]),
    ("{q,k}_proj", ["q_proj", "k_proj"], ["v_proj", "{q,k}_proj"]),
    ("{a,b.c}.d", ["a.d", "b.c.d"], ["b.d", "c.d"]),
    ("x{,.0}", ["x", "x.0"], ["x.1"]),
    ("{a,{b,c}x}", ["a", "bx", "cx"], ["ax", "b"]),
    ("a+b.(c)", ["a+b.(c)"], ["aab.c", "aab.(c)"]),
    ("**.{q,**.k}", ["q", "a.q", "k", "a.b.k"], ["a.q.b"]),
    ("re:.*\\.q", ["a.q", "a.b.q"], ["q", "a.q.x"]),
    ("re:q|k", ["q", "k"], ["qk", "a.q"]),
]


@pytest.mark.parametrize(("pattern", "yes", "no"), PATHS)
def test_path(pattern: str, yes: list[str], no: list[str]):
    assert [path for path in yes if not match.path_matches(pattern, path)] == []
    assert [path for path in no if match.path_matches(pattern, path)] == []


BAD_PATHS = [
    ("", "the path pattern is empty"),
    ("a..b", "path 'a..b' has an empty segment"),
    (".a", "has an empty segment"),
    ("a.", "has an empty segment"),
    ("{,a}", "path '{,a}' (its alternative '') has an empty segment"),
    ("a**b", "path 'a**b': '**' must be a whole segment, not a part of 'a**b'"),
    ("x.{a,b", "path 'x.{a,b': '{' at character 3 is never closed"),
    ("x}", "path 'x}': '}' at character 2 closes nothing"),
    ("x[0-", "path 'x[0-': '[' at character 2 is never closed"),
    ("x[]", "path 'x[]': '[' at character 2 is never closed"),
    ("x[9-0]", "path 'x[9-0]': the range '9-0' runs backwards"),
    ("re:", "nothing follows 're:'"),
    ("re:a(", "missing ), unterminated subpattern at character 2 after 're:'"),
    ("re:a{99999999999}", "the repetition number is too large"),
    ("{a,b}" * 12, "stand for more than 1000 paths"),
    ("a" * 1001, "is longer than 1000 characters"),
]


@pytest.mark.parametrize(("pattern", "message"), BAD_PATHS)
def test_bad_path(pattern: str, message: str):
    with pytest.raises(RuleError, match=re.escape(message)):
        match.check_path(pattern)


def _reference(pattern: list[str], path: list[str]) -> bool:
    """Whether segments match, written a second time: by recursion, with the standard library."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_reference(pattern[1:], path[at:]) for at in range(len(path) + 1))
    return (
        bool(path)
        and fnmatch.fnmatchcase(path[0], pattern[0])
        and _reference(pattern[1:], path[1:])
    )


@given(
    st.lists(st.sampled_from(["**", "*", "a", "a*", "*b", "?", "[ab]", "[!a]", "ab"]), min_size=1),
    st.lists(st.sampled_from(["a", "b", "ab", "aab", "c"]), max_size=6),
)
def test_path_agrees_with_a_recursive_reference(pattern: list[str], path: list[str]):
    found = match.path_matches(".".join(pattern), ".".join(path))
    assert found == _reference(pattern, path)


@given(st.text(alphabet="ab.*?[]!-{},0\n", max_size=16), st.text(alphabet="ab.0-", max_size=8))
def test_any_text_is_a_pattern_or_a_rule_error(pattern: str, path: str):
    try:
        match.check_path(pattern)
    except RuleError:
        return
    assert match.path_matches(pattern, path) in (True, False)


LAYERS: list[tuple[str, list[int]]] = [
    (":", [0, 1, 2, 3, 4, 5]),
    ("-2:", [4, 5]),
    ("-8:", [0, 1, 2, 3, 4, 5]),
    (":2", [0, 1]),
    ("1:4", [1, 2, 3]),
    ("::2", [0, 2, 4]),
    ("4::-2", [0, 2, 4]),
    ("0", [0]),
    ("-1", [5]),
    ("6", []),
    ("-7", []),
]


@pytest.mark.parametrize(("spec", "expected"), LAYERS)
def test_layers(spec: str, expected: list[int]):
    assert [index for index in range(6) if match.layer_selected(spec, index, 6)] == expected


BAD_LAYERS = [
    ("", "layers '' is neither an index nor a Python slice"),
    ("last", "layers 'last' is neither an index nor a Python slice"),
    ("1:2:3:4", "is neither an index nor a Python slice"),
    ("1.5", "is neither an index nor a Python slice"),
    ("1, 2", "is neither an index nor a Python slice"),
    ("٣", "is neither an index nor a Python slice"),
    ("9" * 65, "is neither an index nor a Python slice"),
    ("::0", "layers '::0': the step of a slice cannot be 0"),
    ("5:3", "layers '5:3' selects nothing, however many layers a stack has"),
    (":0", "selects nothing, however many layers a stack has"),
    ("-1:-3", "selects nothing, however many layers a stack has"),
]


@pytest.mark.parametrize(("spec", "message"), BAD_LAYERS)
def test_bad_layers(spec: str, message: str):
    with pytest.raises(RuleError, match=re.escape(message)):
        match.parse_layers(spec)


_ends = st.none() | st.integers(-7, 7)


@given(_ends, _ends, st.none() | st.integers(-3, 3).filter(bool))
def test_layers_is_a_python_slice(start: int | None, stop: int | None, step: int | None):
    spec = ":".join("" if part is None else str(part) for part in (start, stop, step))
    stacks = {length: list(range(length))[start:stop:step] for length in range(30)}
    if not any(stacks.values()):
        with pytest.raises(RuleError, match="selects nothing"):
            match.parse_layers(spec)
        return
    for length, expected in stacks.items():
        chosen = {index for index in range(length) if match.layer_selected(spec, index, length)}
        assert chosen == set(expected)


SHAPES: list[tuple[dict[str, str], str | None]] = [
    ({"in": ">=768"}, None),
    ({"in": ">768"}, "'in' is 768, not >768"),
    ({"in": "768"}, None),
    ({"in": "==768", "out": "<1000"}, "'out' is 3072, not <1000"),
    ({"out": ">=1024, <=4096"}, None),
    ({"out": "!=3072"}, "'out' is 3072, not !=3072"),
    ({"rank": "2"}, None),
    ({"numel": ">0"}, "it has no size 'numel'"),
]


@pytest.mark.parametrize(("comparisons", "misfit"), SHAPES)
def test_shape(comparisons: dict[str, str], misfit: str | None):
    sizes = {"in": 768, "out": 3072, "rank": 2}
    assert match.shape_misfit(comparisons, sizes) == misfit
    assert match.shape_matches(comparisons, sizes) == (misfit is None)


BAD_COMPARISONS = [
    ("", "'' is not a comparison"),
    (">=", "'>=' is not a comparison"),
    ("=256", "'=256' is not a comparison"),
    ("> -1", "'> -1' is not a comparison"),
    (">=1e3", "is not a comparison"),
    (">=1,", "is not a comparison"),
    ("<256, >512", "no number satisfies the comparison '<256, >512'"),
    ("<0", "no number satisfies the comparison '<0'"),
    (">3, <5, !=4", "no number satisfies the comparison"),
]


@pytest.mark.parametrize(("text", "message"), BAD_COMPARISONS)
def test_bad_comparison(text: str, message: str):
    with pytest.raises(RuleError, match=re.escape(message)):
        match.parse_comparison(text)


_terms = st.tuples(st.sampled_from(["==", "!=", ">=", "<=", ">", "<"]), st.integers(0, 6))


@given(st.lists(_terms, min_size=1, max_size=5))
def test_a_comparison_is_refused_exactly_if_no_number_satisfies_it(terms: list[tuple[str, int]]):
    python = " and ".join(f"n {sign} {bound}" for sign, bound in terms)
    satisfied = [n for n in range(20) if eval(python, {"n": n})]  # noqa: S307 - our own text
    text = ",".join(f"{sign} {bound}" for sign, bound in terms)
    if not satisfied:
        with pytest.raises(RuleError, match="no number satisfies"):
            match.parse_comparison(text)
        return
    assert [n for n in range(20) if match.shape_matches({"in": text}, {"in": n})] == satisfied


ROLES = [
    # wanted, roles it means, roles it does not mean
    (
        "attention.qkv",
        ["attention.qkv", "attention.q", "attention.k", "attention.kv"],
        ["attention.out"],
    ),
    ("attention.q", ["attention.q"], ["attention.qkv", "attention.qk", "attention.k"]),
    (
        "attention.kv",
        ["attention.k", "attention.v", "attention.kv"],
        ["attention.q", "attention.qkv"],
    ),
    ("attention", ["attention.q", "attention.qkv", "attention.out"], ["mlp.in", "norm"]),
    ("mlp", ["mlp.in", "mlp.gate", "mlp.gate_in", "mlp.out"], ["attention.out", "router"]),
    ("mlp.gate_in", ["mlp.gate_in", "mlp.gate", "mlp.in"], ["mlp.out"]),
    ("mlp.in", ["mlp.in"], ["mlp.gate_in", "mlp.gate"]),
    ("norm", ["norm"], ["head"]),
]


@pytest.mark.parametrize(("wanted", "yes", "no"), ROLES)
def test_role(wanted: str, yes: list[str], no: list[str]):
    assert [role for role in yes if not match.role_matches(wanted, role)] == []
    assert [role for role in no if match.role_matches(wanted, role)] == []


def test_every_role_means_itself_and_is_known():
    for name in (*match.ROLES, *match.PARTS):
        assert match.role_matches(name, match.check_role(name))
    for group in match.GROUPS:
        assert any(match.role_matches(group, name) for name in match.ROLES)


def test_an_unknown_role_names_the_nearest():
    with pytest.raises(RuleError, match=r"unknown role 'atention\.q'") as raised:
        match.check_role("atention.q")
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("did you mean 'attention.q'")


class _Own(nn.Linear):
    class Inner(nn.Module):
        pass


TYPES: list[tuple[str, type, bool]] = [
    ("Linear", nn.Linear, True),
    ("torch.nn.Linear", nn.Linear, True),
    ("torch.nn.modules.linear.Linear", nn.Linear, True),
    ("nn.Linear", nn.Linear, False),
    ("torch.n.Linear", nn.Linear, False),
    ("Line", nn.Linear, False),
    ("Linear", _Own, True),
    ("Module", _Own, True),
    ("object", _Own, False),
    ("_Own", nn.Linear, False),
    ("Inner", _Own.Inner, True),
    ("_Own.Inner", _Own.Inner, True),
    (f"{__name__}._Own.Inner", _Own.Inner, True),
]


@pytest.mark.parametrize(("wanted", "cls", "expected"), TYPES)
def test_type(wanted: str, cls: type, expected: bool):
    assert match.type_matches(match.check_type(wanted), cls) is expected


@pytest.mark.parametrize("name", ["", "*Linear", "torch.nn.", ".Linear", "1Linear", "a b", "a-b"])
def test_bad_type(name: str):
    with pytest.raises(RuleError, match="is not the name of a class"):
        match.check_type(name)


STACKS: list[tuple[str, dict[str, Any], bool]] = [
    ("all", {"path": "blocks", "largest": False}, True),
    ("auto", {"path": "blocks", "largest": False}, True),
    ("largest", {"path": "blocks", "largest": False}, False),
    ("largest", {"path": "blocks", "largest": True}, True),
    ("**.blocks", {"path": "vit.blocks", "largest": False}, True),
    ("**.blocks", {"path": "vit.stages", "largest": True}, False),
]


@pytest.mark.parametrize(("wanted", "stack", "expected"), STACKS)
def test_stack(wanted: str, stack: dict[str, Any], expected: bool):
    assert match.stack_matches(match.check_stack(wanted), **stack) is expected


def test_bad_stack():
    with pytest.raises(RuleError, match="has an empty segment"):
        match.check_stack("a..b")
