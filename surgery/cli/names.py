"""``surgery list`` and ``surgery schema``: what a rule file can say."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from surgery import registry, shipped
from surgery.cli.options import Debug, Json, Quiet
from surgery.cli.session import session


class Kind(StrEnum):
    """What ``surgery list`` can list."""

    PASSES = "passes"
    METHODS = "methods"
    MAPS = "maps"
    TOPOLOGIES = "topologies"
    FORMATS = "formats"
    PRESETS = "presets"
    RULES = "rules"
    CONFIGS = "configs"


REGISTRIES = {
    Kind.PASSES: registry.PASSES,
    Kind.METHODS: registry.ADAPTERS,
    Kind.MAPS: registry.MIRRORS,
    Kind.TOPOLOGIES: registry.TOPOLOGIES,
    Kind.FORMATS: registry.FORMATS,
}


def schema(
    *,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE", help="Write to a file.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Print the JSON schema of rule files, which editors use for completion."""
    with session(as_json=True, quiet=quiet, debug=debug) as current:
        from surgery.rules import json_schema

        with current.running():
            data = json_schema()
        if out is None:
            current.result("", data)
            return
        current.write_json(out, data)
        current.note(f"saved to {out}")


def list_names(
    kind: Annotated[Kind | None, typer.Argument(help="One kind only.", show_default=False)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List passes, methods, topologies, formats, presets and shipped rule files.

    Imports none of them.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        found = {each.value: entries(each) for each in ([kind] if kind else Kind)}
        current.result(names_view(found), found)


def entries(kind: Kind) -> list[dict[str, str]]:
    """What is registered or shipped under one kind: names and where each comes from."""
    if kind is Kind.RULES:
        return [{"name": name, "origin": str(path)} for name, path in shipped.rules().items()]
    if kind is Kind.CONFIGS:
        found = {**shipped.pretraining(), **shipped.finetuning(), **shipped.adaptations()}
        return [{"name": name, "origin": str(path)} for name, path in found.items()]
    if kind is Kind.PRESETS:
        from surgery.sources import presets

        return presets.listed()
    found = REGISTRIES[kind]
    return [{"name": name, "origin": found.origin(name)} for name in found.names()]


def names_view(found: dict[str, list[dict[str, str]]]) -> Table:
    """Names by kind as a table."""
    table = Table("kind", "name", "from")
    for kind, names in found.items():
        for entry in names:
            table.add_row(kind, Text(entry["name"]), Text(entry["origin"]))
    return table
