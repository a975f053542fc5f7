"""Statistics over several batches, what stays as it was, and bad loaders."""

import pytest
import torch
from torch import nn

from bcos_rt.conversion import Recipe, bcosify, recalibrate
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from tests.conversion.models import images, net


def converted(**changes):
    return bcosify(net(), Recipe(**changes))[0]


def first_conv_variance(network, x):
    with torch.no_grad():
        z = network.backbone.conv(network.encoding(network.encode(x)))
    return z.var(dim=(0, 2, 3), correction=0), z.mean(dim=(0, 2, 3))


def norm_of(network):
    return network.backbone.get_submodule("norm")


def test_no_momentum_averages_the_batches_equally():
    network = converted()
    batches = [images(n=2), images((24, 24), n=4) ** 2, images(n=1) * 0.5]
    recalibrate(network, ((b, torch.zeros(len(b))) for b in batches))
    expected = [torch.stack(v).mean(0) for v in zip(*(first_conv_variance(network, b) for b in batches), strict=True)]
    torch.testing.assert_close(norm_of(network).running_var, expected[0])
    torch.testing.assert_close(norm_of(network).running_mean, expected[1])
    assert int(norm_of(network).num_batches_tracked) == 3


def test_momentum_updates_the_old_statistics():
    network = converted()
    old = norm_of(network).running_var.clone()
    var, _ = first_conv_variance(network, images())
    recalibrate(network, images(), momentum=0.25)
    torch.testing.assert_close(norm_of(network).running_var, 0.75 * old + 0.25 * var)


def test_modes_momenta_and_weights_stay():
    network = converted()
    network.backbone.get_submodule("drop").train()
    modes = {name: m.training for name, m in network.named_modules()}
    before = {name: p.clone() for name, p in network.named_parameters()}
    recalibrate(network, images())
    assert {name: m.training for name, m in network.named_modules()} == modes
    assert norm_of(network).momentum == 0.1
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_dropout_is_off_and_the_result_repeats():
    network = converted().train()
    recalibrate(network, images())
    first = norm_of(network).running_var.clone()
    recalibrate(network, images())
    assert torch.equal(norm_of(network).running_var, first)


def test_one_value_per_channel_has_variance_zero():
    network = bcosify(net(conv=nn.Conv2d(3, 8, 16)), Recipe())[0]
    recalibrate(network, images((16, 16), n=1))
    assert torch.equal(norm_of(network).running_var, torch.zeros(8))
    with torch.no_grad():
        assert network(images((16, 16))).isfinite().all()


def test_conventional_batch_norm_needs_more_than_one_value():
    network = bcosify(net(conv=nn.Conv2d(3, 8, 16)), Recipe(batch_norm="keep"))[0]
    old = norm_of(network).running_var.clone()
    with pytest.raises(InvalidArgumentError, match="one value per channel"):
        recalibrate(network, images((16, 16), n=1))
    assert torch.equal(norm_of(network).running_var, old)


def test_batches_take_the_network_dtype():
    network = converted().double()
    recalibrate(network, [images()])
    assert norm_of(network).running_var.dtype == torch.float64


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], InvalidArgumentError, "at least one batch"),
        ([images(n=0)], InvalidArgumentError, "an empty batch"),
        ([{"image": images()}], InvalidTypeError, "a batch of type dict"),
        (3, InvalidTypeError, "iterable"),
    ],
)
def test_bad_loaders_leave_the_statistics(loader, error, message):
    network = converted()
    old = norm_of(network).running_var.clone()
    with pytest.raises(error, match=message):
        recalibrate(network, loader)
    assert torch.equal(norm_of(network).running_var, old)
    assert norm_of(network).momentum == 0.1


def test_failure_midway_restores_the_statistics():
    network = converted()
    old = norm_of(network).running_var.clone()
    with pytest.raises(InvalidArgumentError):
        recalibrate(network, [images(), torch.rand(1, 4, 32, 32)])
    assert torch.equal(norm_of(network).running_var, old)


@pytest.mark.parametrize("momentum", [0, 1.5, -0.1])
def test_bad_momentum(momentum):
    with pytest.raises(InvalidArgumentError, match="momentum"):
        recalibrate(converted(), images(), momentum=momentum)


def test_not_a_module():
    with pytest.raises(InvalidTypeError, match="net"):
        recalibrate("resnet18", images())


def test_integer_images_are_an_error():
    network = converted()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    with pytest.raises(InvalidTypeError, match="images: got dtype"):
        recalibrate(network, [(255 * images()).to(torch.uint8)])
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(buffer, before[name], rtol=0, atol=0)
