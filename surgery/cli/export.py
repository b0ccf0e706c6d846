"""``surgery export``: models in formats that others read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

import surgery
from surgery.cli.options import (
    Base,
    Config,
    Debug,
    Device,
    Dtype,
    Example,
    Json,
    Model,
    Pretrained,
    Quiet,
)
from surgery.cli.session import load, overrides, read_example, restored, session

if TYPE_CHECKING:
    from surgery.exporting import Fit


def export(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Argument(metavar="OUT", help="File or folder to write.", show_default=False),
    ] = None,
    *,
    form: Annotated[
        str | None,
        typer.Option("--format", "-f", help="Name of the format.", show_default=False),
    ] = None,
    listing: Annotated[
        bool,
        typer.Option("--list", help="Say which formats fit the model, and why the others do not."),
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-O",
            metavar="KEY=VALUE",
            help="Set one option of the format; VALUE is read as YAML. Repeatable.",
        ),
    ] = None,
    base: Base = None,
    config: Config = None,
    pretrained: Pretrained = None,
    device: Device = None,
    dtype: Dtype = None,
    example: Example = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a model, rewritten or not, in a format that others read without this library.

    What is written is loaded with the program it is for and compared before it takes its place.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        if not listing and (out is None or form is None):
            raise typer.BadParameter("expected MODEL OUT --format NAME, or --list MODEL")
        from surgery import exporting

        with current.running():
            loaded = (
                load(model, config, pretrained=pretrained, device=device, dtype=dtype)
                if base is None
                else restored(Path(model), base, device)
            )
        if out is None or form is None or listing:
            found = exporting.fits(loaded)
            shown = [{"format": fit.format, "misfit": fit.misfit} for fit in found]
            current.result(fits_view(found), shown)
            return
        with current.running():
            done = surgery.export(
                loaded, out, format=form, example=read_example(example), **overrides(option or [])
            )
        current.result(done.view(), done.to_dict())
        current.note(f"saved to {out}")


def fits_view(found: list[Fit]) -> Table:
    """Formats with whether they fit."""
    table = Table("format", "fits", "why not")
    for fit in found:
        table.add_row(Text(fit.format), "no" if fit.misfit else "yes", Text(fit.misfit or ""))
    return table
