"""``surgery adapt``: meta-training from a configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery import shipped
from surgery.cli.options import Debug, Json, Plots, Quiet, Resume, RunFolder
from surgery.cli.session import session
from surgery.cli.training import configurations, train


def adapt(
    given: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]...",
            help="A configuration (YAML) or the name of a shipped one, and overrides such as "
            "inner.steps=3.",
            show_default=False,
        ),
    ],
    *,
    out: RunFolder = None,
    resume: Resume = False,
    plots: Plots = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Meta-train a model, so that a few gradient steps adapt it to a new task."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train.adapt import run
        from surgery.train.adapt.config import AdaptConfig

        files, changes = configurations(given, shipped.adaptations())
        if len(files) != 1:
            raise typer.BadParameter(f"expected one configuration, received {len(files)}")
        with current.running():
            config = AdaptConfig.load(files[0], changes)
        folder = out or Path("runs") / config.name
        train(
            current,
            lambda tell: run.adapt(config, out=folder, resume=resume, tell=tell),
            folder if plots else None,
        )
