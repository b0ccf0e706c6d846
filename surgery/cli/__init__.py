"""The ``surgery`` command: the public API's verbs, one command each.

Results go to stdout, as tables or with ``--json`` as JSON; messages, progress and errors go to
stderr. Exit codes: 0 done, 2 wrong usage, 1 a file could not be read or written, 70 a bug, 130
interrupted, and one per error class of ``surgery.errors``.

A command is a function in one of the modules beside this one and a line below.
"""

from __future__ import annotations

from typing import Annotated

import typer

import surgery
from surgery.cli import adapt, change, convert, data, export, look, names, runs, training
from surgery.terminal import OK

__all__ = ["app", "main"]

app = typer.Typer(
    name="surgery",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        typer.echo(f"model-surgery {surgery.__version__}")
        raise typer.Exit(OK)


@app.callback(epilog="Each command explains itself: surgery COMMAND --help")
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=show_version, is_eager=True),
    ] = False,
) -> None:
    """Rewrite the architecture of a PyTorch model from a short rule file, with proof."""


# In the order in which the help lists them.
app.command("inspect")(look.inspect_model)
app.command("plan")(look.plan)
app.command("apply")(change.apply)
app.command("verify")(change.verify)
app.command("undo")(change.undo)
app.command("export")(export.export)
app.command("convert")(convert.convert)
app.command("schema")(names.schema)
app.command("list")(names.list_names)
app.command("pretrain")(training.pretrain)
app.command("finetune")(training.finetune)
app.command("adapt")(adapt.adapt)
app.command("sample")(runs.sample)
app.command("plot")(runs.plot)
app.add_typer(data.group)


def main() -> None:
    """Run the command line."""
    app()
