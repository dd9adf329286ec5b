"""Which sample comes when, and samples to batches.

The samples of a run are counted: sample i of optimizer step `step` has

    position = step * batch_size + i,    epoch = position // num,
    index = permutation(seed, epoch)[position % num]

Rank r of W takes i = r * batch_size / W ... (r + 1) * batch_size / W - 1 and splits them into micro-batches.
Ranks, micro-batches, workers and restarts so change who reads a sample, and never which samples a step has.

Example: 10 cases, batch_size 4. Step 2 has positions 8 to 11: the last two cases of epoch 0 and the first two
of epoch 1. With two ranks, rank 0 reads positions 8 and 9, rank 1 reads 10 and 11.
"""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..config import InputError
from ..engine.distributed import keyed_generator, rank, world_size


class _Order:
    """Batch sampler of a DataLoader: lists of (position, index), one for each micro-batch of this rank."""

    def __init__(self, num: int, batch_size: int, micro_batch_size: int, seed: int, steps: range):
        self.num, self.batch_size, self.micro_batch_size = num, batch_size, micro_batch_size
        self.seed, self.steps = seed, steps
        self.per_rank = batch_size // world_size()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, order = -1, []
        for step in self.steps:
            first = step * self.batch_size + rank() * self.per_rank
            items = []
            for position in range(first, first + self.per_rank):
                if position // self.num != epoch:
                    epoch = position // self.num
                    draw = keyed_generator(self.seed, epoch, "order")
                    order = torch.randperm(self.num, generator=draw).tolist()
                items.append((position, order[position % self.num]))
            for i in range(0, self.per_rank, self.micro_batch_size):
                yield items[i : i + self.micro_batch_size]

    def __len__(self) -> int:
        return len(self.steps) * -(-self.per_rank // self.micro_batch_size)


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items to a batch: tensors stacked, numbers to a tensor (B,), strings to a list, dicts by entry."""
    batch = {}
    for key, first in items[0].items():
        values = [item[key] for item in items]
        if isinstance(first, dict):
            batch[key] = collate(values)
        elif isinstance(first, Tensor):
            batch[key] = torch.stack(values)
        else:
            batch[key] = values if isinstance(first, str) else torch.tensor(values)
    return batch


def _ignore_signals(worker: int) -> None:
    """A scheduler, or Ctrl-C, signals all processes of a job. Workers must live until the loop has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_workers() -> None:
    """The interpreter ends its processes by SIGTERM at exit, and waits. Workers ignore SIGTERM: kill them."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _next(stream: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The next micro-batch. An InputError of a worker process loses the traceback in its message."""
    try:
        return next(stream)
    except InputError as e:
        raise InputError(str(e).strip().splitlines()[-1].removeprefix("ldm3d.config.InputError: ")) from None


def batches(
    dataset: Dataset,
    batch_size: int,
    micro_batch_size: int,
    seed: int,
    first_step: int,
    last_step: int,
    workers: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """For every optimizer step from first_step to last_step - 1, the list of the micro-batches of this rank.

    `dataset` takes (position, index), as VolumeDataset does. batch_size is that of all ranks together, and
    must divide over them. Worker processes load ahead, beyond the end of a step and of an epoch.
    """
    if batch_size % world_size():
        raise InputError(f"batch_size: {batch_size} does not divide over {world_size()} ranks")
    order = _Order(len(dataset), batch_size, micro_batch_size, seed, range(first_step, last_step))
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # shares the cache
        generator=torch.Generator(),  # its own, so that the loop's random state stays untouched
    )
    stream = iter(loader)
    if workers:
        atexit.register(_end_workers)
    for _ in range(first_step, last_step):
        yield [_next(stream) for _ in range(len(order) // len(order.steps))]


def evaluation_batches(dataset: Dataset, batch_size: int) -> Iterator[dict[str, Any]]:
    """Every case once, spread over the ranks. A rank may get one case more than another. A thread reads the
    next batch while the network is busy with this one."""
    mine = range(rank(), len(dataset), world_size())
    groups = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]

    def read(group: range) -> dict[str, Any]:
        return collate([dataset[index, index] for index in group])

    with ThreadPoolExecutor(1) as pool:
        coming = None
        for group in groups:
            ready, coming = coming, pool.submit(read, group)
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
