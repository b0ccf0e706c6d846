"""Data loaders: torch's own, over samples in their order."""

from __future__ import annotations

from typing import cast

import torch
from torch.utils.data import DataLoader

from surgery.train.data.base import Batch, Samples, Spread, StreamSamples, need
from surgery.train.data.order import Order, Sweep


def training_loader(
    samples: Samples | StreamSamples,
    *,
    batch: int,
    seed: int,
    start: int = 0,
    workers: int = 0,
    pin: bool = False,
) -> DataLoader[Batch]:
    """Batches without end, in the order of ``Order``; a stream comes as it is.

    Args:
        samples: What is trained on.
        batch: Samples in a batch, over all ranks. Accelerate splits it with
            ``DataLoaderConfiguration(split_batches=True)``.
        seed: Seed of the order.
        start: Number of the first batch; to resume after n batches is to start at n.
        workers: Processes that read ahead; 0 reads in this one. A stream is read by one process
            at most: more would each read all of it.
        pin: Whether batches lie in page-locked memory, from which a CUDA device copies without
            waiting.

    Returns:
        A loader of batches: tensors of shape (B, ...) by name, among them ``position`` of shape
        (B,).

    Raises:
        DataError: there are no samples, or a number is out of range.
    """
    if isinstance(samples, StreamSamples):
        need(batch >= 1, f"a batch has {batch} samples, expected 1 or more")
        return DataLoader(
            samples.at(start * batch),
            batch_size=batch,
            num_workers=min(workers, 1),
            # Not forked: connections to the hub are made by threads of this process.
            multiprocessing_context="spawn" if workers else None,
            pin_memory=pin,
            drop_last=True,
            generator=_generator(),
        )
    order = Order(len(samples), batch=batch, seed=seed, start=start)
    return _stored(samples, order, workers, pin)


def evaluation_loader(
    samples: Samples,
    *,
    batch: int,
    count: int | None = None,
    workers: int = 0,
    pin: bool = False,
) -> DataLoader[Batch]:
    """Every sample once, or ``count`` of them at equal distances; always the same ones.

    Args:
        samples: What is evaluated on.
        batch: Samples in a batch, over all ranks; the last batch may be smaller.
        count: Samples at most; None for all.
        workers: Processes that read ahead; 0 reads in this one.
        pin: Whether batches lie in page-locked memory.

    Raises:
        DataError: there are no samples, or a number is out of range.
    """
    # A view rather than a shorter order: accelerate compares the length of the dataset with the
    # batch to know how many samples of the last batch it repeated for the sake of equal parts.
    chosen = Spread(samples, len(samples) if count is None else count)
    return _stored(chosen, Sweep(len(chosen), batch=batch), workers, pin)


def _stored(samples: Samples, order: Order | Sweep, workers: int, pin: bool) -> DataLoader[Batch]:
    return DataLoader(
        samples,
        batch_sampler=order,
        num_workers=workers,
        pin_memory=pin,
        collate_fn=_as_it_is,
        persistent_workers=workers > 0,
        generator=_generator(),
    )


def _as_it_is(batch: object) -> Batch:
    """Samples come as batches already."""
    return cast("Batch", batch)


def _generator() -> torch.Generator:
    """What torch draws the workers' seeds from.

    The global one by default: each loader that begins would then change what dropout draws, and a
    resumed run would differ from one that was not interrupted.
    """
    return torch.Generator().manual_seed(0)
