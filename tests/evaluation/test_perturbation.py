"""Insertion and deletion on networks whose curves are known."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from bcos_rt import Recipe, bcosify
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.evaluation import Perturbation, insertion_deletion, perturbation_curves
from bcos_rt.evaluation.perturbation import filled
from bcos_rt.files import read_rows
from bcos_rt.nn.conventional import ConventionalNetwork

SIDE = 4
PIXELS = SIDE * SIDE
BLACK = (0.0, 0.0, 0.0)
LOGITS = Perturbation(steps=PIXELS, deletion=BLACK, insertion=BLACK, score="logit")


def linear(classes: int = 2) -> ConventionalNetwork:
    torch.manual_seed(0)
    return ConventionalNetwork(nn.Sequential(nn.Flatten(), nn.Linear(3 * PIXELS, classes))).double().eval()


def contributions(net: ConventionalNetwork, images: Tensor, k: int) -> Tensor:
    weight = net.model[1].weight.detach()[k].reshape(3, SIDE, SIDE)  # type: ignore[index, union-attr]
    return (weight * images).sum(1)


IMAGES = torch.rand(3, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_curves_of_a_linear_network_are_sums_of_its_contributions() -> None:
    net = linear()
    maps = contributions(net, IMAGES, 1)
    found = perturbation_curves(net, IMAGES, 1, maps, LOGITS)
    bias = float(net.model[1].bias[1].detach())  # type: ignore[index, union-attr]
    np.testing.assert_allclose(found.fractions, np.arange(PIXELS + 1) / PIXELS)
    for i in range(3):
        highest_first = sorted(maps[i].flatten().tolist(), reverse=True)
        inserted = [bias + sum(highest_first[:count]) for count in range(PIXELS + 1)]
        deleted = [bias + sum(highest_first[count:]) for count in range(PIXELS + 1)]
        np.testing.assert_allclose(found.insertion[i], inserted, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.deletion[i], deleted, rtol=1e-9, atol=1e-12)
        area = sum((a + b) / 2 for a, b in itertools.pairwise(inserted)) / PIXELS
        assert float(found.insertion_area()[i]) == pytest.approx(area)
    # No other order is better: what the areas are for.
    worst = perturbation_curves(net, IMAGES, 1, -maps, LOGITS)
    assert bool((found.insertion_area() > worst.insertion_area()).all())
    assert bool((found.deletion_area() < worst.deletion_area()).all())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_scores_and_both_ends(score: str) -> None:
    net = linear(3)
    options = Perturbation(steps=5, score=score, deletion=(0.2, 0.4, 0.6), insertion="mean")  # type: ignore[arg-type]
    found = perturbation_curves(net, IMAGES, [0, 2, 1], torch.rand(3, SIDE, SIDE), options)
    assert found.deletion.shape == found.insertion.shape == (3, 6)

    def scores(images: Tensor) -> Tensor:
        with torch.no_grad():
            logits = net(images)
        values = logits.softmax(1) if score == "softmax" else 1 / (1 + torch.exp(-logits))
        return values[torch.arange(3), torch.tensor([0, 2, 1])]

    colour = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)[:, None, None].expand_as(IMAGES)
    average = torch.stack([torch.stack([c.mean() for c in image]) for image in IMAGES])[:, :, None, None]
    torch.testing.assert_close(found.deletion[:, 0], scores(IMAGES))
    torch.testing.assert_close(found.deletion[:, -1], scores(colour))
    torch.testing.assert_close(found.insertion[:, 0], scores(average.expand_as(IMAGES)))
    torch.testing.assert_close(found.insertion[:, -1], scores(IMAGES))


def test_equal_attributions_go_in_reading_order_and_none_is_the_top_class() -> None:
    """Half of the pixels of a constant map are the upper half of the image."""
    net = linear()
    found = perturbation_curves(net, IMAGES, None, torch.ones(3, SIDE, SIDE), Perturbation(2, BLACK, score="logit"))
    halved = IMAGES.clone()
    halved[:, :, : SIDE // 2] = 0
    with torch.no_grad():
        top = net(IMAGES).argmax(1)
        expected = net(halved).gather(1, top[:, None])[:, 0]
    torch.testing.assert_close(found.deletion[:, 1], expected)


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_batch_size_changes_nothing(batch_size: int) -> None:
    net, maps = linear(), torch.rand(3, SIDE, SIDE, generator=torch.Generator().manual_seed(2))
    expected = perturbation_curves(net, IMAGES, 0, maps, Perturbation(steps=6))
    found = perturbation_curves(net, IMAGES, 0, maps, Perturbation(steps=6, batch_size=batch_size))
    torch.testing.assert_close(found.deletion, expected.deletion)
    torch.testing.assert_close(found.insertion, expected.insertion)


def test_the_blur_is_the_published_one_in_proportion() -> None:
    images = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(filled(images, "blur"), gaussian_blur(images, [11, 11], [5.0, 5.0]))
    half = images[:, :, :112, :112]
    torch.testing.assert_close(filled(half, "blur"), gaussian_blur(half, [5, 5], [2.5, 2.5]))
    torch.testing.assert_close(filled(half, "blur", 1.0), gaussian_blur(half, [3, 3], [1.0, 1.0]))
    flat = torch.full((1, 3, 2, 3), 0.3)
    torch.testing.assert_close(filled(flat, "blur", 40.0), flat)


def test_a_data_set(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)
    )
    net, _ = bcosify(source, Recipe(mean=(0, 0, 0), std=(1, 1, 1)))
    conventional = ConventionalNetwork(source).train()
    seen: list[int] = []
    result = insertion_deletion(
        {"bcos": net, "conventional": conventional},
        {"bcos": ["bcos", "random"], "conventional": ["input_x_gradient"]},
        torch.utils.data.TensorDataset(torch.rand(9, 3, 8, 8), torch.zeros(9, dtype=torch.int64)),
        images=4, options=Perturbation(steps=8), batch_size=3, tell=lambda _what, done, _of: seen.append(done),
    )  # fmt: skip
    assert seen == [3, 4] * 3
    assert conventional.training, "the mode is as it was"
    rows = result.summary()
    assert [(row["network"], row["method"]) for row in rows] == [
        ("bcos", "bcos"), ("bcos", "random"), ("conventional", "input_x_gradient"),
    ]  # fmt: skip
    for row in rows:
        assert (row["images"], row["steps"]) == (4, 8)
        assert 0 < row["deletion"] < 1
        assert 0 < row["insertion"] < 1
    curves = result.curves["bcos", "bcos"]
    assert rows[0]["deletion"] == pytest.approx(float(np.mean([float(area) for area in curves.deletion_area()])))
    result.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"perturbation.csv", "perturbation.npz", "perturbation.png"}
    (first, *_) = read_rows(tmp_path / "perturbation.csv")
    assert float(first["insertion"]) == pytest.approx(rows[0]["insertion"])
    stored = np.load(tmp_path / "perturbation.npz")
    np.testing.assert_allclose(stored["bcos/bcos/deletion"], curves.deletion, rtol=1e-6)


def test_long_names_leave_the_axes_their_room() -> None:
    long = "a_checkpoint_of_a_sweep_lr0.001_weight_decay0.0001_seed12345_epoch000100_of_resnet20.safetensors"
    result = insertion_deletion(
        {long: linear(), "b": linear()}, ["random"], (torch.rand(2, 3, SIDE, SIDE), [0, 1]), images=2,
        options=Perturbation(steps=4),
    )  # fmt: skip
    figure = result.plot()
    figure.draw_without_rendering()
    for axis in figure.axes:
        assert axis.get_position().width > 0.35
        assert axis.get_legend().get_window_extent().x1 <= figure.bbox.x1


def test_numbers_of_others_are_numbers() -> None:
    colour = tuple(np.array([0.25, 0.5, 1], np.float32))
    options = Perturbation(deletion=colour, insertion=tuple(torch.tensor(colour)), blur_sigma=np.int64(3))  # type: ignore[arg-type]
    assert options.deletion == (0.25, 0.5, 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "Perturbation.steps: got 0"),
        ({"batch_size": 0}, "Perturbation.batch_size"),
        ({"deletion": "black"}, "Perturbation.deletion: got 'black'"),
        ({"insertion": (0, 0, 255)}, "three numbers in"),
        ({"score": "probability"}, "Perturbation.score"),
        ({"blur_sigma": 0.0}, "Perturbation.blur_sigma"),
        ({"blur_sigma": "3"}, "Perturbation.blur_sigma: got '3'"),
        ({"deletion": np.zeros(3)}, "three numbers in"),
        ({"deletion": ("a", "b", "c")}, "three numbers in"),
    ],
)
def test_bad_options_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Perturbation(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": IMAGES[0]}, "images: got shape"),
        ({"maps": torch.rand(2, SIDE, SIDE)}, "maps: got shape"),
        ({"maps": torch.full((3, SIDE, SIDE), float("nan"))}, "maps: got NaN"),
        ({"targets": 2}, "class 2"),
        ({"targets": [[0, 1]] * 3}, "one class an image"),
        ({"options": Perturbation(steps=PIXELS + 1)}, f"at most {PIXELS}"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {"images": IMAGES, "targets": 0, "maps": torch.rand(3, SIDE, SIDE), "options": Perturbation(steps=4)}
    with pytest.raises(InvalidArgumentError, match=message):
        perturbation_curves(linear(), **{**arguments, **changes})  # type: ignore[arg-type]


def test_images_of_several_sizes_are_named() -> None:
    class Sizes(torch.utils.data.Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.rand(3, SIDE, SIDE + index), 0

    with pytest.raises(InvalidArgumentError, match="images of several sizes"):
        insertion_deletion({"a": linear()}, ["random"], Sizes())


@pytest.mark.parametrize("name", ["images", "batch_size"])
@pytest.mark.parametrize("value", [0, 2.5, True])
def test_counts_that_are_none_are_named(name: str, value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name}: got {value}, expected an integer of at least 1"):
        insertion_deletion({"a": linear()}, ["random"], (IMAGES, [0, 1, 0]), **{name: value})  # type: ignore[arg-type]


def test_a_network_without_methods_is_named() -> None:
    with pytest.raises(InvalidArgumentError, match="methods: got none for 'a'"):
        insertion_deletion({"a": linear()}, {"b": ["random"]}, (torch.rand(2, 3, SIDE, SIDE), None))


def test_bad_networks_and_data_are_named() -> None:
    with pytest.raises(InvalidTypeError, match="net: got str"):
        perturbation_curves("resnet", IMAGES, 0, torch.rand(3, SIDE, SIDE))  # type: ignore[arg-type]
    data = (torch.rand(2, 3, SIDE, SIDE), None)
    with pytest.raises(InvalidArgumentError, match="networks: got none"):
        insertion_deletion({}, ["random"], data)
    with pytest.raises(InvalidArgumentError, match="images: got 0"):
        insertion_deletion({"a": linear()}, ["random"], data, images=0)
    with pytest.raises(InvalidArgumentError, match="no image"):
        insertion_deletion({"a": linear()}, ["random"], (torch.rand(0, 3, SIDE, SIDE), None))


def test_maps_and_logits_of_a_data_set_that_are_not_finite_are_named() -> None:
    def unfinished(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return images.sum(1) / 0

    with pytest.raises(InvalidArgumentError, match="NaN or infinite values from 'unfinished'"):
        insertion_deletion({"a": linear()}, [unfinished], (IMAGES.float(), None), options=LOGITS)
    net = linear()
    with torch.no_grad():
        net.model[1].bias[0] = float("nan")  # type: ignore[index, union-attr]
    with pytest.raises(InvalidArgumentError, match="logits of a with NaN"):
        insertion_deletion({"a": net}, ["random"], (IMAGES.float(), None), options=LOGITS)
