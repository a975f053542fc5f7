"""Images in folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from bcos_rt.data import splits
from bcos_rt.data.image_data import EXPECTED, ImageData, Transform
from bcos_rt.errors import InvalidArgumentError
from bcos_rt.images import decode_image

__all__ = ["FolderData", "is_hidden", "is_image"]

# torchvision's, and what Pillow also reads and cameras and browsers write.
EXTENSIONS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jp2", ".avif")


def is_hidden(name: str) -> bool:
    """Names with a dot in front, and the folder that macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def is_image(name: str) -> bool:
    """Whether a path is called like an image and no part of it is hidden."""
    return name.lower().endswith(EXTENSIONS) and not any(is_hidden(part) for part in Path(name).parts if part != "..")


class FolderData(ImageData):
    """Class folders, with images at any depth below each; or images alone; or splits of either.

    A class folder may be empty: it then has a label and no image.
    """

    def __init__(self, path: Path, split: str | None, size: int | None, transform: Transform | None) -> None:
        super().__init__(size, transform)
        top = _subfolders(path)
        # Folders without an image, such as annotations beside splits, are neither splits nor classes.
        parts = [name for name in top if splits.is_split(name) or name == split]
        if parts or (split is not None and not splits.is_split(split)):
            parts += [name for name in top if name not in parts and _holds_images(path / name)]
        chosen = splits.split_folder(
            parts, split, repr(str(path)),
            holds_classes=lambda name: any(_holds_images(path / name / below) for below in _subfolders(path / name)),
        )  # fmt: skip
        of_training: list[str] = []
        root = path
        if chosen is not None:
            root = path / chosen
            others = [name for name in parts if splits.is_training(name) and splits.is_split(chosen)]
            of_training = [name for other in others for name in _subfolders(path / other)]
        own = _subfolders(root)
        classes = splits.numbered(own, of_training, repr(str(root)))
        self.paths: list[Path] = []
        labels: list[int] = []
        for name in own:
            found = sorted(p for p in _files(root / name) if is_image(p.name))
            if not found and next(_files(root / name), None) is not None:
                raise InvalidArgumentError(
                    "data", f"{str(root / name)!r}, which has files and no image among them",
                    f"class folders of images ({', '.join(EXTENSIONS)})",
                )  # fmt: skip
            lost = next((p for p in found if not p.is_file()), None)
            if lost is not None:
                raise InvalidArgumentError("data", f"{str(lost)!r}, a link to a file that is not there", "image files")
            self.paths += found
            labels += [classes.index(name)] * len(found)
        alone = sorted(p for p in root.iterdir() if p.is_file() and is_image(p.name))
        if alone and own:
            raise InvalidArgumentError(
                "data", f"{str(alone[0])!r} beside the folders {', '.join(own[:5])}", "images in class folders"
            )
        if not own:
            self.paths, labels = alone, [-1] * len(alone)
        if not self.paths:
            raise InvalidArgumentError("data", f"{str(root)!r}, in which there is no image", EXPECTED)
        self.class_names = tuple(classes) or None
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, index: int) -> tuple[Image.Image | Tensor, int]:
        path = self.paths[index]
        return decode_image(path, repr(str(path))), int(self.labels[index])  # type: ignore[index]


def _subfolders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not is_hidden(entry.name))


def _files(path: Path) -> Iterator[Path]:
    """All files below a folder that are not hidden, through links to folders too, in any order."""

    def unreadable(error: OSError) -> None:
        raise InvalidArgumentError("data", f"{str(error.filename)!r} ({error.strerror})", "folders that may be read")

    for folder, below, names in os.walk(path, onerror=unreadable, followlinks=True):
        below[:] = [name for name in below if not is_hidden(name)]
        for name in below:
            link = Path(folder, name)
            if link.is_symlink() and Path(folder).resolve().is_relative_to(link.resolve()):
                raise InvalidArgumentError(
                    "data", f"{str(link)!r}, a link to a folder above it", "folders without loops"
                )
        yield from (Path(folder, name) for name in names if not is_hidden(name))


def _holds_images(path: Path) -> bool:
    return any(is_image(file.name) for file in _files(path))
