"""Arguments and options that several commands share, one alias each."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


def known_device(name: str | None) -> str | None:
    """The name, if torch knows such a device."""
    if name is None:
        return None
    import torch

    try:
        return str(torch.device(name))
    except RuntimeError as error:
        raise typer.BadParameter(str(error).partition("\n")[0]) from None


class Precision(StrEnum):
    """Floating-point formats a model can be cast to, by torch's names."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT64 = "float64"


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME, transformers:ARCH, diffusers:CLASS, preset:NAME, hub:ID, or an existing "
        "folder.",
        show_default=False,
    ),
]
Rules = Annotated[
    Path, typer.Argument(metavar="RULES", help="A rule file (YAML).", show_default=False)
]
Saved = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="A folder written by surgery apply.", show_default=False),
]
Config = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        "-c",
        metavar="KEY=VALUE",
        help="Override one field of the model's config; VALUE is read as YAML. Repeatable.",
    ),
]
Pretrained = Annotated[
    bool | None,
    typer.Option(
        "--pretrained/--random",
        help="Load weights, or start from random ones. Default: weights from hub: and folders.",
        show_default=False,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Where to build the model: cpu, cuda, cuda:1, meta.",
        callback=known_device,
    ),
]
Dtype = Annotated[Precision | None, typer.Option(help="Cast the weights.")]
Example = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A safetensors file of forward arguments by name, where none can be inferred.",
    ),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="DIR", help="Folder to write.", show_default=False)
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--materialize",
        metavar="DIR",
        help="Rewrite the model on the meta device, then stream its weights from this folder of "
        "safetensors: no second copy is ever in memory.",
    ),
]
Against = Annotated[
    Path | None,
    typer.Option(
        metavar="SRC",
        help="Prove from the files alone that everything in DIR is SRC's or made by a rule.",
    ),
]
Merged = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        metavar="DIR",
        help="With --against: the adapter that was merged, where SRC does not hold it.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The stock model with its weights, for a folder that holds the adapter only.",
    ),
]
AdapterOnly = Annotated[
    bool, typer.Option("--adapter-only", help="Save what was inserted, not the stock weights.")
]
ShardSize = Annotated[str, typer.Option(help="Largest weight file, such as 500MB.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout instead of a table.")]
Full = Annotated[bool, typer.Option("--full", help="One row per site, not per run of like ones.")]
Code = Annotated[bool, typer.Option("--code", help="Show the Python that is rewritten.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print results and errors only.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug messages.")]
Given = Annotated[
    list[str],
    typer.Argument(
        metavar="CONFIG [KEY=VALUE]...",
        help="A configuration (YAML) or the name of a shipped one, and overrides such as "
        "train.steps=100.",
        show_default=False,
    ),
]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="DIR", help="Folder of the run. Default: runs/ and its name."
    ),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")
]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw the run when it is done.")]
