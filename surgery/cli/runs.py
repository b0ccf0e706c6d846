"""``surgery sample`` and ``surgery plot``: what a run learned."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from surgery.cli.options import Debug, Device, Json, Quiet
from surgery.cli.session import session


class Picture(StrEnum):
    """Formats of pictures."""

    PNG = "png"
    SVG = "svg"


class Animation(StrEnum):
    """Formats of animations."""

    GIF = "gif"
    WEBP = "webp"


def sample(
    folder: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A folder written by pretrain.", show_default=False),
    ],
    changes: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...",
            help="Fields of objective.sample, such as steps=100, count=40, guidance=3 for images, "
            "or prompts='[import]', tokens=200, temperature=0.7 for text.",
            show_default=False,
        ),
    ] = None,
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="File to write. Default: in RUN/samples."),
    ] = None,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw text or a grid of images from the model that a run ended with."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train import sample as sampling

        with current.running():
            drawn = sampling.sample(folder, changes or [], out=out, device=device)
        current.result(drawn.view(), drawn.to_dict())
        if drawn.texts is not None:
            current.note(f"written to {drawn.path}")


def plot(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Run folders; several are compared with the first.",
            show_default=False,
        ),
    ],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder of the pictures. Default: plots/ of each run.",
        ),
    ] = None,
    picture: Annotated[
        Picture, typer.Option("--format", help="Of the pictures that do not move.")
    ] = Picture.PNG,
    animation: Annotated[Animation, typer.Option(help="Of the one that does.")] = Animation.GIF,
    threshold: Annotated[
        float, typer.Option(help="Smallest coefficient that the graph shows.", min=0.0)
    ] = 0.1,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw what runs learned: coefficients over time, their graph, loss curves side by side."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train import views

        with current.running():
            drawn = views.draw(
                runs,
                out=out,
                form=picture.value,
                animation=animation.value,
                threshold=threshold,
            )
        current.result(drawn.view(), drawn.to_dict())
