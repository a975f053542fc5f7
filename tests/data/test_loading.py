"""The sampler: every image once, the same global batches for any number of processes."""

from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bcos_rt.data import EpochSampler, derived_seed, shard
from bcos_rt.errors import InvalidArgumentError

SIZES = {"length": st.integers(0, 60), "batch_size": st.integers(1, 20), "world": st.integers(1, 4)}


@given(**SIZES, epoch=st.integers(0, 5), drop_last=st.booleans())
def test_processes_share_the_batches_of_one(
    length: int, batch_size: int, world: int, epoch: int, drop_last: bool
) -> None:
    def batches(world_size: int, rank: int) -> list[list[int]]:
        sampler = EpochSampler(length, batch_size, world_size=world_size, rank=rank, seed=7, drop_last=drop_last)
        sampler.set_epoch(epoch)
        found = list(sampler)
        assert len(found) == len(sampler)
        return found

    alone = batches(1, 0)
    together = [batches(world, rank) for rank in range(world)]
    assert [list(chain(*parts)) for parts in zip(*together, strict=True)] == alone
    seen = list(chain(*alone))
    assert len(seen) == len(set(seen)) == (length // batch_size * batch_size if drop_last else length)
    if drop_last and batch_size % world == 0:
        assert {len(batch) for parts in together for batch in parts} <= {batch_size // world}


@given(**SIZES)
def test_shards_are_every_image_once(length: int, batch_size: int, world: int) -> None:
    seen = [i for rank in range(world) for batch in shard(length, batch_size, world, rank) for i in batch]
    assert sorted(seen) == list(range(length))


@given(length=st.integers(1, 60), batch_size=st.integers(1, 20), skip=st.integers(0, 70))
def test_skipping_leaves_the_rest_as_it_was(length: int, batch_size: int, skip: int) -> None:
    sampler = EpochSampler(length, batch_size, seed=1)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.skip(skip)
    assert list(sampler) == whole[skip:]
    sampler.set_epoch(3)
    assert list(sampler) == whole


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(40, 40, seed=seed)
        sampler.set_epoch(epoch)
        return next(iter(sampler))

    orders = [tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9
    assert next(iter(EpochSampler(5, 5, shuffle=False))) == [0, 1, 2, 3, 4]
    seeds = {derived_seed(a, b) for a in range(50) for b in range(50)}
    assert len(seeds) == 2500
    assert all(0 <= s < 2**63 for s in seeds)
    torch.manual_seed(max(seeds))


@pytest.mark.parametrize(
    "changes", [{"batch_size": 0}, {"world_size": 0}, {"rank": 2, "world_size": 2}, {"length": -1}]
)
def test_bad_arguments_are_named(changes: dict[str, int]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(changes))):
        EpochSampler(**{"length": 8, "batch_size": 4, **changes})  # type: ignore[arg-type]
