"""What a run has to remember of its data, so that its model can be used where the data is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from surgery import files
from surgery.errors import DataError
from surgery.train.data.base import Facts
from surgery.train.data.tokenizer import Kind, load_saved

FILE, TOKENIZER = "data.json", "tokenizer"


class _Stored(BaseModel):
    """``Facts`` as JSON; of the tokenizer its kind, since its files are beside it."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    vocab_size: int | None
    length: int | None
    channels: int | None
    size: tuple[int, int] | None
    classes: int | None
    names: tuple[str, ...] | None
    longest: int | None
    tokenizer: Kind | None


def write_facts(facts: Facts, folder: Path) -> None:
    """Write ``data.json`` and the folder ``tokenizer`` into the folder of a run.

    What is there already is of the same run, and stays.
    """
    if (folder / FILE).exists():
        return
    tokenizer = facts.tokenizer
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
    # All of them: a fact that ``_Stored`` does not know is refused rather than forgotten.
    kind = None if tokenizer is None else tokenizer.kind
    values: dict[str, Any] = {**vars(facts), "tokenizer": kind}
    stored = _Stored(**values)
    files.write(folder / FILE, stored.model_dump_json(indent=1) + "\n")


def read_facts(folder: Path) -> Facts:
    """What ``write_facts`` wrote.

    Raises:
        DataError: a file is missing or broken.
    """
    path = folder / FILE
    try:
        stored = _Stored.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing, which says what data the run was trained on",
            hint="copy the whole folder of the run",
        ) from None
    except ValidationError as error:
        raise DataError(f"{path} is broken: {error}") from None
    kind = stored.tokenizer
    tokenizer = None if kind is None else load_saved(kind, folder / TOKENIZER)
    values: dict[str, Any] = {**dict(stored), "tokenizer": tokenizer}
    return Facts(**values)
