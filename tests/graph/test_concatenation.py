"""Concatenations in place: the native backend's lowered graphs have no copies that they need not have."""

from __future__ import annotations

import operator
import threading

import pytest
import torch
from torch import Tensor, nn

from bcos_rt import Engine, bcosify, explain
from bcos_rt.graph.backends import native
from bcos_rt.graph.fused import build_fused
from bcos_rt.kernels import cpu
from tests.explanation.test_engine import assert_same
from tests.graph.networks import network

pytestmark = pytest.mark.skipif(not cpu.available(), reason=f"no C++ kernels: {cpu.unavailable_reason()}")
aten = torch.ops.aten
SIZE = (34, 30)


class Branches(nn.Module):
    """Concatenations of branches, one value in two of them and twice in one; and one of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, 3, 1, 1)
        self.both, self.other = nn.Conv2d(24, 5, 1), nn.Conv2d(35, 9, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.head = nn.Linear(43, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        left, right = self.left(x).relu(), self.right(x)
        joined = torch.cat([left, right, self.depthwise(x)], 1)
        wide = torch.cat([joined, self.both(joined), left], 1)
        twice = torch.cat([joined, self.both(joined), left], 1) + torch.cat([left, left, right, right, left[:, :3]], 1)
        y = self.other(wide + twice).relu()
        return self.head(torch.cat([joined.mean((2, 3)), y.mean((2, 3)), right.mean((2, 3))], 1))


def branches() -> nn.Module:
    torch.manual_seed(2)
    return bcosify(Branches())[0].eval()


def lowered(net: nn.Module) -> list[list[object]]:
    """What the steps of the prediction and of the explanation are."""
    programs = build_fused(net, SIZE)
    targets = []
    for program in (programs.predict, programs.explain):
        targets.append([node.target for node in native.lowered(program)[0].graph.nodes])
    return targets


def images(count: int) -> Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(4))


def test_a_chain_has_one_buffer_and_no_concatenation():
    for targets in lowered(network("dense")):
        assert aten.cat.default not in targets
        names = [getattr(target, "__name__", "") for target in targets]
        assert sum(name.startswith("buffer") for name in names) == 1
        assert sum(name.startswith("join") for name in names) == 3


def test_layers_write_into_the_buffer(monkeypatch):
    """All but the stem, the transition and the head; what a join copies is the pooled stem."""
    written = []
    original = cpu.conv_epilogue

    def spy(*args, **kwargs):
        result = original(*args, **kwargs)
        # A slice's pixels lie further apart than its own channels.
        written.append(result[0].stride(3) != result[0].shape[1])
        return result

    monkeypatch.setattr(cpu, "conv_epilogue", spy)
    Engine(network("dense"), SIZE, backend="native").predict(images(1))
    assert written == [False, True, True, True, False, False]


def test_adjoints_add_to_one_gradient(monkeypatch):
    """All but the first, which has none before it, and the last, whose result is all that is left."""
    in_place = []
    original = cpu.scale_act_transposed

    def spy(*args):
        result = original(*args)
        in_place.append(result.data_ptr() == args[5].data_ptr() if args[5] is not None else False)
        return result

    monkeypatch.setattr(cpu, "scale_act_transposed", spy)
    Engine(network("dense"), SIZE, backend="native").explain(images(1))
    assert in_place == [False, True, True, False]


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("targets", [1, [[0, 1], [2, -1], [3, 3]]])
def test_branches(targets, chunk):
    net = branches()
    engine = Engine(net, SIZE, backend="native", chunk=chunk)
    assert_same(engine.explain(images(3), targets), explain(net, images(3), targets))
    with torch.no_grad():
        torch.testing.assert_close(engine.predict(images(3)), net(images(3)), rtol=1e-4, atol=1e-4)


def test_rows_are_concatenated_as_they_were():
    for targets in lowered(branches()):
        assert aten.cat.default in targets
        assert operator.getitem in targets


def test_concurrent_calls_share_no_buffer():
    net = network("dense")
    engine, pictures = Engine(net, SIZE, backend="native"), images(6)
    expected = [engine.explain(picture[None]) for picture in pictures]
    differences: list[float] = []

    def work(numbers: range) -> None:
        for _ in range(5):
            for i in numbers:
                found = engine.explain(pictures[i][None]).weights
                differences.append(float((found - expected[i].weights).abs().max()))

    threads = [threading.Thread(target=work, args=(range(start, 6, 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(differences) == 30
    assert max(differences) == 0
