"""Asymmetric padding in the native backend: a part of the kernels' windows, not a copy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bcos_rt import Engine, bcosify, explain
from bcos_rt.graph.backends import native
from bcos_rt.graph.fused import build_fused
from bcos_rt.kernels import cpu
from tests.explanation.test_engine import assert_same

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"no C++ kernels: {cpu.unavailable_reason()}")
aten = torch.ops.aten
PADS = (aten.pad.default, aten.constant_pad_nd.default)


class Same(nn.Module):
    """Strided layers with TensorFlow's padding (EfficientNet-Lite's), a stem too, and one that is padded with ones."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, 2)
        self.small, self.large = nn.Conv2d(12, 12, 3, 2, groups=12), nn.Conv2d(12, 12, 5, 2, 1, groups=12)
        self.expand, self.head = nn.Conv2d(12, 12, 1), nn.Linear(12, 5)
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.stem(nn.functional.pad(x, (0, 1, 0, 1))))
        x = self.small(nn.functional.pad(x, (0, 1, 1, 2), value=self.value)).relu()
        x = self.large(nn.functional.pad(self.expand(x), (1, 2, 0, 1)))
        return self.head(x.mean((2, 3)))


def same(value: float = 0.0) -> nn.Module:
    torch.manual_seed(6)
    return bcosify(Same(value))[0].eval()


@pytest.mark.parametrize("size", [(32, 36), (33, 30)])
@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("targets", [None, [[0, 1], [2, -1]]])
def test_equals_explain(size, value, targets):
    net = same(value)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    engine = Engine(net, images, backend="native")
    assert_same(engine.explain(images, targets), explain(net, images, targets))
    with torch.no_grad():
        torch.testing.assert_close(engine.predict(images), net(images), rtol=1e-4, atol=1e-4)


def pads_left(net: nn.Module, size: tuple[int, int]) -> list[int]:
    """Paddings and crops of the prediction and of the explanation."""
    programs, counts = build_fused(net, size), []
    for program in (programs.predict, programs.explain):
        counts.append(sum(node.target in PADS for node in native.lowered(program)[0].graph.nodes))
    return counts


def test_only_the_image_itself_is_padded():
    """Odd sizes: the stem's adjoint is then no convolution by parities of pixels, and is cropped."""
    assert pads_left(same(), (32, 36)) == [1, 1]
    assert pads_left(same(), (33, 31)) == [1, 2]


def test_padding_with_another_number_stays():
    """So does its adjoint's crop, which the residual reads too."""
    assert pads_left(same(1.0), (32, 36)) == [2, 3]
