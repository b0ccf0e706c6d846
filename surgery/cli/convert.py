"""``surgery convert``: checkpoints of any size, as a stream."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import surgery
from surgery.cli.options import Debug, Dtype, Example, Json, Quiet
from surgery.cli.session import read_example, session

_NO_RULES = "none"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="A folder with config.json and safetensors, sharded or not.",
            show_default=False,
        ),
    ],
    rules: Annotated[
        Path,
        typer.Argument(
            metavar="RULES",
            help="A rule file (YAML), or none to leave the architecture as it is.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)
    ],
    *,
    adapter: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Merge this adapter first: a folder of PEFT, or of surgery apply --adapter-only.",
        ),
    ] = None,
    allow_other_base: Annotated[
        bool, typer.Option("--allow-other-base", help="Merge an adapter of other weights.")
    ] = False,
    dtype: Dtype = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            help="Largest weight file, such as 5GB. Default: 5GB with rules, else as in SRC.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(help="Tensors worked on at a time. Default: one per core.", min=1),
    ] = None,
    example: Example = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rewrite, merge, cast or cut a checkpoint without loading it. Goes on where a kill stopped it.

    With RULES the result is what surgery apply saves; without, a folder for from_pretrained.
    """
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        with current.running():
            done = surgery.convert(
                source,
                None if str(rules) == _NO_RULES else rules,
                out,
                adapter=adapter,
                dtype=None if dtype is None else dtype.value,
                max_shard_size=max_shard_size,
                threads=threads,
                allow_other_base=allow_other_base,
                example=read_example(example),
            )
        current.result(done.view(), done.to_dict())
        current.note(f"saved to {out}")
