"""Saving and loading: the same network bit for bit, atomic writes, and errors that say what is wrong."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import bcos_rt
from bcos_rt import Recipe
from bcos_rt.checkpoint import is_checkpoint, load, save
from bcos_rt.conversion import bcosify
from bcos_rt.errors import CheckpointError, InvalidArgumentError, InvalidTypeError
from bcos_rt.models import load_model

NAMES = tuple("abcdef")


class Tiny(nn.Module):
    """A small classifier of our own: no name to rebuild it by."""

    def __init__(self, width=8, depth=1):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.body = nn.Sequential(*[nn.Conv2d(width, width, 3, padding=1) for _ in range(depth)])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, 6)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        return self.fc(torch.flatten(self.pool(self.body(x)), 1))


@pytest.fixture(scope="module")
def converted():
    """A network by name, moved away from its initialisation."""
    torch.manual_seed(4)
    network, _ = bcosify(load_model("torchvision:resnet18", weights="random", num_classes=6), class_names=NAMES)
    network.train()
    with torch.no_grad():
        network(images())
    return network


@pytest.fixture
def net(converted):
    return converted.train()


@pytest.fixture
def tiny():
    torch.manual_seed(5)
    network, _ = bcosify(Tiny(), class_names=NAMES)
    return network.eval()


def images(size=64):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(6))


def logits(net):
    with torch.no_grad():
        return net.eval()(images().to(next(net.parameters()).dtype))


# --- round trips -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["folder", "deep/er/folder", "file.safetensors", "resnet.v1.5"])
def test_round_trip(net, name, tmp_path):
    path = tmp_path / name
    assert save(net, path) == path
    assert path.is_file() == name.endswith(".safetensors")
    torch.manual_seed(9)
    random_state = torch.get_rng_state()
    again = load(path)
    assert torch.equal(random_state, torch.get_rng_state())
    assert not again.training
    assert not any(m.training for m in again.modules())
    assert again.recipe == net.recipe
    assert again.source == net.source == {"kind": "torchvision", "name": "resnet18", "num_classes": 6}
    assert again.class_names == list(NAMES)
    before, after = net.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    assert torch.equal(logits(again), logits(net))
    assert is_checkpoint(path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing temporary stays


RECIPES = {
    "equivalent": Recipe.equivalent(),
    "unit": Recipe(weight_norm="unit", activations="identity", mean=(0.0,) * 6, std=(1.0,) * 6),
    "kept": Recipe(b=1.5, keep=("body.*",), logit_bias=-2.5, logit_temperature=3.0, stem_pool="keep"),
    "plain": Recipe(input_normalization="none", mean=(0.1, 0.2, 0.3)),
    "three": Recipe(input_encoding="three_channel", head="after_pool", logit_bias=None, mean=(0.1, 0.2, 0.3)),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_survives(recipe, tmp_path):
    net, _ = bcosify(Tiny(), RECIPES[recipe])
    again = load(save(net, tmp_path / "net"), Tiny())
    assert again.recipe == net.recipe
    assert torch.equal(logits(again), logits(net))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_survive(tiny, dtype, tmp_path):
    tiny.to(dtype)
    again = load(save(tiny, tmp_path / "net.safetensors"), Tiny())
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert torch.equal(logits(again), logits(tiny))


def test_timm_and_lite0_rebuild_without_download(tmp_path):
    pytest.importorskip("timm")
    for name in ("timm:resnet18", "efficientnet-lite0"):
        net, _ = bcosify(load_model(name, weights="random", num_classes=6))
        again = load(save(net, tmp_path / "net"))
        assert again.source["kind"] == name.partition(":")[0]
        assert torch.equal(logits(again), logits(net))


def test_the_side_of_the_images(net, tiny, tmp_path):
    assert net.image_size == 224, "ResNet-18's"
    assert load(save(net, tmp_path / "a.safetensors")).image_size == 224
    assert tiny.image_size is None, "a module of one's own does not say it"
    assert load(save(tiny, tmp_path / "net"), Tiny()).image_size is None
    tiny.image_size = 48
    for name in ("net", "net.safetensors"):
        assert load(save(tiny, tmp_path / name), Tiny()).image_size == 48


@pytest.mark.parametrize("names", [["a"], ["a"] * 1000])
def test_a_wrong_number_of_class_names_is_not_written(tiny, tmp_path, names):
    save(tiny, tmp_path / "net")
    tiny.class_names = names
    with pytest.raises(InvalidArgumentError, match=rf"net\.class_names: got {len(names)} names, .*{len(NAMES)}, or"):
        save(tiny, tmp_path / "net")
    assert load(tmp_path / "net", Tiny()).class_names == list(NAMES)


@pytest.mark.parametrize("names", ["abcdef", [1, 2, 3, 4, 5, 6], {"a": 1}])
def test_class_names_are_strings(tiny, tmp_path, names):
    tiny.class_names = names
    with pytest.raises(InvalidTypeError, match=r"net\.class_names"):
        save(tiny, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_network_without_class_names(tiny, tmp_path):
    tiny.class_names = None
    assert load(save(tiny, tmp_path / "net"), Tiny()).class_names is None


def test_shared_and_viewed_tensors(tiny, tmp_path):
    """Tensors in one memory are stored one by one, and no more of that memory than they are."""
    net, _ = bcosify(Tiny(depth=2))
    net.backbone.get_submodule("body.1").weight = net.backbone.get_submodule("body.0").weight
    path = save(net, tmp_path / "net.safetensors")
    again = load(path, Tiny(depth=2))
    assert torch.equal(logits(again), logits(net))

    big = torch.randn(3, *tiny.backbone.conv.weight.shape)
    tiny.backbone.conv.weight.data = big[1]  # a view into a larger tensor
    tiny.backbone.norm.running_mean = tiny.backbone.norm.running_var  # two names for one tensor
    again = load(save(tiny, path), Tiny())
    assert torch.equal(again.backbone.conv.weight, big[1])
    assert torch.equal(logits(again), logits(tiny))
    with safe_open(path, "pt") as file:
        assert file.get_slice("backbone.conv.weight").get_shape() == list(big[1].shape)


def test_transposed_weights(tiny, tmp_path):
    tiny.to(memory_format=torch.channels_last)
    weight = tiny.backbone.get_submodule("body.0").weight
    assert not weight.is_contiguous()
    again = load(save(tiny, tmp_path / "net"), Tiny())
    assert torch.equal(again.backbone.get_submodule("body.0").weight, weight)


def test_the_network_is_not_changed(net, tmp_path):
    before = {k: v.clone() for k, v in net.state_dict().items()}
    save(net, tmp_path / "net")
    assert net.training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


# --- what the files hold ---------------------------------------------------------------------------------------------


def test_config_is_readable_json(tiny, tmp_path):
    save(tiny, tmp_path / "net")
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["format"] == "bcos-rt"
    assert config["format_version"] == 1
    assert config["bcos_rt_version"] == bcos_rt.__version__
    assert Recipe.from_dict(config["recipe"]) == tiny.recipe
    assert config["class_names"] == list(NAMES)
    save(tiny, tmp_path / "net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        assert json.loads(file.metadata()["bcos_rt"]) == config
        assert set(file.keys()) == set(tiny.state_dict())


# --- overwriting -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net", "net.safetensors"])
def test_overwriting_a_checkpoint(tiny, name, tmp_path):
    path = tmp_path / name
    save(tiny, path)
    with torch.no_grad():
        tiny.backbone.conv.weight.mul_(2)
    save(tiny, path)
    assert torch.equal(load(path, Tiny()).backbone.conv.weight, tiny.backbone.conv.weight)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("error", "raised"), [(OSError, InvalidArgumentError), (KeyboardInterrupt, KeyboardInterrupt)])
@pytest.mark.parametrize("name", ["net", "net.safetensors"])
def test_a_failed_write_leaves_the_old_checkpoint(tiny, name, tmp_path, monkeypatch, error, raised):
    path = tmp_path / name
    save(tiny, path)
    old = logits(tiny)
    with torch.no_grad():
        tiny.backbone.conv.weight.mul_(2)
    real = os.replace

    def fails_at_the_end(source, target):
        if str(target) == str(path) and fails_at_the_end.armed:
            fails_at_the_end.armed = False  # putting the old one back succeeds
            raise error("disk full")
        return real(source, target)

    fails_at_the_end.armed = True
    monkeypatch.setattr(os, "replace", fails_at_the_end)
    with pytest.raises(raised, match="disk full"):
        save(tiny, path)
    monkeypatch.undo()
    assert torch.equal(logits(load(path, Tiny())), old)
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("when", "whole"), [(1, "old"), (2, "new")])
def test_ctrl_c_behind_a_rename_leaves_a_whole_directory(tiny, tmp_path, monkeypatch, when, whole):
    path = tmp_path / "net"
    save(tiny, path)
    expected = {"old": logits(tiny)}
    with torch.no_grad():
        tiny.backbone.conv.weight.mul_(2)
    expected["new"] = logits(tiny)
    real, calls = os.replace, []

    def interrupted(source, target):
        real(source, target)
        calls.append(target)
        if len(calls) == when:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tiny, path)
    monkeypatch.undo()
    assert torch.equal(logits(load(path, Tiny())), expected[whole])
    assert [p.name for p in tmp_path.iterdir()] == ["net"]


def test_foreign_directories_are_not_replaced(tiny, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"x")
    with pytest.raises(InvalidArgumentError, match=r"holds cat\.jpg"):
        save(tiny, folder)
    assert (folder / "cat.jpg").read_bytes() == b"x"
    # Another project's model directory has the same two file names.
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"architectures": ["Bert"]}')
    (other / "model.safetensors").write_bytes(b"x")
    with pytest.raises(InvalidArgumentError, match="a checkpoint to replace"):
        save(tiny, other)
    # A checkpoint with something of the user's beside it.
    save(tiny, tmp_path / "net")
    (tmp_path / "net" / "notes.txt").write_text("x")
    with pytest.raises(InvalidArgumentError, match=r"notes\.txt"):
        save(tiny, tmp_path / "net")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert is_checkpoint(save(tiny, empty))


def test_unusable_paths(tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder.safetensors").mkdir()
    for path, said in (
        (tmp_path / "file", "an existing file"),
        (tmp_path / "file" / "below", "can be written"),
        (tmp_path / "folder.safetensors", "a directory"),
        (tmp_path / "net.pth", r"ending in \.safetensors"),
    ):
        with pytest.raises(InvalidArgumentError, match=said):
            save(tiny, path)
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder(tiny, tmp_path):
    tmp_path.chmod(0o500)
    try:
        for name in ("net", "net.safetensors"):
            with pytest.raises(InvalidArgumentError, match="can be written"):
                save(tiny, tmp_path / name)
    finally:
        tmp_path.chmod(0o700)


def test_save_wants_a_network(tmp_path):
    with pytest.raises(InvalidTypeError, match="a BcosNetwork"):
        save(Tiny(), tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_source_must_be_json(tiny, tmp_path):
    tiny.source["when"] = object()
    with pytest.raises(InvalidArgumentError, match=r"net\.source"):
        save(tiny, tmp_path / "net")


# --- loading what does not fit ---------------------------------------------------------------------------------------


def test_a_module_of_ones_own_must_be_given(tiny, tmp_path):
    path = save(tiny, tmp_path / "net")
    with pytest.raises(CheckpointError, match=r"Tiny.*give it as model="):
        load(path)
    given = Tiny()
    before = {k: v.clone() for k, v in given.state_dict().items()}
    assert torch.equal(logits(load(path, given)), logits(tiny))
    assert all(torch.equal(before[k], v) for k, v in given.state_dict().items())
    with pytest.raises(InvalidTypeError, match="model"):
        load(path, "torchvision:resnet18")


def test_wrong_architecture_lists_keys(tiny, tmp_path):
    path = save(tiny, tmp_path / "net")
    with pytest.raises(CheckpointError) as caught:
        load(path, Tiny(width=12))
    message = str(caught.value)
    assert "backbone.conv.weight is 8x6x3x3, expected 12x6x3x3" in message
    assert "Tiny" in message
    with pytest.raises(CheckpointError, match=r"missing: backbone\.body\.1\.weight"):
        load(path, Tiny(depth=2))
    with pytest.raises(CheckpointError, match=r"unexpected: backbone\.body\.0\.weight"):
        load(path, Tiny(depth=0))


def test_a_model_that_does_not_convert(tiny, tmp_path):
    path = save(tiny, tmp_path / "net")
    with pytest.raises(CheckpointError, match="does not convert"):
        load(path, nn.Sequential(nn.Flatten(), nn.Linear(12, 6)))


def edited(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_damaged_configs(tiny, tmp_path):
    path = save(tiny, tmp_path / "net")
    cases = (
        ({"format_version": 2}, "format version 2, this version of bcos-rt reads 1"),
        ({"format": "other"}, "not a bcos-rt checkpoint"),
        ({"recipe": {"bb": 3}}, "its recipe is not one this version knows"),
        ({"recipe": {"b": 0.5}}, "its recipe is not one this version knows"),
        ({"recipe": None}, "recipe or source is missing"),
        ({"source": []}, "recipe or source is missing"),
        ({"class_names": [1, 2]}, "class_names"),
        ({"class_names": ["a"]}, "does not convert"),
        ({"image_size": 0}, "image_size"),
        ({"image_size": "64"}, "image_size"),
        ({"source": {"kind": "timm", "name": "hf-hub:x/y", "num_classes": 2}}, "cannot rebuild"),
    )
    good = (path / "config.json").read_text()
    for changes, said in cases:
        model = None if "source" in changes else Tiny()
        with pytest.raises(CheckpointError, match=said):
            load(edited(path, **changes), model)
        (path / "config.json").write_text(good)
    for text in ("", "{", "[1]", "\x00"):
        (path / "config.json").write_text(text)
        assert not is_checkpoint(path)
        with pytest.raises(CheckpointError, match="JSON"):
            load(path, Tiny())


def test_truncated_files(tiny, tmp_path):
    path = save(tiny, tmp_path / "net.safetensors")
    content = path.read_bytes()
    for length in (0, 5, 300, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            load(path, Tiny())
    folder = save(tiny, tmp_path / "net")
    (folder / "model.safetensors").write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        load(folder, Tiny())
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        load(folder, Tiny())


def test_files_of_others(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        load(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"holds no config\.json$"):
        load(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    for name in ("last", "best"):
        (run / f"{name}.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"\(but best\.safetensors, last\.safetensors: name one of them\)"):
        load(run)
    plain = tmp_path / "plain.safetensors"
    save_file({"w": torch.zeros(1)}, plain)
    with pytest.raises(CheckpointError, match=r"bcos_rt\.save did not write.*weights=FILE"):
        load(plain)
    torch.save({"w": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(tmp_path / "w.pth")
    assert not any(map(is_checkpoint, (plain, tmp_path, tmp_path / "w.pth", tmp_path / "absent")))


@pytest.mark.parametrize("name", ["net.safetensors", "folder"])
def test_files_have_the_mode_ordinary_files_have(tiny, name, tmp_path):
    path = save(tiny, tmp_path / name)
    (tmp_path / "plain").touch()
    plain = (tmp_path / "plain").stat().st_mode & 0o777
    for file in [path] if path.is_file() else path.iterdir():
        assert file.stat().st_mode & 0o777 == plain, file
