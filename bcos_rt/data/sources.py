"""Data sets of labelled images from folders, tar files, Hugging Face ``datasets`` and arrays, behind one interface."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from bcos_rt.data.arrays import ArrayData, UsersData
from bcos_rt.data.folders import FolderData
from bcos_rt.data.hugging_face import HuggingFaceData, chosen_split, downloaded, huggingface
from bcos_rt.data.image_data import EXPECTED, ImageData, Transform, with_transform
from bcos_rt.data.tar_files import TarData, shard_paths
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["open_data"]


def open_data(
    spec: Any, *, size: int | None = None, split: str | None = None, transform: Transform | None = None
) -> ImageData:
    """Open a data set of labelled images.

    Args:
        spec: one of

            - a folder of class folders, or of splits of them. A folder of images alone is data without labels;
            - a tar file, a list of them, or a pattern ``shards-{000..003}.tar``: samples ``KEY.jpg`` with ``KEY.cls``,
              ``KEY.cls.txt`` or a ``KEY.json`` that has a ``"label"`` (webdataset), or ``CLASS/NAME.jpg``, or
              ``SPLIT/CLASS/NAME.jpg``. They are read in place, by any number of processes;
            - ``hf:NAME`` or ``hf:NAME:CONFIG``, a Hugging Face data set, a folder that ``save_to_disk`` wrote, or an
              open ``datasets.Dataset``;
            - a pair (images, labels) of arrays or tensors: uint8 [N, H, W, 3] or [N, 3, H, W], floats in [0, 1] of
              those shapes, or gray [N, H, W]; labels [N] or None;
            - a torch ``Dataset`` of (image [3, H, W] in [0, 1], label); an :class:`ImageData` keeps its own size and
              transform, and what is given here follows them.
        size: side of the images, cut out as :func:`bcos_rt.images.load_image` does; an image of that size is taken
            whole. None leaves all as they are.
        split: which part, where the data has parts: ``"train"``, ``"val"`` (also finds ``validation`` and ``test``), or
            a name of the data's own. Data without parts is taken whole for ``"train"`` and ``"val"``.
        transform: instead of ``size``: takes an image [3, H, W], uint8 or float32 in [0, 1], and returns it as float32
            in [0, 1].

    Returns:
        A map-style data set.

    Raises:
        InvalidArgumentError, InvalidTypeError: data or a split that is not there or cannot be used, named.
        MissingDependencyError: ``datasets`` (extra ``train``) is not installed.
    """
    if size is not None and transform is not None:
        raise InvalidArgumentError("size, transform", f"{size} and a transform", "one of them")
    if isinstance(spec, ImageData):
        return with_transform(spec, size, transform)
    if _is_hugging_face(spec):
        return HuggingFaceData(chosen_split(spec, split, f"this {type(spec).__name__}"), size, transform)
    if isinstance(spec, Dataset):
        return UsersData(spec, size, transform)
    if isinstance(spec, list | tuple) and spec and all(isinstance(part, str | os.PathLike) for part in spec):
        return TarData(shard_paths([os.fspath(part) for part in spec]), split, size, transform)
    if isinstance(spec, tuple) and len(spec) == 2:
        return ArrayData(spec[0], spec[1], size, transform)
    if not isinstance(spec, str | os.PathLike):
        raise InvalidTypeError("data", type(spec).__name__, EXPECTED)
    text = os.fspath(spec)
    if text.startswith("hf:"):
        return HuggingFaceData(downloaded(text.removeprefix("hf:"), split), size, transform)
    path = Path(text)
    if path.is_dir():
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            found = huggingface().load_from_disk(text)
            return HuggingFaceData(chosen_split(found, split, repr(text)), size, transform)
        return FolderData(path, split, size, transform)
    if text.endswith((".tar", ".tar.gz", ".tgz")):
        return TarData(shard_paths([text]), split, size, transform)
    if not path.exists():
        raise InvalidArgumentError("data", f"{text!r}, which does not exist", EXPECTED)
    raise InvalidArgumentError("data", repr(text), EXPECTED)


def _is_hugging_face(spec: Any) -> bool:
    # Without importing it; a user's own package may be called "datasets" too.
    from_there = type(spec).__module__.startswith("datasets.")
    return from_there and (isinstance(spec, dict) or hasattr(spec, "features"))
