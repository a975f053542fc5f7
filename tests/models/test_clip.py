"""CLIP models of open_clip: names, files of weights, both towers, conversion of the image tower, checkpoints."""

import json
import sys
import urllib.error

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from bcos_rt import Recipe, bcosify, load, save
from bcos_rt.conversion.recipe import CLIP_MEAN, CLIP_STD
from bcos_rt.errors import CheckpointError, InvalidArgumentError, InvalidTypeError, MissingDependencyError
from bcos_rt.models import known_models, load_model, metadata_of, rebuild_source
from bcos_rt.models.clip import clip_imagenet_class_names, clip_imagenet_templates, load_clip
from bcos_rt.models.openclip import clip_source
from bcos_rt.nn import BcosConv2d
from tests.clip_models import NAMES, SIZE, WIDTH, register, seeded_weights
from tests.tolerances import TOLERANCES

open_clip = pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    register(folder)
    return folder


@pytest.fixture(scope="module", params=NAMES)
def file(request, folder):
    """A name and a file of seeded weights."""
    name = NAMES[request.param]
    return name, seeded_weights(name, folder)


@pytest.fixture(scope="module")
def resnet(folder):
    return load_clip(NAMES["resnet"], weights=seeded_weights(NAMES["resnet"], folder))


def photos(n=2):
    return torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(2))


def normalised(tower, x):
    mean, std = (torch.tensor(v)[:, None, None] for v in (tower.mean, tower.std))
    return (x - mean) / std


def same(module, state, prefix=""):
    mine = module.state_dict()
    return all(torch.equal(mine[k], state[prefix + k]) for k in mine)


def holding(state):
    """A module with this state dict."""
    root = nn.Module()
    for key, value in state.items():
        module = root
        *path, leaf = key.split(".")
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_buffer(leaf, value)
    return root


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tag", "quick_gelu"),
    [
        ("RN50", "openai", True),
        ("RN50:cc12m", "cc12m", True),
        ("ViT-B-32", "openai", True),
        ("ViT-B-16", "openai", True),
        ("ViT-B-32:laion2b_s34b_b79k", "laion2b_s34b_b79k", False),
        ("ViT-B-32-quickgelu:metaclip_400m", "metaclip_400m", True),
        ("ViT-B-16-SigLIP", "webli", False),
    ],
)
def test_a_tag_says_the_activation(name, tag, quick_gelu):
    source = clip_source(name)
    assert (source.tag, source.quick_gelu) == (tag, quick_gelu)
    assert clip_source(name, not quick_gelu).quick_gelu != quick_gelu
    assert source.describe()["config"]["quick_gelu"] is quick_gelu
    assert clip_source(source.name) == source


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("RN5O", "did you mean.*'RN50'"),
        ("RN50:opnai", "a tag of RN50 .did you mean 'openai'"),
        ("resnet50", "a model of open_clip"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(InvalidArgumentError, match=message):
        load_clip(name, weights="random")
    with pytest.raises(InvalidArgumentError, match=message):
        load_model(f"open_clip:{name}", weights="random")


def test_names_are_known(folder):
    assert {"open_clip:RN50", "open_clip:ViT-B-32", f"open_clip:{NAMES['resnet']}"} <= set(known_models())
    with pytest.raises(InvalidArgumentError, match="did you mean 'open_clip:RN101'"):
        load_model("RN101")


def test_unusable_arguments(folder):
    with pytest.raises(InvalidTypeError, match="name"):
        load_clip(50)
    with pytest.raises(InvalidTypeError, match="quick_gelu"):
        load_clip("RN50", quick_gelu="yes")
    with pytest.raises(InvalidArgumentError, match=r"num_classes.*embedding"):
        load_model(f"open_clip:{NAMES['resnet']}", weights="random", num_classes=5)


def test_without_open_clip(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingDependencyError, match=r"bcos-rt\[clip\]"):
        load_clip("RN50")
    assert not [name for name in known_models() if name.startswith("open_clip:")]


# --- towers and files ------------------------------------------------------------------------------------------------


def test_towers_are_open_clips(file):
    name, path = file
    model, state = load_clip(name, weights=path), torch.load(path)
    tower = model.image_tower
    assert same(tower.module, state, "visual.")
    assert same(model.text_tower.model, state)
    assert not any("visual" in key for key in model.text_tower.state_dict())
    assert not tower.module.training
    assert not model.text_tower.training
    assert (tower.mean, tower.std, tower.input_size) == (CLIP_MEAN, CLIP_STD, SIZE)
    assert tower.source["kind"] == "open_clip"
    assert model.width == WIDTH
    assert model.logit_scale == pytest.approx(float(state["logit_scale"].exp()))
    assert metadata_of(tower.module) == (tower.mean, tower.std)
    reference = open_clip.create_model(name, pretrained=str(path)).eval()
    with torch.no_grad():
        expected = reference.encode_image(normalised(tower, photos()))
        torch.testing.assert_close(tower.conventional()(photos()), expected)
    json.dumps(tower.source)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("kind", ["safetensors", "checkpoint", "archive"])
def test_kinds_of_files(file, folder, kind):
    name, path = file
    state = torch.load(path)
    if kind == "safetensors":
        other = folder / f"{name}.safetensors"
        save_file(state, other)
    elif kind == "checkpoint":  # as open_clip's training script writes it
        other = folder / "epoch_1.pt"
        wrapped = {f"module.{k}": v for k, v in state.items()}
        torch.save({"epoch": 1, "name": "x", "state_dict": wrapped, "optimizer": {}}, other)
    else:  # as OpenAI published it: TorchScript in fp16, with numbers that are no weights
        other = folder / "openai.pt"
        numbers = {"input_resolution": SIZE, "context_length": 77, "vocab_size": 49408}
        half = {k: v.half() if v.is_floating_point() else v for k, v in state.items()}
        tree = holding({**half, **{k: torch.tensor(v) for k, v in numbers.items()}})
        torch.jit.save(torch.jit.script(tree), other)
    given = load_clip(name, weights=other)
    for key, value in given.text_tower.model.state_dict().items():
        torch.testing.assert_close(value, state[key], rtol=1e-3, atol=1e-4)
        assert value.dtype == torch.float32
    for key, value in given.image_tower.module.state_dict().items():
        torch.testing.assert_close(value, state[f"visual.{key}"], rtol=1e-3, atol=1e-4)
    if kind != "archive":
        assert same(given.image_tower.module, state, "visual.")


def test_files_that_do_not_fit(file, folder):
    name, path = file
    other = folder / "few.pt"
    torch.save({k: v for k, v in torch.load(path).items() if "ln_final" not in k}, other)
    with pytest.raises(CheckpointError, match=r"2 missing: ln_final.weight, ln_final.bias"):
        load_clip(name, weights=other)
    other.write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"few\.pt"):
        load_clip(name, weights=other)
    with pytest.raises(CheckpointError, match="no such file"):
        load_clip(name, weights=folder / "none.pt")
    with pytest.raises(CheckpointError, match=r"does not fit CLIP"):
        load_clip(NAMES["resnet"] if name == NAMES["transformer"] else NAMES["transformer"], weights=path)


def test_random_weights_are_the_seed_s(folder):
    def tower():
        torch.manual_seed(3)
        return load_clip(NAMES["transformer"], weights="random").image_tower.module.state_dict()

    first, second = tower(), tower()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_activation(folder):
    def activations(**options):
        tower = load_clip(NAMES["transformer"], weights="random", **options).image_tower.module
        return {type(m).__name__ for m in tower.modules()} & {"QuickGELU", "GELU"}

    assert activations() == {"GELU"}
    assert activations(quick_gelu=True) == {"QuickGELU"}
    source = load_clip(NAMES["transformer"], weights="random", quick_gelu=True).image_tower.source
    assert "QuickGELU" in {type(m).__name__ for m in rebuild_source(source).modules()}


def test_local_folder(file, tmp_path):
    """What ``open_clip.push_to_hf_hub`` saves: its own normalisation and image size."""
    name, path = file
    preprocessing = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": preprocessing}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(torch.load(path), tmp_path / "open_clip_model.safetensors")
    model = load_clip(f"local-dir:{tmp_path}")
    assert same(model.image_tower.module, torch.load(path), "visual.")
    assert (model.image_tower.mean, model.image_tower.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert model.encode_text(["a dog"]).shape == (1, WIDTH)
    net, _ = bcosify(load_model(f"open_clip:local-dir:{tmp_path}"), Recipe(output="embedding"))
    assert net.recipe.mean == (0.1, 0.2, 0.3)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"local-dir.*weights='random'"):
        load_clip(f"local-dir:{tmp_path}")
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json"):
        load_clip(f"local-dir:{tmp_path / 'none'}")


def test_failed_download(folder, monkeypatch):
    def no_network(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("open_clip.factory.download_pretrained", no_network)
    with pytest.raises(CheckpointError, match=r"open_clip:RN50:openai .*no route to host.*weights=FILE"):
        load_clip("RN50")
    with pytest.raises(CheckpointError, match="no published weights"):
        load_clip(NAMES["resnet"])


def test_a_tag_s_weights(folder, monkeypatch):
    """What is loaded for a tag: its file, its activation, its normalisation; open_clip's table is made to list one."""
    name = NAMES["transformer"]
    path = seeded_weights(name, folder, seed=6)
    tag = {"file": str(path), "quick_gelu": True, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    monkeypatch.setitem(sys.modules["open_clip.pretrained"]._PRETRAINED, name, {"ours": tag})
    model = load_clip(name)
    assert model.name == f"{name}:ours"
    assert same(model.image_tower.module, torch.load(path), "visual.")
    assert model.image_tower.mean == (0.5, 0.5, 0.5)
    assert "QuickGELU" in {type(m).__name__ for m in model.image_tower.module.modules()}
    # A file's weights are taken for the tag's.
    again = load_clip(name, weights=path)
    with torch.no_grad():
        assert torch.equal(again.image_tower.conventional()(photos()), model.image_tower.conventional()(photos()))


# --- texts -----------------------------------------------------------------------------------------------------------


def test_text_embeddings(resnet):
    templates = ("a photo of a {}.", lambda c: f"itap of my {c}.")
    given = resnet.encode_text(["dog", "cat"], templates)
    assert given.shape == (2, WIDTH)
    torch.testing.assert_close(given.norm(dim=1), torch.ones(2))
    tokenizer = open_clip.get_tokenizer(NAMES["resnet"])
    for i, name in enumerate(("dog", "cat")):
        with torch.no_grad():
            texts = tokenizer([f"a photo of a {name}.", f"itap of my {name}."])
            each = F.normalize(resnet.text_tower.model.encode_text(texts), dim=1)
        torch.testing.assert_close(given[i], F.normalize(each.mean(0), dim=0))
    assert float((given[0] - given[1]).norm()) > 1e-3
    # In parts, and one prompt with braces of its own.
    many = resnet.encode_text([str(i) for i in range(300)])
    torch.testing.assert_close(many[299], resnet.encode_text(["299"])[0])
    assert resnet.encode_text(["{0} {}"]).shape == (1, WIDTH)


def test_imagenet_s_classifier_is_open_clip_s(resnet, folder):
    templates, names = clip_imagenet_templates(), clip_imagenet_class_names()
    assert len(templates) == 80
    assert len(set(names)) > 990
    reference = open_clip.create_model(NAMES["resnet"], pretrained=str(folder / f"{NAMES['resnet']}.pt")).eval()
    tokenizer = open_clip.get_tokenizer(NAMES["resnet"])
    expected = open_clip.build_zero_shot_classifier(reference, tokenizer, names[:3], templates)
    torch.testing.assert_close(resnet.encode_text(names[:3], templates), expected.T, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("a dog",), InvalidTypeError, "prompts"),
        (([],), InvalidArgumentError, "prompts"),
        (([1],), InvalidTypeError, "prompts"),
        ((["a dog"], "a {}"), InvalidTypeError, "templates"),
        ((["a dog"], []), InvalidArgumentError, "templates"),
        ((["a dog"], ["a photo"]), InvalidArgumentError, "templates.*'a photo'.*{}"),
    ],
)
def test_what_cannot_be_encoded(resnet, arguments, error, message):
    with pytest.raises(error, match=message):
        resnet.encode_text(*arguments)


# --- conversion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [Recipe.clip(), Recipe.equivalent(output="embedding")])
def test_every_weight_is_carried_over(file, recipe):
    """Convolutions among them, which the published code leaves at random."""
    name, path = file
    state = torch.load(path)
    net, report = bcosify(load_model(f"open_clip:{name}", weights=path), recipe)
    assert report.weights_copied.complete
    converted = dict(net.backbone.named_modules())
    found = 0
    for key, layer in load_clip(name, weights=path).image_tower.module.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        weight, found = state[f"visual.{key}.weight"], found + 1
        if layer.in_channels == 3:
            weight = torch.cat([weight, -weight], 1) / 2
        assert isinstance(converted[key], BcosConv2d)
        assert torch.equal(converted[key].weight, weight), key
    assert found == (1 if "transformer" in name else 2 + 1 + 4 * 4)


def test_equivalent_at_b_one(file):
    name, path = file
    tower = load_clip(name, weights=path).image_tower
    recipe = Recipe.equivalent(mean=tower.mean, std=tower.std, output="embedding")
    net, _ = bcosify(tower, recipe)
    with torch.no_grad():
        expected = F.normalize(tower.module(normalised(tower, photos(4))), dim=1)
        given = net.eval()(photos(4))
    assert given.shape == (4, WIDTH)
    difference = float((given - expected).abs().max() / expected.abs().max())
    assert difference < TOLERANCES["equivalence"]


def test_checkpoints_need_neither_file_nor_configuration(file, tmp_path, monkeypatch):
    name, path = file
    net, _ = bcosify(load_model(f"open_clip:{name}", weights=path), Recipe.clip())
    save(net, tmp_path / "net.safetensors")
    configs = {k: v for k, v in sys.modules["open_clip.factory"]._MODEL_CONFIGS.items() if k != name}
    monkeypatch.setattr("open_clip.factory._MODEL_CONFIGS", configs)
    before = torch.random.get_rng_state()
    again = load(tmp_path / "net.safetensors")
    assert torch.equal(before, torch.random.get_rng_state())
    with torch.no_grad():
        assert torch.equal(again(photos()), net.eval()(photos()))
    assert again.source == net.source


def test_names_of_models_are_converted(folder, monkeypatch):
    path = seeded_weights(NAMES["resnet"], folder)
    tag = {"file": str(path), "mean": CLIP_MEAN, "std": CLIP_STD}
    monkeypatch.setitem(sys.modules["open_clip.pretrained"]._PRETRAINED, NAMES["resnet"], {"ours": tag})
    net, report = bcosify(f"open_clip:{NAMES['resnet']}", Recipe.clip())
    assert report.weights_copied.complete
    assert net.eval()(photos()).shape == (2, WIDTH)


@pytest.mark.parametrize(
    "config",
    [
        None,
        {},
        {"embed_dim": 4, "quick_gelu": False, "vision_cfg": {"depth": 3}},
        {"embed_dim": 4, "quick_gelu": False, "vision_cfg": {"timm_model_name": "hf-hub:nobody/nothing"}},
    ],
)
def test_sources_that_cannot_be_rebuilt(config):
    with pytest.raises(CheckpointError, match="cannot rebuild open_clip:x"):
        rebuild_source({"kind": "open_clip", "name": "x", "num_classes": 4, "config": config})


def test_verification_compares_embeddings(file):
    """``bcosify`` scales the source's embeddings to norm 1 before it compares, as the network does."""
    name, path = file
    recipe = Recipe.equivalent(output="embedding")
    _, report = bcosify(load_model(f"open_clip:{name}", weights=path), recipe, verify_images=photos(4))
    assert report.equivalence.within(TOLERANCES["equivalence"])
    _, report = bcosify(load_model(f"open_clip:{name}", weights=path), recipe.replace(b=1.5), verify_images=photos(4))
    assert not report.equivalence.within(TOLERANCES["equivalence"])
