"""``surgery data``: data to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.options import Debug, Json, Quiet
from surgery.cli.session import session

group = typer.Typer(
    name="data", no_args_is_help=True, help="Prepare data to train on.", rich_markup_mode=None
)


@group.command("tokenize")
def tokenize_text(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A text file, a folder, a pattern such as 'texts/**/*.md', or stdlib.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)
    ],
    *,
    tokenizer: Annotated[
        str, typer.Option(help="bytes, bpe (trained on SOURCE), a folder, or hub:ORG/NAME.")
    ] = "bytes",
    vocabulary: Annotated[int | None, typer.Option(help="Tokens of bpe.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="Which files of a folder. Default: **/*.txt")
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(help="Part of the files that is kept for evaluation.", min=1e-6, max=0.999),
    ] = 0.05,
    length: Annotated[
        int, typer.Option(help="Tokens in a sample, unless a configuration says otherwise.", min=2)
    ] = 256,
    workers: Annotated[
        int | None, typer.Option(help="Processes. Default: one per core.", min=1)
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Bytes of text in a shard of tokens.", min=1)] = 1
    << 25,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn text into shards of tokens. Interrupted, the same command goes on where it stopped."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train.data.making import tokenize

        with current.running():
            index = tokenize(
                source,
                out,
                tokenizer=tokenizer,
                vocabulary=vocabulary,
                pattern=pattern,
                held_out=held_out,
                length=length,
                workers=workers,
                shard_size=shard_size,
            )
        current.result(index.view(), index.summary())
        current.note(f"saved to {out}")


@group.command("check")
def check(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of tokens.", show_default=False)
    ],
    *,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare every byte of a folder of tokens with its checksums."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train.data import shards

        with current.running():
            index = shards.read_index(folder)
            shards.verify(folder, index)
        current.result(index.view(), index.summary())
