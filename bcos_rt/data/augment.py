"""Training-time transforms, all with torchvision.transforms.v2 and all without normalisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from bcos_rt.data.loading import seeded
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["Augmentation", "Mixing", "check_used", "make_plain"]

# Shorter side of an evaluated image over the side of its centre crop, as in bcos_rt.images.load_image.
CROP_FRACTION = 0.875


def make_plain(settings: Any) -> None:
    """Make the numbers of a frozen dataclass Python's own, those of float fields floats, once they are known to be fit.

    NumPy's float64 is a float too, but torch does not load one from a file; and torch's Beta distribution takes no
    integers.
    """
    hints = get_type_hints(type(settings))
    for entry in dataclasses.fields(settings):
        value, hint = getattr(settings, entry.name), hints[entry.name]
        if hint in (float, float | None) and value is not None:
            object.__setattr__(settings, entry.name, float(value))
        elif hint == tuple[float, float]:
            object.__setattr__(settings, entry.name, tuple(map(float, value)))


def check_used(settings: Any, used_by: Mapping[str, tuple[str, tuple[Any, ...]]]) -> None:
    """Refuse a field that is not at its default where the choice in another field does not use it.

    Args:
        settings: a dataclass.
        used_by: by field, the other one and its choices that use it.
    """
    defaults = {entry.name: entry.default for entry in dataclasses.fields(settings)}
    for name, (by, users) in used_by.items():
        if getattr(settings, by) not in users and getattr(settings, name) != defaults[name]:
            got = f"{getattr(settings, name)!r} with {by}={getattr(settings, by)!r}, which does not use it"
            expected = f"{defaults[name]!r}, or {by} {' or '.join(map(repr, users))}"
            raise InvalidArgumentError(f"{type(settings).__name__}.{name}", got, expected)


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image, and the size of images. Pixels stay in [0, 1]: networks normalise themselves.

    Attributes:
        size: side of the square images in pixels; None takes the images as they are, all of one size.
        crop: ``"resized"``, a random part resized to ``size`` (Inception's crop); ``"padded"``, a random square of
            ``size`` out of the image padded with ``padding`` zeros on each side; ``"none"``, evaluation's centre crop.
        scale, ratio: of ``"resized"``: range of the part's share of the image and of its aspect ratio.
        padding: of ``"padded"``, pixels.
        flip: probability of a horizontal flip.
        policy: ``"none"``; ``"rand_augment"`` (``magnitude`` 0 to 30, two operations); ``"trivial_augment"``.
        magnitude: of ``"rand_augment"``.
        jitter: brightness, contrast and saturation each change by up to this share.
        erase: probability of erasing a rectangle.
    """

    size: int | None = 224
    crop: Literal["resized", "padded", "none"] = "resized"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    padding: int = 4
    flip: float = 0.5
    policy: Literal["none", "rand_augment", "trivial_augment"] = "none"
    magnitude: int = 9
    jitter: float = 0.0
    erase: float = 0.0

    def __post_init__(self) -> None:
        if self.size is not None and (isinstance(self.size, bool) or not isinstance(self.size, int)):
            raise InvalidTypeError("Augmentation.size", repr(self.size), "an integer or None")
        if self.size is not None and self.size < 1:
            raise InvalidArgumentError("Augmentation.size", self.size, "at least 1 pixel")
        if self.crop not in ("resized", "padded", "none"):
            raise InvalidArgumentError("Augmentation.crop", repr(self.crop), "'resized', 'padded' or 'none'")
        if self.size is None and self.crop != "none":
            raise InvalidArgumentError("Augmentation.size", "None", f"a number of pixels, for crop={self.crop!r}")
        if self.policy not in ("none", "rand_augment", "trivial_augment"):
            raise InvalidArgumentError(
                "Augmentation.policy", repr(self.policy), "'none', 'rand_augment' or 'trivial_augment'"
            )
        for name in ("flip", "erase", "jitter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise InvalidArgumentError(f"Augmentation.{name}", repr(value), "a number from 0 to 1")
        for name, high in (("padding", math.inf), ("magnitude", 30)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= high:
                expected = "an integer of at least 0" if high == math.inf else f"an integer from 0 to {high}"
                raise InvalidArgumentError(f"Augmentation.{name}", repr(value), expected)
        for name in ("scale", "ratio"):
            value = getattr(self, name)
            two = isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(v, int | float) for v in value)
            if not two or not 0 < value[0] <= value[1] < math.inf:
                raise InvalidArgumentError(f"Augmentation.{name}", repr(value), "two numbers, 0 < low <= high")
        make_plain(self)
        check_used(self, _USED_BY)

    @classmethod
    def imagenet(cls, size: int = 224, **changes: Any) -> Augmentation:
        """A random resized crop and a flip, what the published networks are trained with."""
        return cls(size=size, **changes)

    @classmethod
    def imagenet_strong(cls, size: int = 224, **changes: Any) -> Augmentation:
        """With RandAugment and random erasing too."""
        return cls(size=size, **{"policy": "rand_augment", "erase": 0.25, **changes})

    @classmethod
    def cifar(cls, size: int = 32, **changes: Any) -> Augmentation:
        """A random crop of the image padded with 4 pixels, and a flip."""
        return cls(size=size, **{"crop": "padded", **changes})

    @classmethod
    def none(cls, size: int | None = None) -> Augmentation:
        """Images as they are evaluated; of ``size`` None, as they come."""
        return cls(size=size, crop="none", flip=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return dataclasses.asdict(self)

    def eval_transform(self) -> v2.Transform:
        """What happens to an image in evaluation: bytes or floats [3, H, W] -> float32 in [0, 1]."""
        steps: list[v2.Transform] = []
        if self.size is not None:
            steps.append(_FitTo(self.size, 1.0 if self.crop == "padded" else CROP_FRACTION))
        return v2.Compose([*steps, _ToUnit()])

    def train_transform(self) -> v2.Transform:
        """What happens to an image in training: bytes or floats [3, H, W] -> float32 in [0, 1]."""
        steps: list[Any] = []
        if self.crop == "resized" and self.size is not None:
            steps.append(v2.RandomResizedCrop(self.size, self.scale, self.ratio, antialias=True))
        elif self.size is not None:
            steps.append(_FitTo(self.size, 1.0 if self.crop == "padded" else CROP_FRACTION))
            if self.crop == "padded":
                steps.append(v2.RandomCrop(self.size, padding=self.padding))
        if self.flip > 0:
            steps.append(v2.RandomHorizontalFlip(self.flip))
        if self.policy == "rand_augment":
            steps.append(v2.RandAugment(magnitude=self.magnitude, interpolation=InterpolationMode.BILINEAR))
        elif self.policy == "trivial_augment":
            steps.append(v2.TrivialAugmentWide(interpolation=InterpolationMode.BILINEAR))
        if self.jitter > 0:
            steps.append(v2.ColorJitter(self.jitter, self.jitter, self.jitter))
        steps.append(_ToUnit())
        if self.erase > 0:
            steps.append(v2.RandomErasing(self.erase))
        return v2.Compose(steps)


# Fields that only one choice of another field uses.
_USED_BY = {
    "scale": ("crop", ("resized",)), "ratio": ("crop", ("resized",)), "padding": ("crop", ("padded",)),
    "magnitude": ("policy", ("rand_augment",)),
}  # fmt: skip


class _ToUnit(v2.Transform):  # type: ignore[misc]
    """Bytes or floats as float32 in [0, 1]; bicubic filters overshoot a little."""

    def __init__(self) -> None:
        super().__init__()
        self.convert = v2.ToDtype(torch.float32, scale=True)

    def forward(self, image: Any) -> Any:
        return self.convert(image).clamp(0, 1)


class _FitTo(v2.Transform):  # type: ignore[misc]
    """Resize the shorter side to ``size / fraction`` and cut out the centre; nothing for an image of that size."""

    def __init__(self, size: int, fraction: float) -> None:
        super().__init__()
        self.size = size
        self.resize = v2.Resize(round(size / fraction), InterpolationMode.BICUBIC, antialias=True)
        self.crop = v2.CenterCrop(size)

    def forward(self, image: Tensor) -> Any:
        if tuple(image.shape[-2:]) == (self.size, self.size):
            return image
        return self.crop(self.resize(image))


@dataclass(frozen=True)
class Mixing:
    """Mixup and cutmix of a batch's images and labels (arXiv 1710.09412, 1905.04899).

    Attributes:
        mixup, cutmix: parameter alpha of the Beta distribution of the share; 0 for none. With both, each batch takes
            one of the two at random.
        probability: of mixing a batch at all.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mixup", "cutmix", "probability"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InvalidArgumentError(f"Mixing.{name}", repr(value), "a number of at least 0")
        if self.mixup == self.cutmix == 0:
            raise InvalidArgumentError("Mixing", "mixup=0, cutmix=0", "one of them > 0")
        if self.probability > 1:
            raise InvalidArgumentError("Mixing.probability", self.probability, "a number from 0 to 1")
        make_plain(self)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-ready values."""
        return dataclasses.asdict(self)

    def __call__(self, images: Tensor, labels: Tensor, classes: int, seed: int) -> tuple[Tensor, Tensor]:
        """Images [N, 3, H, W] and labels [N] -> mixed images, targets [N, classes] that sum to 1.

        The same ``seed`` mixes the same way; the global random numbers are left as they were.

        Raises:
            InvalidArgumentError: a label that is not 0 to ``classes - 1``, on the CPU.
        """
        # Elsewhere looking would wait for the device in every step.
        if labels.device.type == "cpu" and labels.numel():
            low, high = int(labels.min()), int(labels.max())
            if not 0 <= low <= high < classes:
                raise InvalidArgumentError("data", f"labels {low} to {high}", f"labels 0 to {classes - 1} to mix")
        with seeded(seed):
            if float(torch.rand(())) >= self.probability:
                return images, F.one_hot(labels, classes).to(images.dtype)
            kinds = []
            if self.mixup > 0:
                kinds.append(v2.MixUp(alpha=self.mixup, num_classes=classes))
            if self.cutmix > 0:
                kinds.append(v2.CutMix(alpha=self.cutmix, num_classes=classes))
            chosen = kinds[int(torch.randint(len(kinds), ()))]
            mixed, targets = chosen(images, labels)
        return mixed, targets
