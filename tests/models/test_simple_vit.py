"""SimpleViT: the published sizes and keys, patches and position embeddings, image sizes, weights, the B-cos form."""

import hashlib
import json
import math
import urllib.error

import numpy as np
import pytest
import torch
from torch import nn

from bcos_rt import Engine, Recipe, bcosify, explain
from bcos_rt.checkpoint import load, save
from bcos_rt.errors import CheckpointError, InvalidArgumentError, InvalidTypeError
from bcos_rt.kernels import cpu
from bcos_rt.models import imagenet_class_names, known_models, load_model, rebuild_source, simple_vit
from bcos_rt.models.simple_vit import SIMPLE_VIT_WEIGHTS, SIMPLE_VITS, Patches, PositionEmbedding, SimpleViT
from bcos_rt.nn import BcosConv2d, BcosLinear
from tests.golden import load_golden, seeded
from tests.oracle import oracle
from tests.tolerances import TOLERANCES

# Millions of parameters, as published with B-cos v2 for its standard models.
PARAMETERS = {
    "simple_vit_ti_patch16_224": 5.67, "simple_vit_s_patch16_224": 21.96, "simple_vit_b_patch16_224": 86.38,
    "simple_vit_l_patch16_224": 178.10, "vitc_ti_patch1_14": 5.33, "vitc_s_patch1_14": 20.91,
    "vitc_b_patch1_14": 81.39, "vitc_l_patch1_14": 167.54,
}  # fmt: skip
SMALL = {"patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 48, "num_classes": 7}
STEMS = {"patches": {}, "convolutions": {"patch_size": 1, "conv_stem": (8, 8, 16, 24)}}


def small(stem="patches"):
    return seeded(SimpleViT(**{**SMALL, **STEMS[stem]}), 1)


def images(height=40, width=40, n=2):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(2))


# --- the architecture ------------------------------------------------------------------------------------------------


def test_published_sizes():
    assert SIMPLE_VITS.keys() == PARAMETERS.keys() == SIMPLE_VIT_WEIGHTS.keys()
    for name, build in SIMPLE_VITS.items():
        assert build is getattr(simple_vit, name)
        with torch.device("meta"):
            model = build(1000)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == PARAMETERS[name], name
        layers = [type(m) for m in model.modules()]
        assert layers.count(nn.LayerNorm) == 2 * len(model.transformer) + 1
        assert layers.count(nn.GroupNorm) == layers.count(nn.Conv2d) == (0 if "patch16" in name else len(stem(model)))


def stem(model):
    return [m for m in model.to_patch_embedding.conv_stem if isinstance(m, nn.Conv2d)]


@pytest.mark.parametrize(("name", "channels"), [("ti", [24, 48, 96, 192]), ("l", [64, 128, 128, 256, 256, 512])])
def test_stem(name, channels):
    with torch.device("meta"):
        convs = stem(getattr(simple_vit, f"vitc_{name}_patch1_14")())
    assert [c.out_channels for c in convs] == channels
    assert math.prod(c.stride[0] for c in convs) == 16
    assert all(c.bias is not None and c.kernel_size == (3, 3) for c in convs)


def test_keys_are_the_published_ones():
    """B-cosification's file has them with ``.linear`` behind B-cos layers and without biases."""
    with torch.device("meta"):
        keys = list(simple_vit.simple_vit_ti_patch16_224().state_dict())
    golden = load_golden("published_simple_vit_ti_patch16_224")
    # B-cos layers end in ".linear.weight", some of them after a name "linear" of their own.
    layers = ("linear", "linear1", "linear2", "to_out")
    published = set()
    for key in golden["keys"]:
        *path, parent, leaf = str(key).removeprefix("model.").split(".")
        published.add(".".join([*path, leaf] if path[-1] in layers and parent == "linear" else [*path, parent, leaf]))
    assert {k for k in keys if not k.endswith("bias")} == published
    assert {k.rpartition(".")[0] for k in keys if k.endswith("bias")} == {
        k.rpartition(".")[0] for k in published if "attn.to_" not in k
    }


def test_patches_are_rows_columns_channels():
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = Patches(2)(x)
    assert patches.shape == (2, 2, 3, 12)
    for n, row, column, dy, dx, c in np.ndindex(2, 2, 3, 2, 2, 3):
        assert patches[n, row, column, (dy * 2 + dx) * 3 + c] == x[n, c, 2 * row + dy, 2 * column + dx]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_position_embedding(dtype):
    height, width, dim = 3, 5, 16
    frequencies = 10_000.0 ** (-np.arange(4) / 3)
    rows, columns = np.divmod(np.arange(15), width)
    rows, columns = rows[:, None] * frequencies, columns[:, None] * frequencies
    expected = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)
    got = PositionEmbedding()(torch.zeros(2, height, width, dim, dtype=dtype))
    assert got.dtype == dtype
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 4e-3}[dtype]
    np.testing.assert_allclose(got.double().numpy(), np.broadcast_to(expected, (2, 15, 16)), rtol=0, atol=tolerance)


def test_published_code_gives_the_same():
    pytest.importorskip("bcos")
    pytest.importorskip("einops")
    from bcos.models import vit
    from bcos.modules import DetachableGNLayerNorm2d

    layers = {"linear_layer": nn.Linear, "conv2d_layer": nn.Conv2d, "norm_layer": nn.LayerNorm, "act_layer": nn.GELU}
    layers["norm2d_layer"] = DetachableGNLayerNorm2d
    for name, build in SIMPLE_VITS.items():
        with torch.device("meta"), pytest.warns(UserWarning, match="entrypoints"):
            theirs = getattr(vit, name)(channels=3, **layers).state_dict()
        with torch.device("meta"):
            ours = build(1000).state_dict()
        assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]
    with pytest.warns(UserWarning, match="entrypoints"):
        theirs = seeded(vit.vitc_ti_patch1_14(channels=3, num_classes=5, **layers), 3)
    ours = seeded(simple_vit.vitc_ti_patch1_14(5), 3)
    x = images(48, 80)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"dim": 30}, InvalidArgumentError, "dim: got 30, expected a multiple of 4 and of heads=2"),
        ({"dim": 4, "heads": 1}, InvalidArgumentError, "at least 8"),
        ({"heads": 5}, InvalidArgumentError, "heads=5"),
        ({"depth": 0}, InvalidArgumentError, "depth: got 0, expected at least 1"),
        ({"mlp_dim": 4.0}, InvalidTypeError, "mlp_dim: got 4.0, expected an integer"),
        ({"conv_stem": (8, True)}, InvalidTypeError, r"conv_stem\[1\]"),
        ({"num_classes": -1}, InvalidArgumentError, "num_classes"),
    ],
)
def test_sizes_that_do_not_fit(changes, error, said):
    with pytest.raises(error, match=said):
        SimpleViT(**{**SMALL, **changes})


# --- image sizes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stem", "size"), [("patches", (24, 48)), ("convolutions", (33, 50)), ("convolutions", (16, 16))]
)
def test_other_image_sizes(stem, size):
    source = small(stem)
    x = images(*size)
    _, report = bcosify(source, Recipe.equivalent(), verify_images=x)
    assert report.equivalence.within(TOLERANCES["equivalence"])
    net = bcosify(source)[0].double().eval()
    explanation = explain(net, x.double())
    assert explanation.contributions.shape == (2, *size)
    assert float(explanation.completeness_error().max()) < 1e-12
    _, weights = oracle(net, net.encode(x.double()), explanation.target)
    assert float((explanation.weights - weights).abs().max() / weights.abs().max()) < TOLERANCES["oracle64"]


def test_size_that_the_patches_do_not_divide():
    net = bcosify(small())[0].eval()
    for model in (small(), net, lambda x: explain(net, x), lambda x: Engine(net, x, backend="eager")):
        with pytest.raises(InvalidArgumentError, match="image: got 40 x 41 pixels, expected height and width mult"):
            model(images(40, 41))
    with pytest.raises(InvalidArgumentError, match=r"image: got shape \[3, 40, 40\], expected \[N, C, H, W\]"):
        small()(images()[0])


# --- the B-cos form --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stem", STEMS)
def test_bcos_form(stem):
    net, report = bcosify(small(stem), Recipe(logit_bias=None))
    assert report.weights_copied.complete
    assert report.weights_copied.widened == 1
    backbone = net.backbone
    if stem == "convolutions":
        conv, norm = (backbone.get_submodule(f"to_patch_embedding.conv_stem.{i}") for i in range(2))
        assert isinstance(conv, BcosConv2d)
        assert isinstance(norm, nn.GroupNorm)
        assert conv.in_channels == 6
    else:
        assert backbone.to_patch_embedding.linear.in_features == 6 * 8**2
    linear = {name for name, module in backbone.named_modules() if isinstance(module, BcosLinear)}
    layers = ("attn.to_out", "ff.net.linear1", "ff.net.linear2")
    blocks = {f"transformer.encoder_{i}.{layer}" for i in range(2) for layer in layers}
    assert linear == blocks | {"to_patch_embedding.linear", "linear_head.linear"}
    assert type(backbone.transformer.encoder_0.attn.to_qkv) is nn.Linear
    assert not [name for name, _ in net.named_parameters() if name.endswith("bias")]
    # The head classifies tokens: 5 x 5 patches, or what three strided convolutions leave of 40 x 40 pixels.
    seen = []
    backbone.linear_head.linear.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    net.eval()(images())
    assert seen == [(2, 25, 7)]


@pytest.mark.skipif(not cpu.available(), reason=f"no C++ kernels: {cpu.unavailable_reason()}")
def test_engine_of_fused_kernels():
    """The un-fused graph's explanation; test_transformers has the engine in plain PyTorch, for both stems."""
    net, x = bcosify(small("convolutions"))[0].eval(), images()
    expected = explain(net, x)
    got = Engine(net, x, backend="native").explain(x, expected.target)
    for value, reference, tolerance in (
        (got.logits, expected.logits, TOLERANCES["logits_b2"]),
        (got.weights, expected.weights, TOLERANCES["weights_b2"]),
        (got.contributions, expected.contributions, TOLERANCES["weights_b2"]),
    ):
        assert float((value - reference).abs().max() / reference.abs().max()) < tolerance


@pytest.mark.parametrize("stem", STEMS)
def test_compiled_equals_eager(stem):
    net = bcosify(small(stem))[0].eval()
    x = images()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stem", STEMS)
def test_bfloat16(stem):
    net = bcosify(small(stem), Recipe(logit_bias=None))[0].eval()
    x = images()
    with torch.no_grad():
        expected = net(x)
        got = net.bfloat16()(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert float((got.float() - expected).abs().max() / expected.abs().max()) < 0.05


# --- names and weights -----------------------------------------------------------------------------------------------


def test_by_name():
    loaded = load_model("simple_vit:vitc_ti_patch1_14", weights="random")
    assert (loaded.mean, loaded.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert loaded.input_size == 224
    assert loaded.class_names == imagenet_class_names()
    assert not loaded.module.training
    expected = {"kind": "simple_vit", "name": "vitc_ti_patch1_14", "num_classes": 1000}
    assert json.loads(json.dumps(loaded.source)) == expected
    assert {f"simple_vit:{name}" for name in SIMPLE_VITS} <= set(known_models())
    with pytest.raises(InvalidArgumentError, match="did you mean 'vitc_ti_patch1_14'"):
        load_model("simple_vit:vitc_ti_patch_14")
    with pytest.raises(InvalidArgumentError, match="did you mean 'simple_vit:vitc_s_patch1_14'"):
        load_model("vitc_s_patch1_14")
    rebuilt = rebuild_source({**loaded.source, "num_classes": 3})
    assert rebuilt.linear_head.linear.out_features == 3


def test_weights_from_a_file_and_a_checkpoint_of_ours(tmp_path):
    source = seeded(simple_vit.simple_vit_ti_patch16_224(4), 5)
    torch.save({"state_dict": {f"model.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "weights.ckpt")
    loaded = load_model("simple_vit:simple_vit_ti_patch16_224", weights=tmp_path / "weights.ckpt")
    x = images(32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.module(x), source(x))
    net, _ = bcosify(loaded)
    again = load(save(net, tmp_path / "net"))
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    with pytest.raises(CheckpointError, match=r"does not fit.*missing: .*conv_stem"):
        load_model("simple_vit:vitc_ti_patch1_14", weights=tmp_path / "weights.ckpt")


def test_published_weights_are_downloaded_and_checked(tmp_path, monkeypatch):
    """A release of our own, behind file:// addresses; the name says the start of the hash."""
    name = "vitc_ti_patch1_14"
    source = seeded(simple_vit.vitc_ti_patch1_14(), 6)
    torch.save(source.state_dict(), tmp_path / "plain.pth")
    digest = hashlib.sha256((tmp_path / "plain.pth").read_bytes()).hexdigest()
    for file in (f"good-{digest[:10]}.pth", "bad-0123456789.pth"):
        (tmp_path / file).write_bytes((tmp_path / "plain.pth").read_bytes())
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setitem(SIMPLE_VIT_WEIGHTS, name, (tmp_path / f"good-{digest[:10]}.pth").as_uri())
    loaded = load_model(f"simple_vit:{name}")
    x = images(32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.module(x), source(x))
    other = load_model(f"simple_vit:{name}", num_classes=3).module
    assert torch.equal(other.transformer.encoder_0.attn.to_qkv.weight, source.transformer.encoder_0.attn.to_qkv.weight)
    assert other.linear_head.linear.weight.shape == (3, 192)
    monkeypatch.setitem(SIMPLE_VIT_WEIGHTS, name, (tmp_path / "bad-0123456789.pth").as_uri())
    with pytest.raises(CheckpointError, match=r"could not download .*hash.*weights=FILE"):
        load_model(f"simple_vit:{name}")


def test_addresses_name_their_model_and_hash():
    for name, url in SIMPLE_VIT_WEIGHTS.items():
        stem, _, digest = url.rpartition("/")[2].removesuffix(".pth").rpartition("-")
        assert stem == f"standard_{name}"
        assert len(digest) == 10
        assert int(digest, 16) >= 0


def test_without_a_network(monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    with pytest.raises(CheckpointError, match=r"simple_vit:vitc_s_patch1_14 .*no route to host.*weights=FILE"):
        load_model("simple_vit:vitc_s_patch1_14")
