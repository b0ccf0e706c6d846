"""What every command runs in, and how it reads what it was given."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

import surgery
from surgery import progress
from surgery.cli.options import Precision
from surgery.errors import SourceError
from surgery.terminal import Session

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def session(
    *, as_json: bool = False, quiet: bool = False, debug: bool = False
) -> Generator[Session]:
    """A session whose errors end the command with their exit code and without a traceback."""
    current = Session(as_json=as_json, quiet=quiet, debug=debug)
    try:
        yield current
    except (typer.Exit, typer.BadParameter, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the outermost frame: told, and turned into the exit code
        raise typer.Exit(current.failed(error)) from None


def load(
    model: str,
    config: list[str] | None,
    *,
    pretrained: bool | None,
    device: str | None,
    dtype: Precision | None,
) -> nn.Module:
    """The model a command was given: a rewritten one from its folder, or a stock one."""
    folder = Path(model)
    if (folder / "surgery.json").is_file():
        from surgery.exporting import provenance

        # An export for transformers or diffusers is a folder of that library.
        if not (provenance.is_export(folder) and (folder / "config.json").is_file()):
            return restored(folder, None, device)
    with progress.task(f"loading {model}"):
        return surgery.load(
            model,
            config=overrides(config or []),
            pretrained=pretrained,
            device=device,
            dtype=dtype,
        )


def restored(folder: Path, base: str | None, device: str | None) -> nn.Module:
    """The model a folder holds, over ``base`` where it holds an adapter only."""
    stock = None
    if base is not None:
        with progress.task(f"loading {base}"):
            stock = surgery.load(base, pretrained=True, device=device)
    with progress.task(f"restoring {folder}"):
        return surgery.restore(folder, stock, device=device)


def overrides(pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` options as data, each value read as YAML."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"expected KEY=VALUE, received {pair!r}")
        try:
            found[key] = cast("Any", YAML(typ="safe", pure=True)).load(text)
        except YAMLError as error:
            raise typer.BadParameter(f"the value of {key!r} is not YAML: {error}") from None
    return found


def read_example(path: Path | None) -> dict[str, torch.Tensor] | None:
    """Forward arguments by name from a safetensors file."""
    if path is None:
        return None
    from safetensors import SafetensorError
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    try:
        return load_file(path)
    except SafetensorError as error:
        raise SourceError(f"{path} is not a safetensors file: {error}") from None
