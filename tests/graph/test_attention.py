"""Recomputed attention: the same explanation as with stored softmaxes, in every graph and backend, in less memory."""

import pytest
import torch
from torch import nn

from bcos_rt import Engine, Recipe, bcosify, explain
from bcos_rt.errors import InvalidArgumentError
from bcos_rt.graph import build_explanation_graph, explanation_graph
from bcos_rt.graph.attention import RECOMPUTE_ABOVE
from bcos_rt.graph.backends import eager
from bcos_rt.graph.fused import build_fused
from bcos_rt.graph.program import memory_plan
from bcos_rt.kernels import cpu
from bcos_rt.nn.attention import AttentionPool
from tests.test_transformers import filled, timm_model
from tests.tolerances import TOLERANCES

SIZE = 64


def images(n=2, size=SIZE):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


class Attends(nn.Module):
    """Attention over 16 patches (of 16 pixels) in the forms that networks write it in; the sum of them all."""

    def __init__(self, *forms):
        super().__init__()
        self.forms = forms
        self.patches, self.head = nn.Conv2d(3, 12, 16, 16), nn.Linear(12, 5)
        self.projections = nn.ModuleList(nn.Linear(12, 36) for _ in forms)
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("mask", torch.randn(16, 16, generator=generator))
        self.probe = nn.Parameter(torch.randn(1, 1, 12, generator=generator))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        parts = [self.attend(f, p(x)).mean(2) for f, p in zip(self.forms, self.projections, strict=True)]
        return self.head(sum(parts[1:], parts[0]).flatten(1))

    def attend(self, form, x):
        """[N, heads, queries, channels]."""
        q, k, v = x.unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4).unbind(0)
        options = {"scale": 0.7}

        def attention(q, k, v, mask=None):
            return nn.functional.scaled_dot_product_attention(q, k, v, mask, **options)

        def windows():
            return [t.unflatten(2, (2, 8)).transpose(1, 2) for t in (q, k, v)]

        if form == "bool":
            return attention(q, k, v, (self.mask > 0) | torch.eye(16, dtype=torch.bool, device=x.device))
        if form == "added":
            return attention(q, k, v, self.mask)
        if form == "causal":
            options["is_causal"] = True
            return attention(q, k, v)
        if form == "mask of each image":
            return attention(q, k, v, q[:, :1] @ k[:, :1].transpose(-2, -1))
        if form == "grouped":
            options["enable_gqa"] = True
            return attention(q, k[:, :1], v[:, :1])
        if form == "probe":
            q = self.probe.expand(x.shape[0], -1, -1).unflatten(-1, (2, 6)).transpose(1, 2)
            return attention(q, k, v)
        if form == "heads in the batch":
            return attention(*(t.flatten(0, 1) for t in (q, k, v))).unflatten(0, (-1, 2))
        if form in ("windows", "windows with masks"):
            mask = self.mask[:8, :8] if form == "windows" else self.mask[None, None, :8, :8]
            out = attention(*(t.flatten(0, 1) for t in windows()), mask)
            return out.unflatten(0, (-1, 2)).transpose(1, 2).flatten(2, 3)
        if form == "five dimensions":
            return attention(*windows()).transpose(1, 2).flatten(2, 3)
        return attention(q, k, v)


class Pools(nn.Module):
    """CLIP's attention pool behind a convolution."""

    class Old(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 2
            self.positional_embedding = nn.Parameter(torch.zeros(17, 12))
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 12) for _ in range(3))
            self.c_proj = nn.Linear(12, 7)

    def __init__(self):
        super().__init__()
        self.conv, self.pool = nn.Conv2d(3, 12, 16, 16), AttentionPool(self.Old())

    def forward(self, x):
        return self.pool(self.conv(x))


NETWORKS = {
    "vit": lambda: timm_model("vit_tiny_patch16_224", img_size=SIZE, depth=2),
    # timm writes its windows' softmax out, with the position bias: stored either way.
    "swin": lambda: timm_model(
        "swin_tiny_patch4_window7_224", img_size=SIZE, window_size=4, depths=(2,), num_heads=(2,), embed_dim=16
    ),
    "clip pool": Pools,
    "masks": lambda: Attends("plain", "bool", "added", "causal", "mask of each image"),
    "others": lambda: Attends("grouped", "probe"),
    "folded": lambda: Attends("heads in the batch", "windows", "windows with masks", "five dimensions"),
}
STORED = {"swin"}


def network(name):
    return bcosify(filled(NETWORKS[name]()), Recipe())[0].double().eval()


def targets(graph):
    return [str(node.target) for node in graph.nodes]


def close(actual, expected):
    for name, value in expected.items():
        if not value.is_floating_point():
            assert torch.equal(actual[name], value), name
            continue
        scale = float(value.abs().max()) or 1.0
        assert float((actual[name] - value).abs().max()) <= 1e-9 * scale, name


@pytest.mark.parametrize("name", NETWORKS)
def test_recomputed_is_stored(name):
    net, x = network(name), images()
    encoded = net.encode(x)
    ids = torch.tensor([[1, 3, -1], [-1, 0, 2]])
    recomputed = build_explanation_graph(net, (SIZE, SIZE), multi=True, attention="recompute")
    found = targets(recomputed.module.graph)
    assert ("bcos_rt.attention_transposed.default" in found) == (name not in STORED)
    assert ("aten.softmax.int" in found) == (name in STORED)
    actual = recomputed(net, encoded, ids)
    total = actual["contributions"].sum((-2, -1)) + actual["residual"]
    torch.testing.assert_close(total, actual["logits"].gather(1, actual["class_used"]), rtol=0, atol=1e-11)
    if name not in STORED:
        stored = build_explanation_graph(net, (SIZE, SIZE), multi=True)
        assert not any("bcos_rt.attention" in t for t in targets(stored.module.graph))
        close(actual, stored(net, encoded, ids))
    if name != "vit":
        return
    one = build_explanation_graph(net, (SIZE, SIZE), attention="recompute")(net, encoded[:1], ids[:1, 0])
    close(one, {key: value[:1, 0] if key != "logits" else value[:1] for key, value in actual.items()})


@pytest.mark.parametrize("name", ["vit", "folded"])
def test_fused_programs(name):
    net, x = network(name), images(3)
    ids = torch.tensor([[1, -1], [-1, 0], [2, 2]])
    reference = build_explanation_graph(net, (SIZE, SIZE), multi=True)(net, net.encode(x), ids)
    programs = build_fused(net, (SIZE, SIZE), torch.float64, attention="recompute")
    assert "bcos_rt.attention_transposed.default" in targets(programs.explain.graph)
    result = programs.explain.run(x, ids)
    close({key: result[key] for key in reference}, reference)
    close(eager.build(programs.explain)(x, ids), {key: reference[key] for key in ("logits", "weights", "residual")})
    # The prediction asks for no log-sum-exp, and what the adjoint does not read is not kept.
    ops = [n for n in programs.predict.graph.nodes if str(n.target) == "bcos_rt.attention.default"]
    assert ops
    assert all([user.args[1] for user in n.users] == [0] for n in ops)


def test_16_bit_storage():
    """The softmax is made again from what it was made of: queries, keys and log-sum-exp of the forward pass's dtype."""
    net, x = bcosify(filled(Attends("added")), Recipe())[0].eval(), images().float()
    ids = torch.tensor([[1], [2]])
    exact = explanation_graph(net, (SIZE, SIZE), multi=True, attention="store")(net, net.encode(x), ids)["weights"]
    for forward_dtype, dtype in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        fused = build_fused(net, (SIZE, SIZE), torch.bfloat16, forward_dtype=forward_dtype, attention="recompute")
        (node,) = (n for n in fused.explain.graph.nodes if str(n.target) == "bcos_rt.attention_transposed.default")
        assert [n.meta["val"].dtype for n in node.args[:3]] == [torch.bfloat16, dtype, dtype]
        assert [n.meta["val"].dtype for n in node.args[3:5]] == [torch.float32, torch.float32]
        weights = fused.explain.run(x, ids)["weights"]
        # Rounding errors of 2^-9 through a few layers, the forward pass's squared by the last.
        assert float((weights - exact).norm() / exact.norm()) < (2e-2 if forward_dtype is None else 1e-2)


@pytest.mark.parametrize("backend", ["native", "inductor"])
def test_engines(backend, tmp_path):
    if backend == "native" and not cpu.available():
        pytest.skip("the C++ kernels are not built")
    net, x = bcosify(filled(Attends("plain", "bool")), Recipe())[0].eval(), images(3).float()
    targets = torch.tensor([[1, -1], [-1, 0], [2, 2]])
    expected = explain(net, x, targets)
    engine = Engine(net, x, backend=backend, attention="recompute")
    assert "attention_transposed" in engine.summary()
    loaded = Engine.load(engine.save(tmp_path / "engine"), backend="eager")
    for found in (engine.explain(x, targets), loaded.explain(x, targets)):
        assert torch.equal(found.target, expected.target)
        for name in ("logits", "weights", "contributions", "residual"):
            given, wanted = getattr(found, name), getattr(expected, name)
            assert float((given - wanted).abs().max()) < TOLERANCES["weights_b2"] * float(wanted.abs().max()), name
        assert float(found.completeness_error().max()) < TOLERANCES["completeness"]
    torch.testing.assert_close(engine.predict(x), expected.logits, rtol=1e-4, atol=1e-5)


def test_auto_is_by_size():
    small = bcosify(filled(Attends("plain")), Recipe())[0].eval()
    # 16 x 16 scores against 2 x 16 x 6 + 16 numbers.
    assert RECOMPUTE_ABOVE * 208 >= 256
    assert "aten.softmax.int" in targets(explanation_graph(small, (SIZE, SIZE)).module.graph)
    # 64 patches: 4096 against 832.
    large = explanation_graph(small, (128, 128)).module.graph
    assert RECOMPUTE_ABOVE * 832 < 4096
    assert "bcos_rt.attention.default" in targets(large)
    for choice in ("store", "recompute"):
        kept = explanation_graph(small, (128, 128), attention=choice).module.graph
        assert ("bcos_rt.attention.default" in targets(kept)) == (choice == "recompute")
    with pytest.raises(InvalidArgumentError, match=r"attention: got 'recomputed', .*did you mean 'recompute'"):
        explanation_graph(small, (SIZE, SIZE), attention="recomputed")


def test_memory():
    net = bcosify(filled(timm_model("vit_tiny_patch16_224", img_size=384, depth=2)), Recipe())[0].eval()
    plans = {
        choice: memory_plan(build_fused(net, (384, 384), attention=choice).explain, 1, 2)
        for choice in ("store", "recompute")
    }
    # What waits for the adjoint of each of two layers: 3 heads' softmaxes, or one projection of 3 x 192 channels.
    tokens = 24**2 + 1
    softmaxes, projection, lse = 3 * tokens**2 * 4, tokens * 3 * 192 * 4, 3 * tokens * 4
    assert plans["store"].saved_bytes - plans["recompute"].saved_bytes >= 2 * (softmaxes - projection - lse)
    # Two classes: the stored softmax is repeated.
    assert plans["store"].peak_bytes - plans["recompute"].peak_bytes >= 3 * (softmaxes - projection - lse)
