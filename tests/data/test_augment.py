"""Augmentation: sizes, ranges, and what each choice does."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bcos_rt.data import Augmentation, Mixing
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError


@pytest.mark.parametrize(
    "augmentation",
    [
        Augmentation.imagenet(24),
        Augmentation.imagenet_strong(24),
        Augmentation.cifar(24),
        Augmentation.cifar(24, policy="trivial_augment", jitter=0.4),
        Augmentation.none(24),
    ],
)
@pytest.mark.parametrize("shape", [(3, 40, 31), (3, 24, 24), (3, 10, 15)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_results_are_images_of_the_size(augmentation: Augmentation, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    image = torch.randint(0, 256, shape, dtype=torch.uint8)
    image = image if dtype == torch.uint8 else image / 255
    for transform in (augmentation.train_transform(), augmentation.eval_transform()):
        for _ in range(5):
            out = transform(image)
            assert out.shape == (3, 24, 24)
            assert out.dtype == torch.float32
            assert 0 <= float(out.min()) <= float(out.max()) <= 1
    assert Augmentation(**json.loads(json.dumps(augmentation.to_dict()))) == augmentation


def same(a: Tensor, b: Tensor) -> bool:
    """Equal but for how a byte is divided by 255."""
    return torch.allclose(a, b, rtol=0, atol=1e-7)


def test_nothing_is_normalised_or_moved_where_nothing_is_asked_for() -> None:
    image = torch.randint(0, 256, (3, 9, 9), dtype=torch.uint8)
    for augmentation in (Augmentation.none(), Augmentation.none(9)):
        assert same(augmentation.train_transform()(image), image / 255)
        assert same(augmentation.eval_transform()(image), image / 255)
    assert same(Augmentation.cifar(9).eval_transform()(image), image / 255)


def test_padded_crops_are_shifts_and_flips() -> None:
    image = torch.arange(1, 26, dtype=torch.uint8).reshape(1, 5, 5).expand(3, -1, -1)
    padded = F.pad(image / 255, (2, 2, 2, 2))
    expected = [padded[:, i : i + 5, j : j + 5] for i in range(5) for j in range(5)]
    expected += [part.flip(2) for part in expected]
    transform = Augmentation.cifar(5, padding=2).train_transform()
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        out = transform(image)
        seen.add(next(i for i, part in enumerate(expected) if same(part, out)))
    assert len(seen) > 20


def test_mixing_sums_to_one_and_is_a_function_of_its_seed() -> None:
    images, labels = torch.rand(8, 3, 6, 6), torch.arange(8) % 4
    for mixing in (Mixing(mixup=0.4), Mixing(cutmix=1.0), Mixing(mixup=0.2, cutmix=0.5)):
        before = torch.random.get_rng_state()
        mixed, targets = mixing(images, labels, 4, seed=1)
        assert torch.equal(torch.random.get_rng_state(), before)
        assert targets.shape == (8, 4)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        again = mixing(images, labels, 4, seed=1)
        assert torch.equal(again[0], mixed)
        assert not torch.equal(mixing(images, labels, 4, seed=2)[0], mixed)
    unmixed, targets = Mixing(mixup=1.0, probability=0.0)(images, labels, 4, seed=1)
    assert torch.equal(unmixed, images)
    assert torch.equal(targets, F.one_hot(labels, 4).float())


def test_mixup_mixes_images_as_it_mixes_labels() -> None:
    images = torch.eye(4)[:, :, None, None].expand(-1, -1, 2, 2)[:, :3]  # image i is 1 in channel i
    mixed, targets = Mixing(mixup=1.0)(images, torch.arange(4), 4, seed=3)
    torch.testing.assert_close(mixed[:, :, 0, 0], targets[:, :3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Augmentation(size=0), "Augmentation.size: got 0"),
        (lambda: Augmentation(crop="centre"), "Augmentation.crop"),  # type: ignore[arg-type]
        (lambda: Augmentation(size=None), "crop='resized'"),
        (lambda: Augmentation(flip=1.5), "Augmentation.flip"),
        (lambda: Augmentation(scale=(0.5, 0.1)), "Augmentation.scale"),
        (lambda: Augmentation(policy="auto"), "Augmentation.policy"),  # type: ignore[arg-type]
        (lambda: Augmentation(magnitude=99), "Augmentation.magnitude"),
        (lambda: Mixing(), "one of them > 0"),
        (lambda: Mixing(mixup=-1.0), "Mixing.mixup"),
        (lambda: Mixing(mixup=1.0, probability=2.0), "Mixing.probability"),
    ],
)
def test_bad_values_are_named(make: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make()


def test_wrong_types_are_named() -> None:
    with pytest.raises(InvalidTypeError, match=r"Augmentation\.size: got '224'"):
        Augmentation(size="224")  # type: ignore[arg-type]
