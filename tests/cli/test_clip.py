"""The commands with --clip, on tiny seeded CLIP models."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from bcos_rt import Recipe, bcosify, explain_text, load, save
from bcos_rt.data import open_data
from bcos_rt.images import load_image
from bcos_rt.models.clip import load_clip
from tests.clip_models import NAMES, SIZE, WIDTH, register, seeded_weights
from tests.tolerances import TOLERANCES

open_clip = pytest.importorskip("open_clip")

NAME = NAMES["resnet"]
TEXTS = ("a dog", "a cat in a tree")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    register(folder)
    return folder


@pytest.fixture(scope="module")
def file(folder):
    return seeded_weights(NAME, folder)


@pytest.fixture(scope="module")
def model(file):
    return load_clip(NAME, weights=file)


@pytest.fixture(scope="module")
def tower(model, folder):
    """A saved B-cosified image tower."""
    net, _ = bcosify(model.image_tower, Recipe.clip())
    return save(net, folder / "tower.safetensors")


@pytest.fixture
def options(file):
    return ("--clip", NAME, "--weights", file)


def said(*texts):
    return [part for text in texts for part in ("--text", text)]


# --- explain ---------------------------------------------------------------------------------------------------------


def test_texts_and_a_conventional_tower(bcos, options, model, photos, tmp_path):
    result = bcos("explain", photos[0], *options, *said(*TEXTS), "-o", tmp_path / "out.png", "--json")
    assert result.code == 0, result.err
    data = result.json
    assert (data["label"], data["size"], data["pooling"]) == ("initial explanation", SIZE, "mean")
    assert data["network"]["clip"] == NAME
    (image,) = data["images"]
    assert [entry["prompt"] for entry in image["texts"]] == list(TEXTS)
    # At B = 1 the score is the cosine that CLIP itself gives.
    with torch.no_grad():
        embedding = model.image_tower.conventional()(load_image(photos[0], SIZE)[None])
    expected = F.normalize(embedding, dim=1) @ model.encode_text(TEXTS).T
    for entry, cosine in zip(image["texts"], expected[0].tolist(), strict=True):
        assert entry["score"] == pytest.approx(cosine, abs=TOLERANCES["equivalence"])
        assert entry["completeness_error"] < TOLERANCES["completeness"]
        assert entry["contributions_sum"] + entry["residual"] == pytest.approx(entry["score"], abs=1e-4)
    with Image.open(tmp_path / "out.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100


def test_the_numbers_are_explain_text_s(bcos, options, model, tower, photos, tmp_path):
    how = ("--pooling", "cosine_power", "--power", 3.5)
    out = tmp_path / "{name}.npz"
    result = bcos("explain", *photos, *options, "-c", tower, *said(*TEXTS), *how, "-o", out, "--json")
    assert result.code == 0, result.err
    data = result.json
    assert (data["label"], data["pooling"], data["power"]) == ("explanation", "cosine_power", 3.5)
    assert data["network"]["checkpoint"] == str(tower)
    images = torch.stack([load_image(photo, SIZE) for photo in photos])
    expected = explain_text(load(tower), images, model.encode_text(TEXTS), "cosine_power", power=3.5)
    for i, (photo, image) in enumerate(zip(photos, data["images"], strict=True)):
        assert [e["score"] for e in image["texts"]] == pytest.approx(expected.logits[i].tolist(), abs=1e-6)
        with np.load(tmp_path / f"{photo.stem}.npz") as arrays:
            np.testing.assert_allclose(arrays["contributions"][0], expected.contributions[i].numpy(), atol=1e-6)


def test_what_a_person_reads(bcos, folder, photos, tmp_path):
    """Of a VisionTransformer with random weights."""
    options = ("--clip", NAMES["transformer"], "--weights", "random")
    result = bcos("explain", photos[0], *options, *said(*TEXTS), "-o", tmp_path / "out.png")
    assert result.code == 0, result.err
    assert result.err == ""
    for text in (*TEXTS, "score", "residual", "initial explanation", "not fine-tuned", "out.png"):
        assert text in result.out


class TestRefused:
    @pytest.fixture
    def refused(self, bcos, tmp_path):
        def refuse(*messages_and_arguments, message):
            result = bcos("explain", *messages_and_arguments, "-o", tmp_path / "out.png")
            assert result.code == 2, result.out
            assert message in result.err
            assert result.err.count("\n") == 1, result.err
            assert not list(tmp_path.iterdir())

        return refuse

    def test_texts_without_a_model_and_the_other_way_round(self, refused, options, photos):
        refused(photos[0], *said("a dog"), message="--text: got no --clip")
        refused(photos[0], *options, message="--clip: got no --text")
        refused(photos[0], "-m", "timm:resnet18", "--pooling", "max", message="without --clip")
        refused(photos[0], "-m", "timm:resnet18", "--power", 2, message="without --clip")

    def test_options_of_classes(self, refused, options, photos):
        refused(photos[0], *options, *said("a dog"), "--class", "dog", message="--class")
        refused(photos[0], *options, *said("a dog"), "--top", 2, message="--top")
        refused(photos[0], *options, *said("a dog"), "-m", "timm:resnet18", message="--clip, --model")
        refused(photos[0], *options, *said("a dog"), "--num-classes", 3, message="--num-classes")

    def test_pooling(self, refused, options, photos):
        refused(photos[0], *options, *said("a dog"), "--pooling", "meen", message="did you mean 'mean'")
        refused(photos[0], *options, *said("a dog"), "--pooling", "cosine_power", message="power")

    def test_checkpoints(self, refused, options, tower, checkpoint, photos, folder):
        refused(photos[0], *options, *said("a dog"), "-c", checkpoint, message="which returns logits")
        refused(photos[0], "-c", tower, message="an image tower, expected --clip NAME")
        refused(photos[0], "-m", "open_clip:RN50", "-w", "random", message="--clip RN50")
        wide = folder / "wide.json"
        wide.write_text((folder / f"{NAME}.json").read_text().replace(f'"embed_dim": {WIDTH}', '"embed_dim": 32'))
        open_clip.add_model_config(wide)
        net, _ = bcosify(load_clip("wide", weights="random").image_tower, Recipe.clip())
        path = save(net, folder / "wide.safetensors")
        refused(photos[0], *options, *said("a dog"), "-c", path, message="embeddings of 32 numbers, expected 24")

    def test_names_and_weights(self, refused, options, photos, tmp_path):
        refused(photos[0], "--clip", "RN5O", *said("a dog"), message="did you mean 'RN50'")
        refused(photos[0], "--clip", NAME, *said("a dog"), message="no published weights")
        refused(photos[0], "--clip", NAME, "-w", tmp_path / "none.pt", *said("a dog"), message="an existing file")


# --- convert and export ----------------------------------------------------------------------------------------------


def test_convert(bcos, file, model, tmp_path):
    source = ("--model", f"open_clip:{NAME}", "--weights", file)
    result = bcos("convert", *source, "--recipe", "clip", "-o", tmp_path / "net.safetensors", "--json")
    assert result.code == 0, result.err
    net = load(tmp_path / "net.safetensors")
    expected, _ = bcosify(model.image_tower, Recipe.clip())
    assert net.recipe == expected.recipe
    x = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad():
        assert torch.equal(net(x), expected.eval()(x))


def test_export_of_a_converted_model(bcos, folder, photos, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    name = NAMES["transformer"]
    file = seeded_weights(name, folder)
    model, options = load_clip(name, weights=file), ("--clip", name, "--weights", file)
    out = tmp_path / "clip.onnx"
    result = bcos("export", *options, "--pooling", "cosine_power", "--power", 2, "-o", out, "--json", "--no-verify")
    assert result.code == 0, result.err
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["image", "text_embedding"]
    image, text = load_image(photos[0], SIZE)[None], model.encode_text(["a dog"])
    (score,) = session.run(["logits"], {"image": image.numpy(), "text_embedding": text.numpy()})
    net, _ = bcosify(model.image_tower, Recipe.equivalent(output="embedding"))
    expected = explain_text(net.eval(), image, text, "cosine_power", power=2)
    assert score[0, 0] == pytest.approx(float(expected.logits[0, 0]), abs=TOLERANCES["onnx_logits"])


def test_export_of_a_checkpoint(bcos, options, tower, checkpoint, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "tower.onnx"
    result = bcos(
        "export", "-c", tower, "--pooling", "max", "--only", "contributions", "-o", out, "--json", "--no-verify"
    )
    assert result.code == 0, result.err
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[-1] == SIZE
    assert session.get_inputs()[1].name == "text_embedding"
    for arguments, message in (
        ((*options, "-c", tower), "--clip, --checkpoint"),
        ((*options, "-m", "timm:resnet18"), "--clip, --model"),
        (("-c", checkpoint, "--pooling", "max"), "pooling"),
    ):
        result = bcos("export", *arguments, "-o", tmp_path / "other.onnx")
        assert result.code == 2
        assert message in result.err
    assert [p.name for p in tmp_path.iterdir()] == ["tower.onnx"]


# --- evaluate --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Splits of class folders, three images each, of one colour and noise."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(1)
    for split in ("train", "val"):
        for name, colour in (("red_panda", (200, 60, 30)), ("tree_frog", (40, 180, 70))):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(3):
                noise = random.integers(-30, 31, (SIZE, SIZE, 3))
                Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def test_zero_shot(bcos, options, model, tower, data):
    """Of the tower as it is, by hand; and of a checkpoint."""
    result = bcos("evaluate", *options, "--zero-shot", "--data", data, "--template", "a photo of a {}.", "--json")
    assert result.code == 0, result.err
    found = result.json
    assert (found["protocol"], found["texts"]) == ("zero shot", ["red panda", "tree frog"])
    images = open_data(data, size=SIZE, split="val")
    batch = torch.stack([image for image, _ in images])
    texts = model.encode_text(["red panda", "tree frog"], ["a photo of a {}."])
    with torch.no_grad():
        cosines = F.normalize(model.image_tower.conventional()(batch), dim=1) @ texts.T
    logits, labels = model.logit_scale * cosines, torch.tensor([0, 0, 0, 1, 1, 1])
    assert found["results"]["images"] == 6
    assert found["results"]["completeness"] is None
    assert found["results"]["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert found["results"]["top1"] == float((logits.argmax(1) == labels).double().mean())

    result = bcos("evaluate", *options, "-c", tower, "--zero-shot", "--data", data, "--explained", 1)
    assert result.code == 0, result.err
    assert "top-1" in result.out
    assert "(1 images)" in result.out


def test_linear_probe(bcos, tower, data):
    result = bcos("evaluate", "-c", tower, "--linear-probe", "--data", data, "--json")
    assert result.code == 0, result.err
    found = result.json
    assert found["protocol"] == "linear probe"
    assert found["probe"]["images"] == 6
    assert found["probe"]["c"] in [c for c, _ in found["probe"]["tried"]]
    assert found["results"]["top1"] == 1.0, "red and green"


def test_imagenet_s_classes_are_read_by_their_words():
    from bcos_rt.cli.evaluate import _class_texts
    from bcos_rt.models.clip import clip_imagenet_class_names

    class Names:
        def encode_text(self, names, templates):
            return len(names), len(templates)

    class Images:
        class_names = tuple(f"n{i:08d}" for i in range(1000))

    names, encoded = _class_texts(Names(), Images(), None)
    assert names == clip_imagenet_class_names()
    assert encoded == (1000, 80)
    Images.class_names = ("n00000001", "n00000002")
    assert _class_texts(Names(), Images(), ["{}"]) == (["n00000001", "n00000002"], (2, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--clip", NAME), "--zero-shot or --linear-probe beside it"),
        (("--zero-shot",), "--zero-shot: got no --clip"),
        (("--linear-probe",), "--linear-probe: got no image tower"),
        (("--clip", NAME, "--zero-shot", "--linear-probe"), "--zero-shot, --linear-probe: got both"),
        (("--clip", NAME, "--linear-probe", "--pooling", "max"), "--pooling"),
        (("--clip", NAME, "--zero-shot", "--train", "x"), "--train"),
        (("--clip", NAME, "--zero-shot", "--pooling", "meen"), "did you mean 'mean'"),
        (("--clip", NAME, "--zero-shot", "-w", "random", "--template", "a photo"), "'a photo'"),
        (("--clip", NAME, "--zero-shot", "-w", "random", "-m", "timm:resnet18"), "--clip, --model"),
        (("-m", "open_clip:RN50"), "--clip RN50"),
    ],
)
def test_bad_input_of_evaluate_is_named(bcos, folder, data, arguments, message):
    result = bcos("evaluate", *arguments, "--data", data)
    assert (result.code, message in result.err) == (2, True), result.err


def test_protocols_and_networks_that_do_not_go_together(bcos, tower, checkpoint, data):
    for arguments, message in (
        (("-c", tower), "an image tower, expected --clip and --zero-shot, or --linear-probe"),
        (("-c", checkpoint, "--linear-probe"), "returns logits"),
        (("-c", tower, "--linear-probe", "--train", data / "val"), "the images that are measured"),
    ):
        result = bcos("evaluate", *arguments, "--data", data)
        assert (result.code, message in result.err) == (2, True), result.err
    result = bcos("evaluate", "-c", tower, "--linear-probe", "--data", data / "val")
    assert (result.code, "the images that are measured" in result.err) == (2, True), result.err


# --- finetune --------------------------------------------------------------------------------------------------------


def test_finetune(bcos, options, model, checkpoint, data, tmp_path):
    how = ("--batch-size", 4, "--epochs", 2, "--size", SIZE, "--lr", 0.001, "--workers", 0)
    run = tmp_path / "run"
    result = bcos("finetune", *options, "--data", data, "--val", data, "-o", run, *how, "--json")
    assert result.code == 0, result.err
    found = result.json
    assert found["network"]["clip"] == NAME
    assert found["best"]["val_cosine"] <= 1
    assert found["last"]["epoch"] == 2
    net = load(run / "last.safetensors")
    assert net.recipe == Recipe.clip()
    batch = torch.stack([image for image, _ in open_data(data, size=SIZE, split="val")])
    with torch.no_grad():
        cosines = F.cosine_similarity(net(batch), model.image_tower.conventional()(batch), dim=1)
    assert found["last"]["val_cosine"] == pytest.approx(float(cosines.mean()), abs=1e-4)

    # On from there, with the other loss; a person's table.
    loss = ("--set", "distillation.siglip=0", "--set", "distillation.embedding=1")
    again = bcos("finetune", *options, "-c", run / "best.safetensors", "--data", data, "--val", data,
                 "-o", tmp_path / "more", *how, *loss)  # fmt: skip
    assert again.code == 0, again.err
    assert "val cosine" in again.out
    for arguments, message in (
        ((*options, "-m", "timm:resnet18"), "--clip, --model"),
        ((*options, "--num-classes", 3), "--clip, --num-classes"),
        ((*options, "-c", checkpoint), "which returns logits"),
        (("-c", run / "best.safetensors"), "an image tower, expected --clip NAME beside it"),
    ):
        result = bcos("finetune", *arguments, "--data", data, "-o", tmp_path / "other", *how)
        assert (result.code, message in result.err) == (2, True), result.err
