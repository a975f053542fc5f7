"""Data sets of labelled images from folders, tar files, Hugging Face ``datasets`` and arrays, behind one interface."""

from __future__ import annotations

import bisect
import io
import os
import re
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import functional as transforms

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError, did_you_mean
from bcos_rt.images import decode_image, resized

__all__ = ["ImageData", "open_data"]

Transform = Callable[[Tensor], Tensor]
# Other names people give a split.
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation", "test")}
_EXPECTED = (
    "a folder of class folders, a .tar file or shards-{000..003}.tar, 'hf:NAME', a pair (images, labels), "
    "or a torch Dataset of (image, label)"
)


class ImageData(Dataset[tuple[Tensor, int]]):
    """Images with labels: items are (image [3, H, W] float32 in [0, 1], label int, -1 for none).

    Attributes:
        class_names: one name per label, or None.
        labels: all labels, [N] int64, or None where that would need every image read.
    """

    class_names: tuple[str, ...] | None = None
    labels: Tensor | None = None

    def __init__(self, size: int | None, transform: Transform | None) -> None:
        self.size, self.transform = size, transform

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, index: int) -> tuple[Image.Image | Tensor, int]:
        """The decoded image and the label."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        image, label = self.read(index % len(self))
        if self.transform is not None:
            return self.transform(image if isinstance(image, Tensor) else transforms.pil_to_tensor(image)), label
        if isinstance(image, Tensor):
            image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
        height, width = transforms.get_dimensions(image)[1:]
        fits = self.size is not None and (height, width) == (self.size, self.size)
        return resized(image, None if fits else self.size), label


def open_data(
    spec: Any, *, size: int | None = None, split: str | None = None, transform: Transform | None = None
) -> ImageData:
    """Open a data set of labelled images.

    Args:
        spec: one of

            - a folder of class folders; with ``split`` and a folder of that name in it (``val`` also finds
              ``validation`` and ``test``), that one. A folder of images alone is data without labels;
            - a tar file, or a pattern ``shards-{000..003}.tar``: samples ``KEY.jpg`` with ``KEY.cls`` (webdataset), or
              ``CLASS/NAME.jpg``, or ``SPLIT/CLASS/NAME.jpg``. They are read in place, by any number of processes;
            - ``hf:NAME`` or ``hf:NAME:CONFIG``, a Hugging Face data set, a folder that ``save_to_disk`` wrote, or an
              open ``datasets.Dataset``;
            - a pair (images, labels) of arrays or tensors: uint8 [N, H, W, 3] or [N, 3, H, W], floats in [0, 1] of
              those shapes, or gray [N, H, W]; labels [N] or None;
            - a torch ``Dataset`` of (image [3, H, W] in [0, 1], label); an :class:`ImageData` is returned as it is.
        size: without a ``transform``: side of the images, cut out as :func:`bcos_rt.images.load_image` does; an image
            of that size is taken whole. None leaves all as they are.
        split: which part, where the data has parts.
        transform: takes an image [3, H, W], uint8 or float32 in [0, 1], and returns it as float32 in [0, 1].

    Returns:
        A map-style data set.

    Raises:
        InvalidArgumentError, InvalidTypeError: data that is not there or cannot be used, named.
        MissingDependencyError: ``datasets`` (extra ``train``) is not installed.
    """
    if isinstance(spec, tuple) and len(spec) == 2:
        return _Arrays(spec[0], spec[1], size, transform)
    if type(spec).__module__.startswith("datasets."):
        return _HuggingFace(_chosen_split(spec, split), size, transform)
    if isinstance(spec, ImageData):
        return spec
    if isinstance(spec, Dataset):
        return _Users(spec, size, transform)
    if not isinstance(spec, str | os.PathLike):
        raise InvalidTypeError("data", type(spec).__name__, _EXPECTED)
    text = os.fspath(spec)
    if text.startswith("hf:"):
        return _HuggingFace(_downloaded(text.removeprefix("hf:"), split), size, transform)
    path = Path(text)
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return _HuggingFace(_chosen_split(_huggingface().load_from_disk(text), split), size, transform)
        return _Folder(_split_folder(path, split), size, transform)
    if text.endswith((".tar.gz", ".tgz")):
        raise InvalidArgumentError(
            "data", repr(text), "an uncompressed tar file", " (images in it are read in any order: gunzip it first)"
        )
    if text.endswith(".tar"):
        return _Tar(_shards(text), split, size, transform)
    if not path.exists():
        raise InvalidArgumentError("data", f"{text!r}, which does not exist", _EXPECTED)
    raise InvalidArgumentError("data", repr(text), _EXPECTED)


class _Users(ImageData):
    """A data set of the user's own."""

    def __init__(self, data: Dataset[Any], size: int | None, transform: Transform | None) -> None:
        super().__init__(size, transform)
        expected = "items (image [3, H, W] float in [0, 1], label)"
        if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise InvalidTypeError("data", type(data).__name__, "a map-style Dataset with a length")
        self.data = data
        names = getattr(data, "classes", getattr(data, "class_names", None))
        self.class_names = tuple(names) if isinstance(names, list | tuple) else None
        if len(data) == 0:
            return
        with torch.random.fork_rng(devices=[]):
            item = data[0]
        if not (isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], Tensor)):
            raise InvalidTypeError("data", f"items of type {type(item).__name__}", expected)
        image = item[0]
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise InvalidArgumentError("data", f"images of shape {tuple(image.shape)}, {image.dtype}", expected)

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index]
        return image, int(label)


# --- folders ---------------------------------------------------------------------------------------------------------


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS) and not Path(name).name.startswith(".")


def _split_folder(path: Path, split: str | None) -> Path:
    for name in _SPLITS.get(split or "", (split,)):
        if name is not None and (path / name).is_dir():
            return path / name
    return path


class _Folder(ImageData):
    """Class folders, at any depth below each; or images alone."""

    def __init__(self, path: Path, size: int | None, transform: Transform | None) -> None:
        super().__init__(size, transform)
        classes = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            found = sorted(p for p in (path / name).rglob("*") if p.is_file() and _is_image(p.name))
            self.paths += found
            labels += [label] * len(found)
        if not classes:
            self.paths = sorted(p for p in path.iterdir() if p.is_file() and _is_image(p.name))
            labels = [-1] * len(self.paths)
        if not self.paths:
            raise InvalidArgumentError("data", f"{str(path)!r}, in which there is no image", _EXPECTED)
        self.class_names = tuple(classes) or None
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Image.Image | Tensor, int]:
        path = self.paths[index]
        return decode_image(path, repr(str(path))), int(self.labels[index])  # type: ignore[index]


# --- tar files -------------------------------------------------------------------------------------------------------


def _shards(pattern: str) -> list[Path]:
    """``name-{000..003}.tar`` as its files; any other name as itself."""
    found = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    names = [pattern]
    if found:
        head, first, last, tail = found.groups()
        names = [f"{head}{i:0{len(first)}}{tail}" for i in range(int(first), int(last) + 1)]
    for name in names:
        if not Path(name).is_file():
            raise InvalidArgumentError("data", f"{name!r}, which does not exist", "existing tar files")
    return [Path(name) for name in names]


class _Tar(ImageData):
    """Images inside uncompressed tar files, read in place: an index of offsets is made once."""

    def __init__(
        self, shards: Sequence[Path], split: str | None, size: int | None, transform: Transform | None
    ) -> None:
        super().__init__(size, transform)
        self.shards = list(shards)
        entries: list[tuple[int, str, int, int]] = []  # shard, name, offset, bytes
        classes: dict[tuple[int, str], int] = {}
        for number, shard in enumerate(self.shards):
            try:
                with tarfile.open(shard, "r:") as archive:
                    for member in archive:
                        if member.isfile() and _is_image(member.name):
                            entries.append((number, member.name.removeprefix("./"), member.offset_data, member.size))
                        elif member.isfile() and member.name.endswith(".cls"):
                            key = (number, member.name.removeprefix("./").removesuffix(".cls"))
                            classes[key] = _class_of(archive, member, shard)
            except (tarfile.TarError, OSError, EOFError) as error:
                raise InvalidArgumentError(
                    "data", f"{str(shard)!r} ({error})", "a whole, uncompressed tar file"
                ) from error
        if not entries:
            raise InvalidArgumentError("data", f"{str(self.shards[0])!r}, in which there is no image", _EXPECTED)
        if classes:
            labels = [classes.get((e[0], _key(e[1])), -1) for e in entries]
        else:
            entries, labels = self._by_folder(entries, split)
        self.entries = entries
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self._files: dict[tuple[int, int], Any] = {}

    def _by_folder(
        self, entries: list[tuple[int, str, int, int]], split: str | None
    ) -> tuple[list[tuple[int, str, int, int]], list[int]]:
        """Entries in the order of class and name, with their labels."""
        deep = all(len(Path(e[1]).parts) >= 3 for e in entries)
        if deep:
            parts = sorted({Path(e[1]).parts[0] for e in entries})
            chosen = next((name for name in _SPLITS.get(split or "", (split,)) if name in parts), None)
            if chosen is None and len(parts) > 1:
                raise InvalidArgumentError("split", repr(split), f"one of {', '.join(parts)}")
            entries = [e for e in entries if Path(e[1]).parts[0] == (chosen or parts[0])]
        level = 1 if deep else 0
        names = [Path(e[1]).parts for e in entries]
        if any(len(parts) < level + 2 for parts in names):
            return sorted(entries, key=lambda e: (e[1], e[0])), [-1] * len(entries)
        self.class_names = tuple(sorted({parts[level] for parts in names}))
        entries = sorted(entries, key=lambda e: (Path(e[1]).parts[level], e[1], e[0]))
        return entries, [bisect.bisect_left(self.class_names, Path(e[1]).parts[level]) for e in entries]

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def read(self, index: int) -> tuple[Image.Image | Tensor, int]:
        shard, name, offset, length = self.entries[index]
        # One open file a process: a forked one would share its position with its parent.
        key = (os.getpid(), shard)
        if key not in self._files:
            self._files[key] = open(self.shards[shard], "rb")  # noqa: SIM115 (kept open)
        self._files[key].seek(offset)
        data = io.BytesIO(self._files[key].read(length))
        return decode_image(data, f"{name!r} of {str(self.shards[shard])!r}"), int(self.labels[index])  # type: ignore[index]


def _key(name: str) -> str:
    """What an image and its label have in common: the path up to the first dot of the file's name (webdataset)."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}" if folder else file.partition(".")[0]


def _class_of(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    file = archive.extractfile(member)
    text = file.read().decode("utf-8", "replace").strip() if file is not None else ""
    if not text.lstrip("-").isdecimal():
        raise InvalidArgumentError("data", f"{text[:40]!r} in {member.name} of {str(shard)!r}", "a class number")
    return int(text)


# --- Hugging Face ----------------------------------------------------------------------------------------------------


def _huggingface() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("'hf:' data needs Hugging Face datasets: pip install 'bcos-rt[train]'") from error
    return datasets


def _downloaded(name: str, split: str | None) -> Any:
    name, _, config = name.partition(":")
    try:
        found = _huggingface().load_dataset(name, config or None)
    except MissingDependencyError:
        raise
    except Exception as error:  # every backend has its own: HTTP, Arrow, file system
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidArgumentError(
            "data", f"'hf:{name}' ({reason})", "a Hugging Face data set that can be read"
        ) from error
    return _chosen_split(found, split)


def _chosen_split(found: Any, split: str | None) -> Any:
    if not isinstance(found, dict):
        return found
    for name in _SPLITS.get(split or "", (split,)):
        if name in found:
            return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    raise InvalidArgumentError("split", repr(split), f"one of {', '.join(found)}", did_you_mean(str(split), found))


class _HuggingFace(ImageData):
    """An Arrow data set with an image column and, unless it is unlabelled, a label column."""

    def __init__(self, data: Any, size: int | None, transform: Transform | None) -> None:
        super().__init__(size, transform)
        self.data = data
        columns = dict(data.features)
        self.image = _column(columns, ("image", "img", "pixel_values"), "an image")
        self.label = next((n for n in ("label", "labels", "fine_label", "cls", "class") if n in columns), None)
        if self.label is not None:
            names = getattr(columns[self.label], "names", None)
            self.class_names = tuple(names) if names else None
            self.labels = torch.tensor(list(data[self.label]), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> tuple[Image.Image | Tensor, int]:
        row = self.data[index]
        image = row[self.image]
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image, dtype=np.uint8))
        return decode_image(image, f"row {index}"), -1 if self.label is None else int(row[self.label])


def _column(columns: Iterable[str], names: Sequence[str], what: str) -> str:
    for name in names:
        if name in columns:
            return name
    raise InvalidArgumentError("data", f"columns {', '.join(columns)}", f"one with {what}: {', '.join(names)}")


# --- arrays ----------------------------------------------------------------------------------------------------------


class _Arrays(ImageData):
    """Images and labels in memory."""

    def __init__(self, images: Any, labels: Any, size: int | None, transform: Transform | None) -> None:
        super().__init__(size, transform)
        expected = "uint8 or floats in [0, 1], [N, 3, H, W], [N, H, W, 3] or [N, H, W]"
        if not isinstance(images, Tensor | np.ndarray):
            raise InvalidTypeError("data", f"images of type {type(images).__name__}", expected)
        held = torch.as_tensor(images)
        if held.dtype != torch.uint8 and not held.is_floating_point():
            raise InvalidTypeError("data", f"images of dtype {held.dtype}", expected)
        if held.ndim == 4 and held.shape[1] != 3 and held.shape[3] == 3:
            held = held.permute(0, 3, 1, 2)
        elif held.ndim == 3:
            held = held[:, None].expand(-1, 3, -1, -1)
        if held.ndim != 4 or held.shape[1] != 3:
            raise InvalidArgumentError("data", f"images of shape {tuple(torch.as_tensor(images).shape)}", expected)
        if held.is_floating_point() and held.numel():
            low, high = (float(v) for v in torch.aminmax(held))
            if not (low >= 0 and high <= 1):
                raise InvalidArgumentError("data", f"images from {low:.3g} to {high:.3g}", "floats in [0, 1]")
        self.images = held
        self.labels = self._labels(labels)

    def _labels(self, labels: Any) -> Tensor:
        if labels is None:
            return torch.full((len(self.images),), -1, dtype=torch.int64)
        held = torch.as_tensor(labels)
        if held.is_floating_point() or held.dtype == torch.bool:
            raise InvalidTypeError("data", f"labels of dtype {held.dtype}", "class numbers")
        if tuple(held.shape) != (len(self.images),):
            raise InvalidArgumentError(
                "data", f"labels of shape {tuple(held.shape)} for {len(self.images)} images", "one label an image"
            )
        return held.to(torch.int64)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])  # type: ignore[index]
