"""A small network's prediction and explanation on the Triton kernels, against the explanation graph in float64."""

import torch

from bcos_rt import explain
from bcos_rt.kernels import ops
from tests.kernels.chain import explain_fused, network

TARGETS = torch.tensor([[1, 4], [0, 2]])


@torch.no_grad()
def test_a_networks_explanation(device):
    net = network(torch.float64)
    images = torch.rand(2, 3, 33, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = explain(net, images, TARGETS)
    net = net.to(device)
    with ops.use_backend("triton"):
        found = explain_fused(net, images.float().to(device), TARGETS.to(device), torch.float32)
    wanted = (expected.logits, expected.weights, expected.contributions)
    for ours, graph in zip(found, wanted, strict=False):
        graph = graph.reshape(ours.shape)
        # float32 through seven layers that square their responses.
        torch.testing.assert_close(ours.double().cpu(), graph, rtol=0, atol=2e-5 * float(graph.abs().max()))


def test_a_backward_pass_uses_the_kernels_of_its_forward_pass(device, monkeypatch):
    """Autograd's threads do not see use_backend, and a caller may have left it."""

    def called(*_):
        raise AssertionError("the reference was called")

    monkeypatch.setattr(ops.reference, "conv2d_backward", called)
    monkeypatch.setattr(ops.reference, "linear_backward", called)
    x = torch.randn(2, 4, 5, 5, device=device, requires_grad=True)
    w = torch.randn(3, 4, 3, 3, device=device, requires_grad=True)
    v = torch.randn(5, 75, device=device, requires_grad=True)
    with ops.use_backend("triton"):
        y = ops.linear(ops.conv2d(x, w, None, (1, 1), (1, 1)).flatten(1), v)
    y.sum().backward()
    assert all(t.grad is not None and bool(t.grad.isfinite().all()) for t in (x, w, v))
