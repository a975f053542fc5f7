"""Transformers end to end: equivalence, completeness, W against autograd, the engine, ONNX, CLIP's image tower.

Weights are seeded, sizes small; every projection gets random biases, so that none is 0 by accident.
"""

import copy

import pytest
import torch
import torchvision
from torch import nn

from bcos_rt import Engine, Recipe, bcosify, explain, recalibrate
from bcos_rt.errors import InvalidArgumentError, UnsupportedOpError
from bcos_rt.models.simple_vit import SimpleViT
from bcos_rt.nn import BcosLinear
from bcos_rt.nn.attention import AttentionPool, MultiheadAttention, call_projections
from tests.golden import golden_images, load_golden, seeded
from tests.oracle import oracle
from tests.tolerances import TOLERANCES

SIZE = 64


def timm_model(name, **options):
    return pytest.importorskip("timm").create_model(name, num_classes=10, **options)


def hf_model(name, attn_implementation=None, **options):
    transformers = pytest.importorskip("transformers")
    given = {"image_size": SIZE, "patch_size": 16, "num_labels": 10}
    if "depths" not in options:  # a transformer of one stage
        given |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{name}Config")(**{**given, **options})
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    return getattr(transformers, f"{name}ForImageClassification")(config)


MODELS = {
    # name: the model, its output projection of attention, the projection(s) that must stay linear
    "timm vit": (
        lambda: timm_model("vit_tiny_patch16_224", img_size=SIZE, depth=2),
        "blocks.0.attn.proj", ("blocks.0.attn.qkv",),
    ),
    "timm deit distilled": (
        lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=SIZE, depth=2),
        "blocks.1.attn.proj", ("blocks.1.attn.qkv",),
    ),
    "timm swin": (
        lambda: timm_model(
            "swin_tiny_patch4_window7_224", img_size=SIZE, window_size=4, depths=(2, 1), num_heads=(2, 4), embed_dim=32
        ),
        "layers.0.blocks.1.attn.proj", ("layers.0.blocks.1.attn.qkv",),
    ),
    "torchvision vit": (
        lambda: torchvision.models.VisionTransformer(SIZE, 16, 2, 4, 64, 128, num_classes=10),
        "encoder.layers.encoder_layer_0.self_attention.out_proj", (),
    ),
    "torchvision swin": (
        # 72 px: the windows of the first stage are padded.
        lambda: torchvision.models.SwinTransformer([4, 4], 32, [2, 1], [2, 4], [4, 4], num_classes=10),
        "features.1.1.attn.proj", ("features.1.1.attn.qkv",),
    ),
    "timm vit small": (
        lambda: timm_model("vit_small_patch16_224", img_size=SIZE, depth=1, embed_dim=48, num_heads=4),
        "blocks.0.attn.proj", ("blocks.0.attn.qkv",),
    ),
    "timm deit": (
        lambda: timm_model("deit_tiny_patch16_224", img_size=SIZE, depth=1, embed_dim=48),
        "blocks.0.attn.proj", ("blocks.0.attn.qkv",),
    ),
    "timm convnext": (  # no attention: layer scale, LayerNorm over channels, the MLP's last layer
        lambda: timm_model("convnext_tiny", depths=(1, 1, 1, 1), dims=(8, 16, 16, 24)),
        "stages.0.blocks.0.mlp.fc2", (),
    ),
    "timm eva02": (  # rotary embeddings, SwiGLU, biases of its own beside the projection
        lambda: timm_model("eva02_tiny_patch14_224", img_size=SIZE, patch_size=16, depth=1, embed_dim=48, num_heads=4),
        "blocks.0.attn.proj", ("blocks.0.attn.qkv",),
    ),
    "timm dinov2, registers": (  # layer scale, register tokens
        lambda: timm_model("vit_small_patch14_reg4_dinov2", img_size=SIZE, patch_size=16, depth=1, embed_dim=48,
                           num_heads=4),
        "blocks.0.attn.proj", ("blocks.0.attn.qkv",),
    ),
    "timm swin v2": (  # cosine attention, continuous position bias
        lambda: timm_model(
            "swinv2_tiny_window8_256", img_size=SIZE, window_size=4, depths=(1, 1), num_heads=(2, 4), embed_dim=32
        ),
        "layers.1.blocks.0.attn.proj", ("layers.1.blocks.0.attn.qkv",),
    ),
    "hf vit": (
        lambda: hf_model("ViT"),
        "vit.layers.0.attention.o_proj", tuple(f"vit.layers.0.attention.{p}_proj" for p in "qkv"),
    ),
    "hf vit, eager attention": (
        lambda: hf_model("ViT", attn_implementation="eager", num_hidden_layers=1),
        "vit.layers.0.attention.o_proj", tuple(f"vit.layers.0.attention.{p}_proj" for p in "qkv"),
    ),
    "hf dinov2": (  # layer scale; the classifier takes the class token and the mean of the others
        lambda: hf_model("Dinov2", num_hidden_layers=1),
        "dinov2.encoder.layer.0.attention.o_proj", ("dinov2.encoder.layer.0.attention.v_proj",),
    ),
    "hf dinov2, swiglu": (
        lambda: hf_model("Dinov2", use_swiglu_ffn=True, num_hidden_layers=1),
        "dinov2.encoder.layer.0.mlp.down_proj", ("dinov2.encoder.layer.0.attention.q_proj",),
    ),
    "simple vit": (
        lambda: SimpleViT(patch_size=16, dim=32, depth=2, heads=2, mlp_dim=64, num_classes=10),
        "transformer.encoder_1.attn.to_out", ("transformer.encoder_1.attn.to_qkv",),
    ),
    "simple vit, convolutional stem": (
        lambda: SimpleViT(patch_size=2, dim=32, depth=1, heads=2, mlp_dim=64, conv_stem=(8, 8, 16, 32), num_classes=10),
        "transformer.encoder_0.attn.to_out", ("transformer.encoder_0.attn.to_qkv",),
    ),
}  # fmt: skip


# Those whose graphs have no op that another's does not.
LIKE_OTHERS = (
    "timm deit distilled", "timm vit small", "timm deit", "hf vit, eager attention", "timm dinov2, registers",
    "hf dinov2, swiglu",
)  # fmt: skip
IN_ONNX = [name for name in MODELS if name not in LIKE_OTHERS]


def filled(model):
    """Every floating-point entry drawn anew: matrices by their width, scales around 1, biases that are not 0."""
    generator = torch.Generator().manual_seed(1)
    state = model.state_dict()
    for name in sorted(state):
        value = state[name]
        if value.is_floating_point() and value.ndim >= 2:
            state[name] = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        elif value.is_floating_point() and "weight" in name:
            state[name] = 0.5 + torch.rand(value.shape, generator=generator)
        elif value.is_floating_point():
            state[name] = 0.1 * torch.randn(value.shape, generator=generator)
    model.load_state_dict(state)
    return model.eval()


# MLPs with a gate -> their activation, whose result is the gate: the oracle takes it as constant (see tests/oracle.py,
# which cannot know that of an activation).
GATED = {"SwiGLU": "act", "GluMlp": "act", "Dinov2SwiGLUFFN": "act_fn"}


def held_gates(net, source):
    """A copy of a converted network whose MLPs' gates are constants to autograd."""
    net = copy.deepcopy(net)
    for name, module in source.named_modules():
        if type(module).__name__ in GATED:
            activation = net.backbone.get_submodule(f"{name}.{GATED[type(module).__name__]}")
            activation.register_forward_hook(lambda module, args, out: out.detach())
    return net


def images(n=2, size=SIZE):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.fixture(params=MODELS)
def case(request):
    build, output, linear = MODELS[request.param]
    return filled(build()), output, linear, images()


def test_conversion(case):
    source, output, linear, x = case
    _, report = bcosify(source, Recipe.equivalent(), verify_images=x)
    assert report.equivalence.within(TOLERANCES["equivalence"])
    assert report.weights_copied.complete
    assert report.weights_copied.dropped == 0
    net, report = bcosify(source)
    assert report.weights_copied.complete
    assert isinstance(net.backbone.get_submodule(output), BcosLinear)
    for name in linear:
        assert type(net.backbone.get_submodule(name)) is nn.Linear
        assert net.backbone.get_submodule(name).bias is None
        converted, _ = bcosify(source, Recipe(attention="convert"))
        assert isinstance(converted.backbone.get_submodule(name), BcosLinear)


def test_explanation(case):
    source, _, _, x = case
    net = bcosify(source)[0].double().eval()
    explanation = explain(net, x.double())
    assert float(explanation.completeness_error().max()) < 1e-12
    logits, weights = oracle(held_gates(net, source), net.encode(x.double()), explanation.target)
    torch.testing.assert_close(explanation.logits, logits, rtol=1e-10, atol=1e-12)
    difference = (explanation.weights - weights).abs().max() / weights.abs().max()
    assert float(difference) < TOLERANCES["oracle64"]
    given = Engine(net.float(), x, backend="eager").explain(x, explanation.target)
    error = (given.weights.double() - weights).abs().max() / weights.abs().max()
    assert float(error) < TOLERANCES["weights_b2"]


@pytest.mark.parametrize("case", IN_ONNX, indirect=True)
def test_onnx(case, tmp_path):
    pytest.importorskip("onnxruntime")
    from bcos_rt.export import to_onnx

    source, _, _, x = case
    report = to_onnx(bcosify(source)[0].eval(), tmp_path / "net.onnx", SIZE, verify_images=x)
    assert report.parity.differences["weights"].max_relative < TOLERANCES["weights_b2"]


@pytest.mark.parametrize("mask", ["none", "bool", "added", "causal"])
def test_scaled_dot_product_attention(mask):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.qkv, self.head = nn.Conv2d(3, 12, 8, 8), nn.Linear(12, 36), nn.Linear(12, 5)
            generator = torch.Generator().manual_seed(3)
            self.register_buffer("mask", torch.randn(16, 16, generator=generator))

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4).unbind(0)
            # A diagonal that is allowed: no row without any key.
            allowed = (self.mask > 0) | torch.eye(16, dtype=torch.bool, device=x.device)
            given = {"none": None, "bool": allowed, "added": self.mask, "causal": None}[mask]
            x = torch.nn.functional.scaled_dot_product_attention(q, k, v, given, is_causal=mask == "causal", scale=0.7)
            return self.head(x.transpose(1, 2).flatten(2).mean(1))

    source = filled(Net())
    net = bcosify(source)[0].double().eval()
    x = images(size=32).double()
    explanation = explain(net, x)
    _, weights = oracle(net, net.encode(x), explanation.target)
    assert float((explanation.weights - weights).abs().max() / weights.abs().max()) < TOLERANCES["oracle64"]
    assert float(explanation.completeness_error().max()) < 1e-12


# --- layers that read their projections' weights ---------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", ["self", "cross", "weights", "padding", "mask", "both"])
def test_multihead_attention_is_torchs(batch_first, case):
    torch.manual_seed(4)
    old = filled(nn.MultiheadAttention(12, 3, batch_first=batch_first))
    new = call_projections(copy.deepcopy(old))
    assert isinstance(new, MultiheadAttention)
    assert set(new.state_dict()) == set(old.state_dict())
    shapes = ((2, 5, 12), (2, 7, 12)) if batch_first else ((5, 2, 12), (7, 2, 12))
    query, key = (torch.rand(shape) for shape in shapes)
    value = torch.rand(key.shape)
    if case in ("self", "weights"):
        key = value = query
    keys = key.shape[1 if batch_first else 0]
    options = {"need_weights": case == "weights"}
    if case in ("padding", "both"):
        options["key_padding_mask"] = torch.arange(keys)[None].repeat(2, 1) > 4
    if case in ("mask", "both"):
        options["attn_mask"] = torch.rand(5, keys) > 0.7
        options["attn_mask"][:, 0] = False
    expected, weights = old(query, key, value, **options)
    got, probabilities = new(query, key, value, **options)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (weights is None) == (probabilities is None)
    if weights is not None:
        torch.testing.assert_close(probabilities, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(8, 8), (9, 10), (3, 8), (4, 4)])
@pytest.mark.parametrize("shift", [(0, 0), (2, 2), (2, 0)])
def test_window_attention_is_torchvisions(size, shift):
    from torchvision.models.swin_transformer import ShiftedWindowAttention

    old = filled(ShiftedWindowAttention(12, [4, 4], list(shift), 3))
    new = call_projections(copy.deepcopy(old))
    assert set(new.state_dict()) == set(old.state_dict())
    x = torch.rand(2, *size, 12, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(new(x), old(x), rtol=1e-5, atol=1e-6)


def test_layers_nobody_knows_are_left():
    assert call_projections(nn.Linear(3, 3)) is None
    assert call_projections(nn.MultiheadAttention(4, 2, add_bias_kv=True)) is None
    assert call_projections(nn.MultiheadAttention(4, 2, kdim=3)) is None


# --- patches embedded by a linear layer ------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["pixels_first", "channels_first"])
def test_linear_patch_embedding_is_widened_in_its_own_order(order):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm, self.head = nn.Linear(48, 10), nn.LayerNorm(10), nn.Linear(10, 5)

        def forward(self, x):
            n, c, h, w = x.shape
            x = x.reshape(n, c, h // 4, 4, w // 4, 4)
            x = x.permute(0, 2, 4, 3, 5, 1) if order == "pixels_first" else x.permute(0, 2, 4, 1, 3, 5)
            x = self.embed(x.flatten(3).flatten(1, 2))
            return self.head(self.norm(x.mean(dim=1)))

    source, x = filled(Net()), images(size=16)
    _, report = bcosify(source, Recipe.equivalent(), verify_images=x)
    assert report.equivalence.within(TOLERANCES["equivalence"])
    assert report.weights_copied.widened == 1
    assert report.weights_copied.complete
    net, report = bcosify(source)
    # Published for SimpleViT: LayerNorm and classifier of every token, then the mean.
    tokens = []
    net.backbone.head.register_forward_hook(lambda module, args, out: tokens.append(out.shape))
    net.eval()(x)
    assert tokens == [(2, 16, 5)]
    net.double()
    assert float(explain(net, x.double()).completeness_error().max()) < 1e-12


# --- CLIP ------------------------------------------------------------------------------------------------------------


def relative(got, expected):
    expected = torch.as_tensor(expected).double()
    return float((got.double() - expected).abs().max() / expected.abs().max())


def test_clip_image_tower_gives_the_published_tokens():
    modified_resnet = pytest.importorskip("open_clip.modified_resnet")
    golden = load_golden("clip_rn_small")
    tower = modified_resnet.ModifiedResNet((1, 1, 1, 1), output_dim=128, heads=8, image_size=224, width=16)
    source, x = seeded(tower, 21), golden_images(21)
    recipe = Recipe.clip()
    unchanged = Recipe.equivalent(mean=recipe.mean, std=recipe.std)
    net, report = bcosify(source, unchanged, verify_images=x)
    assert report.equivalence.within(TOLERANCES["equivalence"])
    with torch.no_grad():
        assert relative(net(x), golden["standard_embedding"]) < TOLERANCES["equivalence"]

    net, report = bcosify(source, recipe)
    assert report.weights_copied.complete
    assert isinstance(net.backbone.attnpool, AttentionPool)
    assert isinstance(net.backbone.attnpool.c_proj, BcosLinear)
    recalibrate(net, [x])
    for key in (k for k in golden if k.startswith("running_var/")):
        got = net.backbone.get_submodule(key.removeprefix("running_var/")).running_var
        torch.testing.assert_close(got, torch.tensor(golden[key]).float(), rtol=TOLERANCES["running_var"], atol=1e-12)
    with torch.no_grad():
        tokens = net.eval().tokens_encoded(net.encode(x))
        embedding = net(x)
    assert relative(tokens.transpose(0, 1), golden["tokens"]) < TOLERANCES["logits_b2"]
    text = torch.tensor(golden["text_embedding"]).float()
    assert relative(embedding @ text, golden["score"]) < TOLERANCES["logits_b2"]


# --- gates, activations, sizes of images -----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_gated_mlp(activation):
    """GEGLU and SwiGLU as one packed projection (Shazeer 2020, arXiv 2002.05202): W by hand, the gate constant."""

    class Mlp(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.packed, self.out = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.Linear(12, 8)
            self.scale, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 5)

        def forward(self, x, hold=lambda gate: gate):
            x = self.patches(x).flatten(2).transpose(1, 2)
            value, gate = self.packed(x).chunk(2, dim=-1)
            x = x + self.out(value * hold(getattr(nn.functional, activation)(gate))) * self.scale
            return self.head(x.mean(1))

    source, x = filled(Mlp()), images(size=16).double()
    net, report = bcosify(source, Recipe(head="after_pool"))
    assert isinstance(net.backbone.packed, BcosLinear)
    assert report.weights_copied.complete
    net = net.double().eval()
    explanation = explain(net, x)
    held = copy.deepcopy(net)
    forward = type(net.backbone).forward
    held.backbone.forward = lambda x: forward(held.backbone, x, torch.Tensor.detach)
    _, weights = oracle(held, net.encode(x), explanation.target)
    assert float((explanation.weights - weights).abs().max() / weights.abs().max()) < TOLERANCES["oracle64"]
    assert float(explanation.completeness_error().max()) < 1e-12


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations_of_transformers(activation):
    net = bcosify(filled(hf_model("ViT", hidden_act=activation, num_hidden_layers=1)))[0].double().eval()
    assert float(explain(net, images().double()).completeness_error().max()) < 1e-12


def test_an_op_without_a_rule_is_named():
    net, _ = bcosify(filled(hf_model("ViT", hidden_act="relu2", num_hidden_layers=1)))
    with pytest.raises(UnsupportedOpError, match=r"aten\.square\.default in backbone\.vit\.layers\.0\.mlp"):
        explain(net.eval(), images())


FAMILIES = {
    # Relative positions; the view of the attention's result relies on its strides.
    "Beit": {"num_hidden_layers": 1}, "Data2VecVision": {"num_hidden_layers": 1},
    # Windows; a pool over the last dimension of [N, C, T].
    "Swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "patch_size": 4},
    # Global response normalisation, a factor that is a quotient.
    "ConvNextV2": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4},
    # Keys and values of fewer tokens than queries.
    "Segformer": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_attention_heads": [1, 2], "num_encoder_blocks": 2},
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family):
    source, x = filled(hf_model(family, **FAMILIES[family])), images()
    _, report = bcosify(source, Recipe.equivalent(), verify_images=x)
    assert report.equivalence.within(TOLERANCES["equivalence"])
    assert report.weights_copied.complete
    net, report = bcosify(source)
    assert report.weights_copied.complete
    # What is kept is a projection (attention is linear), or a norm of a kind of its own with a bias.
    assert all("attention" in e.reason or "of its own kind" in e.reason for e in report.kept)
    net = net.double().eval()
    explanation = explain(net, x.double())
    assert float(explanation.completeness_error().max()) < 1e-12
    _, weights = oracle(net, net.encode(x.double()), explanation.target)
    assert float((explanation.weights - weights).abs().max() / weights.abs().max()) < TOLERANCES["oracle64"]


SIZES = {
    # Position embeddings that are interpolated, windows that are padded.
    "hf vit": (lambda: hf_model("ViT", num_hidden_layers=1), (96, 64)),
    "hf dinov2": (lambda: hf_model("Dinov2", num_hidden_layers=1), (80, 96)),
    "timm vit": (lambda: timm_model("vit_tiny_patch16_224", img_size=SIZE, depth=1, dynamic_img_size=True), (96, 80)),
    "torchvision swin": (
        lambda: torchvision.models.SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=10), (48, 40),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SIZES)
def test_other_image_sizes(name):
    build, size = SIZES[name]
    source = filled(build())
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(3))
    _, report = bcosify(source, Recipe.equivalent(), verify_images=x)
    assert report.equivalence.within(TOLERANCES["equivalence"])
    net = bcosify(source)[0].double().eval()
    explanation = explain(net, x.double())
    assert explanation.weights.shape[-2:] == size
    assert float(explanation.completeness_error().max()) < 1e-12
    _, weights = oracle(net, net.encode(x.double()), explanation.target)
    assert float((explanation.weights - weights).abs().max() / weights.abs().max()) < TOLERANCES["oracle64"]


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: timm_model("vit_tiny_patch16_224", img_size=SIZE, depth=1), "Input height"),
        (lambda: torchvision.models.VisionTransformer(SIZE, 16, 1, 4, 64, 128, num_classes=10), "Wrong image height"),
    ],
)
def test_image_sizes_a_network_does_not_take(build, reason):
    net = bcosify(filled(build()))[0].eval()
    with pytest.raises(InvalidArgumentError, match=rf"images: got size 96x80, on which the network fails \({reason}"):
        explain(net, torch.rand(1, 3, 96, 80))
