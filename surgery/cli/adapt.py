"""``surgery adapt``: meta-training from a configuration."""

from __future__ import annotations

from surgery import shipped
from surgery.cli.options import Debug, Given, Json, Plots, Quiet, Resume, RunFolder
from surgery.cli.session import session
from surgery.cli.training import configurations, configured, folder_of, train


def adapt(
    given: Given,
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

        config = configured(current, AdaptConfig, *configurations(given, shipped.adaptations()))
        train(
            current,
            lambda folder, tell: run.adapt(config, out=folder, resume=resume, tell=tell),
            folder_of(config, out),
            plots=plots,
        )
