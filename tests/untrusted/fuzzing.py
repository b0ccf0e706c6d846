"""Files as an attacker might write them, and a guard that notices what reading them does.

Most cases are a valid file with one mutation, for a file that is all wrong is refused at once. A
mutation is of the bytes, or of the JSON: a value replaced, a key renamed, doubled or left out.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

#: How many cases ``make fuzz`` and ``make test`` run; over all targets together.
CASES = int(os.environ.get("FUZZ_CASES", "400"))

Kind = str  # valid, mutated, made up

#: What a value in a document may be replaced with.
HOSTILE: list[Any] = [
    *(True, False, None, -1, 0, 1, 2, 3, 7, 255, 1.0, -0.5, 1e308),
    *(2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63)),
    *("", "a", "0", "-1", "../x", "../../x.safetensors", "/etc/passwd", "C:\\x", "a/b", "a\\b"),
    *("\ud800", "\0", "\n", "\x1b[2J", "é" * 200, "x" * 5000, "F32", "F4", "BF16", "I64", "BOOL"),
    *("__metadata__", "{}", "${HOME}", "%s", "re:(a+)+b", "**", "re:", "{a,b", "os.system"),
    *([], {}, [[]], [0], [0, 0], [-1, 5], [2**62, 2**62, 0], [1] * 70, {"a": 1}, {"": {}}),
    *(float("nan"), float("inf"), -float("inf")),
]
#: What may be put into text.
TOKENS = [
    *(b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"{", b"}", b"[", b"]", b'"', b","),
    *(b"\\", b"\\u0000", b"\\ud800", b"NaN", b"-Infinity", b"1e999", b"9" * 400, b"true", b"null"),
    *(b"[" * 2000, b'{"a":' * 2000, b"//", b"/*", b"../", b"\n", b"\r", b"\t", b" " * 100, b":"),
    *(b"&a ", b"*a", b"!!python/object/apply:os.system", b"<<: ", b"---\n", b"...", b"- ", b"? "),
    *(b"%YAML 9.9\n", b"|2\n", b"'", b"!", b"@", b"`", b"0o7", b"0x", b".inf", b"~", b"\xc2\x85"),
]

_DTYPES = {"F64": 8, "F32": 4, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I8": 1, "U8": 1, "BOOL": 1}
_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=6)
_NAMES = st.one_of(
    st.sampled_from(["a", "b", "0.weight", "0.bias", "model.layers.0.w", "é", "a b", "x/../y"]),
    _TEXT,
)


@st.composite
def tensor_files(draw: st.DrawFn, names: tuple[str, ...] | None = None) -> bytes:
    """A valid safetensors file."""
    wanted = draw(st.lists(_NAMES, max_size=4, unique=True)) if names is None else list(names)
    entries: dict[str, Any] = {}
    if draw(st.booleans()):
        entries["__metadata__"] = draw(st.dictionaries(_NAMES, _TEXT, max_size=2))
    position = 0
    for name in wanted:
        if name == "__metadata__":
            continue
        dtype = draw(st.sampled_from(sorted(_DTYPES)))
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        size = _DTYPES[dtype]
        for each in shape:
            size *= each
        entries[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    return assembled(entries, bytes(position), draw(st.integers(0, 8)))


def assembled(entries: Any, data: bytes, pad: int = 0) -> bytes:
    """A file of a header and what follows it."""
    text = json.dumps(entries).encode() + b" " * pad
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def mutated_files(draw: st.DrawFn, original: bytes) -> bytes:
    """A safetensors file with one mutation: of its bytes, of its length, or of its header."""
    how = draw(st.sampled_from(["header", "header", "header", "bytes", "length", "swap"]))
    (length,) = struct.unpack("<Q", original[:8])
    header, data = json.loads(original[8 : 8 + length]), original[8 + length :]
    if how == "header" and header:
        return assembled(draw(mutated(header)), data)
    if how == "length":
        changed = draw(st.one_of(st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]),
                                 st.integers(0, 2 * length + 9)))  # fmt: skip
        return struct.pack("<Q", changed) + original[8:]
    slots = [entry for name, entry in header.items() if name != "__metadata__"]
    if how == "swap" and len(slots) > 1:
        one, other = draw(st.permutations(slots))[:2]
        key = draw(st.sampled_from(["data_offsets", "shape", "dtype"]))
        one[key] = other[key]
        return assembled(header, data)
    return draw(mutated_bytes(original))


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """A JSON document with one value replaced, or one key renamed or left out."""
    changed = deepcopy(document)
    places = list(_places(changed))
    holder, key = draw(st.sampled_from(places))
    how = draw(st.sampled_from(["replace", "replace", "near", "remove", "rename"]))
    if how == "near" and type(holder[key]) is int:
        holder[key] += draw(st.sampled_from([-1, 1, -8, 8, 2**32, 2**63, 2**64]))
    elif how == "rename" and isinstance(holder, dict):
        holder[draw(st.sampled_from([each for each in HOSTILE if isinstance(each, str)]))] = (
            holder.pop(key)
        )
    elif how == "remove":
        del holder[key]
    else:
        holder[key] = deepcopy(draw(st.sampled_from(HOSTILE)))
    return changed


@st.composite
def mutated_bytes(draw: st.DrawFn, original: bytes) -> bytes:
    """Bytes with one bit turned, one piece taken out, doubled, or put in."""
    at = draw(st.integers(0, len(original)))
    end = draw(st.integers(at, min(len(original), at + 40)))
    how = draw(st.sampled_from(["flip", "cut", "double", "put", "put", "end"]))
    if how == "flip" and at < len(original):
        turned = original[at] ^ (1 << draw(st.integers(0, 7)))
        return original[:at] + bytes([turned]) + original[at + 1 :]
    if how == "cut":
        return original[:at] + original[end:]
    if how == "double":
        return original[:end] + original[at:end] + original[end:]
    if how == "end":
        return original[:at]
    return original[:at] + draw(st.sampled_from(TOKENS)) + original[at:]


def _places(document: Any) -> Generator[tuple[Any, Any]]:
    keys: Any = ()
    if isinstance(document, dict):
        keys = document
    elif isinstance(document, list):
        keys = range(len(document))
    for key in list(keys):
        yield document, key
        yield from _places(document[key])


class Counted:
    """How many cases of each kind there were, and how they ended."""

    def __init__(self) -> None:
        self.kinds: Counter[Kind] = Counter()
        self.ends: Counter[str] = Counter()

    def note(self, kind: Kind, end: str) -> None:
        """Count a case."""
        self.kinds[kind] += 1
        self.ends[end] += 1

    def check(self) -> None:
        """At least 30 % were valid files with one mutation; some were taken, and some refused."""
        assert self.kinds["mutated"] >= 0.3 * self.kinds.total(), self.kinds
        assert len(self.ends) > 1, self.ends


class Allocations(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            self.largest = max(self.largest, result.untyped_storage().nbytes())
        return result


_CHANGES = (
    *("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "shutil.rmtree", "subprocess.Popen", "os.system"),
    *("os.exec", "os.fork", "os.posix_spawn", "socket.connect"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Watch:
    """An audit hook that notes whatever changes a file outside of one folder, or starts a process.

    Unpickling counts too: it is never right.
    """

    def __init__(self) -> None:
        self.allowed: str | None = None
        self.seen: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.allowed is None:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING
        changes = event in _CHANGES or writes
        if event == "pickle.find_class" or (changes and not self._inside(arguments)):
            self.seen.append(f"{event} {arguments}")

    def _inside(self, arguments: tuple[Any, ...]) -> bool:
        paths = [os.fsdecode(each) for each in arguments[:2] if isinstance(each, (str, bytes))]
        return all(
            os.path.realpath(path).startswith(str(self.allowed)) or path == os.devnull
            for path in paths
            if "/" in path and "__pycache__" not in path  # what Python itself writes
        )

    @contextmanager
    def only(self, folder: Path | None) -> Generator[None]:
        """Nothing but this folder may be written to within the block; None for nothing at all."""
        self.allowed = "\0" if folder is None else str(folder.resolve())
        self.seen.clear()
        try:
            yield
        finally:
            self.allowed = None
        assert not self.seen, list(self.seen)


WATCH = Watch()

Strategy = Callable[[bytes], st.SearchStrategy[bytes]]


@st.composite
def cases(draw: st.DrawFn, valid: st.SearchStrategy[bytes], mutate: Strategy) -> tuple[Kind, bytes]:
    """A file: one in ten is valid, most are so but for one mutation, the rest is made up."""
    kind = draw(st.sampled_from(["valid", *["mutated"] * 7, "made up", "made up"]))
    if kind == "valid":
        return kind, draw(valid)
    if kind == "mutated":
        return kind, draw(mutate(draw(valid)))
    made_up = st.one_of(
        st.binary(max_size=60),
        st.lists(st.sampled_from(TOKENS), max_size=8).map(b"".join),
        st.recursive(
            st.sampled_from(HOSTILE),
            lambda inner: st.one_of(
                st.lists(inner, max_size=3),
                st.dictionaries(
                    st.sampled_from(["a", "weight_map", "dtype", "shape", "data_offsets", "rules"]),
                    inner,
                    max_size=3,
                ),
            ),
            max_leaves=6,
        ).map(lambda found: json.dumps(found).encode()),
    )
    return kind, draw(made_up)
