"""Images in memory, and the data sets of others."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from bcos_rt.data.image_data import ImageData, Transform
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["ArrayData", "UsersData", "image_of"]

_EXPECTED_ITEMS = "items (image [3, H, W] float in [0, 1], label)"
# Filters that sharpen overshoot (torch's bicubic one by 0.45 at most); images that were normalised lie far outside.
_OVERSHOOT = 0.5


def _forwards(values: Any) -> Any:
    """An array that lies backwards in memory (RGB that was BGR), which torch does not take, as one that does not."""
    backwards = isinstance(values, np.ndarray) and min(values.strides, default=0) < 0
    return np.ascontiguousarray(values) if backwards else values


def image_of(array: np.ndarray[Any, Any], name: str) -> Image.Image | Tensor:
    """An array [H, W], [H, W, 3] or [3, H, W] of bytes or of floats in [0, 1] as an image.

    Raises:
        InvalidArgumentError: another shape, type or range; ``name`` is what the image is called.
    """
    expected = "bytes or floats in [0, 1], [H, W], [H, W, 3] or [3, H, W]"
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3) or array.dtype.kind not in "uif":
        raise InvalidArgumentError("data", f"{name}, of shape {array.shape} and type {array.dtype}", expected)
    low, high = (array.min(), array.max()) if array.size else (0, 0)
    if not (low >= 0 and high <= (1 if array.dtype.kind == "f" else 255)):
        raise InvalidArgumentError("data", f"{name}, of {array.dtype} from {low:.3g} to {high:.3g}", expected)
    if array.dtype.kind != "f":
        return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8)).convert("RGB")
    image = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return image.permute(2, 0, 1) if image.ndim == 3 else image.expand(3, -1, -1)


class ArrayData(ImageData):
    """Images and labels in memory."""

    def __init__(self, images: Any, labels: Any, size: int | None, transform: Transform | None) -> None:
        super().__init__(size, transform)
        expected = "uint8 or floats in [0, 1], [N, 3, H, W], [N, H, W, 3] or [N, H, W]"
        if not isinstance(images, Tensor | np.ndarray):
            raise InvalidTypeError("data", f"images of type {type(images).__name__}", expected)
        images = _forwards(images)
        # Read on the CPU, whose random numbers augmentation takes.
        held = torch.as_tensor(images).detach().cpu()
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
        try:
            held = torch.as_tensor(_forwards(labels)).detach().cpu()
        except (TypeError, ValueError, RuntimeError) as error:  # such as names
            raise InvalidTypeError(
                "data", f"labels of type {type(labels).__name__} ({error})", "class numbers"
            ) from error
        if held.is_floating_point() or held.is_complex() or held.dtype == torch.bool:
            raise InvalidTypeError("data", f"labels of dtype {held.dtype}", "class numbers")
        if tuple(held.shape) != (len(self.images),):
            raise InvalidArgumentError(
                "data", f"labels of shape {tuple(held.shape)} for {len(self.images)} images", "one label an image"
            )
        held = held.to(torch.int64)
        if held.numel() and int(held.min()) < -1:
            raise InvalidArgumentError("data", f"label {int(held.min())}", "class numbers, or -1 for none")
        return held

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])  # type: ignore[index]


class UsersData(ImageData):
    """A data set of the user's own. Its first item is looked at when it is opened, every item when it is read."""

    def __init__(self, data: Dataset[Any], size: int | None, transform: Transform | None) -> None:
        super().__init__(size, transform)
        if isinstance(data, IterableDataset) or not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
            raise InvalidTypeError("data", type(data).__name__, "a map-style Dataset with a length")
        self.data = data
        names = getattr(data, "classes", getattr(data, "class_names", None))
        self.class_names = tuple(names) if isinstance(names, list | tuple) else None
        if len(data) == 0:
            return
        with torch.random.fork_rng(devices=[]):
            image, _ = self.read(0)
        if not bool(image.isfinite().all()):
            raise InvalidArgumentError("data", "NaN or infinite values (item 0)", _EXPECTED_ITEMS)

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> tuple[Tensor, int]:
        item: Any = self.data[index]
        if not (isinstance(item, tuple | list) and len(item) == 2):
            raise InvalidTypeError("data", f"items of type {type(item).__name__}", _EXPECTED_ITEMS)
        image, label = item
        if not isinstance(image, Tensor):
            raise InvalidTypeError("data", f"images of type {type(image).__name__}", _EXPECTED_ITEMS)
        if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
            raise InvalidArgumentError(
                "data", f"images of shape {tuple(image.shape)}, {image.dtype} (item {index})", _EXPECTED_ITEMS
            )
        low, high = (float(v) for v in torch.aminmax(image)) if image.numel() else (0.0, 0.0)
        # Not of NaN: training and evaluation say more of it.
        if low < -_OVERSHOOT or high > 1 + _OVERSHOOT:
            raise InvalidArgumentError(
                "data", f"images from {low:.3g} to {high:.3g} (item {index})", _EXPECTED_ITEMS,
                " (networks normalise them themselves)",
            )  # fmt: skip
        try:
            number = label.item() if hasattr(label, "item") else label
        except (RuntimeError, ValueError):  # several numbers, such as a one-hot target
            number = None
        if isinstance(number, float) and number.is_integer():
            number = int(number)
        if not isinstance(number, int) or number < -1:
            raise InvalidArgumentError("data", f"label {label!r} of item {index}", "a class number, or -1 for none")
        return image, int(number)
