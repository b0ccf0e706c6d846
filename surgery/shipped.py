"""The rule files and training configurations that ship with the library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from surgery.errors import SurgeryError


def configs() -> Path:
    """The folder of shipped configurations.

    A wheel carries it inside the package; a checkout has it beside the package, where people
    look for it. Both are the same files.

    Raises:
        SurgeryError: the installation has neither.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "rules").is_dir():
            return folder
    raise SurgeryError(
        f"no shipped configurations beside or inside {package}",
        hint="reinstall model-surgery: its wheel contains surgery/configs",
    )


def rules() -> dict[str, Path]:
    """Shipped rule files by name, the name being the file's stem."""
    return {path.stem: path for path in sorted((configs() / "rules").glob("*.yaml"))}


def pretraining() -> dict[str, Path]:
    """Shipped training configurations by name, the name being the file's stem."""
    return {path.stem: path for path in sorted((configs() / "pretrain").glob("*.yaml"))}


def finetuning() -> dict[str, Path]:
    """Shipped fine-tuning configurations by name, the name being the file's stem."""
    return {path.stem: path for path in sorted((configs() / "finetune").glob("*.yaml"))}


def adaptations() -> dict[str, Path]:
    """Shipped configurations of fast adaptation by name, the name being the file's stem."""
    return {path.stem: path for path in sorted((configs() / "adapt").glob("*.yaml"))}


def file_or_shipped(given: str | Path, known: Mapping[str, Path]) -> Path | None:
    """The file that is meant: a path, or the name of a shipped one.

    Args:
        given: A path or a name. A file wins over a shipped one of the same name, a folder does not.
        known: The shipped ones by name.

    Returns:
        The path, whether a file is there or not; None for a name without suffix where nothing is.
    """
    path = Path(given)
    if path.is_file():
        return path
    return known.get(str(given), path if path.suffix or path.exists() else None)
