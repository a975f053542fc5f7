"""bcos-rt train, finetune, evaluate and localise, on small images in class folders."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from bcos_rt import load
from bcos_rt.cli import app
from bcos_rt.cli.train import _recipe, _teller
from bcos_rt.models import load_model
from bcos_rt.models.small import SMALL_NETWORKS, small_resnet, small_vit
from bcos_rt.models.weights import classifier_metadata

CLASSES = ("black", "blue", "cyan", "green", "red", "white", "yellow")
COLOURS = ((0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 0), (1, 0, 0), (1, 1, 1), (1, 1, 0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders train and val of noisy colours, 32 pixels."""
    root = tmp_path_factory.mktemp("colours")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 10), ("val", 6)):
        for name, colour in zip(CLASSES, COLOURS, strict=True):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                noise = 0.3 * torch.rand(32, 32, 3, generator=generator)
                pixels = (255 * (0.7 * torch.tensor(colour) + noise)).to(torch.uint8).numpy()
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


@pytest.fixture
def tiny(monkeypatch):
    """A network that takes no time, as small:tiny."""
    monkeypatch.setitem(SMALL_NETWORKS, "tiny", small_resnet(1, 4))


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_logits_are_as_many_as_the_names_of_the_data(bcos, tiny, data, tmp_path, command):
    """A network with other numbers of logits and names could not be loaded again."""
    initial = ("--weights", "random") if command == "finetune" else ()
    result = bcos(
        command, "--model", "small:tiny", *initial, "--num-classes", 9, "--data", data, "-o", tmp_path / "out", *QUICK
    )
    expected = f"--num-classes: got 9 with --data of {len(CLASSES)} classes, expected {len(CLASSES)}"
    assert (result.code, expected in result.err) == (2, True), result.err
    assert not (tmp_path / "out").exists()


QUICK = ("--epochs", 10, "--batch-size", 14, "--size", 32, "--workers", 0, "--accelerator", "cpu",
         "--set", "augmentation.crop=none", "--lr", 0.01)  # fmt: skip


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conventional network's run."""
    from typer.testing import CliRunner

    out = tmp_path_factory.mktemp("runs") / "standard"
    arguments = ["train", "--model", "small:resnet20", "--standard", "--data", data, "--val", data, "-o", out, *QUICK]
    result = CliRunner().invoke(app, [str(a) for a in (*arguments, "--json")])
    assert result.exit_code == 0, result.output
    return out


def test_train_finetune_evaluate_localise(bcos, data, trained, tmp_path):
    assert json.loads((trained / "recipe.json").read_text())["recipe"]["optimizer"] == "sgd"
    run = tmp_path / "run"
    photo = data / "val" / "red" / "0.png"
    arguments = (
        "finetune", "--model", "small:resnet20", "--weights", trained / "last.safetensors", "--data", data,
        "--val", data, "-o", run, *QUICK, "--set", "ema=0.5", "--teacher", "--set", "distillation.logits=0.5",
        "--explain", photo, "--lr", 0.005,
    )  # fmt: skip
    result = bcos(*arguments, "--json")
    assert result.code == 0, result.err
    assert result.json["epochs"] == 10
    recipe = json.loads((run / "recipe.json").read_text())
    assert (recipe["recipe"]["ema"], recipe["recipe"]["distillation"]["logits"]) == (0.5, 0.5)
    net = load(run / "last.safetensors")
    assert tuple(net.class_names) == tuple(sorted(CLASSES)), "the data's"
    assert (run / "explanations" / "epoch_010.png").exists()
    # A finished run that is resumed is only reported; without --resume it is refused.
    assert bcos(*arguments, "--resume").code == 0
    refused = bcos(*arguments)
    assert (refused.code, "which holds a run" in refused.err) == (2, True)

    found = bcos("evaluate", "-c", run / "last.safetensors", "--data", data, "-o", tmp_path / "r.png", "--json")
    assert found.code == 0, found.err
    assert found.json["results"]["top1"] == pytest.approx(result.json["last"]["val_top1"])
    assert found.json["results"]["top1"] > 0.7
    assert found.json["results"]["completeness"]["largest"] < 1e-3
    assert (tmp_path / "r.png").exists()
    table = bcos("evaluate", "--model", "small:resnet20", "--weights", trained / "last.safetensors", "--data", data)
    assert table.code == 0, table.err
    assert "top-1" in table.out

    game = bcos(
        "localise", "-c", run / "last.safetensors", "--model", "small:resnet20", "--weights",
        trained / "last.safetensors", "--method", "bcos", "--method", "input_x_gradient", "--data", data, "--grid", 2,
        "--grids", 2, "--confidence", 0.0, "--same-grids", "-o", tmp_path / "loc", "--json",
    )  # fmt: skip
    assert game.code == 0, game.err
    rows = {(row["network"], row["method"]) for row in game.json["results"]}
    assert rows == {("last", "bcos"), ("last", "input_x_gradient"), ("small:resnet20", "input_x_gradient")}
    assert (tmp_path / "loc" / "localisation.png").exists()


def test_weights_of_other_classes_teach_features_alone(bcos, data, tiny, tmp_path):
    """Their classifier would be a new one: nobody learns from it, and nobody is told its answers."""
    torch.manual_seed(0)
    torch.save(SMALL_NETWORKS["tiny"](3).state_dict(), tmp_path / "w.pth")
    model = ("--model", "small:tiny", "--weights", tmp_path / "w.pth")
    arguments = ("finetune", *model, "--data", data, "-o", tmp_path / "out", *QUICK, "--epochs", 1, "--json")
    teacher = ("--teacher", "--set", "distillation.logits=1")
    refused = bcos(*arguments, *teacher)
    assert (refused.code, "--teacher: got with weights of other classes, whose classifier is new" in refused.err) == (
        2,
        True,
    )
    features = ("--teacher", "--set", "distillation.logits=0", "--set", "distillation.features=1")
    found = bcos(*arguments, *features, "--set", 'distillation.modules=["layer1"]')
    assert found.code == 0, found.err
    assert load(tmp_path / "out" / "last.safetensors").class_names == sorted(CLASSES)
    for command in ("evaluate", "localise"):
        result = bcos(command, *model, "--num-classes", 7, "--data", data, "-o", tmp_path / "x.png")
        assert (result.code, "--num-classes: got 7, and weights of another number" in result.err) == (2, True), (
            result.err
        )


def test_as_many_other_classes_have_names_and_a_classifier_of_their_own(bcos, data, tiny, tmp_path):
    torch.manual_seed(1)
    old = SMALL_NETWORKS["tiny"](len(CLASSES)).state_dict()
    names = ["red", *(f"other {i}" for i in range(len(CLASSES) - 1))]
    save_file(old, tmp_path / "w.safetensors", metadata=classifier_metadata(names, 32))
    arguments = ("finetune", "--model", "small:tiny", "--weights", tmp_path / "w.safetensors", "--data", data, *QUICK,
                 "--epochs", 1, "--set", "lr=0.0", "--conversion", "equivalent")  # fmt: skip
    assert bcos(*arguments, "-o", tmp_path / "run").code == 0
    net = load(tmp_path / "run" / "last.safetensors")
    assert net.class_names == sorted(CLASSES)
    new = net.backbone.state_dict()
    assert torch.equal(new["layer1.0.conv1.weight"], old["layer1.0.conv1.weight"])
    assert not torch.equal(new["fc.weight"].flatten(), old["fc.weight"].flatten())
    refused = bcos(*arguments, "--teacher", "--set", "distillation.logits=1", "-o", tmp_path / "other")
    assert (refused.code, "--teacher: got with weights of other classes" in refused.err) == (2, True), refused.err


def test_a_conventional_networks_file_has_names_and_side(bcos, data, tiny, tmp_path):
    arguments = ("--model", "small:tiny", "--data", data, *QUICK, "--epochs", 1, "--size", 16)
    assert bcos("train", "--standard", *arguments, "-o", tmp_path / "run").code == 0
    source = load_model("small:tiny", weights=tmp_path / "run" / "last.safetensors")
    assert (source.class_names, source.input_size) == (tuple(sorted(CLASSES)), 16)
    model = ("--model", "small:tiny", "--weights", tmp_path / "run" / "last.safetensors")
    found = bcos("explain", data / "val/red/0.png", *model, "--class", "red", "-o", tmp_path / "e.npz", "--json")
    assert found.code == 0, found.err
    with np.load(tmp_path / "e.npz") as arrays:
        assert arrays["images"].shape[-2:] == (16, 16)


@pytest.mark.parametrize(("name", "head"), [("tiny", "before_pool"), ("vit_tiny", "after_pool")])
def test_from_scratch_as_bcos_v2(bcos, data, tiny, monkeypatch, tmp_path, name, head):
    monkeypatch.setitem(SMALL_NETWORKS, "vit_tiny", small_vit(1, 32))
    how = ("--conversion", "bcos_v2", "--epochs", 1, "--set", "warmup_epochs=0")
    result = bcos("train", "--model", f"small:{name}", "--data", data, "-o", tmp_path / "run", *QUICK, *how)
    assert result.code == 0, result.err
    recipe = load(tmp_path / "run" / "last.safetensors").recipe
    assert (recipe.weight_norm, recipe.activations, recipe.head) == ("unit", "identity", head)
    assert (recipe.mean, recipe.std) == ((0.0,) * 6, (1.0,) * 6)


def test_the_side_of_training_is_that_of_evaluation(bcos, data, tiny, tmp_path):
    """Of a source that was made for 32 pixels and is trained with 16; the average too."""
    run = tmp_path / "run"
    quick = [*QUICK, "--epochs", 1, "--size", 16, "--set", "ema=0.5"]
    result = bcos("finetune", "-m", "small:tiny", "-w", "random", "--data", data, "--val", data, "-o", run, *quick)
    assert result.code == 0, result.err
    for name in ("last", "best", "ema"):
        assert load(run / f"{name}.safetensors").image_size == 16
    found = [
        bcos("evaluate", "-c", run / "last.safetensors", "--data", data, "--explained", 0, "--json", *size)
        for size in ((), ("--size", 16), ("--size", 32))
    ]
    losses = [one.json["results"]["loss"] for one in found]
    assert losses[0] == losses[1] != losses[2]
    photo = data / "val" / "red" / "0.png"
    explained = bcos("explain", photo, "-c", run / "last.safetensors", "-o", tmp_path / "e.png", "--json")
    assert (explained.code, explained.json["size"]) == (0, 16), explained.err


def test_bcos_from_scratch_with_a_recipe_file(bcos, data, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({"epochs": 1, "loss": "bce", "batch_size": 10, "agc": None,
                                                 "augmentation": {"size": 32, "crop": "none"}}))  # fmt: skip
    result = bcos("train", "--model", "small:densenet28", "--recipe", tmp_path / "r.json", "--data", data, "-o",
                  tmp_path / "run", "--workers", 0, "--json")  # fmt: skip
    assert result.code == 0, result.err
    assert "val_top1" not in result.json["last"]
    assert load(tmp_path / "run" / "last.safetensors").recipe.b == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("finetune",), "--model, --checkpoint: got neither"),
        (("finetune", "-c", "x", "-m", "small:resnet20"), "--model, --checkpoint: got both"),
        (("finetune", "-m", "small:resnet2"), "did you mean 'resnet20'"),
        (("train", "-m", "small:resnet20", "--recipe", "bcosfy"), "did you mean 'bcosify'"),
        (("train", "-m", "small:resnet20", "--set", "lr"), "FIELD=VALUE"),
        (("train", "-m", "small:resnet20", "--set", "lrr=1"), "did you mean 'lr'"),
        (("train", "-m", "small:resnet20", "--explain", "none.png"), "photo: got 'none.png'"),
        (("train", "-m", "small:resnet20", "--batch-size", 900), "at least one batch"),
        (("finetune", "-c", "x", "--num-classes", 7), "--num-classes: got 7 with a checkpoint"),
        (("finetune", "-c", "x", "-w", "random"), "--weights: got 'random' with a checkpoint"),
        (("finetune", "-c", "x", "--conversion", "equivalent"), "--conversion: got 'equivalent' with a checkpoint"),
        (
            ("finetune", "-c", "x", "--clip", "RN50", "--conversion", "equivalent"),
            "--conversion: got 'equivalent' with",
        ),
        (("train", "-m", "small:resnet20", "--standard", "--conversion", "r.json"), "got 'r.json' with --standard"),
        (
            ("finetune", "-m", "small:resnet20", "-w", "random", "--teacher"),
            "--teacher: got a recipe without distillation, expected one that says what is learned from it (--set "
            "distillation.logits=0.5",
        ),
        (("finetune", "-c", "x", "--teacher"), "--teacher: got with --checkpoint"),
        (
            ("finetune", "-m", "small:resnet20", "--set", "distillation.logits=1"),
            "--teacher: got without --teacher, and a recipe with a distillation",
        ),
        (("train", "-m", "small:resnet20", "--set", "distillation.logits=1"), "--recipe, --set: got a recipe with a"),
        (
            ("train", "-m", "small:resnet20", "--conversion", "nope"),
            "--conversion: got 'nope', expected 'default', 'bcos_v2', 'equivalent' or an existing JSON file",
        ),
        (("finetune", "-m", "small:resnet20", "-w", "random", "--conversion", "nope"), "--conversion: got 'nope'"),
    ],
)
def test_bad_input_is_named(bcos, data, tmp_path, arguments, message):
    result = bcos(*arguments, "--data", data, "-o", tmp_path / "run", "--workers", 0)
    assert result.code == 2, result.err
    assert message in result.err
    assert not (tmp_path / "run" / "state.pt").exists()


def test_settings_may_be_spelled_as_in_python():
    changes = ["step_schedule=False", "learn_b=True", "agc=None", "loss=bce", "sync_norms=true"]
    recipe = _recipe("bcosify", changes, None, None, None, None)
    assert (recipe.step_schedule, recipe.learn_b, recipe.agc, recipe.loss, recipe.sync_norms) == (
        False, True, None, "bce", True,
    )  # fmt: skip


def test_a_line_an_epoch_without_a_terminal(bcos, data, tiny, tmp_path):
    quick = [*QUICK, "--epochs", 2, "--size", 8, "--set", "ema=0.5"]
    arguments = ("train", "-m", "small:tiny", "--data", data, "--val", data, "--json", *quick)
    result = bcos(*arguments, "-o", tmp_path / "run")
    assert result.code == 0, result.err
    assert result.json["epochs"] == 2, "stdout holds the object and nothing else"
    lines = [line for line in result.err.splitlines() if line.startswith("epoch ")]
    assert [line[:10] for line in lines] == ["epoch 1/2:", "epoch 2/2:"]
    last = result.json["last"]
    for said in (
        f"train loss {last['train_loss']:.4f} top-1 {last['train_top1']:.2%},",
        f"validation top-1 {last['val_top1']:.2%},",
        f"average top-1 {last['ema_top1']:.2%},",
        f"lr {last['lr']:.3g},",
        f"{last['images_per_s']:.1f} images/s,",
    ):
        assert said in lines[1]
    assert lines[1].endswith("0:00:00 left")


def test_the_line_of_an_epoch_says_what_there_is(capsys):
    tell = _teller(Console(width=20), 3)
    tell({"epoch": 1, "train_loss": 0.5, "train_cosine": 0.25, "lr": 1e-4, "images_per_s": 12.34})
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("epoch 1/3: train loss 0.5000 cosine 0.2500, lr 0.0001, 12.3 images/s, 0:00:0")


def test_every_option_says_what_it_is():
    def commands(group):
        for command in group.commands.values():
            yield from commands(command) if hasattr(command, "commands") else [command]

    for command in commands(typer.main.get_command(app)):
        for option in command.params:
            if option.param_type_name == "option":
                assert option.help, (command.name, option.name)
                if (command.name, option.name) in (("finetune", "model"), ("evaluate", "model"), ("train", "model")):
                    assert "small:NAME" in option.help


def test_more_nodes_than_there_are_are_named(bcos, data, tmp_path, monkeypatch):
    """srun says two nodes; what is said here is passed on, not ignored."""
    arguments = ("train", "-m", "small:resnet20", "--data", data, "-o", tmp_path / "run", *QUICK)
    for name, value in {"SLURM_NTASKS": "2", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_PROCID": "0",
                        "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "train"}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    result = bcos(*arguments, "--devices", 1, "--num-nodes", 3)
    assert (result.code, "num_nodes=3" in result.err) == (2, True), result.err


@pytest.mark.parametrize(
    ("variables", "silent"),
    [({}, False), ({"RANK": "0"}, False), ({"RANK": "1"}, True), ({"SLURM_PROCID": "3"}, True),
     ({"SLURM_PROCID": "0", "LOCAL_RANK": "1"}, True), ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, True)],
)  # fmt: skip
def test_one_process_speaks(variables, silent, monkeypatch):
    from bcos_rt.cli.train import _is_silent

    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert _is_silent() is silent


def test_missing_data_is_named(bcos, tmp_path):
    result = bcos("train", "-m", "small:resnet20", "--data", tmp_path / "nothing", "-o", tmp_path / "run")
    assert (result.code, "which does not exist" in result.err) == (2, True)
    result = bcos("evaluate", "-m", "small:resnet20", "-w", "random", "--data", tmp_path / "nothing")
    assert (result.code, "which does not exist" in result.err) == (2, True)


def test_sigterm_ends_with_143_and_resume_goes_on(data, tmp_path):
    command = [sys.executable, "-m", "bcos_rt", "train", "-m", "small:resnet20", "--data", str(data), "-o",
               str(tmp_path / "run"), *(str(a) for a in QUICK), "--epochs", "20"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "metrics.csv").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert "--resume" in said
    done = len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) - 1
    assert 1 <= done < 20
    again = subprocess.run(
        [*command, "--resume", "--json"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["epochs"] == 20
