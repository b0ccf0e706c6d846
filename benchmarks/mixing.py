"""The mixing of states alone, forward and backward, against the memory traffic it cannot avoid.

A stack of K sites whose blocks cost nothing, with all K (K + 1) / 2 coefficients learned, so that
what is timed is the sums and their gradients. With R = K (K + 1) / 2 the floor is 2R + 5K passes
over one state:

    forward    R + 2K    each sum reads its states and what the block gave, and writes the result
    backward   R + 3K    each state reads the later gradients, its own values and the gradient from
                         its block, and writes its gradient

Its time is that of a copy measured in the same turn, two passes each, of a state of at least four
times the last-level cache. ``plain`` is ``y + w[0] * x[0]``, then ``+ w[1] * x[1]`` and so on, as
autograd differentiates it.

The C library gives a large tensor back to the system when it is freed, and the system clears the
pages of the next one again, 4 KiB at a time. That is no part of what is compared: both sides run
with torch's huge pages (``THP_MEM_ALLOC_ENABLE=1``), which makes it cheaper, not free, and what
is left of it, for the 2K states that ours writes, is measured in the same turn and shown.
``--small-pages`` leaves that as it is.

To reach: ours at most 2.5 times the floor on the CPU and 1.5 times on CUDA, and plain at least
twice as slow as ours.

Run: ``python benchmarks/mixing.py [--sites 12 24] [--rounds 5] [--threads 2] [--device cuda]``
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import Ratio, Timings, as_data, interleave, report, table
from torch import Tensor
from torch.autograd import Function

from architectures.shortcuts import Ancre, History, Mixer

LIMIT = {"cpu": 2.5, "cuda": 1.5}
SPEEDUP = 2.0
COPIES = 4  # of one state per turn
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
CACHE = Path("/sys/devices/system/cpu/cpu0/cache")


class Free(Function):
    """A block that costs nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        """Give ``y`` whatever enters."""
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Hand the gradient on."""
        return gradients[0], None


def block(x: Tensor, y: Tensor) -> Tensor:
    free: Callable[..., Tensor] = Free.apply
    return free(x, y)


def ours(mixer: Mixer, x: Tensor, y: Tensor) -> Tensor:
    history = History(mixer(), mixer.support)
    for _ in mixer.support:
        x = history.leave(block(history.enter(x), y))
    return x


def plain(mixer: Mixer, x: Tensor, y: Tensor) -> Tensor:
    weights, states = mixer(), list[Tensor]()
    for row in mixer.support:
        states.append(x)
        x = block(x, y)
        for state in row:
            x = x + weights[len(states) - 1, state] * states[state]
    return x


def with_huge_pages() -> None:
    """Start over with torch's allocator asking for huge pages; it reads this once, early."""
    if os.environ.get(HUGE_PAGES) != "1":
        os.environ[HUGE_PAGES] = "1"
        os.execv(sys.executable, [sys.executable, *sys.argv])  # noqa: S606 - this very script


def last_level_cache(device: str) -> int:
    """Bytes of the largest cache."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in CACHE.glob("index*/size")]
    return max((int(size.removesuffix("K")) * 1024 for size in sizes), default=32 * 2**20)


def passes(sites: int) -> int:
    """Reads and writes of one state that no implementation avoids."""
    return sites * (sites + 1) + 5 * sites


def memory(state: Tensor, wait: Callable[[], None]) -> dict[str, Callable[[], None]]:
    """Copying a state, writing one, and writing one that is new."""
    other = torch.zeros_like(state)

    def copy() -> None:
        for _ in range(COPIES):
            state.copy_(other)
        wait()

    def old() -> None:
        for _ in range(COPIES):
            other.zero_()
        wait()

    def fresh() -> None:
        for _ in range(COPIES):
            torch.empty_like(state).zero_()
        wait()

    return {"copy": copy, "old": old, "fresh": fresh}


def run(sites: int, elements: int, options: argparse.Namespace) -> Timings:
    """Seconds of both sides and of the floor, turn by turn."""
    to = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    torch.manual_seed(0)
    mixer = Mixer(Ancre(sites, temperature=1.0, device=options.device))
    (logits,) = mixer.parameters()
    with torch.no_grad():
        logits.normal_()
    x, y, gradient, copied = (torch.randn(elements, **to) for _ in range(4))
    x.requires_grad_()

    def clear() -> None:
        x.grad = logits.grad = None
        wait()

    def wait() -> None:
        if options.device == "cuda":
            torch.cuda.synchronize()

    def step(side: Callable[[Mixer, Tensor, Tensor], Tensor]) -> None:
        side(mixer, x, y).backward(gradient)
        wait()

    found = []
    for side in (ours, plain):
        clear()
        step(side)
        assert x.grad is not None
        assert logits.grad is not None
        found.append((x.grad, logits.grad))
    for one, other in zip(*found, strict=True):
        # Sums of as many terms as there are elements, in float32 and in another order.
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3 * other.abs().max().item())
    del found

    cases = {"ours": lambda: step(ours), "plain": lambda: step(plain), **memory(copied, wait)}
    timings = interleave(cases, rounds=options.rounds, warmup=1, prepare=clear)
    of_one_pass = [taken / (2 * COPIES) for taken in timings.seconds["copy"]]
    floor = [passes(sites) * taken for taken in of_one_pass]
    turns = zip(timings.seconds["fresh"], timings.seconds["old"], strict=True)
    pages = [2 * sites * max(fresh - old, 0.0) / COPIES for fresh, old in turns]
    return Timings({**timings.seconds, "floor": floor, "pages": pages})


def row(sites: int, size: int, timings: Timings, device: str) -> tuple[Sequence[str], Any]:
    floor, speedup = timings.ratio("ours", "floor"), timings.ratio("plain", "ours")
    total = passes(sites) * size
    seconds = {name: timings.median(name) for name in ("floor", "ours", "pages", "plain")}
    line = [
        str(sites),
        f"{size / 2**20:.0f} MiB",
        f"{total / 1e9:.1f} GB",
        f"{total / seconds['floor'] / 1e9:.1f} GB/s",
        *(f"{value:.2f} s" for value in seconds.values()),
        str(floor),
        str(speedup),
    ]
    data = {
        "sites": sites,
        "state_bytes": size,
        "floor_bytes": total,
        "seconds": seconds,
        "ours/floor": as_data(floor),
        "plain/ours": as_data(speedup),
        "met": met(floor, speedup, device),
    }
    return line, data


def met(floor: Ratio, speedup: Ratio, device: str) -> bool:
    return floor.median <= LIMIT[device] and speedup.median >= SPEEDUP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sites", type=int, nargs="+", default=[12, 24])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--small-pages", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.device == "cpu" and not options.small_pages:
        with_huge_pages()
    size = 4 * last_level_cache(options.device)
    elements = size // getattr(torch, options.dtype).itemsize
    rows, data = [], []
    for sites in options.sites:
        line, numbers = row(sites, size, run(sites, elements, options), options.device)
        rows.append(line)
        data.append(numbers)
        print(line, flush=True)
    header = [
        "K",
        "state",
        "floor",
        "copy",
        "floor",
        "ours",
        "of it new pages",
        "plain",
        f"ours / floor (limit {LIMIT[options.device]})",
        f"plain / ours (at least {SPEEDUP:g})",
    ]
    name = "mixing" if options.device == "cpu" else f"mixing_{options.device}_{options.dtype}"
    report(name, table(header, rows), {"rows": data})


if __name__ == "__main__":
    main()
