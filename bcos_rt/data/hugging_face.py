"""Data sets of Hugging Face ``datasets``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bcos_rt.data import splits
from bcos_rt.data.arrays import image_of
from bcos_rt.data.image_data import ImageData, Transform
from bcos_rt.errors import BcosError, InvalidArgumentError, InvalidTypeError, MissingDependencyError
from bcos_rt.images import decode_image
from bcos_rt.lazy import require

__all__ = ["HuggingFaceData", "chosen_split", "downloaded", "huggingface"]


def huggingface() -> Any:
    """The package ``datasets``."""
    return require("datasets", "train")


def downloaded(name: str, split: str | None) -> Any:
    """The split of ``NAME`` or ``NAME:CONFIG``, from the hub or its cache."""
    name, _, config = name.partition(":")
    try:
        found = huggingface().load_dataset(name, config or None)
    except MissingDependencyError:
        raise
    except Exception as error:  # every backend has its own: HTTP, Arrow, file system
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidArgumentError(
            "data", f"'hf:{name}' ({reason})", "a Hugging Face data set that can be read"
        ) from error
    return chosen_split(found, split, repr(f"hf:{name}"))


def chosen_split(found: Any, split: str | None, data: str) -> Any:
    """One data set of a dictionary of them; any other as it is."""
    if not isinstance(found, dict):
        return found
    name = splits.choose(found, split, data)
    if name is None:
        raise InvalidArgumentError("split", f"None, of {data}", f"one of {', '.join(found)}")
    return found[name]


class HuggingFaceData(ImageData):
    """An Arrow data set with an image column and, unless it is unlabelled, a label column."""

    def __init__(self, data: Any, size: int | None, transform: Transform | None) -> None:
        super().__init__(size, transform)
        if not hasattr(data, "__len__") or not getattr(data, "features", None):
            raise InvalidTypeError("data", f"datasets.{type(data).__name__}", "a datasets.Dataset, not streamed")
        columns = dict(data.features)
        self.image = _column(columns, ("image", "img", "pixel_values"), "Image")
        if self.image is None:
            raise InvalidArgumentError(
                "data", f"columns {', '.join(columns)}", "one with an image: image, img, pixel_values"
            )
        self.label = _column(columns, ("label", "labels", "fine_label", "cls", "class"), "ClassLabel")
        plain = data.with_format(None)
        if self.label is not None:
            names = getattr(columns[self.label], "names", None)
            self.class_names = tuple(names) if names else None
            self.labels = _class_numbers(plain[self.label], self.label)
        # The user's own transform of rows stays; other formats only say what type an image has.
        self.data = data if data.format["type"] == "custom" else plain
        self._decode: Any = None
        feature = columns[self.image]
        if type(feature).__name__ == "Image" and self.data is plain:
            # Decoded here, where the file's name is still known.
            self._decode = feature if feature.decode else huggingface().Image()
            self.data = plain.cast_column(self.image, huggingface().Image(mode=feature.mode, decode=False))

    def __len__(self) -> int:
        return len(self.data)

    def read(self, index: int) -> tuple[Image.Image | Tensor, int]:
        name = f"row {index}"
        try:
            row = self.data[index]
            image = row[self.image]
            if self._decode is not None and image is not None:
                name += f" ({image['path']})" if image.get("path") else ""
                image = self._decode.decode_example(image)
        except BcosError:
            raise
        except Exception as error:
            # Decoding raises all that Pillow does; with a row's own transform, anything.
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InvalidArgumentError(
                "data", f"{name} of column {self.image!r} ({reason})", "an image that can be decoded"
            ) from error
        label = -1 if self.label is None else int(row[self.label])
        if image is None:
            raise InvalidArgumentError("data", f"no image in {name} of column {self.image!r}", "an image in every row")
        if isinstance(image, Image.Image):
            return decode_image(image, name), label
        return image_of(np.asarray(image), name), label


def _column(columns: dict[str, Any], names: Sequence[str], kind: str) -> str | None:
    """The column of one of these names, or else the only one of this kind."""
    known = next((name for name in names if name in columns), None)
    of_kind = [name for name, feature in columns.items() if type(feature).__name__ == kind]
    return known if known is not None or len(of_kind) != 1 else of_kind[0]


def _class_numbers(values: Iterable[Any], column: str) -> Tensor:
    numbers = list(values)
    for row, value in enumerate(numbers):
        if isinstance(value, bool) or not isinstance(value, int) or value < -1:
            raise InvalidArgumentError(
                "data", f"{value!r} in row {row} of column {column!r}", "class numbers",
                " (class_encode_column makes them of names)" if isinstance(value, str) else "",
            )  # fmt: skip
    return torch.tensor(numbers, dtype=torch.int64)
