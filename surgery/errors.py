"""Every error the library raises.

One base class, one subclass per kind of failure. Each carries a stable ``code`` for
programs and an ``exit_code`` for the command line, so that a script can tell a rule file
that is wrong from a checkpoint that is broken without reading prose.
"""

from __future__ import annotations

from typing import ClassVar

# A message names what a file says, and a file of somebody else may say megabytes.
_LONGEST = 8000
_HEAD, _TAIL = 6000, 1500


class SurgeryError(Exception):
    """Base of every error raised on purpose.

    Args:
        message: What was received and what was expected.
        hint: What to do about it; printed on a line of its own.
    """

    code: ClassVar[str] = "SRG-000"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(_bounded(message), hint)
        self.message = _bounded(message)
        self.hint = hint

    def __str__(self) -> str:
        if self.hint is None:
            return self.message
        return f"{self.message}\n  hint: {self.hint}"

    def __reduce__(self) -> tuple[object, ...]:
        # The keyword-only fields live in __dict__, which pickle restores as the state.
        return (type(self), (self.message,), self.__dict__)


def _bounded(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[:_HEAD]} [...{len(text) - _HEAD - _TAIL} characters...] {text[-_TAIL:]}"


class RuleError(SurgeryError):
    """A rule file or a rule object is wrong: unknown key, wrong type, bad value.

    Args:
        message: What was received and what was expected.
        hint: What to do about it.
        file: The rule file, or None for a recipe built in Python.
        line: 1-based line in the file.
        column: 1-based column in the file.
    """

    code = "SRG-RULE"
    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        file: str | None = None,
        line: int | None = None,
        column: int | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.file = file
        self.line = line
        self.column = column

    def __str__(self) -> str:
        text = super().__str__()
        if self.line is None:
            return text if self.file is None else f"{self.file}: {text}"
        return f"{self.file or '<rules>'}:{self.line}:{self.column}: {text}"


class NoMatch(SurgeryError):
    """A rule matched nothing. The message names the nearest misses and why they missed."""

    code = "SRG-NOMATCH"
    exit_code = 4


class Conflict(SurgeryError):
    """Two edits, or an edit and something already done to the model, do not go together."""

    code = "SRG-CONFLICT"
    exit_code = 5


class CaptureError(SurgeryError):
    """A forward could not be traced, or a traced one met a call it was not traced for."""

    code = "SRG-CAPTURE"
    exit_code = 6


class ContractBroken(SurgeryError):
    """The numeric proof failed: the rewritten model is not what its passes promised."""

    code = "SRG-CONTRACT"
    exit_code = 7


class CheckpointError(SurgeryError):
    """A saved model or adapter is missing, truncated, unsafe, or does not fit."""

    code = "SRG-CHECKPOINT"
    exit_code = 8


class ExportError(SurgeryError):
    """The rewritten model cannot be expressed in the format that was asked for."""

    code = "SRG-EXPORT"
    exit_code = 9


class SourceError(SurgeryError):
    """A model could not be loaded, or an example input could not be inferred for it."""

    code = "SRG-SOURCE"
    exit_code = 10


class ModelStateError(SurgeryError):
    """The model is in a state the operation cannot work on, such as already compiled."""

    code = "SRG-MODEL"
    exit_code = 11


class ConfigError(RuleError):
    """A training configuration is wrong: unknown key, wrong type, bad value, contradiction.

    Args:
        message: What was received and what was expected.
        hint: What to do about it.
        file: The configuration, or None for one built in Python.
        line: 1-based line in the file.
        column: 1-based column in the file.
    """

    code = "SRG-CONFIG"
    exit_code = 12


class DataError(SurgeryError):
    """Training data is missing, empty, or not what the configuration or the model expects."""

    code = "SRG-DATA"
    exit_code = 13


class TrainingError(SurgeryError):
    """A training run cannot start, or had to stop."""

    code = "SRG-TRAIN"
    exit_code = 14
