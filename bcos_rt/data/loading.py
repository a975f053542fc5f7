"""The order of images, their random numbers, and the loader: all functions of seed, epoch and index alone."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from bcos_rt.errors import BcosError, InvalidArgumentError

__all__ = ["Augmented", "EpochSampler", "derived_seed", "loader", "read_batch", "seeded", "shard"]

Item = tuple[Tensor, int]


def derived_seed(*numbers: int) -> int:
    """A seed of 63 bits that depends on all the numbers given, and looks unrelated for neighbours."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The CPU's random numbers are those of ``torch.manual_seed(seed)`` in the block, and after it what they were.

    Those of other devices are not touched: ``torch.manual_seed`` would seed them too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


class Augmented(Dataset[Item]):
    """A data set whose item i of epoch e is read under random numbers of its own, seeded by (seed, e, i).

    So the result does not depend on how many processes read, in which order, or whether the run was resumed. These are
    torch's random numbers on the CPU, which torchvision's transforms use; outside they are left as they were.

    Args:
        data: items (image, label), augmented when they are read.
        seed: of the run.
    """

    def __init__(self, data: Dataset[Item], seed: int) -> None:
        self.data, self.seed = data, seed
        # Shared with the processes that read, which outlive an epoch.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Item:
        with seeded(derived_seed(self.seed, int(self._epoch), index)):
            return self.data[index]


class EpochSampler(Sampler[list[int]]):
    """Batches of indices. The i-th global batch of an epoch is the same for any number of processes.

    It is ``permutation[i G : (i+1) G]``, G the global batch size, the permutation drawn with (seed, epoch); process r
    of W takes the r-th of its W consecutive parts.

    Args:
        length: images.
        batch_size: of all processes together.
        world_size, rank: number of processes, and which this is.
        shuffle: False takes the images in their order.
        drop_last: leave out the images that do not fill a batch; otherwise the last batch is smaller, and in it some
            processes may have one image more than others, or none.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        world_size: int = 1,
        rank: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
    ) -> None:
        for name, value, low in (("length", length, 0), ("batch_size", batch_size, 1), ("world_size", world_size, 1)):
            if value < low:
                raise InvalidArgumentError(name, value, f"at least {low}")
        if not 0 <= rank < world_size:
            raise InvalidArgumentError("rank", rank, f"0 to {world_size - 1}")
        self.length, self.batch_size, self.world_size, self.rank = length, batch_size, world_size, rank
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.epoch = self.skipped = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0; nothing is skipped in it."""
        self.epoch, self.skipped = epoch, 0

    def skip(self, batches: int) -> None:
        """Begin the epoch after so many batches."""
        self.skipped = batches

    def __len__(self) -> int:
        whole, rest = divmod(self.length, self.batch_size)
        return max(0, whole + bool(rest and not self.drop_last) - self.skipped)

    def __iter__(self) -> Iterator[list[int]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(derived_seed(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        else:
            order = list(range(self.length))
        size, world = self.batch_size, self.world_size
        for i in range(self.skipped, self.skipped + len(self)):
            batch = order[i * size : (i + 1) * size]
            yield batch[len(batch) * self.rank // world : len(batch) * (self.rank + 1) // world]


def shard(length: int, batch_size: int, world_size: int = 1, rank: int = 0) -> list[list[int]]:
    """Batches of one process's share of the images in their order, for evaluation: all together are each image once.

    Args:
        batch_size: of all processes together.
    """
    mine = range(rank, length, world_size)
    size = max(1, batch_size // world_size)
    return [list(mine[i : i + size]) for i in range(0, len(mine), size)]


@dataclass(frozen=True)
class _Failure:
    """An error on its way out of the process that read. Raised there, torch would make a RuntimeError of it."""

    error: BcosError


class _Reporting(Dataset[Any]):
    """Items of a data set, or why they cannot be read."""

    def __init__(self, data: Dataset[Item]) -> None:
        self.data = data

    def __getitem__(self, index: int) -> Item | _Failure:
        try:
            return self.data[index]
        except BcosError as error:
            return _Failure(error)


def _collate(items: list[Item | _Failure]) -> Any:
    for item in items:
        if isinstance(item, _Failure):
            return item
    sizes = sorted({tuple(item[0].shape[1:]) for item in items if not isinstance(item, _Failure)})
    if len(sizes) > 1:
        found = ", ".join(f"{height} x {width}" for height, width in sizes[:4])
        return _Failure(
            InvalidArgumentError("data", f"images of several sizes, {found}", "one size in a batch", " (give a size)")
        )
    return default_collate(items)


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Processes that read begin with SIGTERM blocked in all of their threads.
        with _sigterm_blocked():
            batches = super().__iter__()
        for batch in batches:
            if isinstance(batch, _Failure):
                raise batch.error
            yield batch


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _outlive_signals(_worker: int) -> None:
    """Have a process that reads go on when its whole group is told to stop: when to stop is the training's to say.

    Ctrl-C, and SLURM's SIGTERM, reach every process of a job. A SIGTERM of its parent, which ends readers with it,
    still ends this one. Who sent a signal is told by ``sigwaitinfo`` alone, which not every system has, and which needs
    the signal blocked.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def read_batch(data: Dataset[Item], indices: Sequence[int]) -> Any:
    """The batch (images, labels) of these items, read by this process; errors as of :func:`loader`."""
    items = _Reporting(data)
    batch = _collate([items[i] for i in indices])
    if isinstance(batch, _Failure):
        raise batch.error
    return batch


def loader(data: Dataset[Item], batches: Sampler[list[int]] | Sequence[list[int]], workers: int = 0) -> DataLoader[Any]:
    """A loader of these batches, (images [B, 3, H, W], labels [B]).

    Errors of this package are raised as they are, whichever process read.

    Args:
        workers: processes that read; 0 reads in this one.

    Raises:
        InvalidArgumentError: while it is read: an image that cannot be read, or images of several sizes in a batch.
    """
    return _Loader(
        _Reporting(data),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_collate,
        worker_init_fn=_outlive_signals,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
