"""The order of images, their random numbers, and the loader: all functions of seed, epoch and index alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from bcos_rt.errors import InvalidArgumentError

__all__ = ["Augmented", "EpochSampler", "derived_seed", "loader", "shard"]

Item = tuple[Tensor, int]


def derived_seed(*numbers: int) -> int:
    """A seed of 63 bits that depends on all the numbers given, and looks unrelated for neighbours."""
    text = ",".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class Augmented(Dataset[Item]):
    """A data set whose item i of epoch e is read under random numbers of its own, seeded by (seed, e, i).

    So the result does not depend on how many processes read, in which order, or whether the run was resumed. These are
    torch's random numbers, which torchvision's transforms use; the global ones are left as they were.

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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, int(self._epoch), index))
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


def loader(data: Dataset[Item], batches: Sampler[list[int]] | Sequence[list[int]], workers: int = 0) -> DataLoader[Any]:
    """A loader of these batches, (images [B, 3, H, W], labels [B]).

    Args:
        workers: processes that read; 0 reads in this one.
    """
    return DataLoader(
        data,
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
