"""Image files as tensors a network takes."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transform

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError

__all__ = ["CROP_FRACTION", "decode_image", "load_image", "resized"]

# 256 pixels cut to 224.
CROP_FRACTION = 0.875
# Modes in which a sample is wider than a byte; Pillow's own conversion to RGB would clip them instead of scaling.
_DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
# Share of its range by which an image of floats may leave it: bicubic filters overshoot at edges.
_OVERSHOOT = 0.1
_WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")


def load_image(path: str | os.PathLike[str], size: int | None = 224, crop_fraction: float = CROP_FRACTION) -> Tensor:
    """Read an image file as a float tensor, the way classifiers are evaluated.

    Any mode becomes RGB: grayscale is repeated, a palette looked up, CMYK converted, transparency laid over white,
    16-bit samples scaled. The orientation a camera noted in EXIF is applied. The image is resized (bicubic,
    antialiased) so that its shorter side is ``size / crop_fraction``, and its centre cropped to ``size``.

    Args:
        path: any file Pillow reads; of an animation the first frame.
        size: side of the square result in pixels; None keeps the image's own size.
        crop_fraction: the crop's side over the resized image's shorter side; 0.875 turns 256 into 224.

    Returns:
        [3, H, W], float32 in [0, 1], not normalised: a B-cos network does that itself.

    Raises:
        InvalidArgumentError: the file is missing, truncated or no image; ``size`` < 1; ``crop_fraction`` not in (0, 1].
    """
    if not isinstance(path, str | os.PathLike):
        raise InvalidTypeError("path", type(path).__name__, "the path of an image file")
    if size is not None and (isinstance(size, bool) or not isinstance(size, int)):
        raise InvalidTypeError("size", repr(size), "an integer or None")
    if size is not None and size < 1:
        raise InvalidArgumentError("size", size, "at least 1 pixel")
    if not 0 < crop_fraction <= 1:
        raise InvalidArgumentError("crop_fraction", crop_fraction, "a number in (0, 1]")
    return resized(_read_rgb(Path(path), repr(str(path))), size, crop_fraction)


def resized(image: Image.Image | Tensor, size: int | None, crop_fraction: float = CROP_FRACTION) -> Tensor:
    """An RGB image or a tensor [3, H, W] in [0, 1], resized and cropped as :func:`load_image` says."""
    if size is not None:
        shorter = max(size, round(size / crop_fraction))
        image = transform.resize(_trimmed(image), [shorter], interpolation=InterpolationMode.BICUBIC, antialias=True)
        image = transform.center_crop(image, [size, size])
    tensor: Tensor = image if isinstance(image, Tensor) else transform.to_tensor(image)
    # Bicubic filters overshoot at edges (Pillow clips its bytes itself).
    return tensor.clamp(0, 1)


def decode_image(source: Path | IO[bytes] | Image.Image, name: str) -> Image.Image | Tensor:
    """An image as :func:`load_image` reads it, before resizing: RGB bytes, or float32 [3, H, W] of deeper samples.

    Args:
        source: a file, an open one, or an image that Pillow has opened.
        name: what to call it in errors.

    Raises:
        InvalidArgumentError: missing, truncated or no image.
    """
    return _read_rgb(source, name)


def _trimmed(image: Image.Image | Tensor) -> Image.Image | Tensor:
    """Cut the ends off very long images: the crop drops them, and a line of 1 x 9000 resized whole fills memory."""
    _, height, width = transform.get_dimensions(image)
    limit = 2 * min(height, width) + 16
    # Equal parity keeps the centre where it was.
    target = [side if side <= limit else limit + (side - limit) % 2 for side in (height, width)]
    return image if target == [height, width] else transform.center_crop(image, target)


def _read_rgb(source: Path | IO[bytes] | Image.Image, name: str) -> Image.Image | Tensor:
    """The decoded image, upright: an 8-bit RGB image, or float32 [3, H, W] in [0, 1] where samples are deeper."""
    expected = "an image file such as JPEG or PNG"
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as opened:
            opened.load()
            return _to_rgb(ImageOps.exif_transpose(opened))
    except FileNotFoundError as error:
        raise InvalidArgumentError("path", f"{name}, which does not exist", expected) from error
    except IsADirectoryError as error:
        raise InvalidArgumentError("path", f"{name}, a directory", expected) from error
    except PermissionError as error:
        raise InvalidArgumentError("path", f"{name}, which may not be read", expected) from error
    except UnidentifiedImageError as error:
        raise InvalidArgumentError("path", f"{name}, which is no image Pillow can read", expected) from error
    except Image.DecompressionBombError as error:
        raise InvalidArgumentError("path", f"{name} ({error})", "an image of reasonable size") from error
    except (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError) as error:
        # Pillow's decoders raise all of these on damaged files.
        raise InvalidArgumentError("path", f"{name}, corrupt or truncated ({error})", expected) from error


def _to_rgb(image: Image.Image) -> Image.Image | Tensor:
    if image.mode in _DEEP:
        return _deep_gray(image)
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _deep_gray(image: Image.Image) -> Tensor:
    """A grayscale image of 16-bit, 32-bit or floating-point samples as float32 [3, H, W] in [0, 1]."""
    samples = np.asarray(image).astype(np.float64)
    if not np.isfinite(samples).all():
        raise ValueError("it holds NaN or infinite samples")
    scale, beyond = 65535.0, 0.0
    if image.mode in ("I", "F"):
        # No format says what the range of these is, so take the smallest usual one that fits.
        beyond = _OVERSHOOT if image.mode == "F" else 0.0
        ranges = (1.0,) * (image.mode == "F") + (255.0, 65535.0, 2.0**31 - 1)
        scale = next((full for full in ranges if samples.max() <= (1 + beyond) * full), float(samples.max()))
    if samples.min() < -beyond * scale:
        raise ValueError("it holds negative samples")
    samples = samples / scale
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        # This one value is transparent: white, as everything transparent.
        samples[np.asarray(image) == clear] = 1.0
    gray = torch.from_numpy(np.clip(samples, 0, 1).astype(np.float32))
    return gray.expand(3, -1, -1).contiguous()
