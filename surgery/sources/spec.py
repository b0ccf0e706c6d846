"""What ``load`` is asked for: ``scheme:name``, or an existing folder. Never a guess."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from surgery.errors import SourceError
from surgery.registry import suggest

SCHEMES = ("timm", "transformers", "diffusers", "preset", "hub", "folder")
_SYNTAX = (
    "'timm:NAME', 'transformers:MODEL_TYPE_OR_CLASS', 'diffusers:CLASS', 'preset:NAME', "
    "'hub:ORG/NAME[/SUBFOLDER][@REVISION]', or the path of an existing folder"
)


@dataclass(frozen=True)
class Spec:
    """A parsed spec.

    Attributes:
        scheme: One of ``SCHEMES``.
        name: Name of an architecture, class or preset, repository id, or the folder's path.
        subfolder: Folder inside the repository; only for ``hub``.
        revision: Branch, tag or commit; only for ``hub``.
    """

    scheme: str
    name: str
    subfolder: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        if self.scheme == "folder":
            return self.name
        folder = f"/{self.subfolder}" if self.subfolder else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.scheme}:{self.name}{folder}{revision}"


def parse(spec: str | os.PathLike[str]) -> Spec:
    """Parse what ``load`` was given.

    Raises:
        SourceError: it is neither a known scheme nor an existing folder.
    """
    text = os.fspath(spec)
    if isinstance(spec, os.PathLike):
        return _folder(text)
    scheme, colon, name = text.partition(":")
    if colon and scheme in SCHEMES and scheme != "folder":
        return _schemed(text, scheme, name)
    if text and Path(text).is_dir():
        return _folder(text)
    raise _unknown(text)


def _folder(text: str) -> Spec:
    path = Path(text)
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise SourceError(f"{text!r}: expected a folder, but it {kind}")
    return Spec("folder", text)


def _schemed(text: str, scheme: str, name: str) -> Spec:
    if not name.strip():
        raise SourceError(f"{text!r} names no model", hint=f"expected {_SYNTAX}")
    if scheme != "hub":
        return Spec(scheme, name)
    path, _, revision = name.partition("@")
    parts = path.split("/")
    if "" in parts or ".." in parts or "." in parts:
        raise SourceError(
            f"{text!r}: {path!r} is no repository id",
            hint="expected hub:ORG/NAME[/SUBFOLDER][@REVISION]",
        )
    return Spec("hub", "/".join(parts[:2]), "/".join(parts[2:]), revision or None)


def _unknown(text: str) -> SourceError:
    scheme, colon, _ = text.partition(":")
    if colon and "/" not in scheme:
        known = [name for name in SCHEMES if name != "folder"]
        hint = f"{suggest(scheme, known)} Expected {_SYNTAX}"
        return SourceError(f"{text!r}: unknown scheme {scheme!r}", hint=hint)
    near = near_specs(text)
    guess = f"did you mean {' or '.join(repr(name) for name in near)}? " if near else ""
    return SourceError(
        f"{text!r} has no scheme and is not an existing folder", hint=f"{guess}expected {_SYNTAX}"
    )


def near_specs(text: str) -> list[str]:
    """Specs that resemble a name given without a scheme, at most one or two of each library."""
    from surgery.sources import (
        diffusers_models,
        libraries,
        presets,
        timm_models,
        transformers_models,
    )

    found: list[str] = []
    listings: dict[str, Callable[[], list[str]]] = {
        timm_models.LIBRARY: timm_models.names,
        transformers_models.LIBRARY: transformers_models.names,
        diffusers_models.LIBRARY: diffusers_models.names,
    }
    for library, names in listings.items():
        if libraries.installed(library):
            close = difflib.get_close_matches(text, names(), n=2, cutoff=0.7)
            found += [f"{library}:{name}" for name in close]
    found += [f"preset:{name}" for name in presets.near(text)]
    if text.count("/") == 1 and not text.startswith((".", "/", "~")):
        found.append(f"hub:{text}")
    return found
