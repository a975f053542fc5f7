"""Image files of every mode become the same tensor; files that are none get an error that names them."""

import contextlib
import os

import numpy as np
import pytest
import torch
from PIL import Image

from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.images import load_image


def ramp(height=40, width=60):
    """Smooth uint8 RGB pictures, every channel different, no symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    channels = [x * 255 / (width - 1), y * 255 / (height - 1), (x + 2 * y) * 255 / (width + 2 * height - 3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def written(tmp_path, image, name="image.png", **options):
    path = tmp_path / name
    image.save(path, **options)
    return path


def expected(pixels):
    return torch.from_numpy(pixels.astype(np.float32) / 255).permute(2, 0, 1)


def gray(pixels):
    return torch.from_numpy(pixels.astype(np.float32)).expand(3, -1, -1)


def test_rgb(tmp_path):
    image = load_image(written(tmp_path, Image.fromarray(ramp())), size=None)
    assert image.dtype == torch.float32
    torch.testing.assert_close(image, expected(ramp()))


def test_size_and_crop(tmp_path):
    path = written(tmp_path, Image.fromarray(ramp(300, 500)))
    image = load_image(path)
    assert image.shape == (3, 224, 224)
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    # The crop is the centre: the ramps' middle values stand in the middle, and what it shows is 224/256 of the height.
    assert float(image[0, 112, 112]) == pytest.approx(0.5, abs=0.01)
    assert float(image[1, 112, 112]) == pytest.approx(0.5, abs=0.01)
    shown = float(image[1, -1, 0] - image[1, 0, 0])
    assert shown == pytest.approx(0.875, abs=0.01)
    whole = load_image(path, crop_fraction=1.0)
    assert float(whole[1, -1, 0] - whole[1, 0, 0]) == pytest.approx(1, abs=0.01)
    assert load_image(path, size=33).shape == (3, 33, 33)


def test_downscaling_is_antialiased(tmp_path):
    checkers = np.indices((448, 448)).sum(0) % 2 * 255
    path = written(tmp_path, Image.fromarray(np.repeat(checkers[..., None], 3, axis=2).astype(np.uint8)))
    image = load_image(path, size=56, crop_fraction=1.0)[:, 4:-4, 4:-4]
    assert float((image - 0.5).abs().max()) < 0.02


def test_small_images_are_enlarged(tmp_path):
    path = written(tmp_path, Image.new("RGB", (1, 1), (255, 0, 51)))
    image = load_image(path)
    torch.testing.assert_close(image, torch.tensor([1.0, 0.0, 0.2])[:, None, None].expand(3, 224, 224))


def test_long_images(tmp_path):
    """Resized whole, this line would take 8 GB."""
    line = np.zeros((1, 9001, 3), np.uint8)
    line[:, 4500] = 255
    image = load_image(written(tmp_path, Image.fromarray(line)))
    assert image.shape == (3, 224, 224)
    row = image[0, 112]
    assert float(row[112]) == pytest.approx(1, abs=0.02)  # the white pixel is the centre
    torch.testing.assert_close(row, row.flip(0), atol=0.02, rtol=0)


def test_grayscale(tmp_path):
    pixels = ramp()[..., 2]
    torch.testing.assert_close(
        load_image(written(tmp_path, Image.fromarray(pixels)), size=None), gray(pixels / 255), atol=1e-6, rtol=0
    )
    bits = load_image(written(tmp_path, Image.fromarray(pixels > 100), "bits.png"), size=None)
    assert torch.equal(bits, gray(pixels > 100))


def test_sixteen_bit_grayscale(tmp_path):
    pixels = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60) * 27
    assert pixels.max() > 64000
    for name in ("deep.png", "deep.tiff"):
        image = load_image(written(tmp_path, Image.fromarray(pixels), name), size=None)
        torch.testing.assert_close(image, gray(pixels / 65535), atol=1e-6, rtol=0)
    cropped = load_image(tmp_path / "deep.png", size=32)
    assert cropped.shape == (3, 32, 32)
    assert 0.1 < float(cropped.std()) < 0.5


def test_wide_and_floating_point_samples(tmp_path):
    pixels = np.arange(2400).reshape(40, 60)
    wide = load_image(written(tmp_path, Image.fromarray(pixels.astype(np.int32) * 27), "wide.tiff"), size=None)
    torch.testing.assert_close(wide, gray(pixels * 27 / 65535), atol=1e-6, rtol=0)
    for scale in (1, 255):
        samples = (pixels / 2399 * scale).astype(np.float32)
        image = load_image(written(tmp_path, Image.fromarray(samples), "float.tiff"), size=None)
        torch.testing.assert_close(image, gray(pixels / 2399), atol=1e-6, rtol=0)
    # What a filter overshoots by is no other range; bytes in 32 bits are full at 2^31 - 1.
    samples = (pixels / 2399).astype(np.float32)
    samples[0, :2] = -0.02, 1.001
    image = load_image(written(tmp_path, Image.fromarray(samples), "over.tiff"), size=None)
    torch.testing.assert_close(image, gray(samples.clip(0, 1)), atol=1e-6, rtol=0)
    samples = (pixels / 2399 * 255).astype(np.float32)
    samples[0, :2] = -5, 260
    image = load_image(written(tmp_path, Image.fromarray(samples), "over.tiff"), size=None)
    torch.testing.assert_close(image, gray(samples.clip(0, 255) / 255), atol=1e-6, rtol=0)
    full = np.full((4, 4), 2**31 - 1, np.int32)
    assert float(load_image(written(tmp_path, Image.fromarray(full), "full.tiff"), size=None).min()) == 1.0
    for negative in (-full, -full.astype(np.float32)):
        with pytest.raises(InvalidArgumentError, match="negative samples"):
            load_image(written(tmp_path, Image.fromarray(negative), "negative.tiff"), size=None)
    samples[3, 4] = np.nan
    with pytest.raises(InvalidArgumentError, match="NaN"):
        load_image(written(tmp_path, Image.fromarray(samples), "nan.tiff"), size=None)


def test_transparency_lies_over_white(tmp_path):
    alpha = np.full((40, 60), 255, np.uint8)
    alpha[:, :20] = 0
    alpha[:, 20:40] = 51
    rgba = Image.fromarray(np.dstack([ramp(), alpha]))
    cover = torch.from_numpy(alpha / 255)
    want = expected(ramp()) * cover + (1 - cover)
    image = load_image(written(tmp_path, rgba), size=None)
    torch.testing.assert_close(image, want.float(), atol=1 / 255, rtol=0)
    la = load_image(written(tmp_path, rgba.convert("LA"), "la.png"), size=None)
    assert torch.equal(la[:, :, :20], torch.ones(3, 40, 20))
    assert torch.equal(la[0], la[2])
    deep = np.full((40, 60), 20000, np.uint16)
    deep[:, :20] = 40000
    Image.fromarray(deep).save(tmp_path / "deep.png", transparency=40000)
    image = load_image(tmp_path / "deep.png", size=None)
    assert torch.equal(image[:, :, :20], torch.ones(3, 40, 20))
    assert float(image[:, :, 20:].max()) == pytest.approx(20000 / 65535)


def test_palette(tmp_path):
    image = Image.fromarray(ramp()).quantize(64)
    want = expected(np.asarray(image.convert("RGB")))
    assert len(np.unique(want)) > 10
    torch.testing.assert_close(load_image(written(tmp_path, image), size=None), want)
    torch.testing.assert_close(load_image(written(tmp_path, image, "image.gif"), size=None), want)
    # One colour of the palette declared transparent.
    see_through = load_image(written(tmp_path, image, "hole.png", transparency=5), size=None)
    hole = np.asarray(image) == 5
    assert hole.any()
    assert bool((see_through[:, hole] == 1).all())
    torch.testing.assert_close(see_through[:, ~hole], want[:, ~hole])


def test_cmyk(tmp_path):
    image = Image.fromarray(ramp()).convert("CMYK")
    plain = load_image(written(tmp_path, image, "image.tiff"), size=None)
    torch.testing.assert_close(plain, expected(ramp()), atol=2 / 255, rtol=0)
    jpeg = load_image(written(tmp_path, image, "image.jpg", quality=98), size=None)
    torch.testing.assert_close(jpeg, expected(ramp()), atol=12 / 255, rtol=0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """A camera stores the picture turned and notes how; what we read is the upright one, whatever the note."""
    upright = Image.fromarray(ramp())
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = load_image(written(tmp_path, stored, exif=exif), size=None)
    torch.testing.assert_close(image, expected(ramp()))


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    path = tmp_path / "two.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert load_image(path, size=None)[:, 0, 0].tolist() == [1, 0, 0]


def test_real_photograph():
    data = pytest.importorskip("skimage.data")
    image = load_image(os.path.join(data.data_dir, "chelsea.png"))
    assert image.shape == (3, 224, 224)
    assert 0.3 < float(image.mean()) < 0.6


# --- files that are no images ----------------------------------------------------------------------------------------


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"absent\.png.*does not exist"):
        load_image(tmp_path / "absent.png")
    with pytest.raises(InvalidArgumentError, match="a directory"):
        load_image(tmp_path)


def test_not_an_image(tmp_path):
    for content in (b"", b"hello", bytes(range(256)) * 10):
        (tmp_path / "photo.jpg").write_bytes(content)
        with pytest.raises(InvalidArgumentError, match=r"photo\.jpg.*no image"):
            load_image(tmp_path / "photo.jpg")


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tiff", "webp", "bmp"])
def test_truncated(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = written(tmp_path, Image.fromarray(noise), f"cut.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InvalidArgumentError, match=f"cut.{suffix}"):
        load_image(path)


def test_damaged_bytes_never_raise_anything_else(tmp_path):
    """Forty random damages of each format give an image or our error."""
    rng = np.random.default_rng(1)
    for suffix in ("jpg", "png", "gif", "tiff", "webp"):
        path = written(tmp_path, Image.fromarray(ramp()), f"damaged.{suffix}")
        content = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(40):
            broken = content.copy()
            places = rng.integers(0, len(broken), 8)
            broken[places] = rng.integers(0, 256, 8)
            path.write_bytes(broken.tobytes())
            with contextlib.suppress(InvalidArgumentError):
                assert load_image(path, size=16).shape == (3, 16, 16)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(tmp_path, monkeypatch):
    path = written(tmp_path, Image.fromarray(ramp()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InvalidArgumentError, match="reasonable size"):
        load_image(path)


def test_bad_arguments(tmp_path):
    path = written(tmp_path, Image.fromarray(ramp()))
    for size, error in ((0, InvalidArgumentError), (-3, InvalidArgumentError), (2.5, InvalidTypeError)):
        with pytest.raises(error, match="size"):
            load_image(path, size=size)
    for fraction in (0, 1.5, float("nan")):
        with pytest.raises(InvalidArgumentError, match="crop_fraction"):
            load_image(path, crop_fraction=fraction)
    with pytest.raises(InvalidTypeError, match="path"):
        load_image(7)
