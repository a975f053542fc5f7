"""The trainer: what it learns, that a resumed run is the run that was not stopped, and how it fails."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from PIL import Image
from rich.console import Console
from torch import Tensor, nn

from bcos_rt import Recipe, bcosify, explain, finetune, load
from bcos_rt.data import Augmentation, Mixing
from bcos_rt.errors import InvalidArgumentError, InvalidTypeError, TrainingError, TrainingInterruptedError
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.nn.exponent import exponents, learn_exponents
from bcos_rt.nn.network import BcosNetwork
from bcos_rt.nn.norms import BatchNormUncentered2d
from bcos_rt.training import Distillation, TrainingRecipe, TrainingResult
from bcos_rt.training.optim import clip_adaptively
from tests.training.worker import colours, convnet, network

PLAIN = TrainingRecipe(
    epochs=3, batch_size=16, lr=5e-3, loss="bce", agc=None, augmentation=Augmentation.none(), log_every=1
)


def weights(net: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def without_times(rows: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows]


# --- learning --------------------------------------------------------------------------------------------------------


def test_it_learns_and_says_what(tmp_path: Path) -> None:
    net = network()
    result = finetune(
        net, colours(96), PLAIN.replace(epochs=6, lr=0.02), validation=colours(48, seed=1), output=tmp_path / "run",
        explain_images=colours(2)[0].float() / 255,
    )  # fmt: skip
    assert result.net is net
    assert not net.training
    first, last = result.history[0], result.history[-1]
    assert last["train_loss"] < first["train_loss"]
    assert last["val_top1"] > 0.9, "three colours can be told apart"
    images, labels = colours(48, seed=1)
    with torch.no_grad():
        right = (net(images.float() / 255).argmax(1) == labels).double().mean()
    assert last["val_top1"] == pytest.approx(float(right))
    assert result.best is not None
    assert result.best["val_top1"] == max(row["val_top1"] for row in result.history)
    files = {p.relative_to(tmp_path / "run").as_posix() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert {"recipe.json", "metrics.csv", "steps.csv", "state.pt", "last.safetensors", "best.safetensors"} <= files
    assert {f"explanations/epoch_{i:03d}.png" for i in range(7)} <= files
    assert any(name.startswith("tensorboard/") for name in files)
    hidden = [name for name in files if "/." in name or name.startswith(".")]
    assert hidden == [".lock"], "temporary files"
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 7
    described = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert TrainingRecipe.from_dict(described["recipe"]).epochs == 6
    again = load(tmp_path / "run" / "last.safetensors", model=convnet())
    for key, value in weights(net).items():
        torch.testing.assert_close(again.state_dict()[key], value, rtol=0, atol=0)
    assert float(explain(again, images[:2].float() / 255).completeness_error().max()) < 1e-4


def test_one_step_is_the_step_written_out() -> None:
    """SGD in float64 against the update by hand: order of images, loss, weight decay, learning rate."""
    recipe = PLAIN.replace(
        epochs=1, batch_size=8, optimizer="sgd", momentum=0.0, weight_decay=0.1, lr=0.05, schedule="constant",
        precision="64-true",
    )  # fmt: skip
    net = ConventionalNetwork(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))).double()
    before = weights(net)
    images, labels = colours(8)
    finetune(net, (images, labels), recipe)
    weight = before["model.1.weight"].requires_grad_()
    bias = before["model.1.bias"].requires_grad_()
    logits = F.linear((images.double() / 255).flatten(1), weight, bias)
    F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 3).double()).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    after = weights(net)
    # Images, and logits on their way out of Fabric's wrapper, are float32.
    torch.testing.assert_close(after["model.1.weight"], (weight - 0.05 * (weight.grad + 0.1 * weight)).detach(),
                               rtol=1e-5, atol=1e-7)  # fmt: skip
    torch.testing.assert_close(after["model.1.bias"], (bias - 0.05 * bias.grad).detach(), rtol=1e-5, atol=1e-7)


def test_accumulated_parts_make_the_same_step_where_nothing_depends_on_the_batch() -> None:
    def trained(accumulate: int) -> dict[str, Tensor]:
        torch.manual_seed(3)
        net = ConventionalNetwork(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                                nn.Linear(4, 3))).double()  # fmt: skip
        finetune(net, colours(40), PLAIN.replace(accumulate=accumulate, precision="64-true", clip_norm=0.5))
        return weights(net)

    whole = trained(1)
    for key, value in trained(3).items():
        torch.testing.assert_close(value, whole[key], rtol=1e-5, atol=1e-8)


def test_average_is_the_average(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    net = network()
    start = weights(net)
    recipe = PLAIN.replace(ema=0.8, epochs=4, batch_size=16)
    result = finetune(
        net, colours(16), recipe, validation=colours(16), output=tmp_path / "run",
        on_epoch=lambda _: seen.append(weights(net)),
    )  # fmt: skip
    assert result.averaged is not None
    assert len(seen) == 4
    for key, value in result.averaged.state_dict().items():
        if value.is_floating_point():
            # One step an epoch here; torch's average begins with the weights after the first step.
            expected = seen[0][key]
            for later in seen[1:]:
                expected = 0.8 * expected + 0.2 * later[key]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert "ema_top1" in result.history[-1]
    saved = load(tmp_path / "run" / "ema.safetensors", model=convnet())
    torch.testing.assert_close(weights(saved), weights(result.averaged))
    assert any(not torch.equal(start[k], v) for k, v in weights(net).items())


def test_adaptive_clipping_limits_each_filter() -> None:
    layer = nn.Conv2d(3, 4, 3)
    generator = torch.Generator().manual_seed(0)
    layer.weight.grad = (
        torch.randn(layer.weight.shape, generator=generator)
        * torch.tensor([1e-4, 1.0, 10.0, 1e-6])[:, None, None, None]
    )
    before = layer.weight.grad.clone()
    clip_adaptively([layer.weight], 0.01)
    limit = 0.01 * layer.weight.detach().flatten(1).norm(dim=1).clamp(min=1e-3)
    norms = layer.weight.grad.flatten(1).norm(dim=1)
    assert bool((norms <= limit * (1 + 1e-5)).all())
    small = before.flatten(1).norm(dim=1) < limit
    assert small.tolist() == [True, False, False, True]
    torch.testing.assert_close(layer.weight.grad[small], before[small], rtol=0, atol=0)


def test_distillation_without_labels_moves_the_student_to_the_teacher() -> None:
    images, _ = colours(64)
    source = convnet()
    teacher = ConventionalNetwork(source)
    finetune(teacher, colours(96), PLAIN.replace(loss="cross_entropy", epochs=8, lr=0.02))
    net, _ = bcosify(source, Recipe(mean=(0, 0, 0), std=(1, 1, 1)))
    recipe = PLAIN.replace(
        loss="none", epochs=8, lr=0.01, distillation=Distillation(logit_loss="bce", features=1.0, modules=("0", "3"))
    )
    frozen = weights(teacher)
    result = finetune(net, (images, None), recipe, teacher=teacher, validation=(images, None))
    assert result.history[-1]["val_top1"] > 0.9, "top class is the teacher's"
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]
    torch.testing.assert_close(weights(teacher), frozen, rtol=0, atol=0)


def test_images_without_labels_are_mixed_for_a_teacher() -> None:
    net = network()
    teacher, _ = bcosify(convnet(), Recipe())
    images = colours(32)[0]
    recipe = PLAIN.replace(loss="none", mixing=Mixing(mixup=1.0), distillation=Distillation(), epochs=1)
    mixed = finetune(net, (images, None), recipe, teacher=teacher)
    plain = finetune(network(), (images, None), recipe.replace(mixing=None), teacher=teacher)
    assert mixed.history[0]["train_loss"] != plain.history[0]["train_loss"]


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({}, {"teacher": "resnet18"}, InvalidTypeError, "teacher: got str"),
        ({}, {"teacher": nn.Identity()}, InvalidArgumentError, "teacher: got a Identity, expected None without"),
        ({}, {"workers": -1}, InvalidArgumentError, "workers: got -1"),
        ({}, {"explain_images": torch.rand(3, 16, 16)}, InvalidArgumentError, "explain_images: got shape"),
        ({}, {"explain_images": torch.zeros(1, 3, 16, 16).byte()}, InvalidTypeError, "explain_images: got dtype"),
        ({"b_start": 1.0, "b_epochs": 2.0}, {"conventional": True}, InvalidArgumentError, r"recipe\.b_start"),
        ({"learn_b": True}, {"conventional": True}, InvalidArgumentError, r"recipe\.learn_b"),
        ({}, {"conventional": True, "explain_images": torch.rand(1, 3, 16, 16)}, InvalidArgumentError, "no B-cos"),
    ],
)
def test_what_would_do_nothing_or_fail_late_is_refused(
    changes: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    net = ConventionalNetwork(convnet()) if options.pop("conventional", False) else network()
    before = weights(net)
    with pytest.raises(error, match=message):
        finetune(net, colours(48), PLAIN.replace(**changes), output=tmp_path / "run", **options)
    torch.testing.assert_close(weights(net), before, rtol=0, atol=0)
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_run_goes_on_with_its_own_data_and_network_and_mends_its_logs(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finetune(network(), colours(48), PLAIN.replace(epochs=1), output=run)
    log = (run / "metrics.csv").read_text()
    with pytest.raises(InvalidArgumentError, match=r"data: got images 96, expected 48"):
        finetune(network(), colours(96), PLAIN.replace(epochs=1), output=run, resume=True)
    other, _ = bcosify(nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3)))
    with pytest.raises(InvalidArgumentError, match=r"net: got backbone.*as in the network the run began with"):
        finetune(other, colours(48), PLAIN.replace(epochs=1), output=run, resume=True)
    (run / "metrics.csv").unlink()
    finetune(network(), colours(48), PLAIN.replace(epochs=1), output=run, resume=True)
    assert (run / "metrics.csv").read_text() == log


def test_mixing_and_bf16_train() -> None:
    net = network()
    recipe = PLAIN.replace(mixing=Mixing(mixup=0.2, cutmix=1.0), precision="bf16-mixed", epochs=6, lr=0.02)
    result = finetune(net, colours(96), recipe, validation=colours(48, seed=1))
    assert result.history[-1]["val_top1"] > 0.8
    assert all(p.dtype == torch.float32 for p in net.parameters())


# --- B and biases ----------------------------------------------------------------------------------------------------


def test_scheduled_b() -> None:
    net = network(b=2.5)
    result = finetune(net, colours(48), PLAIN.replace(b_start=1.0, b_epochs=2.0, epochs=3))
    # 3 steps an epoch. What is validated and saved has the B of the step that comes next.
    assert [row["b"] for row in result.history] == pytest.approx([1 + 1.5 * 3 / 6, 2.5, 2.5])
    assert isinstance(net, BcosNetwork)
    assert net.recipe.b == 2.5


def test_learned_b_is_learned_saved_and_loaded(tmp_path: Path) -> None:
    net = network(b=1.5)
    finetune(
        net, colours(96), PLAIN.replace(learn_b=True, b_lr=0.5, epochs=4), output=tmp_path / "run",
        explain_images=colours(1)[0].float() / 255,
    )  # fmt: skip
    found = exponents(net)
    assert len(set(found.values())) == len(found), "each layer has its own"
    assert all(b >= 1 and b != 1.5 for b in found.values())
    assert not [name for name, _ in net.named_parameters() if name.endswith(".b")], "numbers again"
    again = load(tmp_path / "run" / "last.safetensors", model=convnet())
    assert exponents(again) == pytest.approx(found)
    images = colours(4)[0].float() / 255
    with torch.no_grad():
        torch.testing.assert_close(again(images), net(images))
    assert float(explain(again, images).completeness_error().max()) < 1e-4


def test_b_stays_at_least_one() -> None:
    net = network(b=1.0)
    learn_exponents(net)
    result = finetune(net, colours(96), PLAIN.replace(learn_b=True, b_lr=100.0, epochs=2))
    assert min(exponents(result.net).values()) >= 1.0


def test_biases_decay_to_zero() -> None:
    torch.manual_seed(0)
    net, _ = bcosify(convnet(), Recipe.equivalent(b=2.0, mean=(0, 0, 0), std=(1, 1, 1)))
    biases = {name: p for name, p in net.named_parameters() if name.endswith("bias")}
    with torch.no_grad():
        for p in biases.values():
            p.fill_(0.5)
    sizes: list[float] = []
    finetune(
        net, colours(48), PLAIN.replace(bias_decay_epochs=2.0, epochs=3),
        on_epoch=lambda _: sizes.append(max(float(p.detach().abs().max()) for p in biases.values())),
    )  # fmt: skip
    assert 0.1 < sizes[0] < 0.5
    assert sizes[1:] == [0.0, 0.0]
    with pytest.raises(InvalidArgumentError, match="biases='keep'"):
        finetune(network(), colours(48), PLAIN.replace(bias_decay_epochs=2.0))


# --- resuming --------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    pass


RANDOM = PLAIN.replace(
    epochs=4, augmentation=Augmentation(size=16, crop="padded", padding=2, flip=0.5), mixing=Mixing(mixup=0.5),
    ema=0.9, clip_norm=1.0, agc=0.05,
)  # fmt: skip


def with_dropout(seed: int = 0) -> BcosNetwork:
    torch.manual_seed(seed)
    source = convnet()
    source.insert(len(source) - 1, nn.Dropout(0.3))
    return bcosify(source, Recipe(mean=(0, 0, 0), std=(1, 1, 1)))[0]


def test_a_run_stopped_between_epochs_goes_on_exactly(tmp_path: Path) -> None:
    straight = finetune(with_dropout(), colours(48), RANDOM, validation=colours(16), output=tmp_path / "straight")

    def stop(row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        finetune(with_dropout(), colours(48), RANDOM, validation=colours(16), output=tmp_path / "run", on_epoch=stop)
    with pytest.raises(InvalidArgumentError, match="resume=True"):
        finetune(with_dropout(), colours(48), RANDOM, output=tmp_path / "run")
    # Other weights to begin with: all are replaced.
    resumed = finetune(
        with_dropout(seed=9), colours(48), RANDOM, validation=colours(16), output=tmp_path / "run", resume=True
    )
    assert without_times(resumed.history) == without_times(straight.history)
    assert weights(resumed.net).keys() == weights(straight.net).keys()
    for key, value in weights(straight.net).items():
        assert torch.equal(value, weights(resumed.net)[key]), key
    steps = (tmp_path / "run" / "steps.csv").read_text()
    assert steps == (tmp_path / "straight" / "steps.csv").read_text()
    # A finished run stays as it is.
    done = finetune(with_dropout(), colours(48), RANDOM, validation=colours(16), output=tmp_path / "run", resume=True)
    assert without_times(done.history) == without_times(straight.history)


class Versioned(nn.Linear):
    """A layer that reads states of its own version alone, as torch's layers read older ones differently."""

    _version = 3

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        assert metadata.get("version") == 3
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_a_state_knows_the_versions_of_its_layers(tmp_path: Path) -> None:
    def run() -> TrainingResult:
        source = convnet()
        source[-1] = Versioned(12, 3)
        return finetune(ConventionalNetwork(source), colours(32), PLAIN, output=tmp_path / "run", resume=True)

    assert weights(run().net).keys() == weights(run().net).keys()


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    left, other = tmp_path / "run" / ".state-k1ll3d00.pt", tmp_path / "run" / "notes-state-.pt"
    left.parent.mkdir()
    for path in (left, other):
        path.write_bytes(b"half")
    finetune(network(), colours(32), PLAIN.replace(epochs=1), output=tmp_path / "run")
    assert not left.exists()
    assert other.read_bytes() == b"half"


class _Signalling(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Sends a signal to this process when an image has been read a number of times."""

    def __init__(self, count: int, at: int | None, number: int) -> None:
        self.images, self.labels = colours(count)
        self.at, self.number, self.read = at, number, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.read += 1
        if self.read == self.at:
            os.kill(os.getpid(), self.number)
        return self.images[index].float() / 255, int(self.labels[index])


def test_sigterm_in_an_epoch_saves_and_the_run_goes_on_exactly(tmp_path: Path) -> None:
    recipe = RANDOM.replace(augmentation=Augmentation.none())
    straight = finetune(with_dropout(), _Signalling(64, None, 0), recipe, output=tmp_path / "straight")
    # One image is read to look at the data; then 64 an epoch: in the second step of the second epoch.
    stopping = _Signalling(64, 64 + 20, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(TrainingInterruptedError, match=r"epoch 2, step [12] of 4.*resume"):
        finetune(with_dropout(), stopping, recipe, output=tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) == before
    resumed = finetune(with_dropout(9), _Signalling(64, None, 0), recipe, output=tmp_path / "run", resume=True)
    assert without_times(resumed.history) == without_times(straight.history)
    for key, value in weights(straight.net).items():
        assert torch.equal(value, weights(resumed.net)[key]), key


def test_ctrl_c_saves_too(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"stopped in epoch 2, .*--resume\) goes on"):
        finetune(network(), _Signalling(64, 80, signal.SIGINT), PLAIN, output=tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert (state["progress"]["epoch"], state["progress"]["step"] > 0) == (1, True)


def test_a_killed_run_loses_only_the_unfinished_epoch(tmp_path: Path) -> None:
    """SIGKILL in the third epoch, in a process of its own; the resumed run equals one that was never killed."""
    command = [sys.executable, "-m", "tests.training.worker", "--output"]
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(tmp_path / "run"), "--slow", "2"], cwd=root, env=environment)
    rows = tmp_path / "run" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (rows.exists() and len(rows.read_text().splitlines()) >= 3) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert len(rows.read_text().splitlines()) == 3, "killed within the third epoch"
    for name in ("run", "straight"):
        subprocess.run([*command, str(tmp_path / name)], cwd=root, env=environment, check=True, timeout=120)
    for name in ("metrics.csv", "steps.csv"):
        ours, theirs = (
            [line.split(",") for line in (tmp_path / run / name).read_text().splitlines()]
            for run in ("run", "straight")
        )
        timed = [i for i, column in enumerate(ours[0]) if column in ("seconds", "images_per_s")]
        assert [[v for i, v in enumerate(row) if i not in timed] for row in ours] == [
            [v for i, v in enumerate(row) if i not in timed] for row in theirs
        ]


def test_two_processes_train_like_one(tmp_path: Path) -> None:
    """Gloo, two processes, the same global batches; uncentred norms over both."""
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
                "--rdzv-endpoint=127.0.0.1:0", "-m", "tests.training.worker"]  # fmt: skip
    subprocess.run([*launcher, "--output", str(tmp_path / "two"), "--sync"], cwd=root, env=environment, check=True,
                   timeout=240)  # fmt: skip
    subprocess.run([sys.executable, "-m", "tests.training.worker", "--output", str(tmp_path / "one"), "--sync"],
                   cwd=root, env=environment, check=True, timeout=240)  # fmt: skip
    started = [json.loads((tmp_path / name / "recipe.json").read_text())["processes"] for name in ("one", "two")]
    assert started == [1, 2]
    one, two = (torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("one", "two"))
    for key, value in one["model"].items():
        torch.testing.assert_close(two["model"][key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    for ours, theirs in zip(two["progress"]["history"], one["progress"]["history"], strict=True):
        for name in ("train_loss", "train_top1", "val_loss", "val_top1"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


# --- failing ---------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_step_and_layer(tmp_path: Path) -> None:
    class Later(nn.Module):
        """Gives infinity from the sixth training batch on: in the second epoch of four steps."""

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.calls += 1
            return x / 0 if self.calls >= 6 else x

    source = convnet()
    source.insert(3, Later())
    net = ConventionalNetwork(source)
    with pytest.raises(TrainingError, match=r"epoch 2, step 2 of 4.*output of model\.3 \(Later\).*end of epoch 1"):
        finetune(net, colours(64), PLAIN.replace(loss="cross_entropy"), output=tmp_path / "run")
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    assert state["progress"]["epoch"] == 1
    assert all(bool(torch.isfinite(v).all()) for v in state["model"].values() if v.is_floating_point())


@pytest.mark.parametrize("loss", ["bce", "cross_entropy", "none"])
@pytest.mark.parametrize("where", ["data", "validation"])
def test_a_label_without_a_logit_is_named(where: str, loss: str) -> None:
    images, labels = colours(32)
    wrong = labels.clone()
    wrong[5] = 7
    given = {"data": wrong if where == "data" else labels, "validation": wrong if where == "validation" else labels}
    if where == "data" and loss == "none":
        return  # labels are not read
    recipe = PLAIN.replace(epochs=1, loss=loss, distillation=Distillation())
    with pytest.raises(InvalidArgumentError, match=rf"{where}: got label 7, expected labels 0 to 2"):
        finetune(network(), (images, given["data"]), recipe, validation=(images, given["validation"]),
                 teacher=ConventionalNetwork(convnet()))  # fmt: skip


def test_labels_are_looked_at_before_they_leave_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU looking would wait for it, and a label without a logit end the process's use of it."""
    moved: list[Any] = []
    real = Fabric.to_device
    monkeypatch.setattr(Fabric, "to_device", lambda self, x: (moved.append(x), real(self, x))[1])
    with pytest.raises(InvalidArgumentError, match="images without labels"):
        finetune(network(), (colours(32)[0], None), PLAIN)
    assert not [x for x in moved if isinstance(x, Tensor)]


class _Partly(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images of which every second has no label; those that have one have a wrong one."""

    def __init__(self, teacher: nn.Module, count: int) -> None:
        self.images = colours(count)[0].float() / 255
        with torch.no_grad():
            self.answers = teacher.eval()(self.images).argmax(1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], -1 if index % 2 else (int(self.answers[index]) + 1) % 3


def test_the_teacher_answers_where_labels_are_missing_and_only_there() -> None:
    teacher = ConventionalNetwork(convnet())
    student = ConventionalNetwork(convnet())
    recipe = PLAIN.replace(epochs=1, loss="none", distillation=Distillation(), lr=0.0, batch_size=16)
    # At rate 0 only running statistics move: as in evaluation from the first step.
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0
    result = finetune(student, (colours(16)[0], None), recipe, teacher=teacher, validation=_Partly(teacher, 16))
    assert result.history[0]["val_top1"] == 0.5


def test_tensorboard_has_steps_epochs_and_explanations(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    finetune(
        network(), colours(32), PLAIN.replace(epochs=2), validation=colours(16), output=tmp_path / "run",
        explain_images=colours(1)[0].float() / 255,
    )  # fmt: skip
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"step/train_loss", "step/lr", "epoch/train_loss", "epoch/val_top1"} <= set(tags["scalars"])
    assert [e.step for e in events.Scalars("step/train_loss")] == [1, 2, 3, 4]
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    found = [(e.step, e.value) for e in events.Scalars("epoch/train_loss")]
    assert found == [(2 * i + 2, pytest.approx(float(row["train_loss"]))) for i, row in enumerate(rows)]
    assert tags["images"] == ["explanations"]
    pictures = events.Images("explanations")
    assert [p.step for p in pictures] == [0, 2, 4]
    with Image.open(tmp_path / "run" / "explanations" / "epoch_002.png") as saved:
        seen = Image.open(io.BytesIO(pictures[2].encoded_image_string))
        np.testing.assert_array_equal(np.asarray(seen.convert("RGB")), np.asarray(saved.convert("RGB")))


def test_tensorboard_forgets_what_a_killed_run_did_after_its_state(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def killed(row: dict[str, Any]) -> None:
        """After the second epoch, of which the state is taken away."""
        if row["epoch"] == 1:
            shutil.copy(run / "state.pt", tmp_path)
        else:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    recipe = PLAIN.replace(epochs=3)
    with pytest.raises(KeyboardInterrupt):
        finetune(network(), colours(32), recipe, output=run, on_epoch=killed)
    shutil.copy(tmp_path / "state.pt", run)
    # TensorBoard reads files in the order of their names: the second they were made in, then a count ("10" before "9").
    time.sleep(1.1)
    finetune(network(), colours(32), recipe, output=run, resume=True)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("step/train_loss")] == [1, 2, 3, 4, 5, 6]
    assert [e.step for e in events.Scalars("epoch/train_loss")] == [2, 4, 6]


class _Slow(_Signalling):
    """An epoch of 48 takes longer than the time between two pictures of the bar."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        time.sleep(0.006)
        return super().__getitem__(index)


def test_progress_says_how_long_it_will_take() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120, _environ={"TERM": "xterm"})
    finetune(network(), _Slow(48, None, 0), PLAIN, console=console)
    text = shown.getvalue()
    assert "epoch 1/3" in text
    assert "epoch 3/3" in text
    assert "9/9" in text
    assert "loss 0." in text
    assert text.count("0:00:0") >= 2, "elapsed, and what remains"


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"batch_size": 100}, {}, "data: got 48 images, expected at least one batch"),
        ({}, {"resume": True}, "output: got None"),
        ({"distillation": Distillation()}, {}, "teacher: got None"),
        ({}, {"strategy": "ddp_spawn"}, "strategy"),
        ({}, {"accelerator": "abacus"}, "accelerator, devices, strategy"),
        ({}, {"validation": (torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64))}, "validation"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        finetune(network(), colours(48), PLAIN.replace(**changes), **arguments)


def test_wrong_types() -> None:
    with pytest.raises(InvalidTypeError, match="net: got str"):
        finetune("resnet", colours(48))  # type: ignore[arg-type]
    with pytest.raises(InvalidTypeError, match="recipe: got dict"):
        finetune(network(), colours(48), {"epochs": 3})  # type: ignore[arg-type]


def test_images_without_labels_need_a_teacher() -> None:
    with pytest.raises(InvalidArgumentError, match="images without labels"):
        finetune(network(), (colours(48)[0], None), PLAIN)


def test_another_recipe_does_not_resume(tmp_path: Path) -> None:
    finetune(network(), colours(48), PLAIN, output=tmp_path / "run")
    with pytest.raises(InvalidArgumentError, match=r"lr=0\.1 \(was 0\.005\)"):
        finetune(network(), colours(48), PLAIN.replace(lr=0.1), output=tmp_path / "run", resume=True)


def test_norms_over_processes_are_the_norms_of_one(tmp_path: Path) -> None:
    """One process is a group too: statistics and gradients equal the plain norm's, float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 6, 7, dtype=torch.float64, generator=generator)
    grad = torch.randn(x.shape, dtype=torch.float64, generator=generator)
    found = []
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", world_size=1, rank=0)
    try:
        for synchronised in (False, True):
            norm = BatchNormUncentered2d(5).double()
            norm.synchronised = synchronised
            with torch.no_grad():
                norm.weight.copy_(torch.linspace(0.5, 2, 5))
            image = x.clone().requires_grad_()
            out = norm(image)
            out.backward(grad)
            assert norm.weight.grad is not None
            found.append((out.detach(), image.grad, norm.weight.grad, norm.running_var, norm.running_mean))
    finally:
        torch.distributed.destroy_process_group()
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_validation_that_numbers_a_class_differently_is_refused(tmp_path: Path) -> None:
    for split, names in (("train", "ab"), ("val", "bc")):
        for name in names:
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(folder / f"{i}.png")
    with pytest.raises(InvalidArgumentError, match=r"validation: got 'b' as class 0 of 2, expected class 1"):
        finetune(convnet(), tmp_path / "train", PLAIN.replace(batch_size=4), validation=tmp_path / "val")


# --- nothing done is lost, nothing said is wrong ---------------------------------------------------------------------


class Unreadable(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Validation images the second of which cannot be read."""

    broken = True

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.broken and index == 1:
            raise OSError("no such file")
        return torch.rand(3, 16, 16), 0


def test_an_epoch_that_cannot_be_validated_is_not_lost(tmp_path: Path) -> None:
    seen = Unreadable()
    recipe = PLAIN.replace(epochs=2)
    with pytest.raises(Exception, match="no such file"):
        finetune(network(), colours(48), recipe, validation=seen, output=tmp_path / "run")
    assert (tmp_path / "run" / "state.pt").exists()
    seen.broken = False
    again = finetune(network(), colours(48), recipe, validation=seen, output=tmp_path / "run", resume=True)
    whole = finetune(network(), colours(48), recipe, validation=seen, output=tmp_path / "whole")
    losses = [[row["train_loss"] for row in result.history] for result in (again, whole)]
    assert losses[0] == losses[1]
    assert "images_per_s" not in again.history[0], "none was trained by this process"
    assert again.history[1]["images_per_s"] > 0


class Stopping(Unreadable):
    """Validation images the second of which comes with a signal."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.broken and index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return torch.full((3, 16, 16), index / 4), 0


def test_a_validation_that_is_stopped_loses_nothing(tmp_path: Path) -> None:
    seen = Stopping()
    recipe = PLAIN.replace(epochs=2, batch_size=2)
    with pytest.raises(TrainingInterruptedError, match=r"epoch 1, step 24 of 24.*resume"):
        finetune(network(), colours(48), recipe, validation=seen, output=tmp_path / "run", workers=0)
    seen.broken = False
    again = finetune(network(), colours(48), recipe, validation=seen, output=tmp_path / "run", resume=True)
    whole = finetune(network(), colours(48), recipe, validation=seen, output=tmp_path / "whole")
    for one, other in zip(again.history, whole.history, strict=True):
        assert {k: one[k] for k in ("train_loss", "val_loss")} == {k: other[k] for k in ("train_loss", "val_loss")}
    for one, other in zip(again.net.parameters(), whole.net.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_leaves_no_choice_of_another_in_the_network() -> None:
    net = network()
    net.image_size = 48
    norms = [module for module in net.modules() if isinstance(module, BatchNormUncentered2d)]
    assert norms
    for recipe in (PLAIN.replace(epochs=1, sync_norms=True), PLAIN.replace(epochs=1)):
        assert recipe.augmentation.size is None
        finetune(net, colours(16), recipe)
        assert {norm.synchronised for norm in norms} == {recipe.sync_norms}
        assert net.image_size == 48


def test_images_without_labels_are_refused_before_an_epoch() -> None:
    images = colours(48)[0]
    with pytest.raises(InvalidArgumentError, match="validation: got images without labels"):
        finetune(network(), colours(48), PLAIN, validation=(images, None))
    with pytest.raises(InvalidArgumentError, match="data: got images without labels"):
        finetune(network(), (images, None), PLAIN)


@pytest.mark.parametrize("resume", [False, True])
def test_networks_without_their_state_are_not_overwritten(tmp_path: Path, resume: bool) -> None:
    finetune(network(), colours(48), PLAIN.replace(epochs=2), validation=colours(16), output=tmp_path / "run")
    (tmp_path / "run" / "state.pt").unlink()
    before = (tmp_path / "run" / "best.safetensors").read_bytes()
    with pytest.raises(InvalidArgumentError, match=r"output: .*best\.safetensors.* of a run without its state\.pt"):
        finetune(network(), colours(48), PLAIN.replace(lr=0.1), output=tmp_path / "run", resume=resume)
    assert (tmp_path / "run" / "best.safetensors").read_bytes() == before


def test_a_run_killed_before_its_first_state_begins_anew(tmp_path: Path) -> None:
    recipe = PLAIN.replace(epochs=1)
    finetune(network(), colours(48), recipe, output=tmp_path / "run")
    (tmp_path / "run" / "state.pt").unlink()
    assert len(finetune(network(), colours(48), recipe, output=tmp_path / "run", resume=True).history) == 1


def test_images_without_labels_are_right_where_the_teacher_says_so() -> None:
    teacher = network()
    recipe = PLAIN.replace(loss="none", distillation=Distillation(), lr=0.0, epochs=1, freeze_norms=True)
    result = finetune(network(), (colours(48)[0], None), recipe, validation=(colours(16)[0], None), teacher=teacher)
    assert result.history[0]["train_top1"] == result.history[0]["val_top1"] == 1.0


def test_frozen_norms_keep_their_statistics() -> None:
    net, free = network(), network()
    before = weights(net)
    finetune(net, colours(48), PLAIN.replace(epochs=1, freeze_norms=True))
    finetune(free, colours(48), PLAIN.replace(epochs=1))
    names = [name for name in before if "running" in name]
    assert names
    for name in names:
        assert torch.equal(net.state_dict()[name], before[name])
    assert any(not torch.equal(free.state_dict()[name], before[name]) for name in names)
    assert not torch.equal(net.state_dict()["backbone.0.weight"], before["backbone.0.weight"])


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"select": "loss", "loss": "none", "distillation": Distillation(0.0, features=1.0, modules=("2",))},
         {"teacher": network(), "validation": colours(16)}, r"recipe\.select: got 'loss' with a loss of features"),
        ({}, {"explain_images": torch.rand(1, 3, 16, 16)}, "explain_images: got images without output"),
        ({}, {"output": ["a"]}, "output: got list"),
        ({}, {"on_epoch": "x"}, "on_epoch: got str"),
    ],
)  # fmt: skip
def test_what_would_do_nothing_or_fail_later_is_refused(
    changes: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises((InvalidArgumentError, InvalidTypeError), match=message):
        finetune(network(), colours(48), PLAIN.replace(**changes), **arguments)


def test_parts_are_of_as_equal_sizes_as_can_be() -> None:
    """3, 3, 2, 2, 2: torch's chunks would be four of 3."""
    finetune(network(), colours(48), PLAIN.replace(epochs=1, accumulate=5, batch_size=12))


def test_a_network_is_not_its_own_teacher() -> None:
    net = network()
    with pytest.raises(InvalidArgumentError, match="teacher: got the network that is trained"):
        finetune(net, colours(48), PLAIN.replace(distillation=Distillation()), teacher=net)


def test_a_resumed_run_selects_as_it_did(tmp_path: Path) -> None:
    finetune(network(), colours(48), PLAIN.replace(epochs=1), validation=colours(16), output=tmp_path / "run")
    with pytest.raises(InvalidArgumentError, match=r"select='loss' \(was 'top1'\)"):
        finetune(
            network(), colours(48), PLAIN.replace(epochs=1, select="loss"), validation=colours(16),
            output=tmp_path / "run", resume=True,
        )  # fmt: skip
