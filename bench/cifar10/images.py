"""CIFAR-10 as arrays, decoded once from a tar file of ``train/CLASS/NNNN.jpg`` and ``test/CLASS/NNNN.jpg``."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bcos_rt.files import replacing

__all__ = ["CLASSES", "load_images"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_images(tar: Path, cache: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """``"train"`` and ``"test"``: images uint8 [N, 3, 32, 32], labels int64 [N]; ordered by class and name."""
    if not cache.exists():
        _decode(tar, cache)
    arrays = np.load(cache)
    return {
        split: (torch.from_numpy(arrays[f"{split}_images"]), torch.from_numpy(arrays[f"{split}_labels"]))
        for split in ("train", "test")
    }


def _decode(tar: Path, cache: Path) -> None:
    found: dict[str, list[tuple[int, str, np.ndarray]]] = {"train": [], "test": []}
    with tarfile.open(tar) as archive:
        for member in archive:
            parts = Path(member.name).parts
            if member.isfile() and len(parts) == 3 and parts[0] in found and parts[1] in CLASSES:
                file = archive.extractfile(member)
                if file is None:
                    continue
                image = np.asarray(Image.open(io.BytesIO(file.read())).convert("RGB"))
                found[parts[0]].append((CLASSES.index(parts[1]), parts[2], image))
    arrays = {}
    for split, entries in found.items():
        entries.sort(key=lambda e: e[:2])
        arrays[f"{split}_images"] = np.stack([e[2] for e in entries]).transpose(0, 3, 1, 2)
        arrays[f"{split}_labels"] = np.array([e[0] for e in entries], dtype=np.int64)
    if arrays["train_images"].shape != (50000, 3, 32, 32) or arrays["test_images"].shape != (10000, 3, 32, 32):
        raise SystemExit(f"{tar}: not the whole of CIFAR-10 ({ {k: v.shape for k, v in arrays.items()} })")
    with replacing(cache) as temporary:
        np.savez(temporary, **arrays)
