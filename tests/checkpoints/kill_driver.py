"""Saves over a folder in child processes, ends them at every step or at random, looks each time.

Run by ``test_kill.py`` in a process of its own, which forks: ``kill_driver.py PARENT``.
Prints one JSON object: what each mode found. The modes:

- ``steps``: SIGKILL at the first file-system operation, then at the second, and so on.
- ``errors``: an OSError there instead.
- ``random``: SIGKILL after a random time while saves go on and on.
- ``full``: the file system has no room.

Each also with ``-renames``: the folder is replaced by two renames, as where the file system
cannot exchange two folders.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from surgery.checkpoints import swap
from surgery.errors import SurgeryError

#: What Python reports before it touches the file system, or calls renameat2.
DONE = 7  # the save came to its end before the step did
STEPS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open", "fcntl.flock", "os.listdir")


def model(value: float) -> nn.Module:
    made = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for parameter in made.parameters():
        nn.init.constant_(parameter, value)
    return made


def content(target: Path) -> float:
    """The value that fills the saved model; raises if the folder is not whole."""
    restored = surgery.restore(target, model=model(-1.0))
    values = {float(v) for p in restored.parameters() for v in p.detach().unique()}
    assert len(values) == 1, values
    return values.pop()


class Steps:
    """An audit hook that ends, or disturbs, the process at one step below a folder."""

    def __init__(self, parent: Path, number: int, act: Callable[[], None]) -> None:
        self.parent = str(parent)
        self.left = number
        self.act = act

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not event.startswith(STEPS) or not self._is_below(arguments):
            return
        self.left -= 1
        if self.left == 0:
            self.act()

    def _is_below(self, arguments: tuple[Any, ...]) -> bool:
        # Inside rmtree names are relative, and locks are on handles: those count too.
        first = arguments[0]
        return isinstance(first, int) or self.parent in str(first) or "/" not in str(first)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(5, "input/output error, made up by the test")


def forked(work: Callable[[], int]) -> int:
    """Run ``work`` in a child; what it returns, 3 for an error, or minus the signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            code = work()
        except (OSError, SurgeryError):
            code = 3
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def step_by_step(parent: Path, act: Callable[[], None]) -> dict[str, Any]:
    target, seen = parent / "out", Counter[str]()
    old = 0.0
    surgery.save(model(old), target)
    for number in range(1, 400):
        new = float(number)

        def work(number: int = number, new: float = new) -> int:
            hook = Steps(parent, number, act)
            sys.addaudithook(hook)
            surgery.save(model(new), target)
            return DONE if hook.left > 0 else 0

        code = forked(work)
        found = content(target)
        assert found in (old, new), (number, found)
        seen["old" if found == old else "new"] += 1
        old = found
        if code == DONE:
            assert found == new
            return {"steps": number, "seen": seen, "left": left_over(parent)}
    raise AssertionError("the save never came to its end")


def at_random(parent: Path, rounds: int = 25, most: int = 250) -> dict[str, Any]:
    target, seen = parent / "out", Counter[int]()
    surgery.save(model(0.0), target)
    dice = random.Random(0)  # noqa: S311 - only moments in time
    # On a busy machine a child may be killed before its first save: it takes more of them then.
    while seen.total() < rounds or (len(seen) <= 2 and seen.total() < most):
        child = os.fork()
        if child == 0:
            number = 0
            while True:
                number += 1
                surgery.save(model(float(number)), target)
        time.sleep(dice.random() * 0.15)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen[int(content(target))] += 1
    return {"rounds": seen.total(), "seen": len(seen), "left": left_over(parent)}


def no_room(parent: Path) -> dict[str, Any]:
    target = parent / "out"
    surgery.save(model(1.0), target)

    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        surgery.save(model(2.0), target)
        return 0

    code = forked(work)
    beside = [each.name for each in parent.iterdir() if each != target]
    return {"code": code, "content": content(target), "beside": beside}


def left_over(parent: Path) -> list[str]:
    """What lies beside the target after one more, undisturbed save."""
    surgery.save(model(0.0), parent / "out")
    return [each.name for each in parent.iterdir() if each.name != "out"]


MODES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "steps": lambda parent: step_by_step(parent, kill),
    "errors": lambda parent: step_by_step(parent, fail),
    "random": at_random,
    "full": no_room,
}


def main() -> None:
    warnings.simplefilter("ignore", DeprecationWarning)  # os.fork; this process has one thread
    torch.set_num_threads(1)
    exchange = swap._exchange
    found: dict[str, dict[str, Any]] = {}
    for how in ("", "-renames"):
        swap._exchange = exchange if not how else lambda one, other: False
        for mode, run in MODES.items():
            parent = Path(sys.argv[1]) / f"{mode}{how}"
            parent.mkdir()
            found[parent.name] = run(parent)
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
