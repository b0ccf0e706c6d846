"""Saves, exports and conversions in child processes that are disturbed, and what is left of them.

Run by ``test_faults.py`` in a process of its own, which forks: ``driver.py PARENT POINTS``. Prints
one JSON object: what was found for each operation and each fault. The faults:

- ``kill``: SIGKILL at so many random points, half of them before a random file-system operation and
  half after a random time; each time over nothing and over an older output.
- ``error``: an input/output error at a random file-system operation.
- ``full``: no file may grow beyond a few kilobytes.
- ``tmpfs``: a file system without room, where one can be mounted.
- ``readonly``: the folder of the output cannot be written to.
- ``source``: a file of the source is written to meanwhile; conversions only.

After each the operation is run once more, undisturbed, which must give the whole new output and
leave nothing else.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

import surgery
from surgery.exporting.agreement import Agreement
from surgery.exporting.code import apart
from tests import zoo
from tests.checkpoints.kill_driver import DONE, Steps, fail, forked, kill
from tests.exporting.own import Tower

_REFUSED = 3  # what ``forked`` returns for an OSError or a SurgeryError
_ROOM = 6000  # bytes: more than a configuration has, less than the weights
_DISK = 48 << 20  # bytes; conversions want some to be left


class Operation(ABC):
    """Something that reads a source and puts a folder in place.

    Args:
        parent: An empty folder to work in.
    """

    name: ClassVar[str]

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        self.out = parent / "out"
        self.source = parent / "source"
        self.prepare()
        self.before = content(self.source)
        self.outputs: dict[str, dict[str, str]] = {"absent": {}}
        for which in ("old", "new"):
            self.run(which)
            self.outputs[which] = self.told(self.out)
        assert self.outputs["old"] != self.outputs["new"]

    def prepare(self) -> None:
        """Make what is read; nothing by default."""
        return

    @abstractmethod
    def run(self, which: str) -> None:
        """Write the ``old`` or the ``new`` output."""

    def told(self, folder: Path) -> dict[str, str]:
        """What an output is known by: the hash of each file but of the log of how it was made."""
        return {name: digest for name, digest in content(folder).items() if name != "surgery.json"}

    def begin(self, state: str) -> None:
        """Put the output in a state: ``absent`` or ``old``, with nothing beside it."""
        for each in self.parent.iterdir():
            if each != self.source:
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        if state == "old":
            self.run("old")

    def look(self) -> str:
        """The state the output is in; raises if it is in none, or the source was touched."""
        assert content(self.source) == self.before, "the source was touched"
        found = self.told(self.out) if self.out.exists() else {}
        if found:
            self.check_whole()
        return next(state for state, told in self.outputs.items() if told == found)

    def check_whole(self) -> None:
        """Raise unless every file is the one that surgery.json tells of."""
        files = json.loads((self.out / "surgery.json").read_text())["files"]
        found = content(self.out)
        assert set(files) == set(found) - {"surgery.json"}
        assert all(files[name]["sha256"] == found[name] for name in files)

    def finish(self) -> None:
        """Run once more; the new output must be there, whole, and nothing else."""
        self.run("new")
        assert self.look() == "new"
        left = {each.name for each in self.parent.iterdir()} - {"out", "source"}
        assert not left, left


class Save(Operation):
    """``surgery.save``."""

    name = "save"

    def run(self, which: str) -> None:
        """A model whose weights are all 0, or all 1."""
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        for parameter in model.parameters():
            nn.init.constant_(parameter, float(which == "new"))
        surgery.save(model, self.out, max_shard_size="10KB")


class Export(Operation):
    """``surgery.export`` in the format ``python``, without the process that would check it."""

    name = "export"

    def prepare(self) -> None:
        """Leave the check out: it only reads, and takes seconds."""

        def agree(*_: Any) -> Agreement:
            return Agreement("nobody", ("the example",), 0.0, "", 1.0)

        apart.agrees = agree

    def run(self, which: str) -> None:
        """Towers of two widths."""
        torch.manual_seed(0)
        width = 40 if which == "new" else 36
        call = torch.zeros(1, 2, dtype=torch.long)
        options: dict[str, Any] = {"arguments": {"width": width}, "max_shard_size": "10KB"}
        surgery.export(Tower(width), self.out, format="python", example=call, **options)


class Convert(Operation):
    """``surgery.convert`` of a sharded checkpoint."""

    name = "convert"

    def prepare(self) -> None:
        """A tiny llama, as its library saves it."""
        model: Any = zoo.build("llama")[0]
        model.save_pretrained(self.source, max_shard_size="10KB")

    def run(self, which: str) -> None:
        """Its weights in another dtype and in many files."""
        dtype = torch.float64 if which == "new" else torch.bfloat16
        surgery.convert(self.source, None, self.out, dtype=dtype, max_shard_size="16KB", threads=2)


def content(folder: Path) -> dict[str, str]:
    """The hash of each file of a folder."""
    if not folder.is_dir():
        return {}
    return {each.name: sha256(each.read_bytes()).hexdigest() for each in sorted(folder.iterdir())}


def disturbed(operation: Operation, number: int, act: Callable[[], None]) -> int:
    """Write the new output in a child; something happens at one of its file-system operations."""

    def work() -> int:
        hook = Steps(operation.parent, number, act)
        sys.addaudithook(hook)
        operation.run("new")
        return DONE if hook.left > 0 else 0

    return forked(work)


def steps_of(operation: Operation) -> int:
    """How many file-system operations it takes."""
    reading, writing = os.pipe()

    def work() -> int:
        hook = Steps(operation.parent, -1, fail)
        sys.addaudithook(hook)
        operation.run("new")
        os.write(writing, str(-1 - hook.left).encode())
        return 0

    assert forked(work) == 0
    os.close(writing)
    with os.fdopen(reading) as file:
        return int(file.read())


def killed_after(operation: Operation, seconds: float) -> int:
    """Write the new output in a child that is killed after a time."""
    child = os.fork()
    if child == 0:
        operation.run("new")
        os._exit(DONE)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_random_points(operation: Operation, points: int, act: Callable[[], None]) -> dict[str, Any]:
    """Disturb it at random operations, and for a kill as often after random times."""
    dice = random.Random(operation.name)  # noqa: S311 - only moments
    operation.begin("absent")
    total = steps_of(operation)
    operation.begin("absent")
    began = time.monotonic()
    assert forked(lambda: operation.run("new") or 0) == 0
    duration = time.monotonic() - began
    seen: Counter[str] = Counter()
    for point in range(points):
        state = ("absent", "old")[point // 2 % 2]
        operation.begin(state)
        if act is kill and point % 2:
            code = killed_after(operation, dice.random() * duration * 1.1)
        else:
            code = disturbed(operation, dice.randint(1, total), act)
        found = operation.look()
        assert found in (state, "new"), (point, code, state, found)
        assert code in (DONE, 0, _REFUSED, -signal.SIGKILL), code
        seen[found] += 1
        operation.finish()
    return {"points": seen.total(), "seen": seen, "steps": total}


def without_room(operation: Operation) -> dict[str, Any]:
    """No file may be larger than a few kilobytes."""

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (_ROOM, _ROOM))
        operation.run("new")
        return 0

    return refused(operation, work)


def read_only(operation: Operation) -> dict[str, Any]:
    """The folder around the output may not be written to, not even by root."""

    def work() -> int:
        drop_override()
        operation.parent.chmod(0o555)
        operation.run("new")
        return 0

    try:
        return refused(operation, work)
    finally:
        operation.parent.chmod(0o755)


def drop_override() -> None:
    """Give up root's power over files that it may not write to (``CAP_DAC_OVERRIDE``)."""
    if os.geteuid() != 0:
        return
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    if library.capget(header, sets):
        raise OSError(ctypes.get_errno(), "capget")
    for index in (0, 1):  # effective, permitted: bits 1 and 2 are the override and its reading half
        sets[index] &= ~0b110
    if library.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


def refused(operation: Operation, work: Callable[[], int]) -> dict[str, Any]:
    """Over nothing and over an old output: it stays, and the next run goes through."""
    codes: list[int] = []
    for state in ("absent", "old"):
        operation.begin(state)
        try:
            codes.append(forked(work))
        finally:
            operation.parent.chmod(0o755)
        assert operation.look() == state, operation.look()
        operation.finish()
    return {"codes": codes}


def changed_source(operation: Operation) -> dict[str, Any]:
    """A shard of the source is written to after the first output file was begun."""
    shard = min(operation.source.glob("*.safetensors"))
    data, times = shard.read_bytes(), shard.stat()
    codes: list[int] = []

    def write() -> None:
        with shard.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\x01\x02\x03\x04")

    for state in ("absent", "old"):
        operation.begin(state)
        total = steps_of(operation)
        operation.begin(state)
        codes.append(disturbed(operation, total // 2, write))
        assert shard.read_bytes() != data
        found = operation.told(operation.out) if operation.out.exists() else {}
        assert found == operation.outputs[state]
        shard.write_bytes(data)
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        operation.finish()
    return {"codes": codes}


def on_a_small_disk(make: Callable[[Path], Operation], parent: Path) -> dict[str, Any]:
    """On a file system that has no room for another output beside the old one."""
    disk = parent / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", str(disk)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        return {"skipped": "no file system can be mounted here"}
    try:
        operation = make(disk / "work")
        operation.begin("old")
        filler = disk / "filler"
        fill(filler)
        code = forked(lambda: operation.run("new") or 0)
        assert operation.look() == "old"
        filler.unlink()
        operation.finish()
        return {"codes": [code]}
    finally:
        subprocess.run(["umount", str(disk)], check=True)  # noqa: S607 - the system's


def fill(path: Path) -> None:
    """Write a file until nearly nothing fits on the disk any more."""
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            size = path.stat().st_size
    os.truncate(path, size - 4 * _ROOM)


def main() -> None:
    """Every operation, every fault."""
    warnings.simplefilter("ignore", DeprecationWarning)  # os.fork; this process has one thread
    torch.set_num_threads(1)
    parent, points = Path(sys.argv[1]), int(sys.argv[2])
    found: dict[str, Any] = {}
    for kind in (Save, Export, Convert):

        def make(folder: Path, kind: type[Operation] = kind) -> Operation:
            folder.mkdir()
            return kind(folder)

        operation = make(parent / kind.name)
        told = {
            "kill": at_random_points(operation, points, kill),
            "error": at_random_points(operation, max(points // 2, 2), fail),
            "full": without_room(operation),
            "readonly": read_only(operation),
        }
        if kind is Convert:
            told["source"] = changed_source(operation)
        if points >= 20:
            (parent / f"{kind.name}-tmpfs").mkdir()
            told["tmpfs"] = on_a_small_disk(make, parent / f"{kind.name}-tmpfs")
        found[kind.name] = told
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
