"""Reads run folders for drawing: the log, the coefficient matrices, the configuration.

Whatever a killed process may have left is read as far as it goes, and what is missing is said in
``Record.notes``. What cannot belong together is an error.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from surgery.errors import RuleError, TrainingError
from surgery.rules import yaml
from surgery.train.views.canvas import Array
from surgery.untrusted.documents import parse

CONFIG, LOG, MATRICES = "config.yaml", "log.jsonl", "matrices"
REWIRES_NOTHING = "the run's rules rewire nothing: there is no matrix to draw"
"""The note of a run that was never meant to have matrices."""
_NO_METRIC = {"kind", "step", "tokens", "samples"}
"""What a line of an evaluation says beside what it measured."""
_MOST_NOTED = 3
_MOST_RUNS_NAMED = 6


@dataclass(frozen=True)
class Series:
    """Numbers by step.

    Attributes:
        steps: ``(n,)`` int64, increasing.
        values: ``(n,)`` float64; what was logged as not finite is NaN or infinite.
    """

    steps: Array
    values: Array

    def __len__(self) -> int:
        return len(self.steps)

    def finite(self) -> Series:
        """Without the values that are not."""
        kept = np.isfinite(self.values)
        return Series(self.steps[kept], self.values[kept])


@dataclass(frozen=True)
class Frames:
    """The coefficient matrix of one stack by step.

    Attributes:
        stack: Its name, as ``surgery.shortcuts`` gives it.
        steps: ``(n,)`` int64, increasing.
        values: ``(n, K, K)`` float64, row k what is added after block k.
    """

    stack: str
    steps: Array
    values: Array

    @property
    def sites(self) -> int:
        """K."""
        return int(self.values.shape[1])


@dataclass(frozen=True)
class Record:
    """What a run folder holds.

    Attributes:
        path: The folder.
        name: What the configuration calls the run; the folder's name where there is none.
        seed: Its seed; None where there is no configuration.
        config: The resolved configuration; None where there is none.
        train: Training loss.
        evaluations: Metric → its values on held-out data; ``loss`` among them.
        seconds: Seconds since the start.
        frames: The matrices, stack by stack.
        notes: What was missing or broken, for people.
    """

    path: Path
    name: str
    seed: int | None
    config: Mapping[str, Any] | None
    train: Series
    evaluations: Mapping[str, Series]
    seconds: Series
    frames: tuple[Frames, ...]
    notes: tuple[str, ...]

    @property
    def evaluation(self) -> Series:
        """Evaluation loss."""
        return self.evaluations.get("loss", _series([], "loss"))

    @property
    def last_step(self) -> int:
        """The last step that the log speaks of; 0 for none."""
        series = (self.train, *self.evaluations.values())
        return max((int(each.steps[-1]) for each in series if len(each)), default=0)

    @property
    def total(self) -> int | None:
        """Steps that the configuration asks for."""
        return None if self.config is None else _steps_of(self.config)

    @property
    def unfinished(self) -> bool:
        """Whether the log ends before the run does."""
        return self.total is not None and self.last_step < self.total

    @property
    def label(self) -> str:
        """Name and seed."""
        return self.name if self.seed is None else f"{self.name}, seed {self.seed}"


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed only.

    Attributes:
        name: What they are called, unique among the groups of a picture.
        runs: At least one, by seed.
    """

    name: str
    runs: tuple[Record, ...]


def read_run(path: Path) -> Record:
    """Read one run folder.

    Raises:
        TrainingError: there is no run, its log holds nothing that can be read, or its matrices
            belong to different models.
    """
    _check_is_run(path)
    notes: list[str] = []
    lines = list(_records(path / LOG, notes))
    config = _config(path / CONFIG, notes)
    record = Record(
        path=path,
        name=path.resolve().name if config is None else str(config.get("name", path.name)),
        seed=None if config is None else cast("int | None", config.get("seed")),
        config=config,
        train=_series(_kind(lines, "step"), "loss"),
        evaluations=_evaluations(_kind(lines, "evaluation")),
        seconds=_series(_kind(lines, "step"), "seconds"),
        frames=_frames(path / MATRICES, notes),
        notes=(),
    )
    return dataclasses.replace(record, notes=(*notes, *_remarks(record)))


def groups(records: Sequence[Record]) -> list[Group]:
    """Runs put together by their configuration without its seed, in the order they came in.

    Raises:
        TrainingError: a folder was given twice, or two runs of one configuration have one seed.
    """
    _check_distinct(records)
    together: dict[str, list[Record]] = {}
    for record in records:
        together.setdefault(_identity(record), []).append(record)
    names = [members[0].name for members in together.values()]
    return [
        Group(
            name if names.count(name) == 1 else f"{name} ({members[0].path})",
            tuple(sorted(members, key=lambda each: each.seed or 0)),
        )
        for name, members in zip(names, together.values(), strict=True)
    ]


def _identity(record: Record) -> str:
    if record.config is None:
        return f"folder {record.path.resolve()}"
    return json.dumps({**record.config, "seed": None}, sort_keys=True, default=str)


def _check_distinct(records: Sequence[Record]) -> None:
    seen: dict[Path, Record] = {}
    for record in records:
        if record.path.resolve() in seen:
            raise TrainingError(f"the run {record.path} was given twice", hint="name each run once")
        seen[record.path.resolve()] = record
    seeds: dict[tuple[str, int | None], Record] = {}
    for record in records:
        twin = seeds.setdefault((_identity(record), record.seed), record)
        if twin is not record:
            raise TrainingError(
                f"{twin.path} and {record.path} are runs of one configuration with the same seed "
                f"{record.seed}",
                hint="they are one sample, not two: give one of them",
            )


def _check_is_run(path: Path) -> None:
    if not path.exists():
        raise TrainingError(
            f"there is no run {path}", hint=_runs_in(path.parent) or "check the path"
        )
    if not path.is_dir():
        raise TrainingError(
            f"{path} is a file; a run is a folder with a {LOG}", hint=_runs_in(path.parent)
        )
    if not (path / LOG).is_file():
        raise TrainingError(
            f"{path} is no run: it has no {LOG}",
            hint=_runs_in(path) or "surgery pretrain writes one with its first step",
        )


def _runs_in(folder: Path) -> str | None:
    """Names the runs at most two folders beneath, as `--compare` lays them out."""
    if not folder.is_dir():
        return None
    found = sorted(log.parent for depth in ("*", "*/*") for log in folder.glob(f"{depth}/{LOG}"))
    if not found:
        return None
    names = ", ".join(str(run) for run in found[:_MOST_RUNS_NAMED])
    return f"runs near there: {names}{', ...' if len(found) > _MOST_RUNS_NAMED else ''}"


def _config(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        notes.append(f"there is no {CONFIG}: the run is called after its folder")
        return None
    try:
        data, _ = yaml.load(yaml.decode(path.read_bytes(), str(path)), str(path))
    except RuleError as error:
        notes.append(
            f"{CONFIG} cannot be read ({error.message}): the run is called after its folder"
        )
        return None
    if not isinstance(data, dict):
        notes.append(f"{CONFIG} holds no configuration: the run is called after its folder")
        return None
    return cast("dict[str, Any]", data)


def _steps_of(config: Mapping[str, Any]) -> int | None:
    train = config.get("train")
    steps = cast("Mapping[str, Any]", train).get("steps") if isinstance(train, Mapping) else None
    return steps if isinstance(steps, int) else None


def _records(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """The lines of a log that are whole."""
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines = text.splitlines()
    broken: list[int] = []
    for number, line in enumerate(lines, 1):
        record = _record(line)
        if record is not None:
            yield record
        elif number == len(lines) and not text.endswith("\n"):
            notes.append(
                f"the last line of {LOG} is torn, so the run was killed while it wrote; that line "
                "is left out"
            )
        elif line.strip():
            broken.append(number)
    if broken:
        named = ", ".join(map(str, broken[:_MOST_NOTED]))
        more = f" and {len(broken) - _MOST_NOTED} more" if len(broken) > _MOST_NOTED else ""
        notes.append(f"{LOG} has lines that cannot be read and are left out: {named}{more}")


def _record(line: str) -> dict[str, Any] | None:
    """One line, or None if it is no record."""
    try:
        data = parse(line.encode(), LOG, error=TrainingError, infinities=True)
    except TrainingError:
        return None
    if not isinstance(data, dict):
        return None
    record = cast("dict[str, Any]", data)
    whole = isinstance(record.get("kind"), str) and isinstance(record.get("step"), int)
    return record if whole else None


def _kind(
    records: Iterable[dict[str, Any]], kind: Literal["step", "evaluation"]
) -> list[dict[str, Any]]:
    """Those of one kind by step. A run that went back to a checkpoint has written steps twice."""
    kept: list[dict[str, Any]] = []
    for record in records:
        if record["kind"] != kind:
            continue
        while kept and kept[-1]["step"] >= record["step"]:
            kept.pop()
        kept.append(record)
    return kept


def _series(records: Sequence[Mapping[str, Any]], key: str) -> Series:
    held = [(record["step"], _number(record[key])) for record in records if key in record]
    steps = np.array([step for step, _ in held], dtype=np.int64)
    return Series(steps, np.array([value for _, value in held], dtype=np.float64))


def _evaluations(records: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    names = dict.fromkeys(key for record in records for key in record if key not in _NO_METRIC)
    return {name: _series(records, name) for name in names if _is_number_somewhere(records, name)}


def _is_number_somewhere(records: Sequence[Mapping[str, Any]], name: str) -> bool:
    values = [record[name] for record in records if name in record]
    return any(math.isfinite(_number(value)) for value in values) or name == "loss"


def _number(value: object) -> float:
    """A logged number. JSON has no NaN and no infinity: they are text, or null."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and value.lower().lstrip("+-") in {"nan", "inf", "infinity"}:
        return float(value)
    return math.nan


def _frames(folder: Path, notes: list[str]) -> tuple[Frames, ...]:
    """The matrices of all steps, stack by stack."""
    records = dict(sorted(_matrix_files(folder, notes)))
    if not records:
        return ()
    first_step = next(iter(records))
    shapes = {name: matrix.shape for name, matrix in records[first_step].items()}
    for step, found in records.items():
        _check_same_stacks(folder, (first_step, shapes), (step, found))
    frames = tuple(_frames_of(name, records) for name in shapes)
    for each in frames:
        _note_oddities(each, notes)
    return frames


def _by_number(name: str) -> list[tuple[bool, int, str]]:
    """Sorts ``layer10`` after ``layer2``: a file of tensors has lost the model's own order."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _frames_of(name: str, records: Mapping[int, Mapping[str, Array]]) -> Frames:
    steps = np.array(list(records), dtype=np.int64)
    return Frames(name, steps, np.stack([found[name] for found in records.values()]))


def _matrix_files(folder: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Array]]]:
    from safetensors import SafetensorError

    for path in sorted(folder.glob("*.safetensors")):
        if not path.stem.isdigit():
            continue
        try:
            found = _tensors(path)
        except (SafetensorError, OSError, TrainingError) as error:
            notes.append(f"{MATRICES}/{path.name} cannot be read ({error}) and is left out")
            continue
        for name, matrix in found.items():
            _check_square(path, name, matrix)
        if found:
            yield int(path.stem), found


def _tensors(path: Path) -> dict[str, Array]:
    """The matrices of one step, in the model's order where the file knows it."""
    from safetensors import safe_open

    with cast("Any", safe_open)(path, framework="pt") as file:
        names: list[str] = sorted(file.keys(), key=_by_number)
        about: dict[str, str] = file.metadata() or {}
        told = parse(about.get("stacks", "[]").encode(), str(path), error=TrainingError)
        known = [str(name) for name in cast("list[object]", told)] if isinstance(told, list) else []
        names = known if sorted(known) == sorted(names) else names
        return {name: file.get_tensor(name).double().numpy() for name in names}


def _check_square(path: Path, name: str, matrix: Array) -> None:
    if matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] and matrix.size:
        return
    raise TrainingError(
        f"{path}: the matrix of {name!r} has the shape {tuple(matrix.shape)}, expected (K, K)",
        hint=f"{MATRICES}/ holds what surgery.shortcuts(model) gives, and nothing else",
    )


def _check_same_stacks(
    folder: Path,
    first: tuple[int, Mapping[str, tuple[int, ...]]],
    other: tuple[int, Mapping[str, Array]],
) -> None:
    (start, shapes), (step, found) = first, other
    now = {name: matrix.shape for name, matrix in found.items()}
    if now == shapes:
        return
    raise TrainingError(
        f"{folder} holds matrices of different models: {_stacks(shapes)} at step {start}, "
        f"{_stacks(now)} at step {step}",
        hint="two runs wrote into one folder: move the files of one of them away",
    )


def _stacks(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {rows}x{columns}" for name, (rows, columns) in shapes.items())


def _note_oddities(frames: Frames, notes: list[str]) -> None:
    wrong = np.array([not np.isfinite(matrix).all() for matrix in frames.values])
    if wrong.any():
        notes.append(
            f"{frames.stack}: coefficients are not finite from step {frames.steps[wrong][0]} on, "
            f"in {int(wrong.sum())} of {len(wrong)} records; they are drawn grey"
        )
    above = np.nan_to_num(np.triu(frames.values, 1))
    if np.abs(above).max() > 0:
        notes.append(
            f"{frames.stack}: there are entries above the diagonal, where no state can come from; "
            "they are not drawn"
        )


def _remarks(record: Record) -> Iterator[str]:
    if not len(record.train) and not len(record.evaluation):
        yield f"{LOG} holds no step yet"
    for what, series in (("training", record.train), ("evaluation", record.evaluation)):
        lost = ~np.isfinite(series.values)
        if lost.any():
            yield (
                f"the {what} loss is not finite at {int(lost.sum())} of {len(series)} logged "
                f"steps, first at step {series.steps[lost][0]}; the curve has gaps there"
            )
    if record.unfinished:
        yield f"the run is unfinished: the log ends at step {record.last_step} of {record.total}"
    if not record.frames:
        yield _why_no_matrices(record.config)


def _rewires(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe, as plain data, has a rule for shortcuts."""
    return any(rule.get("pass") == "shortcuts" for rule in recipe.get("rules", ()))


def _why_no_matrices(config: Mapping[str, Any] | None) -> str:
    log = None if config is None else config.get("log")
    if config is not None and config.get("rules") is None:
        return "the run has no rules, so no shortcuts: there is no matrix to draw"
    if config is not None and not _rewires(cast("Mapping[str, Any]", config["rules"])):
        return REWIRES_NOTHING
    if isinstance(log, Mapping) and cast("Mapping[str, Any]", log).get("matrices", 0) is None:
        return "log.matrices is null: no coefficient matrix was recorded"
    return "no coefficient matrix was recorded: the model has no shortcuts, or trained too briefly"
