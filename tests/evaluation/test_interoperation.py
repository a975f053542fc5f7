"""The explanation under captum and Quantus, against autograd and against explain()."""

import copy
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from bcos_rt import BcosNetwork, Recipe, bcosify, explain
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, MissingDependencyError
from bcos_rt.evaluation import BcosAttribution, quantus_explain
from bcos_rt.models.small import SmallResNet

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TARGETS = [0, 4, 2]


def network(recipe: Recipe) -> BcosNetwork:
    torch.manual_seed(0)
    return bcosify(SmallResNet(1, 4, 5), recipe)[0].eval()


@pytest.fixture(scope="module")
def net() -> BcosNetwork:
    return network(Recipe(mean=MEAN, std=STD))


def test_channels_are_the_gradient_s_where_that_is_exact() -> None:
    """At B = 1 nothing but ReLUs depends on the image: W is the gradient in the encoded image."""
    torch.manual_seed(0)
    net = bcosify(SmallResNet(1, 4, 5).double(), Recipe.equivalent(mean=MEAN, std=STD))[0].eval()
    images = IMAGES.double()
    encoded = net.encode(images).requires_grad_()
    assert encoded.shape[1] == 6
    net.forward_encoded(encoded).gather(1, torch.tensor(TARGETS)[:, None]).sum().backward()
    assert encoded.grad is not None
    expected = encoded.grad[:, :3] * images + encoded.grad[:, 3:] * (1 - images)
    torch.testing.assert_close(BcosAttribution(net).attribute(images, TARGETS), expected)


def test_the_sum_over_channels_is_the_contribution_map(net: BcosNetwork) -> None:
    attribution = BcosAttribution(net)
    found = attribution.attribute(IMAGES, target=torch.tensor(TARGETS))
    assert found.shape == IMAGES.shape
    explanation = explain(net, IMAGES, TARGETS)
    torch.testing.assert_close(found.sum(1), explanation.contributions, rtol=1e-4, atol=1e-6)
    encoded = net.encode(IMAGES)
    by_six = attribution.attribute(encoded, target=TARGETS)
    assert by_six.shape == encoded.shape
    torch.testing.assert_close(by_six[:, :3] + by_six[:, 3:], found)


def test_three_channels() -> None:
    net = network(Recipe(mean=MEAN, std=STD, input_encoding="three_channel"))
    found = BcosAttribution(net).attribute(IMAGES, target=1)
    torch.testing.assert_close(found, explain(net, IMAGES, 1).weights * IMAGES)


@pytest.mark.parametrize("target", [3, (3,), [3, 3, 3], [(3,), (3,), (3,)], torch.tensor([3]), torch.tensor([3, 3, 3])])
def test_targets_as_captum_takes_them(net: BcosNetwork, target: object) -> None:
    expected = explain(net, IMAGES, 3).contributions
    found = BcosAttribution(net).attribute(IMAGES, target)
    torch.testing.assert_close(found.sum(1), expected, rtol=1e-4, atol=1e-6)


def test_no_target_is_the_top_class(net: BcosNetwork) -> None:
    found = BcosAttribution(net).attribute(IMAGES)
    torch.testing.assert_close(found.sum(1), explain(net, IMAGES).contributions, rtol=1e-4, atol=1e-6)


def test_tuples_come_back_as_tuples(net: BcosNetwork) -> None:
    attribution = BcosAttribution(net)
    (found,), delta = attribution.attribute((IMAGES,), 1, return_convergence_delta=True)
    torch.testing.assert_close(found, attribution.attribute(IMAGES, 1))
    torch.testing.assert_close(delta, attribution.compute_convergence_delta((found,), (IMAGES,), 1))


def test_the_convergence_delta_is_the_completeness_error(net: BcosNetwork) -> None:
    attribution = BcosAttribution(net)
    assert attribution.has_convergence_delta()
    assert attribution.multiplies_by_inputs
    found = attribution.attribute(IMAGES, TARGETS)
    delta = attribution.compute_convergence_delta(found, IMAGES, TARGETS)
    with torch.no_grad():
        scale = float(net(IMAGES).abs().max())
    assert delta.shape == (3,)
    assert float(delta.abs().max()) < 1e-5 * scale
    wrong = attribution.compute_convergence_delta(found + 0.5, IMAGES, TARGETS)
    torch.testing.assert_close(wrong, torch.full((3,), 0.5 * found[0].numel(), dtype=torch.float64), rtol=1e-4, atol=0)


def test_captum_s_wrappers_take_it(net: BcosNetwork) -> None:
    """Without noise the mean over noisy images is the attribution."""
    captum = pytest.importorskip("captum.attr")
    attribution = BcosAttribution(net)
    assert isinstance(attribution, captum.Attribution)
    found = captum.NoiseTunnel(attribution).attribute(IMAGES, nt_samples=2, stdevs=0.0, target=1)
    torch.testing.assert_close(found, attribution.attribute(IMAGES, 1), rtol=1e-4, atol=1e-6)
    _, delta = captum.NoiseTunnel(attribution).attribute(
        IMAGES, nt_samples=2, stdevs=0.01, target=TARGETS, return_convergence_delta=True
    )
    # One of every noisy image.
    assert delta.shape == (6,)
    assert float(delta.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("inputs", "target", "error", "message"),
    [
        ("image", 0, InvalidTypeError, "inputs: got str"),
        ((IMAGES, IMAGES), 0, InvalidTypeError, "a tuple of 2"),
        (IMAGES, 5, InvalidArgumentError, "class 5"),
        (IMAGES, (1, 2), InvalidArgumentError, "target: got a tuple of 2"),
        (IMAGES, torch.tensor([[0, 1]] * 3), InvalidArgumentError, "several classes"),
        (IMAGES, [[0, 1]] * 3, InvalidArgumentError, "several classes"),
    ],
)
def test_bad_arguments_are_named(
    net: BcosNetwork, inputs: object, target: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        BcosAttribution(net).attribute(inputs, target)


def test_other_networks_and_shapes_are_named(net: BcosNetwork) -> None:
    with pytest.raises(InvalidTypeError, match="net: got SmallResNet"):
        BcosAttribution(SmallResNet(1, 4, 5))  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="attributions: got shape"):
        BcosAttribution(net).compute_convergence_delta(IMAGES[:, :1], IMAGES, 0)


def test_without_captum_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.delitem(sys.modules, "bcos_rt.evaluation.with_captum")
    import bcos_rt.evaluation

    monkeypatch.delitem(vars(bcos_rt.evaluation), "BcosAttribution", raising=False)
    with pytest.raises(MissingDependencyError, match=r"bcos-rt\[evaluate\]"):
        bcos_rt.evaluation.BcosAttribution  # noqa: B018 (importing it is the test)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        bcos_rt.evaluation.Nothing  # noqa: B018


# --- Quantus ---------------------------------------------------------------------------------------------------------


def test_the_function_for_quantus(net: BcosNetwork) -> None:
    inputs = IMAGES.numpy()[:, :, ::-1]  # backwards in memory, as after a flip
    found = quantus_explain(net, inputs, np.array(TARGETS, dtype=np.int32), device="cpu")
    assert found.shape == (3, 1, 16, 16)
    assert found.dtype == np.float32
    expected = explain(net, IMAGES.flip(2), TARGETS).contributions
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=1e-7)


def test_bad_arguments_of_the_function_for_quantus(net: BcosNetwork) -> None:
    with pytest.raises(InvalidTypeError, match="model: got SmallResNet"):
        quantus_explain(SmallResNet(1, 4, 5), IMAGES.numpy(), TARGETS)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="targets"):
        quantus_explain(net, IMAGES.numpy(), [0, 1])
    with pytest.raises(InvalidTypeError, match="targets"):
        quantus_explain(net, IMAGES.numpy(), np.array([0.5, 1, 2]))
    with pytest.raises(InvalidTypeError, match="targets: got NoneType"):
        quantus_explain(net, IMAGES.numpy(), None)
    with_gradient = quantus_explain(net, IMAGES.clone().requires_grad_(), TARGETS)
    np.testing.assert_array_equal(with_gradient, quantus_explain(net, IMAGES.numpy(), TARGETS))


class AsQuantus:
    """How a metric of Quantus calls an ``explain_func`` and what it asks of the result, without the package.

    Read from ``Metric.general_preprocess`` in quantus/metrics/base.py, and from what it calls: ``assert_explain_func``,
    ``expand_attribution_channel``, ``assert_attributions``. The package itself is not asked.
    """

    def __init__(self, explain_func: Callable[..., np.ndarray], explain_func_kwargs: dict[str, object] | None = None):
        assert callable(explain_func)
        self.explain_func, self.options = explain_func, dict(explain_func_kwargs or {})

    def attributions(
        self, model: torch.nn.Module, x_batch: np.ndarray, y_batch: np.ndarray, device: str | None
    ) -> np.ndarray:
        if device is not None and "device" not in self.options:
            self.options["device"] = device
        a_batch = self.explain_func(model=model, inputs=x_batch, targets=y_batch, **self.options)
        assert type(a_batch) is np.ndarray
        # The dimensions of an attribution are those of the image, or have one channel for all of its.
        assert a_batch.shape[0] == x_batch.shape[0]
        assert a_batch.ndim == x_batch.ndim
        assert all(a in (1, x) for a, x in zip(a_batch.shape[1:], x_batch.shape[1:], strict=True))
        expanded = np.broadcast_to(a_batch, x_batch.shape)
        assert not np.all(expanded == 0)
        assert not np.all(expanded == 1)
        assert not np.any(np.isnan(expanded))
        return expanded


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("device", ["cpu", None])
def test_it_is_called_as_quantus_documents(net: BcosNetwork, dtype: type, device: str | None) -> None:
    x, y = IMAGES.numpy().astype(dtype), np.array(TARGETS)
    found = AsQuantus(quantus_explain).attributions(net, x, y, device)
    expected = explain(net, IMAGES, TARGETS).contributions
    for channel in range(3):
        np.testing.assert_allclose(found[:, channel], expected, rtol=1e-5, atol=1e-7)
    # Other options of a user's are passed on, and say nothing to an explanation without any.
    again = AsQuantus(quantus_explain, {"method": "Saliency", "device": "cpu"}).attributions(net, x, y, device)
    np.testing.assert_array_equal(again, found)


def test_it_explains_the_copies_that_quantus_randomises(net: BcosNetwork) -> None:
    """The model parameter randomisation test calls it with deep copies, of which layers are reset."""
    randomised = copy.deepcopy(net)
    torch.manual_seed(1)
    randomised.backbone.fc.reset_parameters()  # type: ignore[union-attr, operator]
    x, y = IMAGES.numpy(), np.array(TARGETS)
    called = AsQuantus(quantus_explain)
    before = called.attributions(net, x, y, "cpu")
    assert not np.allclose(called.attributions(randomised, x, y, "cpu"), before)
    np.testing.assert_array_equal(called.attributions(net, x, y, "cpu"), before)


def test_a_metric_of_quantus_calls_it(net: BcosNetwork) -> None:
    """Its scores are those of the maps given to it directly. Not among what CI installs: see AsQuantus."""
    quantus = pytest.importorskip("quantus")
    x, y = IMAGES.numpy(), np.array(TARGETS)
    options = {"model": net, "x_batch": x, "y_batch": y, "device": "cpu", "softmax": False, "channel_first": True}

    def metric() -> object:
        return quantus.PixelFlipping(features_in_step=64, disable_warnings=True, display_progressbar=False)

    called = metric()(**options, explain_func=quantus_explain)  # type: ignore[operator]
    maps = explain(net, IMAGES, TARGETS).contributions[:, None].numpy()
    given = metric()(**options, a_batch=maps)  # type: ignore[operator]
    assert np.array(called).shape == (3, 3 * 16 * 16 // 64)
    np.testing.assert_allclose(called, given, rtol=1e-5)


def test_explanations_leave_no_gradient(net: BcosNetwork) -> None:
    images: Tensor = IMAGES.clone().requires_grad_()
    found = BcosAttribution(net).attribute(images, 1)
    assert not found.requires_grad
    assert images.grad is None
