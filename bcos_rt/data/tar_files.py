"""Images inside uncompressed tar files."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from bcos_rt.data import splits
from bcos_rt.data.folders import is_hidden, is_image
from bcos_rt.data.image_data import EXPECTED, ImageData, Transform
from bcos_rt.errors import InvalidArgumentError
from bcos_rt.images import decode_image

__all__ = ["TarData", "shard_paths"]

# Of webdataset samples: what follows the key of a file that holds the class number; the fields of a JSON that may.
_CLASS_FILES = ("cls", "cls.txt")
_CLASS_FIELDS = ("label", "cls", "class")


def shard_paths(specs: Sequence[str]) -> list[Path]:
    """The tar files of names and of patterns ``name-{000..003}.tar``, in their order.

    Raises:
        InvalidArgumentError: one does not exist, is compressed or no tar file by its name, or a range is empty.
    """
    names: list[str] = []
    for spec in specs:
        if spec.endswith((".tar.gz", ".tgz")):
            raise InvalidArgumentError(
                "data", repr(spec), "an uncompressed tar file", " (images in it are read in any order: gunzip it first)"
            )
        if not spec.endswith(".tar"):
            raise InvalidArgumentError("data", repr(spec), "the path of a .tar file")
        found = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", spec)
        if not found:
            names.append(spec)
            continue
        head, first, last, tail = found.groups()
        if int(first) > int(last):
            raise InvalidArgumentError("data", repr(spec), "a range {FIRST..LAST} with FIRST at most LAST")
        names += [f"{head}{i:0{len(first)}}{tail}" for i in range(int(first), int(last) + 1)]
    for name, count in Counter(names).items():
        if not Path(name).is_file():
            raise InvalidArgumentError("data", f"{name!r}, which does not exist", "existing tar files")
        if count > 1:
            raise InvalidArgumentError("data", f"{name!r} {count} times", "each tar file once")
    return [Path(name) for name in names]


@dataclass(frozen=True)
class _Member:
    """A file in a tar file: number of the tar file, name, place of its bytes."""

    shard: int
    name: str
    offset: int
    length: int

    @property
    def parts(self) -> tuple[str, ...]:
        return PurePosixPath(self.name).parts

    @property
    def key(self) -> tuple[int, str]:
        """What the files of a webdataset sample have in common: the path up to the first dot of the file's name."""
        folder, slash, file = self.name.rpartition("/")
        return self.shard, folder + slash + file.partition(".")[0]


class TarData(ImageData):
    """Images inside uncompressed tar files, read in place: an index of offsets is made once."""

    def __init__(
        self, shards: Sequence[Path], split: str | None, size: int | None, transform: Transform | None
    ) -> None:
        super().__init__(size, transform)
        self.shards = list(shards)
        images: list[_Member] = []
        classes: dict[tuple[int, str], _Member] = {}
        notes: dict[tuple[int, str], _Member] = {}
        for number, shard in enumerate(self.shards):
            # Of a name that is there twice (tar --append) the last one counts, as for tar.
            found = list(_members(number, shard))
            last = {member.name: member for member in found}
            if len(last) < len(found):
                twice = len(found) - len(last)
                warnings.warn(f"{shard}: {twice} members have names that come again later, which count", stacklevel=3)
            for member in last.values():
                if any(is_hidden(part) for part in member.parts if part != ".."):
                    continue
                extension = member.name.rpartition("/")[2].partition(".")[2].lower()
                if is_image(member.name):
                    images.append(member)
                elif extension in _CLASS_FILES:
                    classes[member.key] = member
                elif extension == "json":
                    notes[member.key] = member
        self._files: dict[tuple[int, int], Any] = {}
        if not images:
            raise InvalidArgumentError("data", f"{str(self.shards[0])!r}, in which there is no image", EXPECTED)
        labels: list[int] | None = None
        if classes:
            labels = self._by_sample(images, {key: self._class_of(member) for key, member in classes.items()})
        noted = {m.key: self._noted(notes[m.key]) for m in images if m.key in notes} if not classes else {}
        if noted and all(_is_class(label) for label in noted.values()):
            labels = self._by_sample(images, noted)
        if labels is None:
            images, labels = self._by_folder(images, split)
            other = next((m for m in images if not _is_class(noted.get(m.key))), None)
            if labels[0] < 0 and other is not None and any(label is not None for label in noted.values()):
                raise InvalidArgumentError(
                    "data", f"class {noted.get(other.key)!r} in the JSON of {self._name(other)}", "a class number"
                )
        self.entries = images
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def _by_sample(self, images: list[_Member], classes: dict[tuple[int, str], int]) -> list[int]:
        """The labels of webdataset samples; each is one image and its class."""
        seen: dict[tuple[int, str], _Member] = {}
        for member in images:
            if member.key not in classes:
                raise InvalidArgumentError(
                    "data",
                    f"{self._name(member)} without a class",
                    "KEY.cls, or KEY.json with a class, for every image",
                )
            if member.key in seen:
                names = f"{self._name(seen[member.key])} and {self._name(member)}"
                raise InvalidArgumentError("data", names, "one image in each sample")
            seen[member.key] = member
        for number, key in classes:
            if (number, key) not in seen:
                found = f"a class and no image of {key!r} in {str(self.shards[number])!r}"
                raise InvalidArgumentError("data", found, "an image with every class")
        return [classes[member.key] for member in images]

    def _by_folder(self, images: list[_Member], split: str | None) -> tuple[list[_Member], list[int]]:
        """Images in the order of class and name, with their labels."""
        data = repr(str(self.shards[0])) + f" and {len(self.shards) - 1} more" * (len(self.shards) > 1)
        paths = {member: member.parts for member in images}
        # A folder around everything.
        while min(map(len, paths.values())) >= 3 and len({parts[0] for parts in paths.values()}) == 1:
            if splits.is_split(next(iter(paths.values()))[0]) or next(iter(paths.values()))[0] == split:
                break
            paths = {member: parts[1:] for member, parts in paths.items()}
        top = sorted({parts[0] for parts in paths.values() if len(parts) > 1})
        chosen = splits.split_folder(
            top, split, data,
            holds_classes=lambda name: any(parts[0] == name and len(parts) > 2 for parts in paths.values()),
        )  # fmt: skip
        of_training: list[str] = []
        if chosen is not None:
            if splits.is_split(chosen):
                of_training = [p[1] for p in paths.values() if len(p) > 2 and splits.is_training(p[0])]
            paths = {member: parts[1:] for member, parts in paths.items() if len(parts) > 1 and parts[0] == chosen}
        elif min(map(len, paths.values())) >= 3:
            raise InvalidArgumentError("split", f"{split!r} of {data}", f"one of {', '.join(top)}")
        alone = [member for member, parts in paths.items() if len(parts) == 1]
        if alone and len(alone) < len(paths):
            raise InvalidArgumentError("data", f"{self._name(alone[0])} beside folders", "images in class folders")
        if alone:
            return sorted(alone, key=lambda m: (m.name, m.shard)), [-1] * len(alone)
        classes = splits.numbered(sorted({p[0] for p in paths.values()}), sorted(set(of_training)), data)
        self.class_names = tuple(classes)
        label = {name: i for i, name in enumerate(classes)}
        ordered = sorted(paths, key=lambda m: (paths[m][0], m.name, m.shard))
        return ordered, [label[paths[m][0]] for m in ordered]

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def read(self, index: int) -> tuple[Image.Image | Tensor, int]:
        member = self.entries[index]
        return decode_image(io.BytesIO(self._bytes(member)), self._name(member)), int(self.labels[index])  # type: ignore[index]

    def _name(self, member: _Member) -> str:
        return f"{member.name!r} of {str(self.shards[member.shard])!r}"

    def _bytes(self, member: _Member) -> bytes:
        # One open file a process: a forked one would share its position with its parent.
        key = (os.getpid(), member.shard)
        if key not in self._files:
            self._files[key] = open(self.shards[member.shard], "rb")  # noqa: SIM115 (kept open)
        file = self._files[key]
        file.seek(member.offset)
        found: bytes = file.read(member.length)
        return found

    def _class_of(self, member: _Member) -> int:
        text = self._bytes(member).decode("utf-8", "replace").strip()
        if not re.fullmatch(r"\d+|-1", text):
            raise InvalidArgumentError("data", f"{text[:40]!r} in {self._name(member)}", "a class number")
        return int(text)

    def _noted(self, member: _Member) -> Any:
        """What a sample's JSON calls its class; None where it says nothing."""
        try:
            found = json.loads(self._bytes(member))
        except ValueError as error:
            raise InvalidArgumentError("data", f"{self._name(member)} ({error})", "JSON") from error
        found = found if isinstance(found, dict) else {}
        return next((found[name] for name in _CLASS_FIELDS if name in found), None)


def _is_class(label: Any) -> bool:
    return isinstance(label, int) and not isinstance(label, bool) and label >= -1


def _members(number: int, shard: Path) -> list[_Member]:
    """The files of a tar file.

    Raises:
        InvalidArgumentError: it is damaged or cut off, or an image in it is a link.
    """
    found: list[_Member] = []
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                if member.isreg() and not member.issparse():
                    found.append(_Member(number, name, member.offset_data, member.size))
                elif not member.isdir() and is_image(name):
                    raise InvalidArgumentError(
                        "data", f"{name!r} of {str(shard)!r}, a link or sparse", "files",
                        " (GNU tar stores links as files with --dereference --hard-dereference)",
                    )  # fmt: skip
            # The reader takes a damaged header for the end, and would leave out all that follows.
            _check_end(shard, archive.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InvalidArgumentError("data", f"{str(shard)!r} ({error})", "a whole, uncompressed tar file") from error
    return found


def _check_end(shard: Path, offset: int) -> None:
    with shard.open("rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
    if block != bytes(tarfile.BLOCKSIZE):
        what = "a damaged header" if len(block) == tarfile.BLOCKSIZE else "no mark of the end"
        raise tarfile.ReadError(f"{what} at byte {offset}")
