"""One run in a process of its own, so that its peak of memory and its time are its own.

The configuration goes in as one line of JSON, what was found comes out as another. As long as the
parent lives it holds the other end of the input; when that closes, the process ends itself, so
that a killed comparison leaves no training behind.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from surgery.errors import SurgeryError, TrainingError

if TYPE_CHECKING:
    from surgery.train.config import PretrainConfig

logger = logging.getLogger(__name__)

_PROCESS = Path("/proc/self")
_ORPHANED = 3
"""Exit code of a process whose parent is gone."""


def in_a_process(config: PretrainConfig, out: Path) -> int | None:
    """Train in a new process, or go on with what is in ``out``; its peak of memory in bytes.

    Raises:
        TrainingError: the run failed, with its error.
    """
    command = [sys.executable, "-m", "surgery.train.apart", str(out)]
    # A session of its own: Ctrl-C is for this process, which then ends that one.
    with subprocess.Popen(  # noqa: S603 - this interpreter, this module
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=_environment(),
        start_new_session=True,
    ) as process:
        try:
            answer = _ask(process, json.dumps(config.dump()))
        except BaseException:
            process.kill()
            raise
    return _peak_of(answer, process.returncode, config)


def _ask(process: subprocess.Popen[str], question: str) -> str:
    """Write a line, and read whatever comes until the process ends. The input stays open."""
    assert process.stdin is not None  # noqa: S101 - it is a pipe
    assert process.stdout is not None  # noqa: S101 - it is a pipe
    try:
        process.stdin.write(question + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""  # it ended before it could read; its exit code says more
    return process.stdout.read()


def here(config: PretrainConfig, out: Path) -> int | None:
    """Train in this process, as under a launcher; the accelerator's peak of memory, if any."""
    import torch

    from surgery.train.run import pretrain

    if torch.accelerator.is_available():
        torch.accelerator.reset_peak_memory_stats()
    pretrain(config, out=out, resume=True)
    return int(torch.accelerator.max_memory_allocated()) if _on_accelerator(config) else None


def _environment() -> dict[str, str]:
    """Ours, with the folders this process imports from: it may not be installed."""
    paths = os.pathsep.join(path for path in sys.path if path)
    return {**os.environ, "PYTHONPATH": paths}


def _peak_of(answer: str, code: int, config: PretrainConfig) -> int | None:
    what = f"{config.name}, seed {config.seed}"
    if not answer.strip():
        raise TrainingError(
            f"{what}: its process ended with exit code {code} and said nothing",
            hint="its messages are on stderr; a negative code is the signal that killed it, "
            "-9 often for want of memory",
        )
    found = cast("dict[str, Any]", json.loads(answer))
    if "error" in found:
        raise TrainingError(f"{what}: {found['error']}", hint=found["hint"])
    return found["peak_memory"]


def _main(out: Path, results: TextIO) -> int:
    """What the new process does."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    data = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        peak = _trained(data, out)
    except SurgeryError as error:
        text = error.message if type(error).__str__ is SurgeryError.__str__ else str(error)
        results.write(json.dumps({"error": text, "hint": error.hint}) + "\n")
        return error.exit_code
    results.write(json.dumps({"peak_memory": peak}) + "\n")
    return 0


def _trained(data: dict[str, Any], out: Path) -> int | None:
    import torch

    from surgery.sources import load
    from surgery.train.config import PretrainConfig
    from surgery.train.run import pretrain

    config = PretrainConfig.parse(data)

    def tell(kind: str, text: str) -> None:
        if kind != "step":
            logger.info("%s, seed %s: %s", config.name, config.seed, text)

    # Its library is imported now: what that takes is no part of what training takes.
    load(config.model.source, config=config.model.config, device="meta")
    before = _forget_peak()
    pretrain(config, out=out, resume=True, tell=tell)
    if _on_accelerator(config):
        return int(torch.accelerator.max_memory_allocated())
    return None if before is None else _resident("VmHWM") - before


def _on_accelerator(config: PretrainConfig) -> bool:
    import torch

    return config.train.device == "auto" and torch.accelerator.is_available()


def _forget_peak() -> int | None:
    """Start the peak of resident memory anew: what is resident now, in bytes.

    Imports leave a peak that may be higher than that of a small model's training. None where the
    kernel does not do this, since the peak of the training alone is unknown then.
    """
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return None
    return _resident("VmRSS")


def _resident(what: str) -> int:
    """A figure of this process in bytes: ``VmRSS`` is resident now, ``VmHWM`` was at most."""
    status = (_PROCESS / "status").read_text()
    return next(
        int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(what)
    )


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(_ORPHANED)


if __name__ == "__main__":
    stdout = sys.stdout
    # Libraries print; stdout belongs to the result.
    with redirect_stdout(sys.stderr):
        code = _main(Path(sys.argv[1]), stdout)
    stdout.flush()
    sys.exit(code)
