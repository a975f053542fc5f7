"""``Engine(backend="triton")`` against ``explain()``: small networks in the interpreter, whole ones on a GPU."""

import pytest
import torch
import torchvision

from bcos_rt import Engine, Recipe, bcosify, explain, recalibrate
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from tests.graph.networks import NETWORKS, network
from tests.kernels.chain import network as residual
from tests.triton.conftest import ON_GPU

GPU_NETWORKS = ("resnet18", "densenet121")
NAMES = (*GPU_NETWORKS, "tokens") if ON_GPU else ("residual", "dense", "tokens")
SIZE = (64, 64) if ON_GPU else (33, 30)


def made(name):
    if name in NETWORKS:
        return network(name)
    torch.manual_seed(0)
    net, _ = bcosify(getattr(torchvision.models, name)(weights=None), Recipe())
    recalibrate(net, [torch.rand(8, 3, *SIZE)])
    return net.eval()


def images(n=2, seed=0):
    return torch.rand(n, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", NAMES)
def test_engine_equals_explain(name, device, tmp_path):
    net = made(name)
    engine = Engine(net, SIZE, device=device, backend="triton")
    assert (engine.backend, engine.device.type) == ("triton", device)
    engine = Engine.load(engine.save(tmp_path / "net.engine"), device=device, backend="triton")
    wide = made(name).double()
    targets = [[1, -1], [0, 2]]
    # On a GPU the first call of a shape runs kernel by kernel, the second is captured, the third replays.
    for seed in range(3 if ON_GPU else 1):
        x = images(seed=seed)
        expected = explain(wide, x.double(), targets)
        found = engine.explain(x.to(device), targets)
        assert torch.equal(found.target.cpu(), expected.target)
        for field, limit in (("logits", 1e-4), ("weights", 1e-3), ("contributions", 1e-3), ("residual", 1e-3)):
            ours, theirs = getattr(found, field).double().cpu(), getattr(expected, field)
            scale = max(float(theirs.abs().max()), float(expected.logits.abs().max()) * (field == "residual"))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=limit * scale, msg=lambda m, f=field: f"{f}: {m}")
        assert float(found.completeness_error().max()) < 1e-3 * max(1.0, float(expected.logits.abs().max()))
        predicted = engine.predict(x.to(device))
        torch.testing.assert_close(predicted, found.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits_keep_the_contribution_map(dtype, device):
    net = made(NAMES[0])
    engine = Engine(net, SIZE, dtype=dtype, device=device, backend="triton")
    x = images(1)
    expected = explain(made(NAMES[0]), x)
    found = engine.explain(x.to(device), expected.target)
    maps = (found.contributions.cpu().flatten(), expected.contributions.flatten())
    assert float(torch.cosine_similarity(*maps, dim=0)) > 0.99
    assert found.weights.dtype == torch.float32


@pytest.mark.skipif(not ON_GPU, reason="streams are a GPU's")
def test_streams_wait_for_each_other(device):
    """Calls on many streams, each with inputs that are still being written and results that are read at once."""
    engine = Engine(made(NAMES[0]), SIZE, device=device, backend="triton")
    x = [images(2, seed=s).to(device) for s in range(4)]
    expected = [engine.explain(v, 3) for v in x]
    streams = [torch.cuda.Stream() for _ in x]
    torch.cuda.synchronize()
    results = []
    for i in range(20):
        which = i % len(x)
        with torch.cuda.stream(streams[which]):
            torch.cuda._sleep(1_000_000)
            late = torch.zeros_like(x[which])
            late.copy_(x[which])
            found = engine.explain(late, 3)
            late.fill_(0.5)  # the engine has taken what it needs, in stream order
            results.append((which, found.weights * 2, found.logits.clone()))
    torch.cuda.synchronize()
    for which, doubled, logits in results:
        torch.testing.assert_close(doubled, expected[which].weights * 2)
        torch.testing.assert_close(logits, expected[which].logits)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter captures nothing")
def test_a_caller_may_capture_an_engine_himself(device):
    engine = Engine(made(NAMES[0]), SIZE, device=device, backend="triton")
    x = images(2).to(device)
    for _ in range(2):
        engine.explain(x, 3)
    graph = torch.cuda.CUDAGraph()
    ids = torch.full((2, 1), 3, device=device)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        engine._explain(x, ids)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        result = engine._explain(x, ids)
    x.copy_(images(2, seed=7))
    graph.replay()
    torch.testing.assert_close(result["weights"][:, 0], engine.explain(x.clone(), 3).weights)


def test_devices_and_dtypes_are_checked(device):
    net = residual()
    with pytest.raises(InvalidArgumentError, match="dtype"):
        Engine(net, SIZE, dtype=torch.float64, device=device, backend="triton")
    with pytest.raises(InvalidArgumentError, match="device"):
        Engine(net, SIZE, device="meta", backend="triton")
    engine = Engine(net, SIZE, device=device, backend="triton")
    with pytest.raises(InvalidTypeError, match="images"):
        engine.predict([1])
    with pytest.raises(InvalidArgumentError, match="targets"):
        engine.explain(images().to(device), 99)
    if ON_GPU:
        with pytest.raises(InvalidArgumentError, match="the engine's device"):
            engine.predict(images())
        with pytest.raises(InvalidArgumentError, match="on a CUDA device"):
            Engine(net, SIZE, device=device, backend="eager")
        assert Engine(net, SIZE, device=device).backend == "triton"
