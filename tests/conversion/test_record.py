"""Models that symbolic tracing cannot follow: what a recorded run says about their layers."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bcos_rt import Recipe, bcosify
from bcos_rt.conversion import nodes
from bcos_rt.conversion.record import record
from bcos_rt.conversion.trace import trace_model
from bcos_rt.errors import InvalidTypeError
from bcos_rt.nn import BcosConv2d, BcosLinear
from bcos_rt.nn.outputs import image_sizes, main_output
from tests.tolerances import TOLERANCES


class Output(OrderedDict):
    """Like transformers' outputs: entries by name, missing ones left out."""


class Attention(nn.Module):
    def __init__(self, out):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), out

    def forward(self, x):
        # Iterating over a shape stops symbolic tracing.
        shape = (*x.shape[:-1], -1, 4)
        q, k, v = (f(x).view(shape).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-1, -2) / 2).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape)), weights


class Net(nn.Module):
    """A stem with a max-pool, attention, squeeze-and-excite, a class token, an output object; sizes are checked."""

    def __init__(self, pool=None):
        super().__init__()
        self.image_size, self.num_channels = 16, 3
        self.conv, self.bn = nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(2) if pool is None else pool
        self.squeeze, self.excite = nn.Linear(8, 4), nn.Linear(4, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.attention = Attention(nn.Linear(8, 8))
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 5)
        self.seen = None

    def forward(self, x, labels=None):
        if x.shape[1] != self.num_channels:
            raise ValueError(f"expected {self.num_channels} channels")
        if x.shape[2] != self.image_size:
            raise ValueError(f"expected {self.image_size} pixels")
        x = self.bn(self.conv(x))
        x += 1
        x = self.pool(F.relu(x))
        x = x * self.excite(F.relu(self.squeeze(x.mean((2, 3))))).sigmoid()[..., None, None]
        x = torch.cat([self.token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        self.seen = x
        x = x + self.attention(self.norm(x))[0]
        return Output(logits=self.fc(x[:, 0]), states=(x,))


def net(**options):
    torch.manual_seed(0)
    model = Net(**options).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def reasons(report):
    return {e.name: e.reason for e in report.entries}


def test_roles():
    network, report = bcosify(net())
    backbone = network.backbone
    assert isinstance(backbone, Net)
    assert isinstance(backbone.conv, BcosConv2d)
    assert backbone.conv.in_channels == 6
    assert isinstance(backbone.pool, nn.AvgPool2d)
    assert type(backbone.squeeze) is type(backbone.excite) is nn.Linear
    assert "gate" in reasons(report)["squeeze"]
    for projection in (backbone.attention.q, backbone.attention.k, backbone.attention.v):
        assert type(projection) is nn.Linear
        assert projection.bias is None
    assert isinstance(backbone.attention.out, BcosLinear)
    assert isinstance(backbone.fc, BcosLinear)
    assert len(network(images())[0]) == 5
    assert any("a run on an image of 16x16" in n for n in report.notes)
    assert any(n.startswith("head: fc (Linear) stays where it is") for n in report.notes)
    converted, _ = bcosify(net(), Recipe(gates="convert", attention="convert"))
    for name in ("squeeze", "excite", "attention.q", "attention.k", "attention.v"):
        assert isinstance(converted.backbone.get_submodule(name), BcosLinear)


def test_equivalent():
    source = net()
    before = {k: v.clone() for k, v in source.state_dict().items()}
    network, report = bcosify(source, Recipe.equivalent(), verify_images=images())
    assert report.equivalence.within(TOLERANCES["equivalence"])
    assert report.weights_copied.complete
    # Nothing of the run stays: neither in the source, nor in the result.
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in before.items())
    assert (source.num_channels, network.backbone.num_channels) == (3, 6)
    fresh = bcosify(net())[0]
    assert fresh.backbone.seen is None
    assert all("forward" not in m.__dict__ for m in fresh.modules())


def test_what_needs_another_forward_stays():
    class Pool(nn.Module):
        def forward(self, x):
            return F.max_pool2d(x, 2)

    _, report = bcosify(net(pool=Pool()), Recipe(activations="identity"))
    kept = {e.reason for e in report.kept if e.kind == "pool"}
    assert kept == {"the forward cannot be rewritten"}
    activations = [e for e in report.entries if e.kind == "activation"]
    assert [e.reason for e in activations] == ["the forward cannot be rewritten", "computes a gate only"]


def test_graph_of_a_run_is_that_of_tracing():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
            self.scale = nn.Parameter(torch.ones(4, 1, 1))

        def forward(self, x):
            x = F.gelu(self.bn(self.conv(x))) * self.scale + 1
            left, right = x.chunk(2, dim=1)
            x = torch.cat([left * right.sigmoid(), 1 - right], 1)
            return self.fc(x.mean((2, 3)))

    model = Plain()
    traced = trace_model(model)
    recorded, size = record(model, traced)
    assert size == (224, 224)
    assert recorded.recorded
    modules = dict(model.named_modules())

    def live(graph):
        found = nodes.live_nodes(graph, modules)
        return sorted(str(n.target) for n in found if n.op == "call_module"), len(
            [n for n in found if n.target in (F.gelu, torch.cat)]
        )

    assert live(recorded.graph) == live(traced.graph) == (["bn", "conv", "fc"], 2)
    written = [n for n in recorded.graph.nodes if n.op == "get_attr"]
    assert [n.target for n in written] == ["scale"]
    assert not [n for n in traced.graph.nodes if n.target == "sigmoid" and n in nodes.live_nodes(traced.graph, modules)]


@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("separate", [True, False])
def test_biases_beside_a_layer(optional, separate):
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.image_size = 16
            self.conv, self.qkv, self.fc = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 6, bias=False), nn.Linear(6, 3)
            self.one, self.two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
            self.register_buffer("three", torch.ones(2))
            self.position = nn.Parameter(torch.ones(1, 16, 6))

        def forward(self, x):
            x = self.conv(x).flatten(2).transpose(1, 2) + self.position
            if optional and self.one is None:
                x = self.qkv(x)
            elif separate:
                x = self.qkv(x) + torch.cat((self.one, self.two, self.three))
            else:
                x = F.linear(x, self.qkv.weight, torch.cat((self.one, self.two, self.three)))
            return self.fc(x.mean(1))

    torch.manual_seed(0)
    source = Loose()
    network, report = bcosify(source, Recipe(head="after_pool"))
    backbone = network.backbone
    assert report.weights_copied.complete
    assert {e.name for e in report.entries if e.after == "no bias"} == {"one", "two", "three"}
    for name in ("one", "two", "three"):
        value = getattr(backbone, name)
        if optional:
            assert value is None
        else:
            assert not value.any()
            assert not value.requires_grad
    assert backbone.position.shape == (1, 16, 6)
    # A weight that is read is not replaced by a layer that nobody calls.
    assert isinstance(backbone.qkv, BcosLinear) == (optional or separate)
    assert network(torch.rand(2, 3, 16, 16)).shape == (2, 3)
    kept, _ = bcosify(source, Recipe.equivalent())
    assert torch.equal(kept.backbone.one, source.one)


def test_main_output():
    logits = torch.zeros(2, 3)
    for output in (logits, Output(loss=None, logits=logits), {"logits": logits}, {"pooler_output": logits}):
        assert main_output(output) is logits
    for output in ((logits,), {"states": logits}, None):
        with pytest.raises(InvalidTypeError, match="logits"):
            main_output(output)


def test_image_sizes():
    model = nn.Module()
    assert image_sizes(model) == []
    model.config = type("Config", (), {"image_size": 48})()
    model.img_size = (32, 64)
    model.pretrained_cfg = {"input_size": (3, 224, 224)}
    assert image_sizes(model) == [(48, 48), (32, 64), (224, 224)]
    model.config.image_size = None
    assert image_sizes(model) == [(32, 64), (224, 224)]
