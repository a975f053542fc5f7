"""Checkpoints of the B-cosification repository and of B-cos v2."""

import copy
import functools
import math

import pytest
import torch

from bcos_rt import Recipe
from bcos_rt.checkpoint import load, save
from bcos_rt.errors import CheckpointError, InvalidArgumentError, InvalidTypeError
from bcos_rt.models import import_published, published_recipe
from tests.golden import golden_images, load_golden, seeded_values
from tests.tolerances import TOLERANCES

# --- B-cosification --------------------------------------------------------------------------------------------------


def described_state(golden, seed):
    """The state dict a golden file describes, keys as the published model has them (one ``model.`` in front)."""
    state = {}
    for key, shape, dtype in zip(golden["keys"], golden["shapes"], golden["dtypes"], strict=True):
        size = [int(n) for n in str(shape).split(",") if n]
        state[str(key)] = torch.zeros(size, dtype=getattr(torch, str(dtype).removeprefix("torch.")))
    state.update(seeded_values(state, seed))
    for key, value in golden.items():
        if key.startswith("running_var/"):
            name = key.removeprefix("running_var/")
            assert name in state
            state[name] = torch.from_numpy(value).to(torch.float32)
    return state


@pytest.mark.parametrize(("name", "seed"), [("resnet18", 31), ("densenet121", 32), ("simple_vit_ti_patch16_224", 33)])
def test_bcosification(name, seed, tmp_path):
    golden = load_golden(f"published_{name}")
    state = described_state(golden, seed)
    path = tmp_path / "epoch.ckpt"
    torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}, "epoch": 89}, path)
    net, report = import_published(path, name, recipe=Recipe(logit_bias=None))
    assert report.flavor == "bcosification"
    assert [key for key, _ in report.keys] == [f"model.{k}" for k in state]
    assert len({place for _, place in report.keys}) == len(state) == len(net.backbone.state_dict())
    assert f"{len(state)} tensors" in str(report)
    with torch.no_grad():
        logits = net(golden_images(seed))
    expected = torch.from_numpy(golden["logits"])
    assert float((logits - expected).abs().max() / expected.abs().max()) < TOLERANCES["logits_b2"]

    # A published network is a network like any other: it saves and loads.
    x = torch.rand(1, 3, 64, 64)
    again = load(save(net, tmp_path / "ours"))
    with torch.no_grad():
        assert torch.equal(again(x), net(x))
    assert again.class_names == net.class_names


def test_simple_vit_keeps_its_sequentials_names():
    golden = load_golden("published_simple_vit_ti_patch16_224")
    state = described_state(golden, 33)
    net, report = import_published(state, "simple_vit_ti_patch16_224")
    assert report.flavor == "bcosification"  # one ``model.`` is enough: B-cos v2's have ``0.`` in front
    places = dict(report.keys)
    assert places["model.to_patch_embedding.linear.linear.weight"] == "to_patch_embedding.linear.weight"
    assert places["model.transformer.encoder_3.ff.net.linear1.linear.weight"] == (
        "transformer.encoder_3.ff.net.linear1.weight"
    )
    assert places["model.transformer.encoder_3.attn.to_qkv.weight"] == "transformer.encoder_3.attn.to_qkv.weight"
    assert net.source == {"kind": "simple_vit", "name": "simple_vit_ti_patch16_224", "num_classes": 1000}
    bare = {key.removeprefix("model."): value for key, value in state.items()}
    with pytest.raises(CheckpointError, match="give flavor="):
        import_published(bare, "simple_vit_ti_patch16_224")
    with pytest.raises(CheckpointError, match=r"missing: .*conv_stem"):
        import_published(state, "vitc_ti_patch1_14")


def test_renumbered_sequentials_go_to_their_own_layers():
    golden = load_golden("published_densenet121")
    _, report = import_published(described_state(golden, 32), "torchvision:densenet121")
    places = dict(report.keys)
    assert places["model.features.0.linear.weight"] == "features.conv0.weight"
    assert places["model.features.5.0.running_var"] == "features.transition1.norm.running_var"
    assert places["model.features.9.2.linear.weight"] == "features.transition3.conv.weight"
    assert places["model.features.4.denselayer2.conv1.linear.weight"] == (
        "features.denseblock1.denselayer2.conv1.weight"
    )
    assert places["model.features.11.weight"] == "features.norm5.weight"
    assert places["model.classifier.linear.weight"] == "classifier.weight"


def test_recipes():
    assert published_recipe("bcosification") == Recipe()
    v2 = published_recipe("bcos_v2")
    assert (v2.weight_norm, v2.activations, v2.b, v2.head) == ("unit", "identity", 2.0, "before_pool")
    assert published_recipe("bcos_v2", "vitc_ti_patch1_14") == v2.replace(head="after_pool")
    assert published_recipe("bcosification", "vitc_ti_patch1_14") == Recipe()
    with pytest.raises(InvalidArgumentError, match="did you mean 'bcos_v2'"):
        published_recipe("bcos-v2")


# --- B-cos v2 --------------------------------------------------------------------------------------------------------


@functools.cache
def bcos_v2_model(name, classes=10):
    """A PyPI ``bcos`` model, seeded, its norms' statistics those of one batch, so that logits are of order 1."""
    pytest.importorskip("bcos")
    from bcos.models import densenet, resnet
    from bcos.modules import norms

    build = getattr(resnet, name, None) or getattr(densenet, name)
    model = build(norm_layer=norms.NoBias(norms.BatchNormUncentered2d), num_classes=classes)
    state = model.state_dict()
    state.update(seeded_values(state, 7))
    model.load_state_dict(state)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(encoded(images()))
    return model.eval()


def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(8))


def encoded(x):
    return torch.cat([x, 1 - x], dim=1)


def difference(net, model, dtype):
    """Largest difference of the logits without bias, relative to their largest magnitude."""
    x = images().to(dtype)
    net, model = copy.deepcopy(net).to(dtype), copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        expected = model(encoded(x))
        scale = (expected - model.logit_layer.logit_bias).abs().max()
        assert float((expected[0] - expected[1]).abs().max()) > 0.01 * float(scale)
        return float((net(x) - expected).abs().max() / scale)


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_bcos_v2(name, tmp_path):
    model = bcos_v2_model(name)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    net, report = import_published(tmp_path / "weights.pth", name, class_names=list("abcdefghij"))
    assert report.flavor == "bcos_v2"
    assert len(report.keys) == len(model.state_dict())
    assert net.class_names == list("abcdefghij")
    assert net.logit_layer.bias == pytest.approx(-math.log(9))
    assert difference(net, model, torch.float32) < TOLERANCES["logits_b2"]
    assert difference(net, model, torch.float64) < TOLERANCES["oracle64"]
    again = load(save(net, tmp_path / "ours.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(images()), net(images()))


@pytest.mark.parametrize("name", ["simple_vit_ti_patch16_224", "vitc_ti_patch1_14"])
@pytest.mark.filterwarnings("ignore:You are trying to use the entrypoints")
def test_bcos_v2_simple_vits(name):
    pytest.importorskip("bcos")
    pytest.importorskip("einops")
    from bcos.models import vit
    from bcos.modules import DetachableGNLayerNorm2d, norms
    from bcos.modules.bcosconv2d import BcosConv2d
    from bcos.modules.bcoslinear import BcosLinear
    from bcos.modules.common import BcosSequential
    from bcos.modules.logitlayer import LogitLayer

    backbone = getattr(vit, name)(
        channels=6,
        linear_layer=functools.partial(BcosLinear, b=2, max_out=1),
        conv2d_layer=functools.partial(BcosConv2d, b=2, max_out=1),
        norm_layer=norms.NoBias(norms.DetachableLayerNorm),
        norm2d_layer=norms.NoBias(DetachableGNLayerNorm2d),
        act_layer=torch.nn.Identity,
        num_classes=10,
    )
    model = BcosSequential(backbone, LogitLayer(logit_bias=-math.log(9))).eval()
    state = model.state_dict()
    state.update(seeded_values(state, 7))
    model.load_state_dict(state)
    net, report = import_published(state, name)
    assert report.flavor == "bcos_v2"
    assert [key for key, _ in report.keys] == list(state)
    x = images()
    with torch.no_grad():
        expected = model(encoded(x))
        got = net(x)
    scale = (expected + math.log(9)).abs().max()
    assert float((expected[0] - expected[1]).abs().max()) > 0.01 * float(scale)
    assert float((got - expected).abs().max() / scale) < TOLERANCES["logits_b2"]


def test_bcos_v2_with_groups():
    model = bcos_v2_model("resnext50_32x4d")
    net, _ = import_published(model.state_dict(), "resnext50_32x4d")
    assert difference(net, model, torch.float64) < TOLERANCES["oracle64"]


def test_running_averages_of_a_trainer():
    model = bcos_v2_model("resnet18")
    state = model.state_dict()
    trainer = {f"model.{k}": torch.zeros_like(v) for k, v in state.items()}
    trainer |= {f"ema.module.{k}": v for k, v in state.items()} | {"ema.n_averaged": torch.tensor(4)}
    net, report = import_published(trainer, "resnet18", flavor="bcos_v2", ema=True)
    assert difference(net, model, torch.float64) < TOLERANCES["oracle64"]
    assert len(report.ignored) == len(state) + 1
    plain, report = import_published(trainer, "resnet18", flavor="bcos_v2")
    assert not plain.backbone.conv1.weight.any()
    assert set(report.ignored) == {f"ema.module.{k}" for k in state} | {"ema.n_averaged"}
    with pytest.raises(CheckpointError, match="no running averages"):
        import_published(state, "resnet18", ema=True)


def test_other_architectures_of_the_same_name_are_refused():
    for name in ("vgg11_bn", "convnext_tiny"):
        with pytest.raises(CheckpointError, match="not torchvision's"):
            import_published({"features.0.linear.weight": torch.zeros(1)}, name, flavor="bcos_v2")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_ambiguous_flavor():
    state = {f"model.{k}": v for k, v in bcos_v2_model("resnet18").state_dict().items()}
    with pytest.raises(CheckpointError, match="give flavor="):
        import_published(state, "resnet18")
    unit, _ = import_published(state, "resnet18", flavor="bcos_v2")
    assert unit.backbone.conv1.weight_norm == "unit"
    plain, _ = import_published(state, "resnet18", flavor="bcosification")
    assert plain.backbone.conv1.weight_norm == "none"


def test_keys_that_differ_are_listed():
    state = dict(bcos_v2_model("resnet18").state_dict())
    del state["layer1.0.conv1.linear.weight"]
    state["layer1.0.conv9.linear.weight"] = torch.zeros(3)
    state["layer1.0.conv2.linear.weight"] = torch.zeros(64, 64, 1, 1)
    with pytest.raises(CheckpointError) as caught:
        import_published(state, "resnet18")
    message = str(caught.value)
    assert "does not fit torchvision:resnet18 as a bcos_v2 network" in message
    assert "1 missing: layer1.0.conv1.weight" in message
    assert "1 unexpected: layer1.0.conv9.linear.weight" in message
    assert "layer1.0.conv2.weight is 64x64x1x1, expected 64x64x3x3" in message


def test_every_tensor_must_be_there():
    state = dict(bcos_v2_model("resnet18").state_dict())
    del state["bn1.num_batches_tracked"]
    with pytest.raises(CheckpointError, match=r"missing: bn1\.num_batches_tracked"):
        import_published(state, "resnet18")


def test_two_keys_for_one_tensor():
    state = dict(bcos_v2_model("resnet18").state_dict())
    state["conv1.weight"] = state["conv1.linear.weight"]
    with pytest.raises(CheckpointError, match=r"unexpected: conv1\.(linear\.)?weight"):
        import_published(state, "resnet18")


def test_wrong_architecture():
    with pytest.raises(CheckpointError, match=r"missing: .*unexpected: "):
        import_published(bcos_v2_model("resnet18").state_dict(), "densenet121")


def test_bad_arguments():
    with pytest.raises(InvalidArgumentError, match="did you mean 'resnet18'"):
        import_published({"w": torch.zeros(1)}, "resnet1")
    with pytest.raises(InvalidTypeError, match="checkpoint"):
        import_published(torch.zeros(1), "resnet18")
    with pytest.raises(InvalidArgumentError, match="without tensors"):
        import_published({"a": 1}, "resnet18")
    with pytest.raises(InvalidTypeError, match="name"):
        import_published({"w": torch.zeros(1)}, None)
    with pytest.raises(CheckpointError, match="no such file"):
        import_published("absent.ckpt", "resnet18")
