"""Image classifiers of transformers: folders that save_pretrained wrote, their metadata, what is wrong with them."""

import json
import sys

import pytest
import torch

from bcos_rt import Recipe, bcosify, load, save
from bcos_rt.errors import CheckpointError, InvalidArgumentError, MissingDependencyError
from bcos_rt.models import load_model, metadata_of, rebuild_source

transformers = pytest.importorskip("transformers")

SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
NAMES = {0: "cat", 1: "dog", 2: "newt"}


def vit(**options):
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SIZE, image_size=32, patch_size=8, **options)
    return transformers.ViTForImageClassification(config).eval()


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "vit"
    vit(id2label=NAMES, label2id={name: i for i, name in NAMES.items()}).save_pretrained(path)
    processor = transformers.ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]
    )
    processor.save_pretrained(path)
    return path


def test_folder(folder):
    loaded = load_model(f"hf:{folder}")
    assert (loaded.mean, loaded.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert loaded.class_names == tuple(NAMES.values())
    assert loaded.input_size == 32
    assert not loaded.module.training
    expected = vit(id2label=NAMES, label2id={})
    assert all(torch.equal(v, expected.state_dict()[k]) for k, v in loaded.module.state_dict().items())
    assert metadata_of(loaded.module) == (loaded.mean, loaded.std)
    x = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(v)[:, None, None] for v in (loaded.mean, loaded.std))
    with torch.no_grad():
        torch.testing.assert_close(loaded.conventional()(x), expected((x - mean) / std).logits)


def test_checkpoint_needs_the_folder_no_more(folder, tmp_path):
    loaded = load_model(f"hf:{folder}")
    net, report = bcosify(loaded)
    assert report.weights_copied.complete
    assert net.recipe.mean == loaded.mean
    assert net.class_names == list(NAMES.values())
    save(net, tmp_path / "net")
    folder.rename(tmp_path / "elsewhere")
    again = load(tmp_path / "net")
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(x), net.eval()(x))
    assert again.class_names == net.class_names


def test_module_itself(folder):
    model = transformers.ViTForImageClassification.from_pretrained(folder)
    x = torch.rand(2, 3, 32, 32)
    net, report = bcosify(model, Recipe.equivalent(), verify_images=x)
    assert net.recipe.mean == (0.1, 0.2, 0.3)
    assert report.equivalence.within()
    # Without a folder nothing is known, and it is said.
    _, report = bcosify(vit())
    assert any("no metadata" in note for note in report.notes)
    assert metadata_of(vit()) is None


def test_processor_that_normalises_nothing(folder):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_normalize": False}))
    loaded = load_model(f"hf:{folder}")
    assert (loaded.mean, loaded.std) == ((0.0,) * 3, (1.0,) * 3)
    path.unlink()
    loaded = load_model(f"hf:{folder}")
    assert (loaded.mean, loaded.std) == (None, None)
    assert loaded.input_size == 32


def test_other_number_of_classes(folder):
    loaded = load_model(f"hf:{folder}", num_classes=5)
    assert loaded.module.classifier.out_features == 5
    assert loaded.class_names is None
    body = vit().vit.state_dict()
    assert all(torch.equal(v, body[k]) for k, v in loaded.module.vit.state_dict().items())
    assert rebuild_source(loaded.source).classifier.out_features == 5


def test_random_and_file(folder, tmp_path):
    torch.manual_seed(7)
    fresh = load_model(f"hf:{folder}", weights="random")
    assert not torch.equal(fresh.module.classifier.weight, vit(id2label=NAMES, label2id={}).classifier.weight)
    torch.save(fresh.module.state_dict(), tmp_path / "weights.pth")
    again = load_model(f"hf:{folder}", weights=tmp_path / "weights.pth")
    assert torch.equal(fresh.module.classifier.weight, again.module.classifier.weight)
    torch.save({"classifier.bias": torch.zeros(3)}, tmp_path / "few.pth")
    with pytest.raises(CheckpointError, match="missing"):
        load_model(f"hf:{folder}", weights=tmp_path / "few.pth")


def test_weights_without_classifier(tmp_path):
    vit().vit.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"lack classifier\.bias, classifier\.weight.*num_classes"):
        load_model(f"hf:{tmp_path}")
    loaded = load_model(f"hf:{tmp_path}", num_classes=4)
    assert (loaded.module.classifier.out_features, loaded.new_classifier) == (4, True)


def test_what_cannot_be_loaded(folder, tmp_path, monkeypatch):
    transformers.BertConfig(num_hidden_layers=1).save_pretrained(tmp_path / "bert")
    for weights in (None, "random"):
        with pytest.raises(InvalidArgumentError, match="a bert, expected an image classifier"):
            load_model(f"hf:{tmp_path / 'bert'}", weights=weights)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="could not be read"):
        load_model(f"hf:{folder}")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"could not be read.*config\.json"):
        load_model(f"hf:{folder}")
    with pytest.raises(InvalidArgumentError, match="hf:NAME"):
        load_model("hf:")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"hf:nobody/nothing: could not be read.*network connection"):
        load_model("hf:nobody/nothing")
    for config in ({}, {"model_type": "unheard_of"}, {"model_type": "vit", "hidden_size": "wide"}):
        with pytest.raises(CheckpointError, match="cannot rebuild hf:x"):
            rebuild_source({"kind": "hf", "name": "x", "num_classes": 3, "config": config})


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"bcos-rt\[huggingface\]"):
        load_model("hf:anything")
