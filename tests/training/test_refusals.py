"""What a run cannot do is said with its name, and what it was told to leave alone it leaves."""

from __future__ import annotations

import errno
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bcos_rt import Recipe, bcosify, finetune, load
from bcos_rt.data import Mixing
from bcos_rt.errors import (
    CheckpointError,
    InvalidArgumentError,
    InvalidTypeError,
    TrainingError,
    TrainingInterruptedError,
)
from bcos_rt.evaluation import evaluate
from bcos_rt.nn import BcosConv2d, BcosLinear
from bcos_rt.nn.conventional import ConventionalNetwork
from bcos_rt.nn.exponent import exponents, set_exponents
from bcos_rt.training import Distillation, TrainingRecipe
from tests.training.test_finetune import PLAIN, _Signalling, weights
from tests.training.worker import colours, convnet, network


def pixels(count: int = 48) -> tuple[Tensor, Tensor]:
    images, labels = colours(count)
    return images.float() / 255, labels


class Items(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images with one replaced by another value."""

    def __init__(self, index: int, value: float) -> None:
        self.images, self.labels = pixels()
        self.images[index] = value

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


@pytest.mark.parametrize("mixing", [None, Mixing(mixup=0.4), Mixing(cutmix=1.0, probability=0.5)])
def test_frozen_norms_stay_frozen_where_images_are_mixed(mixing: Mixing | None, tmp_path: Path) -> None:
    net = network()
    before = {name: value.clone() for name, value in net.named_buffers()}
    recipe = PLAIN.replace(freeze_norms=True, mixing=mixing)
    finetune(net, _Signalling(48, None, 0), recipe)
    for name, value in net.named_buffers():
        assert torch.equal(value, before[name]), name
    # So a run that is stopped in a later epoch goes on as if it had not been.
    stopped = network()
    with pytest.raises(TrainingInterruptedError):
        finetune(stopped, _Signalling(48, 70, signal.SIGTERM), recipe, output=tmp_path / "run")
    finetune(stopped, _Signalling(48, None, 0), recipe, output=tmp_path / "run", resume=True)
    for name, value in weights(net).items():
        assert torch.equal(weights(stopped)[name], value), name


RUN = """
import sys, time
from bcos_rt import finetune
from tests.training.test_finetune import PLAIN
from tests.training.worker import colours, network

def told(_):
    print("trains", flush=True)
    time.sleep(60)

finetune(network(), colours(16), PLAIN, output=sys.argv[1], on_epoch=told)
"""


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    """The second is refused while the first trains, also to resume; a killed one leaves no lock behind."""
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", RUN, str(folder)], stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "trains\n"
            # Of a file that the first run is writing.
            (folder / ".state-now.pt").touch()
            with pytest.raises(InvalidArgumentError, match=r"output.*which another run is writing"):
                finetune(network(), colours(16), PLAIN, output=folder, resume=True)
            assert (folder / ".state-now.pt").exists()
        finally:
            first.kill()
    assert len(finetune(network(), colours(16), PLAIN, output=folder, resume=True).history) == PLAIN.epochs
    assert not (folder / ".state-now.pt").exists()


def test_a_folder_that_cannot_be_locked_is_trained_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    with pytest.warns(UserWarning, match="cannot be locked .*No locks available"):
        finetune(network(), colours(16), PLAIN.replace(epochs=1), output=tmp_path)
    assert (tmp_path / "state.pt").exists()


@pytest.mark.parametrize("name", ["agc", "clip_norm"])
def test_clipping_to_nothing_is_not_no_clipping(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"TrainingRecipe\.{name}: got 0, expected a number > 0, or None"):
        TrainingRecipe(**{name: 0.0})  # type: ignore[arg-type]


def test_a_full_disk_is_named_and_the_last_state_kept(tmp_path: Path) -> None:
    """A limit on the size of files stands for it: torch's error is the same."""
    net, (soft, hard) = network(), resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(row: dict[str, Any]) -> None:
        if row["epoch"] == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "state.pt").stat().st_size // 2, hard))

    try:
        with pytest.raises(TrainingError, match=r"could not be written .*a full disk\?.*is that of the end of epoch 1"):
            finetune(net, colours(48), PLAIN, output=tmp_path, on_epoch=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"]["epoch"] == 1
    load(tmp_path / "last.safetensors", model=convnet())
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".") and p.name != ".lock"]
    assert len(finetune(net, colours(48), PLAIN, output=tmp_path, resume=True).history) == PLAIN.epochs


class Answers(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.body, self.answer = convnet(), answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self.body(x))


@pytest.mark.parametrize("mixing", [None, Mixing(mixup=0.4)])
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda y: {"logits": y}, "type dict.*a module around it"),
        (lambda y: (y, y), "type tuple"),
        (lambda y: y[:, 0], r"shape \(\d+,\)"),
        (lambda y: y[:, :, None, None], r"shape \(\d+, 3, 1, 1\)"),
    ],
)
def test_outputs_that_are_no_logits_are_named(answer: Any, message: str, mixing: Mixing | None) -> None:
    with pytest.raises(InvalidTypeError, match=f"net: got an output of {message}"):
        finetune(Answers(answer), colours(16), PLAIN.replace(mixing=mixing))


def test_weights_of_another_type_are_named() -> None:
    with pytest.raises(InvalidTypeError, match=r"net: got .*float64, expected torch\.float32.*64-true"):
        finetune(network().double(), colours(16), PLAIN)
    with pytest.raises(InvalidTypeError, match=r"net: got .*bfloat16, expected torch\.float32 \(net\.float\(\)\)$"):
        finetune(ConventionalNetwork(convnet()).bfloat16(), colours(16), PLAIN)


def test_frozen_weights_may_be_in_half_precision() -> None:
    net = convnet()
    net[0].requires_grad_(False).bfloat16()
    before = net[3].weight.detach().clone()
    finetune(ConventionalNetwork(net), colours(16), PLAIN.replace(precision="bf16-mixed", epochs=1))
    assert not torch.equal(net[3].weight, before)


def test_a_compiled_network_is_named() -> None:
    with pytest.raises(InvalidTypeError, match=r"net: got what torch\.compile made"):
        finetune(torch.compile(network(), backend="eager"), colours(16), PLAIN)  # type: ignore[arg-type]


def test_images_that_are_not_finite_are_named_with_the_step() -> None:
    with pytest.raises(TrainingError, match=r"the images are not finite in epoch 1, step [1-3] of 3"):
        finetune(network(), Items(17, torch.nan), PLAIN)
    for net in (network(), ConventionalNetwork(convnet())):
        with pytest.raises(InvalidArgumentError, match="image 17"):
            evaluate(net, Items(17, torch.nan))
    with pytest.raises(InvalidArgumentError, match=r"NaN or infinite values \(item 0\)"):
        finetune(network(), Items(0, torch.nan), PLAIN)


def test_images_of_bytes_as_floats_are_named_wherever_they_are() -> None:
    with pytest.raises(InvalidArgumentError, match=r"images from 200 to 200 \(item 17\)"):
        finetune(network(), Items(17, 200.0), PLAIN)
    with pytest.raises(InvalidArgumentError, match=r"\(item 17\)"):
        evaluate(network(), Items(17, 200.0))


def test_arrays_that_lie_backwards_are_data_like_others() -> None:
    images, labels = colours(32)
    ours = images.permute(0, 2, 3, 1).numpy()
    plain = finetune(network(), (np.ascontiguousarray(ours[..., ::-1]), labels), PLAIN)
    backwards = np.ascontiguousarray(labels.numpy()[::-1])[::-1]
    found = finetune(network(), (ours[..., ::-1], backwards), PLAIN)
    assert found.history[-1]["train_loss"] == plain.history[-1]["train_loss"]


def test_states_with_parts_missing_are_named(tmp_path: Path) -> None:
    finetune(network(), colours(16), PLAIN, output=tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["targets"], state["model"]
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="without targets, model"):
        finetune(network(), colours(16), PLAIN, output=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.pop("optimizer0"), "'optimizer0' is not what such a run saves"),
        (lambda state: state.pop("average"), "'average' is not what such a run saves"),
        (lambda state: state.update(optimizer0={}), "'optimizer0' is not what such a run saves"),
        (lambda state: state["model"].popitem(), r"'model' is not what such a run saves \(RuntimeError"),
        (lambda state: state["progress"].update(more=1), "its progress is not that of a run"),
        (lambda state: state.update(progress={"epoch": 1}), "its progress is not that of a run"),
    ],
)
def test_damaged_states_are_named(damage: Callable[[dict[str, Any]], None], message: str, tmp_path: Path) -> None:
    recipe = PLAIN.replace(ema=0.9)
    finetune(network(), colours(16), recipe, output=tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    damage(state)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=f"state.pt: .*{message}" if message[0] == "'" else message):
        finetune(network(), colours(16), recipe, output=tmp_path, resume=True)


class FixedSize(nn.Module):
    """Takes images of 24 pixels a side and says so in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == 24, f"Input height ({x.shape[-1]}) doesn't match model (24)"
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(("who", "mixing"), [("net", None), ("net", Mixing(mixup=0.4)), ("teacher", None)])
def test_sizes_that_a_network_does_not_take_are_named(who: str, mixing: Mixing | None, tmp_path: Path) -> None:
    recipe = PLAIN.replace(epochs=1, **{"augmentation.size": 16}, distillation=Distillation(), mixing=mixing)
    nets = {"net": network(), "teacher": ConventionalNetwork(convnet())} | {who: ConventionalNetwork(FixedSize())}
    message = rf"{who}: got .*not take images of 16 x 16 pixels \(Input height \(16\).*, expected one that does.*--size"
    with pytest.raises(InvalidArgumentError, match=message):
        finetune(nets["net"], colours(16), recipe, teacher=nets["teacher"], output=tmp_path / "run")
    assert not (tmp_path / "run" / "state.pt").exists()
    # Nothing stands in the way of another try.
    finetune(network(), colours(16), recipe, teacher=ConventionalNetwork(convnet()), output=tmp_path / "run")


def test_a_bcos_network_of_one_size_is_named() -> None:
    source = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 12 * 12, 3))
    net, _ = bcosify(source, Recipe(mean=(0, 0, 0), std=(1, 1, 1)))
    with pytest.raises(InvalidArgumentError, match=r"net: got a BcosNetwork that does not take images of 16 x 16"):
        finetune(net, colours(16), PLAIN.replace(learn_b=True))
    assert all(isinstance(layer.b, float) for layer in net.modules() if isinstance(layer, BcosConv2d | BcosLinear))


def test_validation_labels_without_a_logit_are_found_in_the_first_step(tmp_path: Path) -> None:
    images, labels = colours(32)
    net = network()
    before = weights(net)
    with pytest.raises(InvalidArgumentError, match="validation: got label 3, expected labels 0 to 2"):
        finetune(net, (images, labels), PLAIN, validation=(images, labels + 1), output=tmp_path / "run")
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())
    assert not (tmp_path / "run" / "state.pt").exists()


def test_a_begun_run_keeps_what_it_has(tmp_path: Path) -> None:
    recipe = PLAIN.replace(b_start=1.0, b_epochs=1.0)
    with pytest.raises(TrainingInterruptedError):
        finetune(network(), _Signalling(48, 70, signal.SIGTERM), recipe, output=tmp_path)
    other = network()
    set_exponents(other, dict.fromkeys(exponents(other), 1.0))
    finetune(other, _Signalling(48, None, 0), recipe, output=tmp_path, resume=True)
    assert set(exponents(other).values()) == {2.0}


def test_frozen_parts_in_half_precision_are_taken() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.fc = nn.Conv2d(3, 4, 3).bfloat16().requires_grad_(False), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.trunk(x.bfloat16()).float().mean((2, 3)))

    recipe = PLAIN.replace(epochs=1, distillation=Distillation(), **{"augmentation.size": 16})
    finetune(Half(), colours(16), recipe, teacher=Half())


def test_a_teacher_of_features_alone_returns_what_it_likes() -> None:
    module = next(name for name, m in convnet().named_modules() if isinstance(m, nn.Conv2d))
    taught = Distillation(logits=0, features=1, modules=(module,))
    student, teacher = ConventionalNetwork(convnet()), ConventionalNetwork(convnet())
    teacher.forward = lambda x: (ConventionalNetwork.forward(teacher, x), x)[1]  # type: ignore[method-assign]
    assert finetune(student, colours(16), PLAIN.replace(epochs=1, distillation=taught), teacher=teacher).history


def test_what_would_do_nothing_is_refused(tmp_path: Path) -> None:
    standard = ConventionalNetwork(convnet())
    with pytest.raises(InvalidArgumentError, match=r"recipe\.sync_norms: got True for a ConventionalNetwork"):
        finetune(standard, colours(16), PLAIN.replace(sync_norms=True))
    net = network()
    own = {layer.b for layer in net.modules() if isinstance(layer, BcosConv2d | BcosLinear)}
    assert own == {2.0}
    with pytest.raises(InvalidArgumentError, match=r"recipe\.b_start: got 2, which is the network's own B"):
        finetune(net, colours(16), PLAIN.replace(b_start=2.0, b_epochs=1.0))
    with pytest.raises(InvalidArgumentError, match="explain_images: got no image"):
        finetune(net, colours(16), PLAIN, explain_images=torch.empty(0, 3, 16, 16), output=tmp_path)


def test_alphas_may_be_whole_numbers() -> None:
    for mixing in (Mixing(mixup=1), Mixing(cutmix=1)):
        assert finetune(network(), colours(16), PLAIN.replace(epochs=1, mixing=mixing)).history


def test_a_recipe_of_another_version_is_named(tmp_path: Path) -> None:
    finetune(network(), colours(16), PLAIN, output=tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    state["recipe"]["augmentation"]["magnitude"] = 20
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state.pt: its recipe is none of this version's \(Augmentation.magn"):
        finetune(network(), colours(16), PLAIN, output=tmp_path, resume=True)


def test_a_state_of_other_bytes_is_named_without_the_advice_to_run_it(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"garbage" * 100)
    with pytest.raises(CheckpointError) as caught:
        finetune(network(), colours(16), PLAIN, output=tmp_path, resume=True)
    assert str(caught.value) == f"{tmp_path / 'state.pt'}: not a file of PyTorch weights (Unsupported operand 103)"


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match=r"output.*file/run.*cannot be written"):
        finetune(network(), colours(16), PLAIN, output=tmp_path / "file" / "run")
