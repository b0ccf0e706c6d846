"""``surgery pretrain`` and ``surgery finetune``: runs from a configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from surgery import registry, shipped
from surgery.cli.options import Debug, Given, Json, Plots, Quiet, Resume, RunFolder
from surgery.cli.session import session
from surgery.terminal import Session

if TYPE_CHECKING:
    from surgery.train.config import Configuration, RunConfig
    from surgery.train.loop import Tell
    from surgery.train.run import Run

C = TypeVar("C", bound="Configuration")


def pretrain(
    given: Given,
    *,
    out: RunFolder = None,
    resume: Resume = False,
    plots: Plots = True,
    comparing: Annotated[
        bool,
        typer.Option(
            "--compare", help="Train several configurations under one budget and compare them."
        ),
    ] = False,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="0,1,2", help="Seeds of a comparison.", show_default=False),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS", help="Steps of every run of a comparison.", min=1, show_default=False
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a model from scratch. Works alone, with accelerate launch and with torchrun."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train import run
        from surgery.train.config import PretrainConfig

        files, changes = configurations(given, shipped.pretraining())
        if comparing:
            compare_runs(current, files, changes, out=out, seeds=seeds, budget=budget)
            return
        if seeds is not None or budget is not None:
            raise typer.BadParameter("--seeds and --budget belong to --compare")
        config = configured(current, PretrainConfig, files, changes, "; --compare takes several")
        train(
            current,
            lambda folder, tell: run.pretrain(config, out=folder, resume=resume, tell=tell),
            folder_of(config, out),
            plots=plots,
        )


def finetune(
    given: Given,
    *,
    out: RunFolder = None,
    resume: Resume = False,
    plots: Plots = True,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a pretrained model: adapters, a new head, or all of it. Also under a launcher."""
    with session(as_json=as_json, quiet=quiet, debug=debug) as current:
        from surgery.train.finetune.config import FinetuneConfig
        from surgery.train.finetune.run import finetune as fine_tune

        config = configured(current, FinetuneConfig, *configurations(given, shipped.finetuning()))
        train(
            current,
            lambda folder, tell: fine_tune(config, out=folder, resume=resume, tell=tell),
            folder_of(config, out),
            plots=plots,
        )


def configured(
    current: Session, kind: type[C], files: list[Path], changes: list[str], hint: str = ""
) -> C:
    """The one configuration that a command takes."""
    if len(files) != 1:
        raise typer.BadParameter(f"expected one configuration, received {len(files)}{hint}")
    with current.running():
        return kind.load(files[0], changes)


def folder_of(config: RunConfig, out: Path | None) -> Path:
    """The folder of a run."""
    return out or Path("runs") / config.name


def train(current: Session, run: Callable[[Path, Tell], Run], folder: Path, *, plots: bool) -> None:
    """Train, say what came out, and draw it if ``plots``."""
    from surgery.train import engine, views

    def tell(kind: str, text: str) -> None:
        if kind != "step" or not current.interactive:
            current.note(text)

    with current.running():
        done = run(folder, tell)
        engine.leave()
    if not engine.main_process():
        return
    current.result(done.view(), done.to_dict())
    if plots:
        with current.running():
            pictures = views.draw([folder])
        current.note(f"drawn: {', '.join(map(str, pictures.files))}")


def compare_runs(
    current: Session,
    files: list[Path],
    changes: list[str],
    *,
    out: Path | None,
    seeds: str | None,
    budget: int | None,
) -> None:
    """Train and compare configurations, and print the table."""
    from surgery.train import engine
    from surgery.train.compare import compare
    from surgery.train.config import PretrainConfig

    with current.running():
        configs = [PretrainConfig.load(file, changes) for file in files]
        folder = out or Path("runs") / "-vs-".join(config.name for config in configs)
        found = compare(configs, numbers(seeds or "0"), folder, budget=budget, tell=current.note)
        engine.leave()
    if engine.main_process():
        current.result(found.view(), found.to_dict())
        for note in (*found.notes, f"saved to {folder}"):
            current.note(note)


def numbers(text: str) -> list[int]:
    """``0,1,2`` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected numbers such as 0,1,2, received {text!r}") from None


def configurations(
    given: list[str], shipped_ones: Mapping[str, Path]
) -> tuple[list[Path], list[str]]:
    """Configuration files, and the overrides among them."""
    changes = [each for each in given if "=" in each and not Path(each).exists()]
    names = [each for each in given if each not in changes]
    found = list[Path]()
    for name in names:
        path = shipped.file_or_shipped(name, shipped_ones)
        if path is None:
            raise typer.BadParameter(
                f"{name!r} is no file and no shipped configuration; "
                f"{registry.suggest(name, shipped_ones)}"
            )
        found.append(path)
    return found, changes
