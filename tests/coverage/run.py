"""Examine many models, each in a process of its own with a limit on time and memory.

    make coverage                       # one model per timm module, transformers, diffusers
    make coverage ONLY="vit swin"       # those whose name or module contains one of these
    make coverage ALL=1                 # every model that timm registers as well

A run that was interrupted goes on where it stopped: ``runs/coverage/`` has one file per model, and
those that the present code and libraries wrote are not examined again. At the end
``tests/coverage/results.json`` and ``docs/coverage.md`` are written from all of them.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console

from tests.coverage import report
from tests.coverage.cases import MODELS, registered
from tests.sweep.models import Model

ROOT = Path(__file__).resolve().parents[2]
STATE = ROOT / "runs" / "coverage"
RESULTS = ROOT / "tests" / "coverage" / "results.json"
PAGE = ROOT / "docs" / "coverage.md"
#: Imported once by the process that every worker is a fork of.
_PRELOADED = [
    "tests.coverage.examine",
    "timm",
    "transformers.modeling_utils",
    "diffusers.models.modeling_utils",
]
_LIBRARIES = ("torch", "timm", "transformers", "diffusers")
_CODE = ("surgery", "architectures", "tests/coverage", "tests/sweep", "tests/zoo.py")


@dataclass(frozen=True)
class Limits:
    """What one worker may take, and how many there are."""

    seconds: float
    gigabytes: float
    workers: int


def fingerprint() -> str:
    """A digest of the code that is examined, of what examines it, and of the libraries."""
    digest = hashlib.sha256()
    for part in _CODE:
        top = ROOT / part
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
            digest.update(path.read_bytes())
    for library in _LIBRARIES:
        digest.update(importlib.metadata.version(library).encode())
    return digest.hexdigest()[:12]


def _work(name: str, target: Path, code: str) -> None:
    """Body of a worker."""
    import torch

    from tests.coverage.examine import examine, find

    torch.set_num_threads(1)
    _store(target, {**asdict(examine(find(name))), "code": code})


def _store(target: Path, result: dict[str, Any]) -> None:
    partial = target.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
    partial.replace(target)


class _Worker:
    """One model being examined."""

    def __init__(self, model: Model, code: str, limits: Limits) -> None:
        context = multiprocessing.get_context("forkserver")
        self.model = model
        self.target = STATE / f"{model.name}.json"
        self.target.unlink(missing_ok=True)
        self._code = code
        self._limits = limits
        self._start = time.monotonic()
        self._process = context.Process(target=_work, args=(model.name, self.target, code))
        self._process.start()

    def done(self) -> bool:
        """Whether it has ended, or was ended for taking more than it may."""
        if not self._process.is_alive():
            self._process.join()
            if not self.target.exists():
                self._failed(f"the worker died with exit code {self._process.exitcode}")
            return True
        seconds = time.monotonic() - self._start
        gigabytes = self._memory()
        if seconds > self._limits.seconds:
            return self._stop(f"took more than {self._limits.seconds:g} s")
        if gigabytes > self._limits.gigabytes:
            return self._stop(f"took more than {self._limits.gigabytes:g} GB")
        return False

    def _memory(self) -> float:
        try:
            return psutil.Process(self._process.pid).memory_info().rss / 2**30
        except psutil.NoSuchProcess:
            return 0.0

    def _stop(self, why: str) -> bool:
        self._process.kill()
        self._process.join()
        self._failed(why)
        return True

    def _failed(self, why: str) -> None:
        seconds = round(time.monotonic() - self._start, 2)
        result = {
            "name": self.model.name,
            "library": self.model.library,
            "module": vars(self.model).get("module", ""),
            "outcome": {"worker": why},
            "findings": {},
            "refused": "",
            "tracebacks": {},
            "seconds": seconds,
        }
        _store(self.target, {**result, "code": self._code})


def run(models: Iterable[Model], code: str, limits: Limits, console: Console) -> None:
    """Examine models side by side."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOADED)
    waiting, working = list(models), list[_Worker]()
    total, ended = len(waiting), 0
    waiting.reverse()
    while waiting or working:
        while waiting and len(working) < limits.workers:
            working.append(_Worker(waiting.pop(), code, limits))
        time.sleep(0.1)
        for worker in [each for each in working if each.done()]:
            working.remove(worker)
            ended += 1
            result = json.loads(worker.target.read_text(encoding="utf-8"))
            line = f"[{ended}/{total}] {report.line(result)}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def load(names: Iterable[str] | None = None) -> dict[str, dict[str, Any]]:
    """The results there are, by name; of some models if named."""
    wanted = None if names is None else set(names)
    found = [json.loads(path.read_text(encoding="utf-8")) for path in STATE.glob("*.json")]
    return {each["name"]: each for each in found if wanted is None or each["name"] in wanted}


def chosen(only: Iterable[str], *, everything: bool) -> list[Model]:
    """The models that a command line asks for."""
    models = {**MODELS, **(registered() if everything else {})}
    parts = list(only)
    if not parts:
        return list(models.values())
    return [
        model
        for model in models.values()
        if any(part in f"{model.name} {vars(model).get('module', '')}" for part in parts)
    ]


def write(results: dict[str, dict[str, Any]]) -> None:
    """Merge results into the ones of record, and write the page."""
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"models": {}}
    models = {**kept["models"], **{name: _of_record(each) for name, each in results.items()}}
    order = {name: at for at, name in enumerate(MODELS)}
    models = dict(sorted(models.items(), key=lambda item: (order.get(item[0], 1 << 20), item[0])))
    versions = {library: importlib.metadata.version(library) for library in _LIBRARIES}
    record = {"versions": versions, "models": models}
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(report.page(record), encoding="utf-8")


def _of_record(result: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in result.items() if key not in ("tracebacks", "name")}
    return json.loads(re.sub(r"/[^\s\"`()]*/site-packages/", "", json.dumps(kept)))


def main() -> int:
    """Examine what is asked for and has not been yet, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="*", help="parts of names or of timm modules")
    parser.add_argument("--all", action="store_true", help="every model that timm registers")
    parser.add_argument("--keep", action="store_true", help="keep results of other code")
    parser.add_argument("--report", action="store_true", help="only write the page")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=240.0, help="limit per model")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="limit per model")
    options = parser.parse_args()
    console = Console()
    models = chosen(options.only, everything=options.all)
    if not models:
        console.print(f"no model matches {' '.join(options.only)!r}", markup=False)
        return 2
    STATE.mkdir(parents=True, exist_ok=True)
    code = fingerprint()
    names = [model.name for model in models]
    if not options.report:
        have = {n for n, each in load(names).items() if options.keep or each["code"] == code}
        limits = Limits(options.seconds, options.gigabytes, options.workers)
        run([model for model in models if model.name not in have], code, limits, console)
    write(load(names))
    record = json.loads(RESULTS.read_text(encoding="utf-8"))
    console.print(report.summary(record, names), markup=False, highlight=False)
    return 0 if report.reached(record, names) else 1


if __name__ == "__main__":
    sys.exit(main())
