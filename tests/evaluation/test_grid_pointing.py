"""The grid pointing game against a literal reading of its rules, and on networks whose answer is known."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from bcos_rt import BcosNetwork, Recipe, bcosify, explain
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.evaluation import grid_pointing_game
from bcos_rt.evaluation.grid_pointing import (
    Variant,
    choose_images,
    confident_for_all,
    confident_images,
    grids_of,
    share_in_cells,
    smoothing_for,
    tiled,
)
from bcos_rt.nn.conventional import ConventionalNetwork

SIDE = 12
CLASSES = 6


class Colours(nn.Module):
    """Class k is the amount of colour k; a pixel of another colour is nothing to it."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, CLASSES, 1)
        self.act = nn.ReLU()
        with torch.no_grad():
            directions = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]).float()
            # Of a mixed colour there must be more than its parts alone can give.
            self.head.weight.copy_((2 * directions - 1)[:, :, None, None])
            self.head.bias.copy_(-1.1 * (directions.sum(1) - 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.head(x)).mean((2, 3)) * 8 - 1


def images(count: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Squares of one of six colours, a little different each."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    colours = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [1, 0, 1]]).float()
    strength = 0.6 + 0.4 * torch.rand(count, 1, 1, 1, generator=generator)
    return (colours[labels][:, :, None, None] * strength).expand(-1, -1, SIDE, SIDE).contiguous(), labels


def published_indices(by_class: dict[int, list[tuple[int, float]]], cells: int, threshold: float) -> list[int]:
    """The published procedure, read literally: legacy global generator, masks, while more classes than cells."""
    indices = []
    classes = np.array(list(by_class))
    position = dict.fromkeys(by_class, 0)

    def sure(k: int) -> bool:
        return bool(torch.tensor(by_class[k][position[k]][1]).sigmoid().item() > threshold)

    mask = np.array([bool(by_class[k]) and sure(k) for k in classes])
    np.random.seed(42)
    while mask.sum() > cells:
        for k in np.random.choice(classes[mask], size=cells, replace=False):
            indices.append(by_class[k][position[k]][0])
            position[k] += 1
            mask[k] = position[k] < len(by_class[k]) and sure(k)
    return indices


@given(
    counts=st.lists(st.integers(0, 6), min_size=5, max_size=12),
    cells=st.sampled_from([4, 9]),
    threshold=st.sampled_from([0.0, 0.5, 0.9]),
)
def test_images_are_chosen_as_published(counts: list[int], cells: int, threshold: float) -> None:
    generator = np.random.default_rng(sum(counts))
    by_class = {}
    for k, count in enumerate(counts):
        logits = sorted(generator.normal(1, 2, count).tolist(), reverse=True)
        by_class[k] = [(100 * k + i, logit) for i, logit in enumerate(logits)]
    chosen = choose_images(by_class, cells, threshold)
    sure = sum(bool(logits) and 1 / (1 + np.exp(-logits[0][1])) > threshold for logits in by_class.values())
    assume(sure != cells)
    assert chosen == published_indices(by_class, cells, threshold)
    for start in range(0, len(chosen), cells):
        assert len({index // 100 for index in chosen[start : start + cells]}) == cells


def test_just_as_many_classes_as_cells_play() -> None:
    """The published rule asks for one class more, and has no grid for them."""
    by_class = {k: [(10 * k + i, 3.0 - i) for i in range(count)] for k, count in enumerate((2, 3, 2, 5))}
    assert published_indices(by_class, 4, 0.5) == []
    chosen = choose_images(by_class, 4)
    assert [sorted(chosen[:4]), sorted(chosen[4:])] == [[0, 10, 20, 30], [1, 11, 21, 31]]


def test_offsets_are_the_published_ones() -> None:
    chosen = [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]

    def label(index: int) -> int:
        return index % 10

    assert grids_of(chosen, label, 4, 9, published_offsets=False) == [chosen[:4], chosen[4:8], chosen[8:]]
    # After the first grid image 10 is left out; 20 is the next of its class.
    assert grids_of(chosen, label, 4, 9) == [[0, 1, 2, 3], [11, 12, 13, 20]]
    assert grids_of(chosen, label, 4, 1) == [[0, 1, 2, 3]]


def test_shares_by_hand() -> None:
    maps = torch.zeros(3, 4, 4)
    maps[0, :2, 2:] = 1.0  # all in the upper right cell
    maps[1] = 1.0
    maps[1, 2:, :2] = -5.0  # negative values count as nothing
    expected = torch.tensor([[0, 1, 0, 0], [1 / 3, 1 / 3, 0, 1 / 3], [0, 0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(share_in_cells(maps, 2), expected)
    # One bright pixel in a corner of its cell, averaged over 3 x 3: 4 of 9 places stay in the cell.
    point = torch.zeros(1, 4, 4)
    point[0, 1, 1] = 1.0
    torch.testing.assert_close(
        share_in_cells(point, 2, 3), torch.tensor([[4 / 9, 2 / 9, 2 / 9, 1 / 9]], dtype=torch.float64)
    )


@pytest.mark.parametrize(("cell", "window"), [(224, 15), (112, 7), (32, 3), (8, 1)])
def test_window_is_in_proportion(cell: int, window: int) -> None:
    assert smoothing_for(cell) == window


def test_sure_images_are_the_right_ones_in_order() -> None:
    data = images()
    labels = data[1].clone()
    labels[:6] = (labels[:6] + 1) % CLASSES  # six labels the network will not agree with
    net = ConventionalNetwork(Colours()).eval()
    from bcos_rt.data import open_data

    found = confident_images(net, open_data((data[0], labels)), batch_size=7)
    assert sum(map(len, found.values())) == 54
    with torch.no_grad():
        logits = net(data[0])
    for k, entries in found.items():
        assert all(int(labels[i]) == k and int(logits[i].argmax()) == k for i, _ in entries)
        assert [v for _, v in entries] == sorted((float(logits[i, k]) for i, _ in entries), reverse=True)


@pytest.mark.parametrize("variant", ["full", "rescaled", "strided"])
def test_a_network_that_looks_at_its_class_points_at_it(variant: str, tmp_path: Path) -> None:
    net = ConventionalNetwork(Colours())
    result = grid_pointing_game(
        {"colours": net}, ["input_x_gradient", "random"], images(), n=2, grids=5, smooth=0,
        variant=variant, stride=SIDE if variant == "strided" else None,  # type: ignore[arg-type]
    )  # fmt: skip
    rows = {row["method"]: row for row in result.summary()}
    assert rows["input_x_gradient"]["mean"] > 0.999
    assert rows["random"]["mean"] == pytest.approx(0.25, abs=0.02)
    assert rows["random"]["grids"] == 5
    result.save(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "localisation.csv", "localisation.npz", "localisation.png", "localisation_example.png"
    }  # fmt: skip
    stored = np.load(tmp_path / "localisation.npz")
    np.testing.assert_allclose(stored["colours/random"], result.shares["colours", "random"], rtol=1e-6)


@pytest.mark.parametrize(("variant", "cell", "window"), [("full", 48, 3), ("rescaled", 24, 1)])
def test_the_game_is_the_published_one_played_by_hand(variant: Variant, cell: int, window: int) -> None:
    """Choice, offsets, shrinking, smoothing and shares together; colours of uneven strength in every image."""
    torch.manual_seed(0)
    colours, labels = images(36)
    noise = torch.nn.functional.interpolate(0.5 + 0.5 * torch.rand(36, 1, 16, 16), (48, 48), mode="bilinear")
    data = colours[:, :, :1, :1] * noise
    net = ConventionalNetwork(Colours()).eval()

    def uneven(net: nn.Module, grid: Tensor, targets: Tensor) -> Tensor:
        """Brightness of the class's colour, and a pattern that no smoothing leaves as it is."""
        rows = torch.arange(grid.shape[2])[:, None] + 2 * torch.arange(grid.shape[3])
        weight = net.model.head.weight.detach()[targets]  # type: ignore[union-attr, index]
        seen = (weight * grid).sum(1)
        return seen + torch.sin(rows.float()) * grid.sum(1)

    found = grid_pointing_game({"net": net}, {"net": [uneven]}, (data, labels), n=2, grids=4, variant=variant)
    assert found.smooth == window
    by_class: dict[int, list[tuple[int, float]]] = {k: [] for k in range(CLASSES)}
    with torch.no_grad():
        logits = net(data)
    for i in logits.amax(1).argsort(descending=True, stable=True).tolist():
        if int(logits[i].argmax()) == int(labels[i]):
            by_class[int(labels[i])].append((i, float(logits[i].max())))
    order = published_indices(by_class, 4, 0.5)
    expected, start = [], 0
    for _ in range(4):
        chosen: list[int] = []
        read = 0
        while len(chosen) < 4 and start + read < len(order):
            index = order[start + read]
            read += 1
            if int(labels[index]) not in [int(labels[j]) for j in chosen]:
                chosen.append(index)
        if len(chosen) < 4:
            break
        start += read + 1
        parts = data[chosen]
        if variant == "rescaled":
            parts = torch.nn.functional.interpolate(parts, (24, 24), mode="bilinear", antialias=True).clamp(0, 1)
        grid = torch.cat([torch.cat([parts[0], parts[1]], 1), torch.cat([parts[2], parts[3]], 1)], 2)
        for place, index in enumerate(chosen):
            values = uneven(net, grid[None], labels[index][None])[0]
            rows = torch.nn.functional.pad(values, [window // 2] * 4).unfold(0, window, 1).unfold(1, window, 1)
            positive = rows.double().mean((-2, -1)).clamp(min=0)
            top, left = place % 2 * cell, place // 2 * cell
            expected.append(float(positive[top : top + cell, left : left + cell].sum() / positive.sum()))
    (shares,) = found.shares.values()
    assert len(expected) > 8
    np.testing.assert_allclose(shares, expected, rtol=1e-5)
    low, high = np.percentile(shares, [5, 95])
    ends = [float(y) for line in found.plot().axes[0].lines for y in np.atleast_1d(line.get_ydata())]
    inside = [s for s in shares if low <= s <= high]
    # Whiskers end at the last shares within 5 and 95 %.
    assert np.isclose(ends, min(inside)).any()
    assert np.isclose(ends, max(inside)).any()


def test_maps_without_a_positive_part_are_counted() -> None:
    def half(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return -torch.ones(len(images), *images.shape[2:]) if int(targets[0]) < 3 else images.sum(1)

    result = grid_pointing_game({"a": ConventionalNetwork(Colours())}, [half], images(), n=2, grids=5, smooth=0)
    (row,) = result.summary()
    assert row["empty"] == int((result.shares["a", "half"] == 0).sum()) > 0


def test_a_constant_map_scores_chance() -> None:
    def constant(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return torch.ones(len(images), *images.shape[2:])

    result = grid_pointing_game({"a": ConventionalNetwork(Colours())}, [constant], images(), n=2, grids=3, smooth=0)
    np.testing.assert_allclose(result.shares["a", "constant"], 0.25)


def test_bcos_networks_are_explained_by_themselves() -> None:
    source = Colours()
    net, _ = bcosify(source, Recipe(mean=(0, 0, 0), std=(1, 1, 1), logit_bias=None, biases="keep", head="after_pool"))
    result = grid_pointing_game({"a": net.eval()}, ["bcos"], images(), n=2, grids=3, smooth=0)
    assert result.summary()[0]["mean"] > 0.9


def test_networks_have_their_own_grids_unless_told_otherwise() -> None:
    first, second = ConventionalNetwork(Colours()), ConventionalNetwork(Colours())
    with torch.no_grad():
        second.model.head.bias[0] = -9  # type: ignore[union-attr, operator, index]
    # The second knows five classes: own grids can be made, with other images.
    seen: dict[str, list[Tensor]] = {"first": [], "second": []}

    def remember(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        seen["first" if net is first else "second"].append(images[0].clone())
        return torch.ones(len(images), *images.shape[2:])

    nets = {"first": first, "second": second}
    grid_pointing_game(nets, [remember], images(), n=2, grids=4)
    assert not all(torch.equal(a, b) for a, b in zip(seen["first"], seen["second"], strict=True))
    seen["first"].clear()
    seen["second"].clear()
    grid_pointing_game(nets, [remember], images(), n=2, grids=4, same_grids="first")
    assert all(torch.equal(a, b) for a, b in zip(seen["first"], seen["second"], strict=True))


def test_the_same_grids_are_of_images_that_every_network_is_sure_of() -> None:
    first, second = ConventionalNetwork(Colours()).train(), ConventionalNetwork(Colours())
    data, labels = images()
    with torch.no_grad():
        second.model.head.bias[1] -= 0.85  # type: ignore[union-attr, operator, index]
        sure = [
            {i for i in range(60) if int(v[i].argmax()) == int(labels[i]) and float(v[i].max()) > 0}
            for v in (first(data), second(data))
        ]
    assert sure[0] != sure[1], "or there is nothing to test"
    allowed = sure[0] & sure[1]
    seen: list[list[int]] = []

    def remember(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        assert not net.training
        corners = [images[0, :, y, x] for x in (0, SIDE) for y in (0, SIDE)]
        seen.append([int((data[:, :, 0, 0] == corner).all(1).nonzero()[0, 0]) for corner in corners])
        # Column by column: the targets are those of the corners.
        assert targets.tolist() == [int(labels[i]) for i in seen[-1]]
        return torch.ones(len(images), *images.shape[2:])

    nets = {"first": first, "second": second}
    result = grid_pointing_game(nets, [remember], (data, labels), n=2, grids=4, same_grids=True, smooth=0)
    half = len(seen) // 2
    assert seen[:half] == seen[half:]
    assert {i for grid in seen for i in grid} <= allowed
    assert first.training, "the mode is as it was"
    assert {row["images_of"] for row in result.summary()} == {"first + second"}
    seen.clear()
    own = grid_pointing_game(nets, [remember], (data, labels), n=2, grids=4, smooth=0)
    assert [row["images_of"] for row in own.summary()] == ["first", "second"]
    assert not {i for grid in seen for i in grid} <= allowed
    assert len(own.plot_example().axes) == 4, "a grid and a map of each"


def test_long_names_stay_over_their_pictures() -> None:
    long = "a_checkpoint_of_a_sweep_lr0.001_weight_decay0.0001_seed12345_epoch000100_of_resnet20.safetensors"
    net = ConventionalNetwork(Colours())
    result = grid_pointing_game({long: net, "b": net}, ["input_x_gradient", "random"], images(), n=2, grids=1, smooth=0)
    for figure in (result.plot_example(), result.plot()):
        figure.draw_without_rendering()
        titles = [axis.title.get_window_extent() for axis in figure.axes]
        assert min(title.x0 for title in titles) >= 0
        assert max(title.x1 for title in titles) <= figure.bbox.x1
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(titles))


def test_confidence_of_several_networks_is_the_least() -> None:
    first = {0: [(5, 9.0), (2, 3.0), (7, 1.0)], 1: [(1, 4.0)], 2: [(8, 2.0)]}
    second = {0: [(2, 4.0), (5, 2.0)], 1: [(1, 0.5)]}
    assert confident_for_all([first, second]) == {0: [(2, 3.0), (5, 2.0)], 1: [(1, 0.5)], 2: []}
    assert confident_for_all([first]) == first


def test_our_own_explanation_of_a_grid_is_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = bcosify(
        Colours(), Recipe(mean=(0, 0, 0), std=(1, 1, 1), logit_bias=None, biases="keep", head="after_pool")
    )
    calls = []

    def counted(net: nn.Module, images: Tensor, targets: Tensor) -> object:
        calls.append((len(images), tuple(targets.shape)))
        return explain(net, images, targets)

    monkeypatch.setattr("bcos_rt.evaluation.attribution.explain", counted)
    grid_pointing_game({"a": net.eval()}, ["bcos"], images(), n=2, grids=3, smooth=0)
    assert calls == [(1, (1, 4))] * 3


def test_images_are_placed_as_published() -> None:
    """Row i % n, column i // n, a literal reading of the published view and permutation."""
    cells = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    published = cells.view(-1, 3, 3, 3, 4, 4).permute(0, 3, 2, 4, 1, 5).reshape(3, 12, 12)
    assert torch.equal(tiled(cells, 3), published)


def test_windows_cover_the_whole_grid_whatever_the_stride() -> None:
    """5 does not go into 12: without windows at the edge a strip would have no attribution."""
    covered = []

    def ones(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        covered.append(tuple(images.shape[2:]))
        return torch.ones(len(images), *images.shape[2:])

    net = ConventionalNetwork(Colours())
    result = grid_pointing_game({"a": net}, [ones], images(), n=2, grids=1, smooth=0, variant="strided", stride=5)
    assert covered == [(SIDE, SIDE)] * 16
    np.testing.assert_allclose(result.shares["a", "ones"], 0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 1}, "n: got 1"),
        ({"networks": {}}, "networks"),
        ({"networks": [Colours()]}, "networks: got list"),
        ({"confidence": "0.5"}, r"confidence: got '0\.5'"),
        ({"variant": "half"}, "variant: got 'half'"),
        ({"smooth": 4}, "smooth: got 4"),
        ({"same_grids": "b"}, "same_grids"),
        ({"grids": 0}, "grids: got 0"),
        ({"stride": 0}, "stride: got 0"),
        ({"stride": SIDE + 1, "variant": "strided"}, "stride: got 13"),
        ({"methods": {"b": ["random"]}}, "none for 'a'"),
        ({"methods": []}, "methods: got none"),
        ({"methods": ["random", "random"]}, "'random' twice"),
        ({"methods": ["input_times_gradient"]}, "did you mean 'input_x_gradient'"),
        ({"n": 3}, r"data: got 6 classes with an image right for 'a' with a confidence > 0\.5, .*at least 9"),
        ({"confidence": 0.9999}, "data: got 0 classes"),
        ({"confidence": 1.0}, "confidence: got 1"),
        ({"n": 2.0}, r"n: got 2\.0, expected an integer"),
        ({"n": SIDE + 1, "variant": "rescaled"}, "n: got 13"),
        ({"smooth": -3}, "smooth: got -3"),
        ({"stride": 3}, "stride: got 3, expected None for variant='full'"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"methods": "random"}, "methods: got 'random'"),
        ({"data": (torch.zeros(3, 3, 4, 6), torch.arange(3))}, "square images"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {"networks": {"a": ConventionalNetwork(Colours())}, "methods": ["random"], "data": images(), "n": 2}
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=message):
        grid_pointing_game(**{**arguments, **changes})  # type: ignore[arg-type]


def test_a_network_without_parameters_plays() -> None:
    class Six(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Colours()(x)

    result = grid_pointing_game({"a": Six()}, ["input_x_gradient"], images(), n=2, grids=2, smooth=0)
    assert result.summary()[0]["grids"] == 2


@pytest.mark.parametrize("variant", ["full", "strided"])
def test_maps_that_cannot_be_scored_are_refused(variant: Variant) -> None:
    """Not a number would count as nothing, and a smaller map's cells are other places."""

    def unfinished(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return torch.full((len(images), *images.shape[2:]), float("nan"))

    def coarse(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        return torch.rand(len(images), images.shape[2] // 2, images.shape[3] // 2)

    nets = {"a": ConventionalNetwork(Colours())}
    for broken, message in ((unfinished, "NaN or infinite values from 'unfinished'"), (coarse, "from 'coarse'")):
        with pytest.raises(InvalidArgumentError, match=message):
            grid_pointing_game(nets, [broken], images(), n=2, grids=2, variant=variant)


def test_logits_that_are_not_finite_are_refused() -> None:
    net = ConventionalNetwork(Colours())
    with torch.no_grad():
        net.model.head.bias[0] = float("nan")  # type: ignore[union-attr, operator, index]
    with pytest.raises(InvalidArgumentError, match="NaN or infinite"):
        grid_pointing_game({"a": net}, ["random"], images(), n=2)


@pytest.mark.parametrize("kind", ["conventional", "bcos"])
def test_the_published_strided_variant(kind: str) -> None:
    """Against a literal reading: unfold with padding, a map of every window, fold."""
    net: nn.Module = ConventionalNetwork(Colours(), (0.4, 0.5, 0.6), (0.5, 0.25, 0.5))
    if kind == "bcos":
        net = bcosify(Colours(), Recipe(mean=(0.4, 0.5, 0.6), std=(0.5, 0.25, 0.5), logit_bias=None, biases="keep"))[0]
    data, stride, side = images(), 4, SIDE
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def squares(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        """Depends on every channel and on the class."""
        assert isinstance(net, ConventionalNetwork | BcosNetwork)
        inner = (images - net.mean) / net.std if isinstance(net, ConventionalNetwork) else net.encode(images)
        maps = inner.square().sum(1) * (1 + targets[:, None, None])
        seen.append((inner, targets, maps))
        return maps

    result = grid_pointing_game(
        {"a": net.eval()}, [squares], data, n=2, grids=1, smooth=0, variant="strided_padded", stride=stride
    )
    grid, found = result.example["a", "squares"]
    normalised = (grid[None] - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / torch.tensor([0.5, 0.25, 0.5])[
        :, None, None
    ]
    multi = normalised if kind == "conventional" else torch.cat([grid, 1 - grid])[None]
    patches = torch.nn.functional.unfold(multi, side, stride=stride, padding=side - stride)
    patches = patches.view(1, multi.shape[1], side, side, -1)
    assert len(seen) == patches.shape[-1] == 64
    first = int(seen[0][1][0])
    maps = []
    for i, (inner, targets, _) in enumerate(seen):
        assert int(targets[0]) == first
        torch.testing.assert_close(inner[0], patches[0, ..., i])
        maps.append(patches[..., i].square().sum(1) * (1 + first))
    stacked = torch.stack(maps, -1).view(1, side * side, -1)
    expected = torch.nn.functional.fold(stacked, (2 * side, 2 * side), side, stride=stride, padding=side - stride)
    torch.testing.assert_close(found, expected[0, 0])
    with pytest.raises(InvalidArgumentError, match="stride: got 5, expected a divisor of 12"):
        grid_pointing_game({"a": net}, [squares], data, n=2, variant="strided_padded", stride=5)


def test_our_own_explanation_of_padded_windows() -> None:
    recipe = Recipe(mean=(0, 0, 0), std=(1, 1, 1), logit_bias=None, biases="keep", head="after_pool")
    net = bcosify(Colours(), recipe)[0].eval()
    result = grid_pointing_game({"a": net}, ["bcos"], images(), n=2, grids=1, smooth=0, variant="strided_padded")
    assert result.summary()[0]["mean"] > 0.9


def test_workers_read_the_same_images() -> None:
    net = {"a": ConventionalNetwork(Colours())}
    one, two = (grid_pointing_game(net, ["random"], images(), n=2, grids=3, workers=k, batch_size=16) for k in (0, 1))
    np.testing.assert_array_equal(one.shares["a", "random"], two.shares["a", "random"])
