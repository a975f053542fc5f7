"""Images to train on and to evaluate with: sources, augmentation, loading."""

from bcos_rt.data.augment import Augmentation, Mixing
from bcos_rt.data.image_data import ImageData, renumbered
from bcos_rt.data.loading import Augmented, EpochSampler, derived_seed, loader, shard
from bcos_rt.data.sources import open_data
from bcos_rt.data.splits import check_numbers

__all__ = [
    "Augmentation",
    "Augmented",
    "EpochSampler",
    "ImageData",
    "Mixing",
    "check_numbers",
    "derived_seed",
    "loader",
    "open_data",
    "renumbered",
    "shard",
]
