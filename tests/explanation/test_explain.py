"""explain(): targets, batches, sizes, errors, pictures."""

import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from bcos_rt import Recipe, bcosify, explain
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, UnsupportedOpError
from bcos_rt.explanation import colour_picture
from bcos_rt.nn.conventional import ConventionalNetwork


class Small(nn.Module):
    """A little residual CNN with a stem pool: everything a ResNet has, in milliseconds."""

    def __init__(self, classes=7):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 2, 1)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.conv2 = nn.Conv2d(8, 8, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(8)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.relu(self.bn2(self.conv2(x)) + x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


def small(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = Small(**kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 1.5)
            nn.init.normal_(module.bias)
    return model


@pytest.fixture(scope="module")
def net():
    return bcosify(small(), Recipe())[0].eval()


def images(n=2, size=(20, 17), seed=0):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def test_shapes_and_completeness(net):
    result = explain(net, images(3))
    assert result.logits.shape == (3, 7)
    assert result.target.tolist() == result.logits.argmax(1).tolist()
    assert result.weights.shape == (3, 6, 20, 17)
    assert result.contributions.shape == (3, 20, 17)
    assert result.residual.shape == (3,)
    assert float(result.completeness_error().max()) < 1e-4
    assert not torch.allclose(result.contributions[0], result.contributions[1])
    torch.testing.assert_close(result.logits, net(images(3)).detach())


@pytest.mark.parametrize("targets", [3, [3, 3], (3, 3), torch.tensor([3, 3]), np.array([3, 3]), torch.tensor(3)])
def test_forms_of_targets_agree(net, targets):
    result = explain(net, images(), targets)
    assert result.target.tolist() == [3, 3]
    torch.testing.assert_close(result.weights, explain(net, images(), [3, 3]).weights)


def test_k_classes_equal_single_ones(net):
    many = explain(net, images(), [[1, -1, 6], [0, 2, 2]])
    assert many.weights.shape == (2, 3, 6, 20, 17)
    assert many.residual.shape == (2, 3)
    assert many.target[0, 1] == many.logits[0].argmax()
    for k in range(3):
        one = explain(net, images(), many.target[:, k])
        torch.testing.assert_close(many.weights[:, k], one.weights, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(many.residual[:, k], one.residual)
    assert many.picture().shape == (2, 3, 20, 17, 4)
    assert float(many.completeness_error().max()) < 1e-4


def test_an_encoded_image_is_accepted_as_it_is(net):
    x = images()
    torch.testing.assert_close(explain(net, torch.cat([x, 1 - x], 1)).weights, explain(net, x).weights)


def test_other_batches_and_odd_sizes(net):
    for n, size in ((1, (20, 17)), (5, (20, 17)), (2, (33, 21)), (1, (4, 5)), (1, (1, 1))):
        result = explain(net, images(n, size))
        assert result.weights.shape == (n, 6, *size)
        assert float(result.completeness_error().max()) < 1e-4


def test_empty_batch(net):
    result = explain(net, torch.rand(0, 3, 20, 17))
    assert result.weights.shape == (0, 6, 20, 17)
    assert result.logits.shape == (0, 7)
    assert result.picture().shape == (0, 20, 17, 4)
    assert explain(net, torch.rand(0, 3, 20, 17), []).target.shape == (0,)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe.equivalent(), Recipe(b=1.5, weight_norm="unit")])
def test_black_and_white_images(recipe, value):
    network = bcosify(small(), recipe)[0]
    result = explain(network, torch.full((1, 3, 20, 17), value))
    assert torch.isfinite(result.weights).all()
    assert torch.isfinite(result.picture()).all()
    assert float(result.completeness_error().max()) < 1e-4


@pytest.mark.parametrize("weight_norm", ["none", "unit"])
def test_dead_filters_and_dead_channels(weight_norm):
    model = small()
    with torch.no_grad():
        model.conv1.weight[2] = 0
        model.conv2.weight[:] = 0
        model.fc.weight[3] = 0
        model.bn1.running_var[1] = 0
        model.bn1.running_var[2] = 1e-20
    network = bcosify(model, Recipe(weight_norm=weight_norm))[0]
    for target in (None, 3):
        result = explain(network, images(), target)
        assert torch.isfinite(result.logits).all()
        assert torch.isfinite(result.weights).all()
        assert torch.isfinite(result.picture()).all()
        scale = max(1.0, float(result.logits.abs().max()))
        assert float(result.completeness_error().max()) < 1e-4 * scale


def test_a_conventional_model_gets_its_initial_explanation():
    model = small()
    result = explain(model, images())
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    with torch.no_grad():
        expected = model((images() - mean) / std)
    torch.testing.assert_close(result.logits, expected, rtol=1e-4, atol=1e-4)
    assert result.weights.shape[1] == 6
    assert result.label == "initial explanation"
    assert float(result.completeness_error().max()) < 1e-4
    with torch.no_grad():  # a later change of the weights is seen, in place or not
        model.fc.weight.mul_(2)
    assert not torch.allclose(explain(model, images()).logits, result.logits)


def test_new_weights_and_changed_layers_are_seen():
    network = bcosify(small(), Recipe())[0]
    before = explain(network, images())
    network.backbone.get_submodule("conv2").weight.data.mul_(1.5)
    after = explain(network, images())
    assert not torch.allclose(before.weights, after.weights)
    network.backbone.get_submodule("conv2").b = 1.0
    torch.testing.assert_close(explain(network, images()).logits, network(images()).detach())


def test_nothing_stays_in_the_network(net):
    network = bcosify(small(), Recipe())[0].train()
    network.backbone.get_submodule("bn1").eval()
    modes = {name: m.training for name, m in network.named_modules()}
    state = {k: v.clone() for k, v in network.state_dict().items()}
    attributes = {name: set(vars(m)) for name, m in network.named_modules()}
    result = explain(network, images())
    assert modes == {name: m.training for name, m in network.named_modules()}
    assert attributes == {name: set(vars(m)) for name, m in network.named_modules()}
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    torch.testing.assert_close(result.logits, network.eval()(images()).detach())


def test_threads_agree(net):
    expected = explain(net, images(2, (24, 24)))
    results = [None] * 4

    def run(i):
        results[i] = explain(net, images(2, (24, 24)))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for r in results:
        torch.testing.assert_close(r.weights, expected.weights)


def test_double_precision():
    network = bcosify(small().double(), Recipe())[0]
    result = explain(network, images().double())
    assert result.weights.dtype == torch.float64
    assert float(result.completeness_error().max()) < 1e-12


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (torch.rand(1, 4, 20, 17), InvalidArgumentError, "4 channels"),
        (torch.rand(1, 1, 20, 17), InvalidArgumentError, "1 channels"),
        (torch.rand(3, 20, 17), InvalidArgumentError, r"images\[None\]"),
        (torch.zeros(1, 3, 20, 17, dtype=torch.uint8), InvalidTypeError, "255"),
        (torch.full((1, 3, 20, 17), float("nan")), InvalidArgumentError, "NaN"),
        (torch.rand(1, 3, 0, 17), InvalidArgumentError, "pixel"),
        (np.zeros((1, 3, 20, 17)), InvalidTypeError, "ndarray"),
    ],
)
def test_bad_images(net, bad, error, match):
    with pytest.raises(error, match=match):
        explain(net, bad)


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (7, InvalidArgumentError),
        (-2, InvalidArgumentError),
        ([0], InvalidArgumentError),
        ([0, 1, 2], InvalidArgumentError),
        ([[0, 9], [1, 2]], InvalidArgumentError),
        ([[], []], InvalidArgumentError),
        ([[0], [1, 2]], InvalidTypeError),
        ("cat", InvalidTypeError),
        (1.0, InvalidTypeError),
        (True, InvalidTypeError),
        (torch.tensor([0.0, 1.0]), InvalidTypeError),
    ],
)
def test_bad_targets(net, bad, error):
    with pytest.raises(error, match="targets"):
        explain(net, images(), bad)


def test_bad_network():
    with pytest.raises(InvalidTypeError, match="net"):
        explain("resnet18", images())


def test_normalised_images_are_warned_about(net):
    with pytest.warns(UserWarning, match="span"):
        explain(net, images() * 4 - 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(net, images())


def test_a_network_without_image_path_is_an_error():
    model = small()
    model.relu = nn.Sigmoid()
    with pytest.raises(UnsupportedOpError, match="sigmoid"):
        explain(bcosify(model, Recipe.equivalent())[0], images())


def test_picture_follows_its_definition(net):
    """Against the published steps, written out for one image in numpy."""
    result = explain(net, images(2, (40, 33)))
    ours = result.picture(smooth=5, alpha_percentile=97).numpy()
    for i in range(2):
        w, x = result.weights[i].double().numpy(), result.images[i].double().numpy()
        unit = np.clip(w / (np.abs(w).max(0) + 1e-12), 0, None)
        rgb = unit[:3] / (unit[:3] + unit[3:] + 1e-12)
        alpha = np.where((w * x).sum(0) < 0, 1e-12, np.sqrt((w**2).sum(0)))
        padded = np.pad(alpha, 2)
        alpha = np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).mean((2, 3))
        alpha = np.clip(alpha / np.percentile(alpha, 97), 0, 1)
        np.testing.assert_allclose(ours[i], np.concatenate([rgb, alpha[None]]).transpose(1, 2, 0), atol=2e-5)
    assert ours.min() >= 0
    assert ours.max() <= 1


@pytest.mark.parametrize(("smooth", "percentile"), [(4, 99.5), (-1, 99.5), (15, 0), (15, 101)])
def test_bad_picture_options(net, smooth, percentile):
    with pytest.raises(InvalidArgumentError):
        explain(net, images()).picture(smooth, percentile)


def test_picture_of_nothing_is_transparent():
    rgba = colour_picture(torch.rand(1, 6, 8, 8), torch.zeros(1, 6, 8, 8), smooth=3)
    assert torch.isfinite(rgba).all()
    assert not rgba[..., 3].any()


def test_save(net, tmp_path):
    result = explain(net, images(), [[1, 2], [0, 3]])
    path = result.save(tmp_path / "out.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    with np.load(result.save(tmp_path / "out.npz")) as arrays:
        np.testing.assert_array_equal(arrays["weights"], result.weights.numpy())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.npz", "out.png"]
    for bad in ("out.xyz", "missing/out.png"):
        with pytest.raises(InvalidArgumentError, match="path"):
            result.save(tmp_path / bad)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(InvalidArgumentError, match="directory"):
        result.save(tmp_path / "folder.png")


def test_save_some_of_the_images(net, tmp_path):
    result = explain(net, images(3))
    with np.load(result.save(tmp_path / "out.npz", indices=[2, 0])) as arrays:
        np.testing.assert_array_equal(arrays["weights"], result.weights[[2, 0]].numpy())
        assert arrays["target"].shape == (2,)
    for bad in ([3], 0, "0", [], [1.5], [True, False, True], [None]):
        with pytest.raises((InvalidArgumentError, InvalidTypeError), match="indices"):
            result.save(tmp_path / "bad.png", indices=bad)
    with pytest.raises(InvalidArgumentError, match="dpi: got 0"):
        result.save(tmp_path / "bad.png", dpi=0)
    assert [p.name for p in tmp_path.iterdir()] == ["out.npz"]


def test_names_are_no_formulas(tmp_path):
    net, _ = bcosify(small(), Recipe(), class_names=["$_$", "x $\\foo$", "a$b$", "$", "$$", "{", "}"])
    explain(net.eval(), images(2), [1, 0]).save(tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


@pytest.mark.parametrize("scale", [1.0, 0.17, 2.6e-3])
def test_colour_bars_say_what_their_ticks_are(net, scale):
    explanation = explain(net, images(1))
    explanation.contributions.mul_(scale / explanation.contributions.abs().max())
    bar = explanation.plot().axes[-1]
    ticks, labels = bar.get_yticks(), [label.get_text() for label in bar.get_yticklabels()]
    assert len(ticks) > 4
    assert [float(label.replace("\N{MINUS SIGN}", "-")) for label in labels] == pytest.approx(ticks, abs=1e-3 * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_save_in_half_precision(dtype, tmp_path):
    net, _ = bcosify(small().to(dtype), Recipe())
    result = explain(net.eval(), images().to(dtype))
    result.save(tmp_path / "out.png")
    with np.load(result.save(tmp_path / "out.npz")) as arrays:
        np.testing.assert_array_equal(arrays["weights"], result.weights.float().numpy())


def test_autocast_around_the_call_changes_nothing(net):
    """Mixed precision would break the sum: what is explained is the network in its own dtype."""
    images = torch.rand(2, 3, 24, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = explain(net, images)
    outside = explain(net, images)
    for name in ("logits", "weights", "residual"):
        torch.testing.assert_close(getattr(inside, name), getattr(outside, name), rtol=0, atol=0)


@pytest.mark.parametrize("rows", [[torch.tensor([1, 2])] * 2, [np.array([1, 2])] * 2])
def test_a_list_of_tensors_or_arrays_is_k_classes(net, rows):
    images = torch.rand(2, 3, 24, 24)
    explanation = explain(net, images, rows)
    assert explanation.target.tolist() == [[1, 2], [1, 2]]
    assert float(explanation.completeness_error().max()) < 1e-4


def test_sparse_images_are_an_error(net):
    with pytest.raises(InvalidTypeError, match="images: got layout"):
        explain(net, torch.rand(1, 3, 8, 8).to_sparse())


def test_weights_written_through_data_are_seen():
    model, images = small(), torch.rand(1, 3, 24, 24)
    before = explain(model, images).logits
    model.fc.weight.data.mul_(2)
    after = explain(model, images).logits
    normalised = (images - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    torch.testing.assert_close(after, model(normalised).detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after)


def test_a_compiled_network_is_explained_as_what_it_wraps(net):
    compiled = torch.compile(net, backend="eager")
    torch.testing.assert_close(explain(compiled, images()).weights, explain(net, images()).weights)


def test_a_conventional_network_that_normalises_is_normalised_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    net = ConventionalNetwork(model, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), class_names=list("abcd")).eval()
    images = torch.rand(2, 3, 12, 12)
    found = explain(net, images)
    with torch.no_grad():
        torch.testing.assert_close(found.logits, net(images), rtol=1e-4, atol=1e-5)
    assert found.class_name(1) == "b"
    assert float(found.completeness_error().max()) < 1e-4
