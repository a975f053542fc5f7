"""What each choice of an augmentation does to an image, and that the presets make it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bcos_rt.data import Augmentation

SIDE = 64


def made(augmentation: Augmentation, image: Tensor, count: int) -> list[Tensor]:
    """Results under the seeds 0, 1, ..."""
    transform = augmentation.train_transform()
    results = []
    with torch.random.fork_rng(devices=[]):
        for seed in range(count):
            torch.manual_seed(seed)
            results.append(transform(image))
    return results


def still(**changes: Any) -> Augmentation:
    """Nothing random but what is asked for."""
    return Augmentation(**{"size": SIDE, "crop": "none", "flip": 0.0, **changes})


def places() -> Tensor:
    """An image whose first channel is the row, the second the column, in [0, 1)."""
    steps = torch.arange(SIDE) / SIDE
    rows, columns = torch.meshgrid(steps, steps, indexing="ij")
    return torch.stack([rows, columns, torch.zeros_like(rows)])


def noise(side: int = SIDE) -> Tensor:
    return torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def differing(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """In which share of the seeds two images differ."""
    return sum(not torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)) / len(ours)


# --- crops -----------------------------------------------------------------------------------------------------------


def test_the_whole_image_at_its_size_is_the_image() -> None:
    image = noise()
    for result in made(Augmentation(size=SIDE, scale=(1, 1), ratio=(1, 1), flip=0.0), image, 5):
        torch.testing.assert_close(result, image / 255, rtol=0, atol=1e-7)


def test_a_quarter_of_the_image_is_a_square_of_half_its_side() -> None:
    """At half the size nothing is resized: the result is a square out of the image, pixel by pixel."""
    image = places()
    corners = set()
    for result in made(Augmentation(size=SIDE // 2, scale=(0.25, 0.25), ratio=(1, 1), flip=0.0), image, 40):
        row, column = round(float(result[0, 0, 0]) * SIDE), round(float(result[1, 0, 0]) * SIDE)
        assert torch.equal(result, image[:, row : row + SIDE // 2, column : column + SIDE // 2])
        corners.add((row, column))
    assert len(corners) > 30
    for values in zip(*corners, strict=True):
        assert min(values) < 8
        assert max(values) > SIDE // 2 - 8


def shown(result: Tensor) -> tuple[int, int]:
    """Height and width, in pixels, of the part of :func:`places` that a result shows, from its slopes."""
    low, high = SIDE // 4, 3 * SIDE // 4
    height = float(result[0, high, low] - result[0, low, low]) / (high - low) * SIDE * SIDE
    width = float(result[1, low, high] - result[1, low, low]) / (high - low) * SIDE * SIDE
    assert abs(height - round(height)) < 0.02
    assert abs(width - round(width)) < 0.02
    return round(height), round(width)


@pytest.mark.parametrize("ratio", [1.0, 2.0, 0.5, 4.0])
def test_ratio_is_width_over_height(ratio: float) -> None:
    expected = (round(SIDE / 2 / ratio**0.5), round(SIDE / 2 * ratio**0.5))
    augmentation = Augmentation(size=SIDE, scale=(0.25, 0.25), ratio=(ratio, ratio), flip=0.0)
    assert {shown(result) for result in made(augmentation, places(), 5)} == {expected}


@pytest.mark.parametrize(
    ("augmentation", "scale", "ratio"),
    [
        (Augmentation.imagenet(SIDE, flip=0.0), (0.08, 1.0), (3 / 4, 4 / 3)),
        (Augmentation.imagenet_strong(SIDE, flip=0.0, policy="none", erase=0.0), (0.08, 1.0), (3 / 4, 4 / 3)),
        (Augmentation.imagenet(SIDE, flip=0.0, scale=(0.3, 0.5)), (0.3, 0.5), (3 / 4, 4 / 3)),
        (Augmentation.imagenet(SIDE, flip=0.0, scale=(0.2, 0.3), ratio=(1.5, 3)), (0.2, 0.3), (1.5, 3)),
    ],
    ids=["imagenet", "strong", "scale", "ratio"],
)
def test_crops_fill_their_ranges(
    augmentation: Augmentation, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    sizes = [shown(result) for result in made(augmentation, places(), 200)]
    shares, ratios = [h * w / SIDE**2 for h, w in sizes], [w / h for h, w in sizes]
    # Sides are whole pixels.
    assert all((h + 0.5) * (w + 0.5) >= scale[0] * SIDE**2 and (h - 0.5) * (w - 0.5) <= scale[1] * SIDE**2
               for h, w in sizes)  # fmt: skip
    assert all((w + 0.5) / (h - 0.5) >= ratio[0] and (w - 0.5) / (h + 0.5) <= ratio[1] for h, w in sizes)
    for values, (low, high) in ((shares, scale), (ratios, ratio)):
        margin = 0.15 * (high - low)
        assert min(values) < low + margin
        assert max(values) > high - margin


@pytest.mark.parametrize(("flip", "mirrored"), [(0.0, 0), (1.0, 30)])
def test_flips(flip: float, mirrored: int) -> None:
    image = noise() / 255
    results = made(still(flip=flip), image, 30)
    assert sum(torch.equal(result, image.flip(2)) for result in results) == mirrored
    assert sum(torch.equal(result, image) for result in results) == 30 - mirrored


# --- erasing ---------------------------------------------------------------------------------------------------------


def erased(result: Tensor) -> tuple[int, int] | None:
    """Height and width of the black rectangle in an image that has no black; None without one."""
    black = (result == 0).all(0)
    assert torch.equal(black, (result == 0).any(0)), "all channels"
    if not black.any():
        return None
    rows, columns = (torch.nonzero(black.any(axis)).flatten() for axis in (1, 0))
    assert black[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "a rectangle, without holes"
    height, width = int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
    assert int(black.sum()) == height * width
    return height, width


def test_erasing_leaves_a_black_rectangle_and_the_rest_as_it_was() -> None:
    """Of 2 to 33 % of the image and a ratio of 0.3 to 3.3 (Zhong et al., arXiv 1708.04896)."""
    image = 0.2 + 0.8 * places()
    sizes = []
    for result in made(still(erase=1.0), image, 60):
        size = erased(result)
        assert size is not None
        assert torch.equal(result[result != 0], image[result != 0])
        height, width = size
        assert (height + 0.5) * (width + 0.5) >= 0.02 * SIDE**2
        assert (height - 0.5) * (width - 0.5) <= 0.33 * SIDE**2
        assert (height + 0.5) / (width - 0.5) >= 0.3
        assert (height - 0.5) / (width + 0.5) <= 3.3
        sizes.append(size)
    assert len(set(sizes)) > 40


@pytest.mark.parametrize(
    ("augmentation", "share"),
    [
        (still(erase=0.5), 0.5),
        (Augmentation.imagenet_strong(SIDE, policy="none"), 0.25),
        (Augmentation.imagenet_strong(SIDE, policy="none", erase=0.0), 0.0),
        (Augmentation.imagenet(SIDE), 0.0),
        (Augmentation.cifar(SIDE, padding=0), 0.0),
    ],
    ids=["half", "strong", "strong without", "imagenet", "cifar"],
)
def test_how_often_is_erased(augmentation: Augmentation, share: float) -> None:
    count = 300
    found = sum(erased(result) is not None for result in made(augmentation, 0.2 + 0.8 * places(), count))
    assert abs(found - share * count) <= 4 * (count * share * (1 - share)) ** 0.5


# --- colours and policies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("jitter", [0.05, 0.2])
def test_jitter_changes_brightness_contrast_and_saturation_by_up_to_its_share(jitter: float) -> None:
    """The three factors are read from the grey level's mean, its spread, and how far red is from grey."""
    image = torch.tensor([0.5, 0.35, 0.4])[:, None, None] + 0.05 * (places()[:1] < 0.5)

    def numbers(picture: Tensor) -> tuple[float, float, float]:
        grey = (picture * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
        spread = float(grey[0, 0] - grey[-1, 0])
        return float(grey.mean()), spread, float(picture[0, 0, 0] - grey[0, 0])

    mean, spread, red = numbers(image)
    factors = []
    for result in made(still(jitter=jitter), image, 80):
        now = numbers(result)
        brightness = now[0] / mean
        contrast = now[1] / spread / brightness
        factors.append((brightness, contrast, now[2] / red / brightness / contrast))
    for values in zip(*factors, strict=True):
        assert 1 - jitter - 0.01 <= min(values) < 1 - 0.8 * jitter
        assert 1 + 0.8 * jitter < max(values) <= 1 + jitter + 0.01
    assert all(torch.equal(result, image) for result in made(still(), image, 3))


def test_rand_augment_of_magnitude_0_changes_nothing_and_more_changes_more() -> None:
    """On an image with every grey level once, so that equalising it and stretching its contrast change nothing."""
    generator = torch.Generator().manual_seed(1)
    image = torch.stack([torch.randperm(256, generator=generator).reshape(16, 16) for _ in range(3)]).to(torch.uint8)
    unit = image / 255
    change = {}
    for magnitude in (0, 4, 15, 30):
        results = made(still(size=16, policy="rand_augment", magnitude=magnitude), image, 60)
        # Solarising turns white, and what is brighter than its threshold, over.
        change[magnitude] = [float(((r - unit).abs() * (image < 255)).mean()) for r in results]
    assert max(change[0]) < 1e-6
    means = [sum(values) for values in change.values()]
    assert means[1] < 0.7 * means[2] < 0.7 * means[3]
    assert sum(value > 0.01 for value in change[30]) > 40


def test_presets_have_the_policies_they_name() -> None:
    """Under one seed all crop alike; what differs is the policy."""
    image = noise(48)
    plain = made(Augmentation.imagenet(24), image, 60)
    assert differing(plain, made(Augmentation.imagenet_strong(24, policy="none", erase=0.0), image, 60)) == 0
    strong = made(Augmentation.imagenet_strong(24, erase=0.0), image, 60)
    assert differing(plain, strong) > 0.8
    assert differing(strong, made(Augmentation.imagenet(24, policy="rand_augment"), image, 60)) == 0
    assert differing(strong, made(Augmentation.imagenet_strong(24, erase=0.0, magnitude=30), image, 60)) > 0.5
    trivial = made(Augmentation.imagenet(24, policy="trivial_augment"), image, 60)
    assert differing(plain, trivial) > 0.7
    assert differing(strong, trivial) > 0.8
    assert differing(plain, made(Augmentation.imagenet(24, jitter=0.3), image, 60)) == 1
