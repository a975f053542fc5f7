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
