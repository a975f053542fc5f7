"""The randomised-parameter check: what is randomised when, and how maps are compared."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bcos_rt import Recipe, bcosify
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.evaluation import parameter_randomisation
from bcos_rt.evaluation.sanity import rank_correlation, stages_of
from bcos_rt.files import read_rows
from bcos_rt.models.small import SmallResNet
from bcos_rt.nn.conventional import ConventionalNetwork

STAGES = ["fc", "layer3.0", "layer2.0", "layer1.0", "bn1", "conv1"]
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def resnet() -> ConventionalNetwork:
    torch.manual_seed(0)
    return ConventionalNetwork(SmallResNet(1, 4, 5), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)).eval()


def edges(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """A method that looks at the image alone."""
    return images.sum(1) - images.mean((1, 2, 3))[:, None, None]


def test_rank_correlation_is_spearman_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 6, (4, 5, 7), generator=generator).float()  # many equal values
    b = a + torch.randn(4, 5, 7, generator=generator)
    b[2] = -a[2]
    expected = [stats.spearmanr(x.flatten().numpy(), y.flatten().numpy()).statistic for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(rank_correlation(a, b), expected, rtol=1e-12)


def test_rank_correlation_of_known_maps() -> None:
    a = torch.arange(12.0).reshape(1, 3, 4)
    assert float(rank_correlation(a, a.exp())) == pytest.approx(1)
    assert float(rank_correlation(a, -a)) == pytest.approx(-1)
    assert float(rank_correlation(a, torch.ones_like(a))) == 0
    # By hand: 1 - 6 sum(d^2) / (n (n^2 - 1)), d = 1 twice.
    x, y = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[2.0, 1.0, 3.0, 4.0]]])
    assert float(rank_correlation(x, y)) == pytest.approx(1 - 6 * 2 / (4 * 15))


def test_stages_run_from_head_to_stem() -> None:
    assert stages_of(resnet(), IMAGES[:1]) == STAGES
    net, _ = bcosify(resnet().model, Recipe())
    found = stages_of(net.eval(), IMAGES[:1])
    assert (found[0], found[-1]) == ("fc", "conv1")


def test_parameters_outside_of_modules_come_last() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.rand(1, 3, 4, 4))
            self.head = nn.Linear(48, 2)  # made before the stem, run after it
            self.stem = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(torch.flatten(self.stem(x) + self.positions, 1))
            return logits

    net = Positions().eval()
    assert stages_of(net, torch.rand(1, 3, 4, 4)) == ["head", "stem", "(rest)"]
    positions = []

    def watch(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        positions.append(net.positions.detach().clone())  # type: ignore[union-attr, operator]
        return images.sum(1)

    parameter_randomisation(net, [watch], torch.rand(2, 3, 4, 4))
    assert torch.equal(positions[2], net.positions)
    assert not torch.equal(positions[3], net.positions)


def test_randomisation_is_cumulative_and_keeps_scales_and_the_network() -> None:
    net = resnet()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    states: list[dict[str, Tensor]] = []

    def watch(net: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
        assert torch.is_grad_enabled()
        states.append({k: v.clone() for k, v in net.state_dict().items()})
        return images.sum(1)

    found = parameter_randomisation(net, [watch], IMAGES)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert found.stages == tuple(STAGES)
    assert len(states) == 1 + len(STAGES)
    torch.testing.assert_close(states[0], before, rtol=0, atol=0)
    for done in range(len(STAGES) + 1):
        for key, value in before.items():
            if not key.endswith(("conv1.weight", "conv2.weight", "fc.weight")):
                continue
            stage = next(s for s in STAGES if key.startswith(f"model.{s}."))
            same = torch.equal(states[done][key], value)
            assert same == (STAGES.index(stage) >= done), (done, key)
    for key in ("model.fc.weight", "model.layer3.0.conv2.weight"):
        new, old = states[-1][key], before[key]
        assert float(new.square().mean().sqrt() / old.square().mean().sqrt()) == pytest.approx(1, abs=0.35)
    torch.testing.assert_close(states[-1]["model.fc.bias"].sort().values, before["model.fc.bias"].sort().values)
    torch.testing.assert_close(states[-1]["model.bn1.running_var"], before["model.bn1.running_var"])


def test_maps_without_ranks_are_counted() -> None:
    def constant(_net: nn.Module, images: Tensor, _targets: Tensor) -> Tensor:
        maps = torch.ones(len(images), *images.shape[2:])
        maps[0, 0, 0] = 2
        return maps

    found = parameter_randomisation(resnet(), [constant, edges], IMAGES)
    assert found.constant == {"constant": 2, "edges": 0}
    assert {row["method"]: row["constant"] for row in found.summary()} == found.constant


def test_a_method_that_ignores_the_network_is_found_out(tmp_path: Path) -> None:
    net = resnet()
    found = parameter_randomisation(net, [edges, "input_x_gradient"], IMAGES, targets=[0, 4, 2])
    np.testing.assert_allclose(found.correlations["edges"], 1)
    assert found.correlations["input_x_gradient"].shape == (len(STAGES), 3)
    assert np.abs(found.correlations["input_x_gradient"][-1]).max() < 0.6
    again = parameter_randomisation(net, ["input_x_gradient"], IMAGES, targets=[0, 4, 2])
    np.testing.assert_array_equal(again.correlations["input_x_gradient"], found.correlations["input_x_gradient"])
    other = parameter_randomisation(net, ["input_x_gradient"], IMAGES, targets=[0, 4, 2], seed=1)
    assert not np.array_equal(other.correlations["input_x_gradient"], found.correlations["input_x_gradient"])
    found.save(tmp_path)
    names = {"randomisation.csv", "randomisation.npz", "randomisation.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    rows = read_rows(tmp_path / "randomisation.csv")
    assert len(rows) == 2 * len(STAGES)
    assert float(rows[-1]["correlation"]) == pytest.approx(found.correlations["input_x_gradient"][-1].mean())
    stored = np.load(tmp_path / "randomisation.npz")
    assert stored["stages"].tolist() == STAGES


def test_bcos_explanations_follow_the_parameters() -> None:
    net, _ = bcosify(resnet().model, Recipe(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)))
    seen: list[str] = []
    found = parameter_randomisation(
        net.eval(), ["bcos"], IMAGES, stages=["fc", "layer3", "conv1"], tell=lambda what, _done, _of: seen.append(what)
    )
    assert list(found.stages) == seen == ["fc", "layer3", "conv1"]
    values = found.correlations["bcos"]
    assert np.isfinite(values).all()
    assert values.max() < 0.999


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": IMAGES[0]}, "images: got shape"),
        ({"stages": ["layer9"]}, "did you mean"),
        ({"stages": []}, "stages: got"),
        ({"stages": ["fc", "relu"]}, "'relu', which has none"),
        ({"stages": ["fc", "conv1", "fc"]}, "each once"),
        ({"stages": ["layer3", "layer3.0"]}, r"stages: got 'layer3\.0', all of whose parameters stages before it have"),
        ({"stages": ["(rest)", "fc"]}, r"stages: got '\(rest\)' before others"),
        ({"stages": [*STAGES, "(rest)"]}, r"stages: got '\(rest\)', all of whose parameters"),
        ({"stages": "fc"}, "stages: got 'fc'"),
        ({"targets": 5}, "class 5"),
        ({"targets": [[0, 1]] * 3}, "one class an image"),
        ({"methods": []}, "methods: got none"),
        ({"methods": [lambda net, images, targets: images]}, "maps of shape"),
        ({"methods": [lambda net, images, targets: images.sum(1) / 0]}, "NaN or infinite"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"methods": [edges], "images": IMAGES}
    with pytest.raises(InvalidArgumentError, match=message):
        parameter_randomisation(resnet(), **{**arguments, **changes})  # type: ignore[arg-type]


def test_a_wrong_type_is_named() -> None:
    with pytest.raises(InvalidTypeError, match="net: got str"):
        parameter_randomisation("resnet", [edges], IMAGES)  # type: ignore[arg-type]


def test_a_network_without_parameters_is_named() -> None:
    class Poolings(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))

    with pytest.raises(InvalidArgumentError, match="net: got Poolings, which has no parameters"):
        parameter_randomisation(Poolings(), [edges], IMAGES)


def test_logits_that_are_not_finite_are_named() -> None:
    net = resnet()
    with torch.no_grad():
        net.model.fc.bias[2] = float("nan")  # type: ignore[union-attr, operator, index]
    with pytest.raises(InvalidArgumentError, match=r"NaN or infinite values \(image 0\)"):
        parameter_randomisation(net, [edges], IMAGES)
