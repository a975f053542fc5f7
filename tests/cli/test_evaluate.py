"""bcos-rt evaluate, localise, perturb and randomise, on seeded networks; trained networks are in test_train.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from bcos_rt import Recipe, bcosify, save
from bcos_rt.cli.inputs import chosen_device, load_network
from bcos_rt.cli.several import Compared, _short_names, methods_for
from bcos_rt.data import open_data
from bcos_rt.errors import InvalidArgumentError
from bcos_rt.evaluation import Perturbation, insertion_deletion, parameter_randomisation
from bcos_rt.models import load_model
from bcos_rt.models.small import SMALL_NETWORKS, small_resnet, small_vit
from bcos_rt.nn.conventional import ConventionalNetwork
from tests.cli.conftest import CLASSES

SIZE = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three images in each of six class folders."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    for k in range(CLASSES):
        folder = root / f"class{k}"
        folder.mkdir()
        for i in range(3):
            coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return root


@pytest.fixture
def model(weights):
    return ("--model", "timm:resnet18", "--weights", weights, "--size", SIZE)


def test_a_conventional_model_as_it_is(bcos, model, weights, data):
    result = bcos("evaluate", *model, "--data", data, "--json")
    assert result.code == 0, result.err
    found = result.json["results"]
    assert (found["images"], found["classes"], found["completeness"]) == (18, CLASSES, None)
    source = load_model("timm:resnet18", weights=weights)
    items = [open_data(data, size=SIZE)[i] for i in range(18)]
    images, labels = torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
    mean, std = (torch.tensor(v)[:, None, None] for v in (source.mean, source.std))
    with torch.no_grad():
        logits = source.module.eval()((images - mean) / std)
    assert labels.tolist() == [k for k in range(CLASSES) for _ in range(3)]
    assert found["top1"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    top5 = [int(labels[i]) in logits[i].topk(5).indices.tolist() for i in range(18)]
    assert found["top5"] == pytest.approx(sum(top5) / 18)


def test_a_converted_model_answers_the_same_and_explains(bcos, model, data):
    plain = bcos("evaluate", *model, "--data", data, "--json")
    result = bcos("evaluate", *model, "--data", data, "--convert", "--explained", 6, "--json")
    assert result.code == 0, result.err
    found = result.json["results"]
    assert found["top1"] == plain.json["results"]["top1"]
    assert found["loss"] == pytest.approx(plain.json["results"]["loss"], rel=1e-3)
    assert found["completeness"]["images"] == 6
    assert found["completeness"]["largest_relative"] < 1e-4


def test_a_saved_network_may_be_named_as_a_model(bcos, checkpoint, data):
    """As in `bcos-rt explain`."""
    found = [
        bcos("evaluate", option, checkpoint, "--data", data, "--size", SIZE, "--json")
        for option in ("--checkpoint", "--model")
    ]
    assert [result.code for result in found] == [0, 0], found[1].err
    assert found[0].json["results"] == found[1].json["results"]
    assert found[1].json["network"]["checkpoint"] == str(checkpoint)


def test_what_a_person_reads(bcos, checkpoint, data, tmp_path):
    picture = tmp_path / "reliability.png"
    result = bcos(
        "evaluate", "-c", checkpoint, "--size", SIZE, "--data", data, "--explained", 2, "--batch-size", 5, "-o", picture
    )
    assert result.code == 0, result.err
    for text in ("top-1", "top-5", "negative log-likelihood", "calibration error", "completeness error", "2 images"):
        assert text in result.out
    assert "mean confidence" in result.out
    with Image.open(picture) as opened:
        assert opened.format == "PNG"


def test_a_folder_for_all_numbers(bcos, model, data, tmp_path):
    result = bcos("evaluate", *model, "--data", data, "-o", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written == {k: v for k, v in result.json.items() if k != "warnings"}
    with Image.open(tmp_path / "out" / "evaluation.png") as opened:
        assert opened.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--model, --checkpoint: got neither"),
        (("-m", "timm:resnet18", "-c", "x"), "--model, --checkpoint: got both"),
        (("-c", "nothing.safetensors"), "no such file"),
        (("-c", "nothing.safetensors", "--convert"), "--convert"),
        (("-m", "timm:resnet18", "-o", "x.pdf"), "ending in .png"),
    ],
)
def test_bad_input_of_evaluate_is_named(bcos, data, arguments, message):
    result = bcos("evaluate", *arguments, "--data", data)
    assert (result.code, message in result.err) == (2, True), result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method", "gradcam"), "did you mean 'grad_cam'"),
        (("--method", "bcos"), "a post-hoc method for 'timm:resnet18'"),
        (("--smooth", 4), "smooth: got 4"),
        (("--variant", "half"), "variant: got 'half'"),
        # Six classes cannot fill nine cells.
        (("--method", "random"), "expected at least 9"),
        (("--method", "bcos", "--convert"), "expected at least 9"),
    ],
)
def test_bad_input_of_localise_is_named(bcos, model, data, tmp_path, arguments, message):
    result = bcos("localise", *model, "--data", data, "-o", tmp_path / "out", "--grid", 3, *arguments)
    assert (result.code, message in result.err) == (2, True), result.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {"n": 3, "grids": 250, "smooth": None, "confidence": 0.5, "variant": "full", "stride": None,
              "same_grids": None, "batch_size": 64}),
        (("--grid", 2, "--grids", 7, "--smooth", 5, "--confidence", 0.25, "--batch-size", 3),
         {"n": 2, "grids": 7, "smooth": 5, "confidence": 0.25, "batch_size": 3}),
        (("--variant", "rescaled", "--same-grids"), {"variant": "rescaled", "same_grids": True}),
        (("--variant", "strided_padded", "--stride", 9), {"variant": "strided_padded", "stride": 9}),
    ],
)  # fmt: skip
def test_options_of_localise_reach_the_game(bcos, model, data, tmp_path, monkeypatch, arguments, expected):
    given = {}

    def game(networks, methods, images, **options):
        given.update(options, methods=methods)
        raise InvalidArgumentError("grids", "none", "the game is not what is tested")

    monkeypatch.setattr("bcos_rt.evaluation.grid_pointing_game", game)
    options = ("--data", data, "-o", tmp_path / "out", "--method", "random")
    result = bcos("localise", *model, *options, *arguments)
    assert (result.code, "not what is tested" in result.err) == (2, True), result.err
    assert {name: given[name] for name in expected} == expected
    assert [list(names) for names in given["methods"].values()] == [["random"]]


def test_explained_is_for_networks_that_explain_themselves(bcos, model, data):
    result = bcos("evaluate", *model, "--data", data, "--explained", 3)
    assert (result.code, "--explained: got 3 with a conventional network" in result.err) == (2, True), result.err


def test_saved_networks_take_no_weights_of_others(bcos, checkpoint, model, data, tmp_path):
    options = ("-m", checkpoint, "--data", data, "-o", tmp_path / "out", "--grid", 2, "--method", "random")
    result = bcos("localise", *model, *options, "--weights", "random")
    assert (result.code, f"'random' for {checkpoint}" in result.err) == (2, True), result.err
    result = bcos("localise", "-m", model[1], *options, "--weights", "random")
    assert (result.code, "--weights: got 1 for 2 models" in result.err) == (2, True), result.err


def test_grids_of_more_cells_than_pixels_are_refused(bcos, checkpoint, data, tmp_path):
    options = ("--data", data, "-o", tmp_path / "out", "--grid", 300, "--variant", "rescaled")
    result = bcos("localise", "-c", checkpoint, *options)
    assert (result.code, "--grid: got 300, expected at most 224" in result.err) == (2, True), result.err


@pytest.mark.parametrize("command", ["localise", "perturb", "randomise"])
def test_a_folder_that_is_a_file_is_refused_before_the_work(bcos, model, data, tmp_path, command):
    (tmp_path / "out.png").write_bytes(b"mine")
    result = bcos(command, *model, "--data", data, "-o", tmp_path / "out.png")
    assert (result.code, "out.png', a file, expected a folder" in result.err) == (2, True), result.err
    assert (tmp_path / "out.png").read_bytes() == b"mine"


def test_localise_needs_a_network(bcos, data, tmp_path):
    result = bcos("localise", "--data", data, "-o", tmp_path / "out")
    assert (result.code, "neither" in result.err) == (2, True)
    result = bcos("localise", "-c", "x", "--convert", "--data", data, "-o", tmp_path / "out")
    assert (result.code, "--convert" in result.err) == (2, True)


def test_checkpoints_of_small_networks_take_small_images(checkpoint, tmp_path):
    net, _ = bcosify(load_model("small:resnet20", weights="random"))
    assert load_network(None, save(net, tmp_path / "small.safetensors"), None).input_size == 32
    assert load_network(None, checkpoint, None).input_size == 224


@pytest.mark.parametrize("command", ["evaluate", "localise", "perturb", "randomise"])
def test_help(bcos, command):
    result = bcos(command, "--help")
    assert result.code == 0
    for option in ("--data", "--convert", "--device", "--json"):
        assert option in result.out


# --- several networks, the device, what methods need ------------------------------------------------------------------

SIDE = 32


@pytest.fixture(scope="module", autouse=True)
def tiny():
    """A network that takes no time, as small:tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SMALL_NETWORKS, "tiny", small_resnet(1, 4))
        patch.setitem(SMALL_NETWORKS, "tiny_vit", small_vit(1, 32))
        yield


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Six classes of noisy colours, 32 pixels."""
    root = tmp_path_factory.mktemp("colours")
    random = np.random.default_rng(0)
    for k, colour in enumerate(((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1))):
        folder = root / f"class{k}"
        folder.mkdir()
        for i in range(4):
            pixels = 0.7 * np.array(colour) + 0.3 * random.random((SIDE, SIDE, 3))
            Image.fromarray((255 * pixels).astype(np.uint8)).save(folder / f"{i}.png")
    return root


def sure(module, images, labels):
    """Give a network of random weights a head by which it knows the images."""
    features = []
    handle = module.fc.register_forward_pre_hook(lambda _module, given: features.append(given[0].detach()))
    with torch.no_grad():
        module.eval()(images)
    handle.remove()
    x = torch.cat([features[0], torch.ones(len(images), 1)], 1).double()
    wanted = 8.0 * torch.nn.functional.one_hot(labels, CLASSES).double() - 4.0
    solved = torch.linalg.lstsq(x, wanted, driver="gelsd").solution.float()
    with torch.no_grad():
        module.fc.weight.copy_(solved[:-1].T)
        module.fc.bias.copy_(solved[-1])
    return module


@pytest.fixture(scope="module")
def small_weights(tiny, colours, tmp_path_factory):
    """Two files of weights of small:tiny for six classes, which know the colours."""
    items = [open_data(colours, size=SIDE)[i] for i in range(4 * CLASSES)]
    images, labels = torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
    folder = tmp_path_factory.mktemp("small")
    paths = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        source = load_model("small:tiny", weights="random", num_classes=CLASSES)
        mean, std = (torch.tensor(v)[:, None, None] for v in (source.mean, source.std))
        sure(source.module, (images - mean) / std, labels)
        paths.append(folder / f"{seed}.pth")
        torch.save(source.module.state_dict(), paths[-1])
    return paths


SMALL = ("--model", "small:tiny")


def test_several_models_conventional_and_converted(bcos, colours, small_weights, tmp_path):
    first, second = small_weights
    result = bcos(
        "localise", *SMALL, "-m", "convert:small:tiny", *SMALL, "-w", first, "-w", first, "-w", second,
        "--num-classes", CLASSES, "--data", colours, "--grid", 2, "--grids", 2, "--method", "bcos",
        "--method", "input_x_gradient", "--workers", 1, "--device", "cpu", "-o", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    rows = result.json["results"]
    plain = [f"small:tiny ({path})" for path in small_weights]
    assert [(row["network"], row["method"]) for row in rows] == [
        (plain[0], "input_x_gradient"),
        ("convert:small:tiny", "bcos"),
        ("convert:small:tiny", "input_x_gradient"),
        (plain[1], "input_x_gradient"),
    ]
    assert rows[0]["mean"] != rows[3]["mean"], "each has its own weights"
    assert (result.json["device"], result.json["left_out"]) == ("cpu", {})
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "localisation.csv", "localisation.npz", "localisation.png", "localisation_example.png",
    }  # fmt: skip


@pytest.fixture(scope="module")
def numbered(small_weights, tmp_path_factory):
    """One network saved under several numberings of its classes: as in the data, backwards, with a name missing."""
    folder = tmp_path_factory.mktemp("numbered")
    names = [f"class{k}" for k in range(CLASSES)]
    paths = {}
    for key, order, called in (
        ("same", range(CLASSES), names),
        ("backwards", range(CLASSES)[::-1], names[::-1]),
        ("missing", range(CLASSES)[::-1], ["other" if name == "class2" else name for name in names[::-1]]),
    ):
        source = load_model("small:tiny", weights=small_weights[0], num_classes=CLASSES)
        with torch.no_grad():
            for parameter in source.module.fc.parameters():
                parameter.copy_(parameter[list(order)].clone())
        net, _ = bcosify(source, Recipe.equivalent(), class_names=called)
        paths[key] = save(net, folder / f"{key}.safetensors")
    return paths


def test_labels_are_the_network_s_numbers_of_the_classes(bcos, colours, numbered):
    found = {
        key: bcos("evaluate", "-c", path, "--data", colours, "--explained", 0, "--json")
        for key, path in numbered.items()
    }
    assert found["same"].json["results"]["top1"] > 0.9
    for figure in ("top1", "loss"):
        assert found["backwards"].json["results"][figure] == pytest.approx(found["same"].json["results"][figure])
    assert found["missing"].code == 2
    assert "--data: got 'class0' as class 0 of 6, expected class 5 of 6, as the network has it" in found["missing"].err


def test_data_may_hold_some_of_the_classes(bcos, colours, numbered, tmp_path):
    for k in (1, 4):
        (tmp_path / "some").mkdir(exist_ok=True)
        (tmp_path / "some" / f"class{k}").symlink_to(colours / f"class{k}")
    found = bcos("evaluate", "-c", numbered["same"], "--data", tmp_path / "some", "--explained", 0, "--json")
    assert found.code == 0, found.err
    results = found.json["results"]
    assert (results["images"], results["classes"]) == (8, CLASSES)
    assert results["top1"] > 0.9


def test_grids_are_of_the_network_s_numbers(bcos, colours, numbered, tmp_path):
    def localise(name, *keys):
        checkpoints = [part for key in keys for part in ("-c", numbered[key])]
        return bcos("localise", *checkpoints, "--data", colours, "--grid", 2, "--grids", 2, "--method", "bcos",
                    "--confidence", 0.0, "-o", tmp_path / name, "--json")  # fmt: skip

    same, backwards = localise("a", "same"), localise("b", "backwards")
    assert (same.code, backwards.code) == (0, 0), backwards.err
    assert backwards.json["results"][0]["grids"] == same.json["results"][0]["grids"] == 2
    refused = localise("c", "same", "missing")
    assert (refused.code, "as missing has it" in refused.err) == (2, True), refused.err
    refused = localise("d", "same", "backwards")
    assert (refused.code, "which number the classes of --data differently" in refused.err) == (2, True), refused.err


def test_a_saved_network_is_compared_as_a_checkpoint(bcos, checkpoint, data, tmp_path):
    results = [
        bcos("perturb", option, checkpoint, "--data", data, "--size", SIZE, "--images", 2, "--steps", 2, "--method",
             "bcos", "--device", "cpu", "-o", tmp_path / option, "--json")
        for option in ("--checkpoint", "--model")
    ]  # fmt: skip
    assert [result.code for result in results] == [0, 0], results[1].err
    assert results[0].json["results"] == results[1].json["results"]
    assert {row["network"] for row in results[1].json["results"]} == {checkpoint.stem}


def test_strided_windows_from_the_command_line(bcos, colours, small_weights, tmp_path):
    def mean(*options):
        result = bcos(
            "localise", *SMALL, "-w", small_weights[0], "--num-classes", CLASSES, "--data", colours, "--grid", 2,
            "--grids", 1, "--method", "input_x_gradient", *options, "-o", tmp_path / "out", "--json",
        )  # fmt: skip
        assert result.code == 0, result.err
        return result.json["results"][0]["mean"]

    apart, padded = (mean("--variant", variant, "--stride", SIDE) for variant in ("strided", "strided_padded"))
    assert apart == padded, "a window of each cell alone, once: the sum is the mean"
    assert mean("--variant", "strided") != apart


def test_networks_of_different_sizes_need_one(bcos, weights, data, tmp_path):
    arguments = ("-m", "timm:resnet18", "-m", "small:tiny", "-w", weights, "-w", "random", "--data", data)
    result = bcos("localise", *arguments, "-o", tmp_path / "out")
    assert result.code == 2
    assert (
        "--size: got none, and networks for images of different sizes (timm:resnet18 224, small:tiny 32" in result.err
    )


def vit_weights(folder):
    torch.manual_seed(0)
    path = folder / "vit.pth"
    torch.save(load_model("small:tiny_vit", weights="random", num_classes=CLASSES).module.state_dict(), path)
    return path


def test_methods_that_do_not_work_on_a_network_are_left_out_and_said(bcos, colours, tmp_path):
    vit = ("--model", "small:tiny_vit", "-w", vit_weights(tmp_path), "--num-classes", CLASSES, "--data", colours)
    quick = ("--images", 2, "--steps", 2, "-o", tmp_path / "out")
    result = bcos("perturb", *vit, *quick, "--method", "grad_cam", "--method", "input_x_gradient", "--json")
    assert result.code == 0, result.err
    assert [row["method"] for row in result.json["results"]] == ["input_x_gradient"]
    assert list(result.json["left_out"]["small:tiny_vit"]) == ["grad_cam"]
    assert any("small:tiny_vit is not measured with grad_cam" in text for text in result.json["warnings"])
    result = bcos("perturb", *vit, *quick, "--json")
    assert [row["method"] for row in result.json["results"]] == ["input_x_gradient", "integrated_gradients", "random"]
    result = bcos("perturb", *vit, *quick, "--method", "guided_backprop")
    assert (result.code, "guided_backprop changes gradients at ReLUs" in result.err) == (2, True), result.err


def test_a_size_that_a_network_does_not_take_is_named():
    """torchvision's transformers are of one size, and say so in an assertion."""
    net = ConventionalNetwork(torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=5)).eval()
    networks = {"vit": Compared(net, 32, {})}
    assert methods_for(networks, ["saliency"], (), 32) == ({"vit": ["saliency"]}, {})
    with pytest.raises(InvalidArgumentError, match=r"96 x 96 pixels, which 'vit' does not take .*--variant strided"):
        methods_for(networks, ["saliency"], (), 96)


def test_insertion_and_deletion(bcos, colours, small_weights, tmp_path):
    weights = ("-w", small_weights[0], "--num-classes", CLASSES)
    arguments = (
        "perturb", *SMALL, *weights, "--data", colours, "--images", 3, "--steps", 4, "--deletion", "0,0.5,1",
        "--insertion", "mean", "--score", "logit", "--device", "cpu", "-o", tmp_path / "out",
    )  # fmt: skip
    result = bcos(*arguments, "--convert", "--json")
    assert result.code == 0, result.err
    rows = result.json["results"]
    assert [(row["network"], row["method"]) for row in rows] == [
        ("small:tiny", "bcos"),
        ("small:tiny", "random"),
    ]
    source = load_model("small:tiny", weights=small_weights[0], num_classes=CLASSES)
    net = bcosify(source, Recipe.equivalent())[0].eval()
    options = Perturbation(steps=4, deletion=(0, 0.5, 1), insertion="mean", score="logit")
    expected = insertion_deletion({"a": net}, ["bcos"], open_data(colours, size=SIDE), images=3, options=options)
    assert rows[0]["deletion"] == pytest.approx(expected.summary()[0]["deletion"], rel=1e-4)
    assert rows[0]["insertion"] == pytest.approx(expected.summary()[0]["insertion"], rel=1e-4)
    names = {"perturbation.csv", "perturbation.npz", "perturbation.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    shown = bcos(*arguments, "--method", "random")
    assert "insertion" in shown.out
    assert f"{rows[1]['deletion']:.4f}" in shown.out


def test_randomised_parameters(bcos, colours, small_weights, tmp_path):
    arguments = (
        "randomise", *SMALL, "-w", small_weights[0], "--num-classes", CLASSES, "--data", colours, "--images", 3,
        "--stage", "fc", "--stage", "conv1", "--method", "input_x_gradient", "--method", "saliency", "--seed", 3,
        "--device", "cpu", "-o", tmp_path / "out",
    )  # fmt: skip
    result = bcos(*arguments, "--json")
    assert result.code == 0, result.err
    rows = result.json["results"]
    assert [(row["method"], row["stage"]) for row in rows] == [
        (name, stage) for name in ("input_x_gradient", "saliency") for stage in ("fc", "conv1")
    ]
    source = load_model("small:tiny", weights=small_weights[0], num_classes=CLASSES)
    images = open_data(colours, size=SIDE)
    pixels = torch.stack([images[i][0] for i in (0, 8, 16)])
    expected = parameter_randomisation(
        source.conventional().eval(), ["input_x_gradient"], pixels, stages=["fc", "conv1"], seed=3
    )
    assert rows[1]["correlation"] == pytest.approx(expected.summary()[1]["correlation"], abs=1e-4)
    names = {"randomisation.csv", "randomisation.npz", "randomisation.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names
    shown = bcos(*arguments)
    assert "randomised down to" in shown.out
    assert f"{rows[1]['correlation']:.3f}" in shown.out


@pytest.mark.parametrize("command", ["evaluate", "localise", "perturb", "randomise"])
@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_named(bcos, command, device, data, tmp_path):
    result = bcos(command, *SMALL, "-w", "random", "--data", data, "--device", device, "-o", tmp_path / "out", "--json")
    assert result.code == 2
    error = result.json["error"]
    assert (error["type"], error["argument"], error["got"]) == ("InvalidArgumentError", "--device", repr(device))
    assert error["expected"].startswith("one of auto, cpu")


def test_the_device_is_a_gpu_where_there_is_one(bcos, model, data, monkeypatch):
    assert chosen_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto") == torch.device("cpu")
    result = bcos("evaluate", *model, "--data", data, "--device", "auto", "--json")
    assert result.json["device"] == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert chosen_device("auto") == torch.device("cuda", 1)
    assert chosen_device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(InvalidArgumentError, match="one of auto, cpu, cuda, cuda:0, cuda:1"):
        chosen_device("cuda:2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("perturb", *SMALL, "-w", "random", "--deletion", "grey"), "--deletion: got 'grey'"),
        (("perturb", *SMALL, "-w", "random", "--insertion", "0,0,2"), "--insertion: got '0,0,2'"),
        (("perturb", *SMALL, "-w", "random", "--score", "loss"), "Perturbation.score: got 'loss'"),
        (("perturb", *SMALL, "-w", "random", "--method", "lime"), "method: got 'lime'"),
        (("perturb",), "--model, --checkpoint: got neither"),
        (("perturb", *SMALL, *SMALL, "-w", "random", "-w", "random"), "'small:tiny (random)' twice"),
        (("perturb", *SMALL, *SMALL, "-w", "random"), "--weights: got 1 for 2 models"),
        (("randomise", *SMALL, "-c", "x"), "--model, --checkpoint: got both"),
        (("randomise", *SMALL, "-w", "random", "--stage", "layer9"), "did you mean 'layer"),
        (("localise", *SMALL, "--stride", 4), "--stride: got 4 with --variant full"),
        (("localise", "-c", "x", "-w", "random"), "--weights: got no --model"),
    ],
)
def test_bad_input_of_comparisons_is_named(bcos, data, tmp_path, arguments, message):
    result = bcos(*arguments, "--data", data, "-o", tmp_path / "out")
    assert (result.code, message in result.err) == (2, True), result.err
    assert not (tmp_path / "out").exists()


def test_checkpoints_called_alike_have_the_ends_of_their_paths():
    paths = [Path(p) for p in ("/runs/a/best.safetensors", "/runs/b/best.safetensors", "last.safetensors", "c", "d/c")]
    assert _short_names(paths) == ["a/best", "b/best", "last", "c", "d/c"]
    assert _short_names([Path("x/best.safetensors")] * 2) == ["x/best"] * 2
