"""The triton backend: a network's fused program on the kernels, against the same program on the reference."""

import threading

import pytest
import torch
from torch import nn

from bcos_rt import Recipe, bcosify, explain
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError
from bcos_rt.graph.backends import triton as backend
from bcos_rt.graph.capture import bound_arguments
from bcos_rt.graph.fused import build_fused
from bcos_rt.kernels import ops
from tests.kernels.chain import network
from tests.tolerances import TOLERANCES

SIZE = (33, 30)
TARGETS = torch.tensor([[1, 4], [-1, 2]])
bcos = torch.ops.bcos_rt


@pytest.fixture(scope="module")
def fused():
    return build_fused(network(), SIZE)


@pytest.fixture(scope="module")
def runners(fused, device):
    return backend.build_all({"explain": fused.explain, "predict": fused.predict}, device)


def images(n=2, size=SIZE, seed=1):
    return torch.rand(n, 3, *size, generator=torch.Generator().manual_seed(seed))


def assert_close(found, expected, relative=2e-5):
    """Relative to the largest; float32 through seven layers that square their responses."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        ours = found[name].double().cpu()
        assert ours.shape == value.shape
        torch.testing.assert_close(ours, value.double(), rtol=0, atol=relative * max(float(value.abs().max()), 1e-3))


def test_a_networks_explanation(runners, device):
    """Against the un-fused graph in float64, and again where a GPU replays what it captured."""
    for seed in (1, 2, 1):
        x = images(seed=seed)
        expected = explain(network(torch.float64), x.double(), TARGETS)
        found = runners["explain"](x.to(device), TARGETS.to(device))
        wanted = {
            "logits": expected.logits, "class_used": expected.target, "weights": expected.weights,
            "contributions": expected.contributions, "residual": expected.residual,
        }  # fmt: skip
        assert_close(found, wanted)
        if device == "cpu":
            break


def test_a_prediction_of_other_batches(fused, runners, device):
    for n in (1, 3):
        x = images(n)
        assert_close(runners["predict"](x.to(device)), fused.predict.run(x, None))
    assert runners["predict"](images(0).to(device))["logits"].shape == (0, 5)


def test_bytes_as_images(fused, runners, device):
    pixels = (images(1) * 255).to(torch.uint8)
    assert_close(runners["predict"](pixels.to(device)), fused.predict.run(pixels.float() / 255, None))


def test_bytes_where_no_fused_op_reads_the_image(device):
    """A network whose normalisation is not the usual one: its pixels are scaled before the program."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, bias=False), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.conv(x * 1.5).relu().mean((2, 3)))

    torch.manual_seed(0)
    net, _ = bcosify(Plain(), Recipe())
    program = build_fused(net.eval(), (9, 8)).predict
    pixels = (images(2, (9, 8)) * 255).to(torch.uint8)
    runner = backend.build(program, device)
    assert_close(runner(pixels.to(device)), program.run(pixels.float() / 255, None))


def test_in_bfloat16(device):
    fused = build_fused(network(), SIZE, torch.bfloat16)
    x = images(1)
    found = backend.build(fused.predict, device)(x.to(device))["logits"].cpu()
    expected = fused.predict.run(x, None)["logits"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_kernels_larger_than_the_gpu_kernels_take(device):
    """The patches of ViT-B/32: those convolutions are left to PyTorch, forward and back."""

    class Patches(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 32, 32, bias=False), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.conv(x).relu().mean((2, 3)))

    torch.manual_seed(0)
    net, _ = bcosify(Patches(), Recipe())
    program = build_fused(net.eval(), (64, 32)).explain
    assert any(n.target is bcos.conv2d_fused.default for n in program.graph.nodes)
    x, ids = images(1, (64, 32)), torch.tensor([[0, 2]])
    # What is left to PyTorch has its precision: cuDNN's default for float32 is one product of tf32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = backend.build(program, device)(x.to(device), ids.to(device))
    assert_close(found, program.run(x, ids), TOLERANCES["equivalence"])


def test_weights_lie_as_the_kernels_read_them(runners):
    """Then no call copies a weight; the two programs and all their uses share what is equal."""
    explain, predict = runners["explain"].program, runners["predict"].program
    found = set()
    for node in explain.graph.nodes:
        name = str(node.target).removeprefix("bcos_rt.").removesuffix(".default")
        if name not in ("conv2d_fused", "conv2d_transposed", "linear_fused", "linear_transposed"):
            continue
        weight = explain.constants[bound_arguments(node)["weight"]]
        depthwise = weight.ndim == 4 and weight.shape[1] == 1
        if name == "conv2d_fused" and not depthwise:
            assert weight.permute(0, 2, 3, 1).is_contiguous()
        elif name == "linear_fused":
            assert weight.is_contiguous()
        else:
            assert weight.movedim(0, -1).is_contiguous()
        found.add((name, depthwise))
    assert found >= {("conv2d_fused", False), ("conv2d_fused", True), ("conv2d_transposed", True)}
    assert {name for name, _ in found} == {"conv2d_fused", "conv2d_transposed", "linear_fused", "linear_transposed"}
    values = [v.untyped_storage().data_ptr() for v in explain.constants.values() if v.numel()]
    assert len(values) == len(set(values))
    assert predict.constants.keys().isdisjoint(explain.constants.keys())


def test_programs_share_equal_constants_on_the_device(fused, device):
    memory = []
    for runner in backend.build_all({"a": fused.predict, "b": fused.explain}, device).values():
        values = [v for v in runner.program.constants.values() if v.numel()]
        memory.append({v.untyped_storage().data_ptr(): v.nbytes for v in values})
    both = sum((memory[0] | memory[1]).values())
    # The adjoint has weights in an order of its own; apart from these, nothing is there twice.
    assert both == sum(memory[1].values())


def test_threads(fused, runners, device):
    if device == "cpu":
        pytest.skip("Triton's interpreter runs in one thread at a time")
    x = [images(1, seed=seed) for seed in range(3)]
    expected = [fused.predict.run(v, None) for v in x]
    failures = []

    def work(i):
        try:
            for _ in range(2):
                assert_close(runners["predict"](x[i].to(device)), expected[i])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_inputs_are_checked(runners, device):
    with pytest.raises(InvalidArgumentError, match="images"):
        runners["predict"](images(1, (8, 8)).to(device))
    with pytest.raises(InvalidTypeError, match="images"):
        runners["predict"](images(1).double().to(device))
    with pytest.raises(InvalidArgumentError, match="targets"):
        runners["explain"](images(1).to(device))
    with pytest.raises(InvalidArgumentError, match="device"):
        backend.build(runners["predict"].program, "meta")


def test_the_callers_settings_do_not_matter(fused, runners, device):
    x = images(1)
    expected = fused.predict.run(x, None)
    with torch.autocast(device, dtype=torch.bfloat16), torch.inference_mode(), ops.use_backend("reference"):
        found = runners["predict"](x.to(device))
    assert_close(found, expected)
    assert not runners["predict"](x.to(device).requires_grad_())["logits"].requires_grad


def test_a_shape_ahead_of_its_first_call(runners, device):
    runners["predict"].warm_up(1)
    if device == "cuda":
        before = len(runners["predict"]._captures)
        runners["explain"].warm_up(1, 3)
        assert len(runners["predict"]._captures) == before + 1
