"""What every kind of data set has in common: images in [0, 1], labels, and what happens to an image when it is read."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import functional as transforms

from bcos_rt.data.splits import class_numbers
from bcos_rt.errors import InvalidArgumentError
from bcos_rt.images import resized

__all__ = ["EXPECTED", "ImageData", "Transform", "renumbered", "with_transform"]

Transform = Callable[[Tensor], Tensor]
EXPECTED = (
    "a folder of class folders, a .tar file, a list of them or shards-{000..003}.tar, 'hf:NAME', a pair (images, "
    "labels), or a torch Dataset of (image, label)"
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


def with_transform(data: ImageData, size: int | None, transform: Transform | None) -> ImageData:
    """Data whose images go through ``transform``, or are cut to ``size``, after all that ``data`` itself does to them.

    ``data`` is left as it is, and returned where neither is given.
    """
    if size is None and transform is None:
        return data
    plain = data.size is None and data.transform is None
    if plain and type(data).__getitem__ is ImageData.__getitem__:
        # As if it had been opened with them: the transform sees the decoded bytes.
        opened = copy.copy(data)
        opened.size, opened.transform = size, transform
        return opened
    return _Further(data, size, transform)


class _Further(ImageData):
    """The items of another data set, changed further."""

    def __init__(self, data: ImageData, size: int | None, transform: Transform | None) -> None:
        super().__init__(size, transform)
        self.data, self.class_names, self.labels = data, data.class_names, data.labels

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.data[index]


def renumbered(
    data: ImageData, class_names: Sequence[str] | None, argument: str = "data", whose: str = "the network has it"
) -> ImageData:
    """Data whose labels are the numbers that its classes have in ``class_names``, as of a network's logits.

    Data without class names, all without a name in common, and data that is numbered so already are returned as they
    are. Otherwise ``data`` is left as it is.

    Raises:
        InvalidArgumentError: a class has another number there, and another class is not there or stands there twice;
            the message is of ``argument`` and ends with ``whose``.
    """
    numbers = class_numbers(data.class_names, class_names, argument, whose)
    if numbers is None or class_names is None:
        return data
    return _Renumbered(data, numbers, class_names)


class _Renumbered(ImageData):
    """The items of another data set under other labels: class k is class ``numbers[k]``."""

    def __init__(self, data: ImageData, numbers: Sequence[int], class_names: Sequence[str]) -> None:
        super().__init__(None, None)
        self.data, self.numbers, self.class_names = data, tuple(numbers), tuple(class_names)
        if data.labels is not None:
            self.labels = torch.tensor([self._number(label) for label in data.labels.tolist()], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> tuple[Tensor, int]:
        image, label = self.data[index]
        return image, self._number(label)

    def _number(self, label: int) -> int:
        if label >= len(self.numbers):
            raise InvalidArgumentError("data", f"label {label}", f"labels of its {len(self.numbers)} class names")
        return label if label < 0 else self.numbers[label]
